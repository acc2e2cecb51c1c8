"""The sweep itself: Optuna proposes, a process tries, SQLite remembers.

A trial of the plan has an index. Killed with the sweep, it becomes a second Optuna trial of the same index and the same
settings, which goes on from the first one's checkpoint; the last Optuna trial of an index is the one that counts. What
is drawn for an index depends on the seed, the index and (with TPE) the results so far, so that a sweep that was killed
and taken up again tries the same settings as one that was not.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from solotune.config import Recipe
from solotune.errors import ConfigError, MissingExtraError, TrainingError
from solotune.runs.console import console
from solotune.runs.signals import stop_requests
from solotune.sweep.job import Sweep
from solotune.sweep.process import Child
from solotune.sweep.result import Row, best_row, described, show, write
from solotune.sweep.space import Plan
from solotune.sweep.trial import CANNOT_START, as_overrides

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

log = logging.getLogger("solotune")

DATABASE, LOCK = "sweep.db", ".lock"
FAILURES_AT_THE_START = 3  # in a row, none before them complete: the fault lies in the script, not in the settings
SECONDS_BETWEEN_LOOKS = 0.1


def check_recipe(sweep: Sweep) -> None:
    """Read a recipe with the first value of every parameter: a wrong name is said before anything runs.

    Raises:
        ConfigError: what is wrong with the recipe or the names; values that only go wrong together may still do so.
    """
    first = {parameter.name: parameter.values[0] for parameter in sweep.plan.parameters}
    Recipe.load_yaml(sweep.target, as_overrides({**sweep.fixed, **first}))


def run_sweep(sweep: Sweep, retry_failed: bool = False) -> list[Row]:
    """Run the trials of a plan that have not finished; show and write the results.

    Args:
        sweep: what to try and where; a sweep that is there already is taken up.
        retry_failed: run trials that failed before once more, with the same settings.
    Returns:
        A row a trial.
    Raises:
        MissingExtraError: Optuna is not installed.
        ConfigError: the folder holds another sweep or something else, or another process runs it.
        TrainingError: the target cannot start, the first trials all failed, or none succeeded.
        SystemExit: a signal asked to stop; the running trials were given time to save.
    """
    if importlib.util.find_spec("optuna") is None:
        raise MissingExtraError("a sweep needs Optuna: pip install 'solotune[sweep]'")
    if sweep.target.suffix != ".py":
        check_recipe(sweep)
    for line in sweep.plan.notes():
        log.info("%s", line)
    with _alone_in(sweep.folder):
        study = _open(sweep)
        _take_up(study, retry_failed)
        left = sweep.plan.n_trials - sum(trial.state.is_finished() for trial in latest(study).values())
        _say(f"{sweep.plan.n_trials} trials, {max(left, 0)} left to run; files go to {sweep.folder}")
        running: list[tuple[Any, Child]] = []
        try:
            with stop_requests() as stop:
                failure = _run(study, sweep, running, stop)
        finally:
            for _, child in running:
                child.end()
            _take_up(study)
            rows = rows_of(study, sweep.plan)
            write(rows, sweep)
        show(rows, sweep)
        if stop.signal_number is not None:
            _say("stopped; the same command goes on from here")
            raise SystemExit(stop.exit_code)
        if failure is not None:
            raise TrainingError(failure)
        if best_row(rows, sweep.plan) is None:
            raise TrainingError(f"none of the {len(rows)} trials succeeded, the last: {rows[-1].error}")
        return rows


def latest(study: Study) -> dict[int, FrozenTrial]:
    """The trial that counts of each index: the last one."""
    return {trial.user_attrs["index"]: trial for trial in study.get_trials(deepcopy=False)}


def rows_of(study: Study, plan: Plan) -> list[Row]:
    """A row for each trial that has finished, by index."""
    parameters = {parameter.name: parameter for parameter in plan.parameters}
    return [
        Row(
            trial=index,
            state=trial.state.name.lower(),
            value=trial.value,
            seconds=trial.duration.total_seconds() if trial.duration else 0.0,
            settings={name: parameters[name].value(trial.params[name]) for name in parameters if name in trial.params},
            folder=trial.user_attrs["folder"],
            error=trial.user_attrs.get("error", ""),
        )
        for index, trial in sorted(latest(study).items())
        if trial.state.is_finished()
    ]


# ---- the loop -----------------------------------------------------------------------------------------------------


def _run(study: Study, sweep: Sweep, running: list[tuple[Any, Child]], stop: Any) -> str | None:
    """Start and watch trials until none is left, or a signal came; why the sweep cannot go on, where it cannot."""
    failure, asked = None, False
    while True:
        wants_more = stop.signal_number is None and failure is None
        while wants_more and len(running) < sweep.jobs and (trial := _next(study, sweep)) is not None:
            running.append((trial, _start(trial, sweep)))
        if not running or failure is not None:
            return failure
        if stop.signal_number is not None and not asked:
            asked = True
            for _, child in running:
                child.ask_to_stop()
        time.sleep(SECONDS_BETWEEN_LOOKS)
        for trial, child in list(running):
            pruned = False
            if (code := child.exit_code()) is None:
                pruned = sweep.plan.tune.prunes and _falls_behind(trial, child, sweep.plan.tune.metric)
                if not pruned:
                    continue
            child.end()
            running.remove((trial, child))
            if not (asked and code):  # asked to stop it ended early: it will be queued again
                failure = _tell(study, sweep, trial, child, pruned) or failure


def _next(study: Study, sweep: Sweep) -> Any:
    """The next trial, with its settings drawn; None when all were started."""
    from optuna.trial import TrialState

    trials = latest(study)
    waiting = [trial.user_attrs["index"] for trial in trials.values() if trial.state == TrialState.WAITING]
    index = min(waiting, key=lambda index: trials[index].number) if waiting else len(trials)
    if not waiting:
        if index >= sweep.plan.n_trials:
            return None
        fixed = sweep.plan.fixed(index)
        stored = {p.name: p.stored(fixed[p.name]) for p in sweep.plan.parameters if p.name in fixed}
        study.enqueue_trial(stored, user_attrs={"index": index, "folder": f"trials/{index:03d}", "attempt": 1})
    study.sampler = _sampler(sweep, index)
    return study.ask({parameter.name: parameter.distribution() for parameter in sweep.plan.parameters})


def _sampler(sweep: Sweep, index: int) -> BaseSampler:
    """A sampler with random numbers of this trial's own: taken up again, a sweep does not draw the same ones twice."""
    import numpy as np
    from optuna.samplers import RandomSampler, TPESampler

    seed = int(np.random.SeedSequence([sweep.seed, index]).generate_state(1)[0])
    if sweep.plan.tune.search_alg in ("bayesopt", "bohb"):
        return TPESampler(seed=seed, constant_liar=sweep.jobs > 1)
    return RandomSampler(seed=seed)


