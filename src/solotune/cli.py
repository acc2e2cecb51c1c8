"""The `solotune` command: it parses, calls and prints. What takes long to import is imported by the command itself."""

import shlex
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer
from typer.core import TyperGroup

from solotune.cleaning import visible
from solotune.config import Recipe, StepPlan, describe_steps, parse_override
from solotune.config.packaged import find_recipe, is_packaged, load_recipe
from solotune.errors import ConfigError, SolotuneError

STARTED = perf_counter()  # what follows takes seconds to import, which belong to a run's wall time


class _Group(TyperGroup):
    """Says an error that is meant for the person in one message without a traceback."""

    def invoke(self, ctx: typer.Context) -> object:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().invoke(ctx)
        except SolotuneError as error:
            typer.secho(f"error: {visible(error)}", fg="red", err=True)
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


app = typer.Typer(
    cls=_Group,
    help="Reinforcement learning from human feedback for language models on one GPU, or a laptop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a packaged recipe.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Replace a setting; repeatable. C is read as YAML.")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="The run's folder (default: runs/<name of the recipe>).")
]


def _run(recipe: Recipe, out: Path | None, resume: bool, is_packaged: bool = False) -> None:
    from solotune.runs.start import run_recipe

    train = recipe.config.train
    folder = out or Path(train.checkpoint_dir) / str(train.run_name)
    run_recipe(recipe, folder, resume, started=STARTED)
    if is_packaged and (folder / "report.html").is_file():  # the first process has written it
        typer.echo(visible(f"next: open {folder / 'report.html'}"))
        typer.echo(visible(f"      solotune export {shlex.quote(str(folder))} --merge DIR   writes an ordinary model"))
        typer.echo('      a reward of your own is a Python function: README, "Your own reward"')


@app.command()
def quickstart(
    rounds: Annotated[int | None, typer.Option(min=1, metavar="N", help="Rounds of PPO (train.epochs).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Seed of the PPO run (train.seed).")] = None,
    out: OutOption = None,
) -> None:
    """Teach a small language model, from human ratings, to write positive film reviews. Needs no GPU and no hub."""
    recipe = load_recipe("quickstart", [f"train.seed={seed}"] if seed is not None else [])
    if rounds is not None:
        train = recipe.config.train
        train.epochs = rounds
        plan = describe_steps(recipe.config)
        assert isinstance(plan, StepPlan)  # the packaged recipe is one of PPO
        train.total_steps = max(train.total_steps, rounds * plan.steps_per_round)
    _run(recipe, out, resume=False, is_packaged=True)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    out: OutOption = None,
) -> None:
    """Tune the model of a recipe."""
    _run(load_recipe(recipe, overrides), out, resume, is_packaged(recipe))


@app.command()
def reward(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Train the reward model of a recipe (its reward.training section) and report how often it agrees with people."""
    section = load_recipe(recipe, overrides).reward
    settings = None if section is None else section.training
    if settings is None:
        raise ConfigError(f"{recipe}: reward.training is not given, so there is no reward model to train")
    from solotune.quiet import quiet_libraries
    from solotune.rewards.training import train_reward_model

    with quiet_libraries():
        folder = train_reward_model(settings)
    typer.echo(f"saved in {visible(folder)}")


@app.command()
def tree(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Draw the module tree of a recipe's model, with what trains in it, without loading weights."""
    config = load_recipe(recipe, overrides).config
    from rich.console import Console

    from solotune.models.loading import build_policy
    from solotune.models.tree import parameter_tree

    policy = build_policy(config, meta=True)
    parameter_tree(policy.backbone, policy.critic).print(Console())


@app.command()
def fit(
    recipe: RecipeArgument,
    gpu: Annotated[str, typer.Option("--gpu", metavar="SIZE", help="Memory of the GPU.")] = "24GB",
    overrides: SetOption = None,
) -> None:
    """Say how much GPU memory a recipe needs, part by part, without a GPU or weights. Exits 0 if it fits, 1 if not."""
    config = load_recipe(recipe, overrides).config
    from rich.console import Console

    from solotune.models import fit as fitting
    from solotune.models.tree import format_bytes

    limit = fitting.parse_size(gpu)
    try:
        found = fitting.fit(config)
    except SolotuneError as error:
        raise ConfigError(str(error)) from error
    Console().print(found.table())
    if found.total <= limit:
        typer.echo(f"fits: {format_bytes(found.total)} of {format_bytes(limit)}")
        return
    typer.echo(f"does not fit: {format_bytes(found.total)}, more than {format_bytes(limit)}; what would help:")
    for line in fitting.advice(config, found, limit) or ["a smaller model, or fewer trained blocks"]:
        typer.echo(f"  {line}")
    raise typer.Exit(1)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]) -> None:
    """Write the HTML page of a run."""
    if not run.is_dir():
        raise ConfigError(f"no run {run}: must be the folder of a run, e.g. runs/quickstart")
    from solotune.report.page import write_report

    typer.echo(visible(write_report(run)))


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def trlx(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="A Python file that imports trlx.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[ARGUMENTS]...", help="Handed to the script.")
    ] = None,
) -> None:
    """Run a script written for trlX, unchanged: `import trlx` means this project, in this process only.

    `solotune trlx -m trlx.sweep ...` runs a module of trlX's, as `python -m` does.
    """
    from solotune.compat.script import run_script

    run_script(script, arguments or [])


