"""How long a recipe of PPO will take on this machine's CPU, and what it has to fetch: said before anything is done.

Its arithmetic (`trainers.work`) is divided by a rate, which is measured in about a second with products of the model's
own widths. Nothing is said of what cannot be known: a GPU, a reward function, a model that is not here yet.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from solotune.config import PPOConfig, describe_steps
from solotune.data import film_snippets
from solotune.data.assets import FILM_SNIPPETS, PREFIX, Size, is_here, resolve, still_needed
from solotune.models.loading import build_policy, dtype_of
from solotune.models.packed import packed_weights
from solotune.models.products import use_fastest_products
from solotune.models.tree import format_bytes
from solotune.trainers import work
from solotune.trainers.sampling import room_for_prompts

log = logging.getLogger("solotune")

if TYPE_CHECKING:
    from solotune.config import ModelConfig, Recipe, RewardConfig, RewardTrainingConfig
    from solotune.models.policy import PolicyModel

OVERHEAD = 1.35
"""A round's time, in that of its products: norms, attention, drawing tokens, the optimizer."""
REWARD_OVERHEAD = 1.5
"""The same of learning a reward model, whose products are small."""
LEAST_SECONDS = 60.0
"""A run that takes less needs no estimate."""
SECONDS_OF_TIMING = 0.25
"""Of each of four rates."""
WEIGHTS = 2**24
"""Numbers of the weights that are multiplied for a timing: more than a cache holds, as in a model."""
TOKENS_A_WORD = 1.3
PADDED_TOKENS_A_WORD = 2
"""Of a prompt that is padded to the longest beside it."""


class Rates(NamedTuple):
    """Operations a second, of the three kinds of `work.Work`; and of the reward model."""

    steps: float
    passes: float
    head: float
    reward: float = math.inf

    def seconds(self, what: work.Work) -> float:
        """How long it takes."""
        return OVERHEAD * (what.steps / self.steps + what.passes / self.passes + what.head / self.head)


FASTER_THAN_ANY = Rates(1e13, 1e13, 1e13, 1e13)
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
    is_known = _is_model_here(recipe.config.model)
    seconds = time_line(recipe, device) if is_known else None
    lines = [line for line in (seconds, size_line(still_needed(_names(recipe)))) if line is not None]
    return "; ".join(lines) or None, is_known


def time_line(recipe: Recipe, device: torch.device, policy: PolicyModel | None = None) -> str | None:
    """How long the recipe will take; None where that cannot be known, or it is short.

    Args:
        policy: its model, without weights, where it was built already.
    """
    try:
        return _time_line(recipe, device, policy or build_policy(recipe.config, meta=True))
    except Exception as error:  # what is wrong with a recipe is said in its own place, and no run fails for an estimate
        log.debug("no estimate: %s", error)
        return None


def _time_line(recipe: Recipe, device: torch.device, policy: PolicyModel) -> str | None:
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
        measured_rate([_head_shape(policy)], sampled, dtype),
        measured_rate(reward.shapes, reward.rows, torch.float32) if reward.shapes else math.inf,
    )


@torch.no_grad()
def measured_rate(shapes: Sequence[tuple[int, int]], rows: int, dtype: torch.dtype) -> float:
    """Operations a second of products of (rows, in) with (out, in), taken in turn."""
    copies = max(WEIGHTS // sum(out * inner for out, inner in shapes), 1)
    layers = [_layer(*shape, dtype) for _ in range(copies) for shape in shapes]
    inputs = {inner: torch.ones(rows, inner, dtype=dtype) for _, inner in shapes}
    with packed_weights(nn.ModuleList(layers), None):
        for layer in layers[: len(shapes)]:
            layer(inputs[layer.in_features])  # the first product of a shape is prepared
        operations, start, seconds = 0, time.perf_counter(), 0.0
        for layer in itertools.cycle(layers):
            layer(inputs[layer.in_features])
            operations += 2 * rows * layer.weight.numel()
            if (seconds := time.perf_counter() - start) > SECONDS_OF_TIMING:
                break
    return operations / seconds


def _layer(n_out: int, n_in: int, dtype: torch.dtype) -> nn.Linear:
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=False, dtype=dtype)  # type: ignore[assignment]
    nn.init.ones_(layer.weight)
    return layer.requires_grad_(False)


def _head_shape(policy: PolicyModel) -> tuple[int, int]:
    """(out, in) of the LM head, or of the part of it that is timed."""
    head: Any = policy.lm.get_output_embeddings()
    n_out, n_in = head.weight.shape
    return min(n_out, 2 * WEIGHTS // n_in), n_in


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
    blocks = _blocks(encoder)
    weights, shapes = work.matrix_weights([encoder]), _shapes(blocks[0])
    if training is None:
        return Reward(weights, 0.0, shapes, reward.batch_size)
    if (rows := _training_rows(training)) is None:
        return None
    n_rows, n_held_out, tokens = rows
    share = 1.0 if training.num_layers_unfrozen == -1 else training.num_layers_unfrozen / len(blocks)
    operations = work.reward_training(weights, share * weights, n_rows * tokens, n_held_out * tokens)
    return Reward(weights, operations, shapes, max(round(training.batch_size * tokens), 1))


class _Rows(NamedTuple):
    """Rows that a reward model learns from, of all epochs; those held out; tokens of each, roughly."""

    learned: int
    held_out: int
    tokens: float


def _training_rows(training: RewardTrainingConfig) -> _Rows | None:
    """None where they are not known before they are fetched; no rows where the model has learned already."""
    from solotune.rewards.base import fingerprint
    from solotune.rewards.training import PREFIX_SHARE, PREFIX_WORDS, feedback_of, folder_of

    if training.data == FILM_SNIPPETS and not is_here(FILM_SNIPPETS):
        n_rows, words, texts = film_snippets.ROWS, float(film_snippets.MEAN_WORDS), 1
    elif training.data == FILM_SNIPPETS or Path(training.data).is_file():
        feedback = feedback_of(training)
        if folder_of(training, fingerprint(training, feedback)).is_dir():
            return _Rows(0, 0, 1.0)
        n_rows, texts = len(feedback[0]), 2 if hasattr(feedback, "chosen") else 1
        words = fmean(len(text.split()) for text in feedback[0])
    else:
        return None
    if texts == 1:  # some are shown as a beginning
        beginning = (PREFIX_WORDS[0] + min(PREFIX_WORDS[1], words)) / 2
        words = PREFIX_SHARE * min(beginning, words) + (1 - PREFIX_SHARE) * words
    tokens = min(TOKENS_A_WORD * words + 2, training.max_length)
    learned = min(max(n_rows - training.holdout, 0), training.max_rows or n_rows)
    return _Rows(learned * training.epochs, training.holdout, texts * tokens)


def _shapes(block: nn.Module) -> list[tuple[int, int]]:
    """(out, in) of a block's matrices, without the narrow ones of an adapter."""
    sizes = [tuple(p.shape) for p in block.parameters() if p.dim() == 2]
    wide = max((min(size) for size in sizes), default=1)
    return [(size[0], size[1]) for size in sizes if min(size) * 8 >= wide]


def _blocks(encoder: nn.Module) -> Sequence[nn.Module]:
    """An encoder's blocks; itself where it has no list of them."""
    lists = (module for module in encoder.modules() if isinstance(module, nn.ModuleList) and len(module))
    return next((list(blocks) for blocks in lists), [encoder])


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
    except Exception:  # a broken one, too: it is said where it is loaded
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