def _start(trial: Any, sweep: Sweep) -> Child:
    settings = {p.name: p.value(trial.params[p.name]) for p in sweep.plan.parameters}
    hparams = {
        "train.checkpoint_dir": str(_folder(trial, sweep)),
        "train.run_name": "run",
        "train.project_name": f"sweep_{sweep.target.stem}",
        "train.group_name": sweep.folder.resolve().name,
        **sweep.fixed,
        **settings,
    }
    _say(f"trial {trial.user_attrs['index']}: {described(settings)}")
    return Child(_folder(trial, sweep), sweep.target.resolve(), hparams, sweep.accelerate_config)


def _folder(trial: Any, sweep: Sweep) -> Path:
    return (sweep.folder / trial.user_attrs["folder"]).resolve()


def _falls_behind(trial: Any, child: Child, metric: str) -> bool:
    """Tell Optuna of reports that are new, and ask it whether the trial should go on.

    Its unit is a report, whatever the step: one before the first step, which says nothing of the settings, is left out.
    """
    by_step = {step: value for step, value in child.reports(metric) if step}  # a run that was resumed repeats some
    for count, value in list(enumerate(by_step.values(), start=1))[child.n_told :]:
        child.n_told = count
        if math.isfinite(value):
            trial.report(value, count)
            if trial.should_prune():
                return True
    return False


