"""A tuned model as one ordinary model, for tools that know nothing of adapters."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from solotune.errors import ModelError

log = logging.getLogger("solotune")


def merge_adapter(run: Path, target: Path) -> Path:
    """Write the model of a run with its adapter merged in, and the tokenizer, as safetensors; returns `target`.

    Args:
        run: a run's folder, or a folder that `save_pretrained` wrote.
        target: a new or an empty folder.
    Raises:
        ModelError: there is no tuned model in `run`, its base is not found, or `target` holds files.
    """
    source = _saved_model(run)
    if target.exists() and any(target.iterdir()):
        raise ModelError(f"--merge {str(target)!r} is not empty; choose a new folder")
    if not (source / "adapter_config.json").exists():
        log.info("%s was trained in place: it is copied, there is nothing to merge", source)
        shutil.copytree(source, target, dirs_exist_ok=True)
        return target
    base = str(PeftConfig.from_pretrained(str(source)).base_model_name_or_path)
    try:
        lm = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the adapter in {str(source)!r} belongs to {base!r}, which cannot be loaded: {reason}"
        ) from error
    merged = PeftModel.from_pretrained(lm, str(source)).merge_and_unload()  # type: ignore[operator]
    merged.save_pretrained(str(target), safe_serialization=True)
    AutoTokenizer.from_pretrained(str(source)).save_pretrained(str(target))
    return target


def _saved_model(run: Path) -> Path:
    stopped = sorted(run.glob("checkpoints/step_*/hf_model"))[-1:]  # a run that was not finished
    for folder in (run / "adapter", run / "model", run, *stopped):
        if (folder / "adapter_config.json").exists() or (folder / "config.json").exists():
            return folder
    raise ModelError(
        f"{str(run)!r} holds no tuned model; must be the folder of a run, which has adapter/, model/ or checkpoints/"
    )
