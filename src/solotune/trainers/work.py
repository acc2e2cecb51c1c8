"""How much arithmetic a recipe asks for: the products with weight matrices, counted on modules without weights.

A product of a token's vector with a matrix is two operations a weight. Attention's own products are left out: they are
a few percent at the lengths that a CPU trains on. All rollouts are counted as if they ran to `max_new_tokens`.

Shapes: N rollouts, P tokens of a padded prompt, T of a response, S = P + T - 1 positions that are fed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from solotune.config import PPOConfig, describe_steps
from solotune.rollout.settings import SamplingSettings, sweep

if TYPE_CHECKING:
    from solotune.config import TRLConfig
    from solotune.models.policy import PolicyModel


class Work(NamedTuple):
    """Floating-point operations.

    Args:
        steps: of the blocks with one token a row at a time: sampling.
        passes: of the blocks with whole sequences at a time: prompts, measuring, learning.
        head: of the LM head.
    """

    steps: float
    passes: float
    head: float

    def times(self, factor: float) -> Work:
        return Work(*(part * factor for part in self))


class Weights(NamedTuple):
    """Numbers of weights that a token meets, of matrices alone.

    Args:
        trunk, top: of the blocks below and above the split, adapters included.
        trained: of those in `top` that are trained.
        head: of the LM head, and `trained_head` where it is trained.
        critic: of the value head; and `branch` of the blocks that the critic has to itself.
    """

    trunk: int
    top: int
    trained: int
    head: int
    trained_head: int
    critic: int
    branch: int

    @classmethod
    def of(cls, policy: PolicyModel) -> Weights:
        """Those of a model, which may lie on the meta device."""
        blocks = policy.decoder.blocks
        top = blocks[policy.start :]
        head: Any = policy.lm.get_output_embeddings()
        return cls(
            matrix_weights(blocks[: policy.start]),
            matrix_weights(top),
            matrix_weights(top, trained=True),
            head.weight.numel(),
            head.weight.numel() if head.weight.requires_grad else 0,
            matrix_weights([policy.value_head] if policy.value_head is not None else []),
            matrix_weights([policy.value_branch] if policy.value_branch is not None else []),
        )


def matrix_weights(modules: Iterable[nn.Module], trained: bool = False) -> int:
    """Weights in matrices that tokens are multiplied with (not in tables that they look themselves up in).

    Args:
        trained: only of those that require gradients.
    """
    parts = [part for module in modules for part in module.modules()]
    tables = {id(p) for part in parts if isinstance(part, nn.Embedding) for p in part.parameters(recurse=False)}
    found = {id(p): p for part in parts for p in part.parameters(recurse=False) if p.dim() == 2 and id(p) not in tables}
    return sum(p.numel() for p in found.values() if p.requires_grad or not trained)


def sampling(weights: Weights, rows: int, prompt_width: int, new_tokens: int) -> Work:
    """Prompts at once, then token after token, through the whole model."""
    body, N, P, T = weights.trunk + weights.top, rows, prompt_width, new_tokens
    return Work(2 * N * (T - 1) * body, 2 * N * P * body, 2 * N * T * weights.head)


def measuring(weights: Weights, rows: int, prompt_width: int, new_tokens: int) -> Work:
    """Policy and reference over the top, the head of both, and the critic."""
    N, S, T = rows, prompt_width + new_tokens - 1, new_tokens
    top = S * (2 * weights.top + weights.branch)
    return Work(0, 2 * N * (top + T * weights.critic), 4 * N * T * weights.head)


def learning(weights: Weights, rows: int, prompt_width: int, new_tokens: int, recomputes: bool = False) -> Work:
    """One pass of updates: forward, the gradient by what goes in, and by the weights that are trained."""
    N, S, T = rows, prompt_width + new_tokens - 1, new_tokens
    top = S * ((2 + recomputes) * weights.top + weights.trained + (3 + recomputes) * weights.branch)
    return Work(0, 2 * N * (top + 3 * T * weights.critic), 2 * N * T * (2 * weights.head + weights.trained_head))


def added(*parts: Work) -> Work:
    """All of them together."""
    return Work(*(sum(column) for column in zip(*parts, strict=True)))


def ppo_round(config: TRLConfig, weights: Weights, prompt_width: int) -> Work:
    """One round of PPO: sampling, measuring, `ppo_epochs` of learning."""
    method = config.method
    assert isinstance(method, PPOConfig)
    settings = method.gen_experience_kwargs or sweep(method.gen_kwargs)[0].gen_kwargs
    shape = method.num_rollouts, prompt_width, SamplingSettings.from_gen_kwargs(settings, None).max_new_tokens
    epoch = learning(weights, *shape, recomputes=config.train.gradient_checkpointing)
    return added(sampling(weights, *shape), measuring(weights, *shape), epoch.times(method.ppo_epochs))


def evaluation(config: TRLConfig, weights: Weights, n_samples: int, prompt_width: int) -> Work:
    """One evaluation: sampling and measuring, at every value of a sweep."""
    method: Any = config.method
    settings = [SamplingSettings.from_gen_kwargs(each.gen_kwargs, None) for each in sweep(method.gen_kwargs)]
    shapes = [(n_samples, prompt_width, each.max_new_tokens) for each in settings]
    return added(*(part(weights, *shape) for shape in shapes for part in (sampling, measuring)))


def n_evaluations(config: TRLConfig) -> int:
    """How often a run of PPO evaluates: before the first round, where `eval_interval` is crossed, at the end."""
    plan: Any = describe_steps(config)
    before_the_last = plan.rounds - 1
    return 2 + min(before_the_last, before_the_last * plan.steps_per_round // config.train.eval_interval)


def reward_training(weights: int, trained: float, tokens: float, held_out_tokens: float) -> float:
    """Operations of learning a reward model and of scoring what was held out.

    Args:
        weights: in its matrices.
        trained: of those, in the blocks that learn: they are gone through twice more, backward.
        tokens: of all rows and epochs.
    """
    return 2.0 * ((weights + 2 * trained) * tokens + weights * held_out_tokens)