def _tell(study: Study, sweep: Sweep, trial: Any, child: Child, pruned: bool = False) -> str | None:
    """Tell Optuna how a trial ended; why the sweep cannot go on, where it cannot."""
    from optuna.trial import TrialState

    metric, index = sweep.plan.tune.metric, trial.user_attrs["index"]
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)
        _say(f"trial {index}: stopped, its {metric} fell behind after {child.n_told} reports")
        return None
    error = child.failure(metric)
    if error is None:
        if sweep.plan.tune.prunes:
            _falls_behind(trial, child, metric)  # what came since the last look
        study.tell(trial, child.reports(metric)[-1][1])
        best = best_row(rows_of(study, sweep.plan), sweep.plan)
        assert best is not None
        _say(f"trial {index}: {metric} {child.reports(metric)[-1][1]:.4g} (best {best.value:.4g}, trial {best.trial})")
        return None
    if child.exit_code() == CANNOT_START:  # not told: the trial is queued again
        return f"{sweep.target} cannot be swept: {error}; what it printed is in {child.log}"
    trial.set_user_attr("error", error)
    study.tell(trial, state=TrialState.FAIL)
    _say(f"trial {index}: failed: {error}")
    done = [other for other in latest(study).values() if other.state.is_finished()]
    if len(done) >= FAILURES_AT_THE_START and all(other.state == TrialState.FAIL for other in done):
        return (
            f"the first {len(done)} trials all failed, the last: {error}. What it printed is in {child.log}; "
            "when that is put right, the same command with --retry-failed tries them again"
        )
    return None


# ---- taking up ----------------------------------------------------------------------------------------------------


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """The folder, made where there is none, for this process alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the sweep's folder {str(folder)!r} cannot be made: {error}; choose another") from error
    if not (folder / DATABASE).exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigError(f"the folder {str(folder)!r} holds files that are no sweep's: choose another with --out")
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"another process runs the sweep in {str(folder)!r}: wait for it, or choose --out") from None
    try:
        yield
    finally:
        lock.release()


def _open(sweep: Sweep) -> Study:
    """The study in the sweep's database, a new one where there is none.

    Raises:
        ConfigError: it is that of other parameters, or of another metric or target.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="sweep",
        storage=f"sqlite:///{(sweep.folder / DATABASE).resolve()}",
        direction="maximize" if sweep.plan.tune.mode == "max" else "minimize",
        pruner=optuna.pruners.HyperbandPruner() if sweep.plan.tune.prunes else optuna.pruners.NopPruner(),
        load_if_exists=True,
    )
    before, now = study.user_attrs.get("sweep"), sweep.identity
    if before is None:
        study.set_user_attr("sweep", now)
    elif before != now:
        changed = [
            f"{name}: was {json.dumps(before.get(name))}, is {json.dumps(now[name])}"
            for name in now
            if before.get(name) != now[name]
        ]
        raise ConfigError(
            f"the sweep in {str(sweep.folder)!r} was made with other settings, and its trials cannot be compared with "
            f"new ones: choose another folder with --out, or put them back\n" + "\n".join(changed)
        )
    return study


def _take_up(study: Study, retry_failed: bool = False) -> None:
    """Queue trials whose process is gone once more, in the same folder; those that failed in a new one."""
    from optuna.trial import TrialState

    for index, trial in latest(study).items():
        attempt, folder = trial.user_attrs["attempt"], trial.user_attrs["folder"]
        if trial.state == TrialState.FAIL and retry_failed:
            attempt += 1
            folder = f"trials/{index:03d}-{attempt}"
        elif trial.state != TrialState.RUNNING:
            continue
        settings = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        study.enqueue_trial(settings, user_attrs={"index": index, "folder": folder, "attempt": attempt})
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def _say(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
