"""A tuned model as one ordinary model, for tools that know nothing of adapters."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoTokenizer

from solotune.errors import ModelError
from solotune.models.loading import auto_class
from solotune.runs.files import links_out, named, whole_folder

log = logging.getLogger("solotune")


def merge_adapter(run: Path, target: Path) -> Path:
    """Write the model of a run with its adapter merged in, and the tokenizer, as safetensors; returns `target`.

    Args:
        run: a run's folder, or a folder that `save_pretrained` wrote.
        target: a new or an empty folder.
    Raises:
        ModelError: there is no tuned model in `run`, it is broken, its base is not found, or `target` holds files.
        RunFileError: `target` cannot be written.
    """
    source = _saved_model(run)
    if target.exists() and any(target.iterdir()):
        raise ModelError(f"--merge {str(target)!r} is not empty; choose a new folder")
    if (link := links_out(source)) is not None:
        raise ModelError(f"{str(link)!r} is a link to a file elsewhere; put the file itself in its place")
    if not (source / "adapter_config.json").exists():
        log.info("%s was trained in place: it is copied, there is nothing to merge", source)
        with named(target), whole_folder(target) as aside:
            shutil.copytree(source, aside, dirs_exist_ok=True)
        return target
    if not (source / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{str(source)!r} has no adapter_model.safetensors; other files are not loaded (pickled weights "
            "can run code when they are read)"
        )
    try:
        base = str(PeftConfig.from_pretrained(str(source)).base_model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # somebody else's files: peft and transformers raise whatever they stumble over
        raise ModelError(f"the adapter in {str(source)!r} cannot be read: {_reason(error)}") from error
    try:
        lm = auto_class(AutoConfig.from_pretrained(base)).from_pretrained(base, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the adapter in {str(source)!r} belongs to {base!r}, which cannot be loaded: {_reason(error)}"
        ) from error
    try:
        merged = PeftModel.from_pretrained(lm, str(source)).merge_and_unload()  # type: ignore[operator]
    except Exception as error:
        raise ModelError(f"the adapter in {str(source)!r} does not fit {base!r}: {_reason(error)}") from error
    with named(target), whole_folder(target) as aside:
        merged.save_pretrained(str(aside), safe_serialization=True)
        tokenizer.save_pretrained(str(aside))
    return target


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def _saved_model(run: Path) -> Path:
    stopped = sorted(run.glob("checkpoints/step_*/hf_model"))[-1:]  # a run that was not finished
    for folder in (run / "adapter", run / "model", run, *stopped):
        if (folder / "adapter_config.json").exists() or (folder / "config.json").exists():
            return folder
    raise ModelError(
        f"{str(run)!r} holds no tuned model; must be the folder of a run, which has adapter/, model/ or checkpoints/"
    )
