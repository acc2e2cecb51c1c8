"""How long a recipe of PPO will take on this machine's CPU, and what it has to fetch: said before anything is done.

Its arithmetic (`trainers.work`) is divided by a rate, which is measured in about a second with products of the model's
own widths. Nothing is said of what cannot be known: a GPU, a reward function, a model that is not here yet.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from solotune.config import PPOConfig, describe_steps
from solotune.data import film_snippets
from solotune.data.assets import FILM_SNIPPETS, PREFIX, Size, is_here, resolve, still_needed
from solotune.errors import SolotuneError
from solotune.models.loading import build_policy, dtype_of
from solotune.models.packed import PackedWeights, gains_by_packing
from solotune.models.products import use_fastest_products
from solotune.models.tree import format_bytes
from solotune.trainers import work
from solotune.trainers.sampling import room_for_prompts

if TYPE_CHECKING:
    from solotune.config import ModelConfig, Recipe, RewardConfig, RewardTrainingConfig
    from solotune.models.policy import PolicyModel

OVERHEAD = 1.35
"""A round's time, in that of its products: norms, attention, drawing tokens, the optimizer."""
REWARD_OVERHEAD = 1.5
"""The same of learning a reward model, whose products are small."""
LEAST_SECONDS = 60.0
"""A run that takes less needs no estimate."""
SECONDS_OF_TIMING = 0.4
MOST_OF_WEIGHTS = 2**24
"""Numbers of the weights that are multiplied for the timing: more than a cache holds, as in a model."""
TOKENS_A_WORD = 1.3
PADDED_TOKENS_A_WORD = 2
"""Of a prompt that is padded to the longest beside it."""


class Rates(NamedTuple):
    """Operations a second, of the two kinds of `work.Work`; and of the reward model."""

    steps: float
    passes: float
    reward: float = math.inf

    def seconds(self, what: work.Work) -> float:
        """How long it takes."""
        return OVERHEAD * (what.steps / self.steps + what.passes / self.passes)


FASTER_THAN_ANY = Rates(1e13, 1e13, 1e13)
"""Of no CPU."""


class Reward(NamedTuple):
    """What is known of a reward model.

    Args:
        weights: in its matrices, that every token meets.
        training: operations until it is learned; 0 where it is there.
        shapes, rows: what its products multiply when it learns.
    """

    weights: int
    training: float
    shapes: list[tuple[int, int]]
    rows: int


class Estimate(NamedTuple):
    """Seconds of the parts of a run, and the rate they were reckoned with."""

    reward_model: float
    round: float
    rounds: int
    evaluations: float
    rate: float

    @property
    def total(self) -> float:
        return self.reward_model + self.round * self.rounds + self.evaluations

    def line(self) -> str:
        """`about 9 minutes on this machine (86 GFLOP/s): reward model 1 minute, 40 rounds of 11 s`."""
        parts = [f"reward model {roughly(self.reward_model)}"] if self.reward_model >= 1 else []
        parts += [f"{self.rounds:,} round{'' if self.rounds == 1 else 's'} of {self.round:.2g} s"]
        return f"about {roughly(self.total)} on this machine ({self.rate / 1e9:.0f} GFLOP/s): {', '.join(parts)}"


def roughly(seconds: float) -> str:
    """`40 seconds`, `9 minutes`, `2.5 hours`, `3 days`: no more digits than are known."""
    if seconds < 90:
        return f"{max(round(seconds / 10), 1) * 10} seconds"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.2g} hours" if seconds < 36 * 3600 else f"{seconds / 86400:.2g} days"


def size_line(size: Size) -> str | None:
    """What assets take, as a line; None where all are here."""
    parts = {"to download": size.download, "on disk": size.disk}
    return ", ".join(f"{format_bytes(n)} {name}" for name, n in parts.items() if n) or None


def first_line(recipe: Recipe, device: torch.device) -> tuple[str | None, bool]:
    """What is said before anything is fetched, None for nothing; and whether the time is in it, or cannot be known."""
    seconds = None
    if is_known := _is_model_here(recipe.config.model):
        with contextlib.suppress(SolotuneError):  # which will be said in its own place
            seconds = time_line(recipe, device, build_policy(recipe.config, meta=True))
    lines = [line for line in (seconds, size_line(still_needed(_names(recipe)))) if line is not None]
    return "; ".join(lines) or None, is_known


