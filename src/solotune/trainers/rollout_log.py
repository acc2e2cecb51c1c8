"""`train.rollout_logging_dir`: every round's rollouts as JSON, in the files trlX wrote."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from solotune.config.yaml import plain
from solotune.errors import ConfigError
from solotune.rollout.records import Rollouts
from solotune.runs.files import named, write_whole
from solotune.trainers.sampling import Texts

if TYPE_CHECKING:
    from solotune.config import TRLConfig


class RolloutLog:
    """Writes `run-<id>/config.json` and an `epoch-<time>.json` a round: a list of objects with the ids that trlX wrote
    (`query_tensor`, `response_tensor`), and the texts and the score.

    Raises:
        ConfigError: the folder is not there. RunFileError: it cannot be written to.
    """

    def __init__(self, config: TRLConfig, accelerator: Accelerator):
        folder = Path(str(config.train.rollout_logging_dir))
        if not folder.is_dir():
            raise ConfigError(f"train.rollout_logging_dir {str(folder)!r} is no folder; make it before the run")
        self._accelerator = accelerator
        self._folder = folder / f"run-{uuid.uuid4()}"
        if accelerator.is_main_process:
            with named(self._folder):
                self._folder.mkdir()
                (self._folder / "config.json").write_text(str(config), encoding="utf-8")

    def write(self, rollouts: Rollouts, texts: Texts, scores: list[Any]) -> None:
        """One file with the rollouts of all processes."""
        rows = [
            {
                "query_tensor": rollouts.prompt_tokens(row),
                "response_tensor": rollouts.response_tokens(row),
                "prompt": texts.prompts[row],
                "output": texts.outputs[row],
                "score": score,
            }
            for row, score in enumerate(scores)
        ]
        gathered = gather_object(rows)
        if self._accelerator.is_main_process:
            path = self._folder / f"epoch-{time.time()}.json"
            write_whole(path, json.dumps(plain(gathered), ensure_ascii=False))