@app.command()
def sweep(
    target: Annotated[
        str, typer.Argument(metavar="SCRIPT_OR_RECIPE", help="A script with main(hparams), or a recipe.")
    ],
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="What to search for: trlX's YAML.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The sweep's folder (default: runs/<target>-<config>).")
    ] = None,
    overrides: SetOption = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of what is drawn.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="Trials at a time.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run trials that failed once more.")] = False,
    accelerate_config: Annotated[
        Path | None, typer.Option("--accelerate_config", metavar="FILE", help="Run each trial by accelerate launch.")
    ] = None,
    num_gpus: Annotated[float | None, typer.Option("--num_gpus", hidden=True)] = None,
    num_cpus: Annotated[float | None, typer.Option("--num_cpus", hidden=True)] = None,
    yes: Annotated[bool | None, typer.Option("-y", "--assume_yes", hidden=True)] = None,
    server_address: Annotated[str | None, typer.Option("--server_address", hidden=True)] = None,
) -> None:
    """Search for settings: run a trlX script's main(hparams), or a recipe, with many. Goes on where it was stopped."""
    from solotune.runs.console import show_logs
    from solotune.sweep.job import Sweep
    from solotune.sweep.space import read_plan
    from solotune.sweep.study import run_sweep

    show_logs()
    if target.endswith(".py") and not Path(target).is_file():
        raise ConfigError(f"no script {target!r} in {Path.cwd()}: must be a Python file, or a recipe")
    path = Path(target) if target.endswith(".py") else find_recipe(target)
    if accelerate_config is not None and not accelerate_config.is_file():
        raise ConfigError(f"--accelerate_config {accelerate_config}: no such file")
    given = {"--num_gpus": num_gpus, "--num_cpus": num_cpus, "-y": yes, "--server_address": server_address}
    if unused := [name for name, value in given.items() if value is not None]:
        typer.echo(f"without effect here: {', '.join(unused)}; --jobs N runs N trials at a time, on what there is")
    fixed = {name: value for text in overrides or [] for name, value in parse_override(text).items()}
    folder = out or Path("runs") / f"{path.stem}-{config.stem}"
    run_sweep(Sweep(read_plan(config), path, folder, seed, jobs, accelerate_config, fixed), retry_failed)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or of a saved adapter.")],
    merge: Annotated[Path, typer.Option("--merge", metavar="DIR", help="Where the merged model is written.")],
) -> None:
    """Write a run's tuned model as one ordinary model, its adapter merged in."""
    from solotune.models.export import merge_adapter
    from solotune.progress import phase_progress
    from solotune.quiet import quiet_libraries

    with quiet_libraries(), phase_progress("merging the adapter into its model"):
        merged = merge_adapter(run, merge)
    typer.echo(f"saved in {visible(merged)}")


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"solotune {version('solotune')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point of the `solotune` command."""
    try:
        app()
    except KeyboardInterrupt:  # before training takes signals over
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
