"""The end of a run: the tuned model, the summary, the page, and the table of before and after."""

from __future__ import annotations

import logging

from solotune.errors import SolotuneError
from solotune.models.tree import format_bytes, parameter_tree
from solotune.progress import phase_progress
from solotune.report.page import write_report
from solotune.report.reading import read_run
from solotune.report.table import before_after_table
from solotune.runs.clock import peak_memory_bytes
from solotune.runs.console import say, show
from solotune.runs.folder import RunFolder
from solotune.trainers.base import Trainer

log = logging.getLogger("solotune")


def finish(trainer: Trainer, run: RunFolder) -> None:
    """Save the tuned model, the summary and the page, and print the before/after table."""
    accelerator, clock = trainer.accelerator, trainer.clock
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    before, after = trainer.first_evaluation, trainer.last_evaluation
    assert before is not None
    assert after is not None
    with clock.phase("save"):
        is_adapter = hasattr(trainer.model.backbone, "peft_config")
        name = "adapter" if is_adapter else "model"
        with run.whole(name) as folder, phase_progress(f"saving the {name}", expected=0.0):
            trainer.save_pretrained(folder)
    tree = parameter_tree(trainer.model.backbone, trainer.model.critic)
    summary = {
        "reward_before": before.reward,
        "reward_after": after.reward,
        "kl": after.kl,
        "metrics": after.metrics,
        "wall_seconds": clock.wall_seconds(),
        "seconds_by_phase": dict(clock.total),
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "rounds": trainer.rounds_done,
        "seed": trainer.config.train.seed,
        "steps": trainer.steps_done,
        "tokens_per_second": trainer.tokens_done / max(clock.total[trainer.TOKENS[1]], 1e-9),
        "model": str(getattr(trainer.config.model.model_path, "model_type", trainer.config.model.model_path)),
        "trainable_parameters": tree.trainable,
        "total_parameters": tree.total,
        "parameter_tree": tree.text(),
    }
    run.write_json("summary.json", summary)
    samples, changes = (before.samples, after.samples), {"reward": (before.reward, after.reward)}
    try:
        with phase_progress("writing the page", expected=0.0):
            page = f"see {write_report(run.path)}"
        if (shown := read_run(run.path)).sweep and len(shown.before) == len(shown.after):
            samples = shown.before, shown.after
            changes = {f"reward at {setting}": change for setting, change in shown.sweep.items()}
    except SolotuneError as error:  # the tuned model is saved: no reason to end as a run that failed
        log.warning("%s", error)
        page = "there is no page of it"
    show(before_after_table(*samples, rows=8))
    label, _ = trainer.eval_settings[0]
    changes |= {f"{name}{label}": (before.metrics.get(name), value) for name, value in after.metrics.items()}
    told = [f"{name} {a:.3f} -> {b:.3f}" for name, (a, b) in changes.items() if a is not None and b is not None]
    told += [f"KL{label} {after.kl:.2f} nats a response"] if after.kl is not None else []
    told += [f"{summary['wall_seconds']:.0f} s, peak {format_bytes(summary['peak_memory_bytes'])}; {page}"]
    say(", ".join(told))
