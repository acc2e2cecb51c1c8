"""One trial of a sweep, in a process of its own: `python -m solotune.sweep.trial FOLDER`.

FOLDER/trial.json   what to run: {"target", "hparams", "resume"}, written by the sweep
FOLDER/values.jsonl   what was reported: every number the trackers of the run get, and what `main` returned
FOLDER/run/           the run's own folder, where the target lets its folder be chosen
FOLDER/log.txt        what it printed (the sweep's doing)
"""

from __future__ import annotations

import importlib.util
import json
import logging
import numbers
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solotune.compat.script import install, print_own_traceback
from solotune.errors import ConfigError, SolotuneError
from solotune.runs.console import show_logs
from solotune.runs.lines import append_lines

CANNOT_START = 64
"""Exit code of a target that fails before it was given any settings: no other trial would fare better."""


def main() -> None:
    """Run the trial that a folder describes.

    Raises:
        SystemExit: CANNOT_START, or 1 where the target raised (its traceback has been printed), or its own code.
    """
    folder = Path(sys.argv[1])
    _end_with_the_sweep()
    task = json.loads((folder / "trial.json").read_text(encoding="utf-8"))
    show_logs(logging.INFO if _is_first_process() else logging.WARNING)
    path = Path(task["target"])
    try:
        answer = (_run_script if path.suffix == ".py" else _run_recipe)(path, task, folder)
    except SolotuneError as error:
        print_own_traceback(error, path)
        raise SystemExit(1) from None
    if isinstance(answer, Mapping) and _is_first_process():
        plain = {str(name): value.item() if hasattr(value, "item") else value for name, value in answer.items()}
        values = {name: float(value) for name, value in plain.items() if isinstance(value, numbers.Real)}
        append_lines(folder / "values.jsonl", [{"step": None, **values}])


def _run_script(path: Path, task: dict[str, Any], folder: Path) -> Any:
    """Import a script in trlX's style and call its `main(hparams)`; what it returns."""
    install()
    sys.argv = [str(path)]
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(function := getattr(module, "main", None)):
            raise ConfigError(f"{path} has no function main(hparams), which a sweep calls")
    except (Exception, SystemExit) as error:
        print_own_traceback(error, path)
        raise SystemExit(CANNOT_START) from None
    hparams = dict(task["hparams"])
    if task["resume"]:
        hparams["train.resume_from_checkpoint"] = str(folder / "run")
    try:
        return function(hparams)
    except SystemExit:
        raise
    except BaseException as error:
        print_own_traceback(error, path)
        raise SystemExit(1) from None


def _run_recipe(path: Path, task: dict[str, Any], folder: Path) -> None:
    """Train a recipe with the trial's settings as overrides."""
    from solotune.config import Recipe
    from solotune.runs.start import run_recipe

    recipe = Recipe.load_yaml(path, as_overrides(task["hparams"]))
    run_recipe(recipe, folder / "run", task["resume"])


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Dotted settings as `--set` takes them."""
    return [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()]


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _end_with_the_sweep() -> None:
    """Exit at once when the sweep does, however it ends: standard input is a pipe of which it holds the other end.

    A trial that outlived its sweep would still write into the folder when the sweep is taken up again.
    """
    pipe, empty = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)

    def wait() -> None:
        os.read(pipe, 1)  # nothing is ever written
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main()
