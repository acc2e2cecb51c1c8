"""Running a trlX script: `import trlx` and its submodules mean `solotune.compat.trlx`, in this process only."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from solotune.compat.shims import tell_once
from solotune.errors import ConfigError, SolotuneError
from solotune.runs.console import show_logs

OURS = "solotune.compat."
MOVED = {"peft.utils.config": "peft.utils.peft_types"}
"""Modules of other libraries that scripts of the time import and that have moved since."""


class _TrlxModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers `import trlx...` with the module of the same path under `solotune.compat`, the very same object."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in MOVED and (name.partition(".")[0] != "trlx" or importlib.util.find_spec(OURS + name) is None):
            return None
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        if spec.name in MOVED:
            tell_once(f"{spec.name} is {MOVED[spec.name]} now")
        module = importlib.import_module(MOVED.get(spec.name, OURS + spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It ran when it was imported; the import system has replaced its spec, which is put back."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Make `import trlx` mean `solotune.compat.trlx` from here on, also where something called trlx is installed."""
    if not any(isinstance(finder, _TrlxModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TrlxModules())
    for name in [name for name in sys.modules if name.partition(".")[0] == "trlx"]:
        if not (sys.modules[name].__name__ or "").startswith(OURS):
            del sys.modules[name]


def run_script(script: str, arguments: Sequence[str] = ()) -> None:
    """Run a file as `python script arguments` would, with `trlx` being this project; `-m` and a module of trlX's too.

    Raises:
        ConfigError: there is no such file, or module of trlX's.
        SystemExit: the script exited, or died: then its own traceback has been printed, and the code is 1.
    """
    if script == "-m":
        return _run_module(*arguments)
    path = Path(script)
    if not path.is_file():
        raise ConfigError(f"no script {script!r} in {Path.cwd()}: must be a Python file, e.g. ppo_sentiments.py")
    show_logs(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    install()
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        print_own_traceback(error, path)
        raise SystemExit(1) from None


def _run_module(name: str = "", *arguments: str) -> None:
    """Run a module of trlX's as `python -m name arguments` would."""
    if name.partition(".")[0] != "trlx" or importlib.util.find_spec(OURS + name) is None:
        raise ConfigError(f"no module {name!r} of trlX's: must be trlx.sweep, or a script's file without -m")
    install()
    sys.argv = [name, *arguments]
    runpy.run_module(OURS + name, run_name="__main__", alter_sys=True)


def print_own_traceback(error: BaseException, path: Path) -> None:
    """The traceback from the script's first line on: without the frames that ran it and, where the error is one of ours
    that says all there is to say, without those below the script's last line."""
    summary = traceback.TracebackException.from_exception(error)
    _keep_own_frames(summary, path, is_ours=isinstance(error, SolotuneError))
    if isinstance(error, SolotuneError):
        summary.__context__ = None
        if summary.__cause__ is not None and not _keep_own_frames(summary.__cause__, path, is_ours=False):
            summary.__cause__ = None  # nothing in it is the script's
    print("".join(summary.format()), file=sys.stderr, end="")


def _keep_own_frames(summary: traceback.TracebackException, path: Path, is_ours: bool) -> bool:
    """Cut the stack to what a script's author can act on; whether any of its frames is the script's."""
    own = [index for index, frame in enumerate(summary.stack) if Path(frame.filename) == path]
    first = own[0] if own else len(summary.stack)  # a syntax error has no frame and names its line itself
    last = own[-1] + 1 if own and is_ours else len(summary.stack)
    summary.stack = traceback.StackSummary.from_list(list(summary.stack)[first:last])
    return bool(own)
