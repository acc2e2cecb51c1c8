"""The process of a trial, seen from the sweep: started, watched through its files, ended."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solotune.cleaning import visible
from solotune.config.values import nearest
from solotune.runs.lines import append_lines, read_lines

VALUES_FILE = "SOLOTUNE_VALUES_FILE"  # that of solotune.runs.tracking, which takes seconds to import
SECONDS_TO_END = 10


class Child:
    """A trial that runs.

    Args:
        folder: the trial's, absolute. If the run in it has a checkpoint, it goes on from there.
        target: a script or a recipe, absolute.
        hparams: dotted settings.
        accelerate_config: `accelerate launch` starts it with this configuration.
    """

    def __init__(
        self,
        folder: Path,
        target: Path,
        hparams: Mapping[str, Any],
        accelerate_config: Path | None = None,
    ):
        self.folder, self.values, self.log = folder, folder / "values.jsonl", folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)
        resume = any((folder / "run" / "checkpoints").glob("step_*"))
        kept = read_lines(self.values) if resume and self.values.exists() else []
        self.values.unlink(missing_ok=True)
        append_lines(self.values, kept)  # without a line that was cut short
        task = {"target": str(target), "hparams": dict(hparams), "resume": resume}
        (folder / "trial.json").write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")
        start = ["-m", "solotune.sweep.trial", str(folder)]
        if accelerate_config is not None:
            start = ["-m", "accelerate.commands.launch", "--config_file", str(accelerate_config), *start]
        with self.log.open("a" if resume else "w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                [sys.executable, *start],
                env={**os.environ, VALUES_FILE: str(self.values)},
                stdin=subprocess.PIPE,  # its end tells the trial that the sweep is gone
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the sweep's to pass on
            )
        self.n_told = 0  # reports that Optuna's pruner knows of

    def exit_code(self) -> int | None:
        """None while it runs; below 0, the signal that killed it."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """SIGTERM: a run finishes its round, saves and exits."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def end(self) -> None:
        """Make sure that it has ended, its own processes included."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def reports(self, metric: str) -> list[tuple[int | None, float]]:
        """(step, value) of a metric as it was reported, in that order; NaN where it was not finite. The step is None
        for what a script's `main` returned."""
        return [
            (row["step"], math.nan if row[metric] is None else float(row[metric]))
            for row in read_lines(self.values)
            if metric in row
        ]

    def failure(self, metric: str) -> str | None:
        """Why the trial that has ended counts as failed, in one line; None where it did not fail."""
        code = self.exit_code()
        assert code is not None
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        if code > 0:
            return self._last_line() or f"exit code {code}, and nothing in its log"
        reports = self.reports(metric)
        if not reports:
            names = {name for row in read_lines(self.values) for name in row} - {"step"}
            return f"it reported no {metric}: {nearest(metric, names) if names else 'it reported nothing at all'}"
        if not math.isfinite(reports[-1][1]):
            return f"its last {metric} is not a finite number"
        return None

    def _last_line(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((visible(line.strip()) for line in reversed(lines) if line.strip()), "")