def time_line(recipe: Recipe, device: torch.device, policy: PolicyModel) -> str | None:
    """How long the recipe will take; None where that cannot be known, or it is short.

    Args:
        policy: its model, without weights.
    """
    config = recipe.config
    dtype = dtype_of(config.model, device)
    if device.type != "cpu" or not isinstance(config.method, PPOConfig) or config.model.is_seq2seq:
        return None
    if not isinstance(dtype, torch.dtype) or recipe.reward is None or (reward := reward_work(recipe.reward)) is None:
        return None
    if estimate(recipe, policy, reward, FASTER_THAN_ANY).total < LEAST_SECONDS / 1000:
        return None  # and no second is spent on a timing
    found = estimate(recipe, policy, reward, measured_rates(recipe, policy, reward, dtype))
    return found.line() if found.total >= LEAST_SECONDS else None


def estimate(recipe: Recipe, policy: PolicyModel, reward: Reward, rates: Rates) -> Estimate:
    """The seconds of a recipe of PPO at given rates."""
    config, weights, plan = recipe.config, work.Weights.of(policy), describe_steps(recipe.config)
    method: Any = config.method
    width = prompt_width(recipe)
    n_eval = n_eval_samples(recipe)
    scoring = 2 * reward.weights * (width + method.gen_kwargs.get("max_new_tokens", 40)) / rates.reward
    a_round = rates.seconds(work.ppo_round(config, weights, width)) + scoring * method.num_rollouts
    an_evaluation = rates.seconds(work.evaluation(config, weights, n_eval, width)) + scoring * n_eval
    training = REWARD_OVERHEAD * reward.training / rates.reward
    return Estimate(training, a_round, plan.rounds, an_evaluation * work.n_evaluations(config), rates.passes)


def measured_rates(recipe: Recipe, policy: PolicyModel, reward: Reward, dtype: torch.dtype) -> Rates:
    """The machine's, by products of the shapes that the run will have."""
    use_fastest_products("cpu")
    method: Any = recipe.config.method
    shapes = _shapes(policy.decoder.blocks[0])
    sampled = min(method.chunk_size, method.num_rollouts)
    rows = recipe.config.train.minibatch_size or recipe.config.train.batch_size
    positions = rows * (prompt_width(recipe) + method.gen_kwargs.get("max_new_tokens", 40) - 1)
    return Rates(
        measured_rate(shapes, sampled, dtype),
        measured_rate(shapes, positions, dtype),
        measured_rate(reward.shapes, reward.rows, torch.float32) if reward.training else math.inf,
    )


@torch.no_grad()
def measured_rate(shapes: Sequence[tuple[int, int]], rows: int, dtype: torch.dtype) -> float:
    """Operations a second of products of (rows, in) with (out, in), taken in turn."""
    numbers = sum(out * inner for out, inner in shapes)
    copies = max(MOST_OF_WEIGHTS // numbers, 1)
    weights = [torch.randn(shape, dtype=dtype) for _ in range(copies) for shape in shapes]
    inputs = {inner: torch.randn(rows, inner, dtype=dtype) for _, inner in shapes}
    is_packed = dtype == torch.float32 and gains_by_packing()
    with PackedWeights(weights) if is_packed else contextlib.nullcontext():
        for weight in weights[: len(shapes)]:
            F.linear(inputs[weight.shape[1]], weight)  # the first product of a shape is prepared
        operations, start, seconds = 0, time.perf_counter(), 0.0
        for weight in itertools.cycle(weights):
            F.linear(inputs[weight.shape[1]], weight)
            operations += 2 * rows * weight.numel()
            if (seconds := time.perf_counter() - start) > SECONDS_OF_TIMING:
                break
    return operations / seconds


def prompt_width(recipe: Recipe) -> int:
    """Tokens of a prompt with its padding, guessed from its words: its tokenizer may not be here yet."""
    room, data = room_for_prompts(recipe.config), recipe.data
    words = data.prompt_words
    if words is None and isinstance(data.prompts, list):
        texts = [row if isinstance(row, str) else str(row.get(data.prompt_column or "prompt")) for row in data.prompts]
        words = max((len(text.split()) for text in texts), default=1)
    return room if words is None else min(room, 1 + PADDED_TOKENS_A_WORD * words)


def n_eval_samples(recipe: Recipe) -> int:
    """Samples of an evaluation."""
    given = recipe.data.eval_prompts
    return (len(given) if isinstance(given, list) else 32) * recipe.data.eval_repeats


def reward_work(reward: RewardConfig) -> Reward | None:
    """What its model will take; None where that is not known, as of a function."""
    training = reward.training
    name = training.base if training is not None else reward.classifier or reward.model
    config = None if name is None else _local_config(name)
    if config is None:
        return None
    with torch.device("meta"):
        encoder: nn.Module = AutoModel.from_config(config)
    weights, shapes = work.matrix_weights([encoder]), _shapes(_block(encoder))
    if training is None:
        return Reward(weights, 0.0, shapes, reward.batch_size)
    rows = _training_rows(training)
    if rows is None:
        return None
    n_rows, tokens = rows
    unfrozen, blocks = training.num_layers_unfrozen, config.get_text_config().num_hidden_layers
    trained = weights if unfrozen == -1 else weights * min(unfrozen, blocks) / blocks
    operations = work.reward_training(weights, trained, n_rows, tokens, training.epochs)
    return Reward(weights, operations, shapes, max(round(training.batch_size * tokens), 1))


def _training_rows(training: RewardTrainingConfig) -> tuple[int, float] | None:
    """Rows that a reward model learns from, none where it has learned already, and their tokens; None: not known."""
    from solotune.rewards.base import fingerprint
    from solotune.rewards.training import PREFIX_SHARE, PREFIX_WORDS, feedback_of, folder_of

    if training.data == FILM_SNIPPETS and not is_here(FILM_SNIPPETS):
        n_rows, words, texts = film_snippets.ROWS, float(film_snippets.MEAN_WORDS), 1
    elif training.data == FILM_SNIPPETS or Path(training.data).is_file():
        feedback = feedback_of(training)
        if folder_of(training, fingerprint(training, feedback)).is_dir():
            return 0, 0.0
        n_rows, texts = len(feedback[0]), 2 if hasattr(feedback, "chosen") else 1
        words = fmean(len(text.split()) for text in feedback[0])
    else:
        return None
    if texts == 1:  # some are shown as a beginning
        beginning = (PREFIX_WORDS[0] + min(PREFIX_WORDS[1], words)) / 2
        words = PREFIX_SHARE * min(beginning, words) + (1 - PREFIX_SHARE) * words
    tokens = min(TOKENS_A_WORD * words + 2, training.max_length)
    return min(max(n_rows - training.holdout, 0), training.max_rows or n_rows), texts * tokens


def _shapes(block: nn.Module) -> list[tuple[int, int]]:
    """(out, in) of a block's matrices, without the narrow ones of an adapter."""
    sizes = [tuple(p.shape) for p in block.parameters() if p.dim() == 2]
    wide = max((min(size) for size in sizes), default=1)
    return [(size[0], size[1]) for size in sizes if min(size) * 8 >= wide]


def _block(encoder: nn.Module) -> nn.Module:
    """The first of an encoder's blocks, or all of it."""
    lists = (module for module in encoder.modules() if isinstance(module, nn.ModuleList) and len(module))
    return next((blocks[0] for blocks in lists), encoder)


def _is_model_here(model: ModelConfig) -> bool:
    """Whether the model's configuration is known without fetching anything."""
    if model.architecture is not None or isinstance(model.model_path, PretrainedConfig | PreTrainedModel):
        return True
    return _local_config(str(model.model_path)) is not None


def _local_config(name: str) -> PretrainedConfig | None:
    """The configuration of a model that is in a folder or a cache here; None for another."""
    if not is_here(name):
        return None
    try:
        return AutoConfig.from_pretrained(resolve(name), local_files_only=True)
    except (OSError, ValueError, SolotuneError):
        return None


def _names(recipe: Recipe) -> list[str]:
    """The assets that a recipe names."""
    config, data, reward = recipe.config, recipe.data, recipe.reward
    given: list[Any] = [config.model.model_path, config.tokenizer.tokenizer_path]
    given += [data.prompts, data.eval_prompts, data.samples]
    if reward is not None:
        given += [reward.classifier, reward.model]
        given += [reward.training.base, reward.training.data] if reward.training is not None else []
    return [name for name in given if isinstance(name, str) and name.startswith(PREFIX)]
