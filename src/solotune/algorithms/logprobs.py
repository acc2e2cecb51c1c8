"""Log-probabilities of given tokens without the logits of all of them at once.

Shapes: N tokens (response positions of all rows, packed), H hidden size, V vocabulary, c tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from solotune.algorithms.masks import ShapeError

LogitsOf = Callable[[Tensor], Tensor]
"""The language-model head: (c, H) hidden states to (c, V) logits, each row by itself, whatever happens in between."""

# Logits of a chunk, c * V. On a CPU the chunk should stay near the caches, but 64 rows at least share
# a reading of the head; a GPU wants large matrix products. Three buffers of this size at most are alive at once.
CPU_CHUNK_ELEMENTS = 2**22
GPU_CHUNK_ELEMENTS = 2**25
LEAST_CPU_ROWS = 64
CPU_GROUP_ELEMENTS = 2**20  # of a chunk's rows, gone over at a time: 4 MB
LEAST_GROUP_ROWS = 4


class LogprobStats(NamedTuple):
    """logprobs_N: log p of each target, nats, float32 (float64 for float64 logits).

    entropies_N: entropy of each position's distribution, nats, same dtype, without gradient; None if not asked for.
    """

    logprobs_N: Tensor
    entropies_N: Tensor | None


def chunked_logprobs(
    hidden_NH: Tensor,
    targets_N: Tensor,
    logits_of: LogitsOf,
    temperature: float = 1.0,
    chunk: int | None = None,
    want_entropy: bool = True,
) -> LogprobStats:
    """log softmax(logits / temperature) at the targets; only the logits of one chunk exist at a time.

    Differentiable with respect to the hidden states and to every trainable parameter that `logits_of` uses. With a
    frozen head nothing is computed twice: the derivative of a log-probability by its logits, (onehot - softmax) /
    temperature, does not depend on what comes after, so the forward pass pulls it through the head at once and keeps
    d logprob / d hidden, (N, H), for the backward pass to scale: two matrix products with the vocabulary where
    recomputing takes three. (Liger's fused cross-entropy, arXiv:2410.10989, section 3.2, does this for a mean loss;
    here it holds for any loss of the log-probabilities.) A trainable head's chunks are recomputed in the backward pass.

    Args:
        hidden_NH: hidden states that predict the targets, (N, H), float.
        targets_N: token ids, (N,), int64.
        logits_of: the head, with whatever the model does to its logits (soft-capping, LoRA). It must take any number
            of rows, 0 included: that is how its vocabulary and its trainable parameters are found.
        temperature: what the tokens were sampled with, > 0.
        chunk: rows of logits at a time; None takes as many as fit in a few tens of MB on a CPU, in a few hundred
            elsewhere.
        want_entropy: also compute the entropies (one more sweep over the logits).
    Returns:
        LogprobStats(logprobs_N, entropies_N). Differentiable once.
    Raises:
        ShapeError: hidden states are not (N, H), targets not (N,), or logits not (c, V).
        ValueError: temperature or chunk is not above 0.
    """
    if hidden_NH.ndim != 2 or targets_N.shape != hidden_NH.shape[:1]:
        raise ShapeError(
            f"hidden_NH {tuple(hidden_NH.shape)}, targets_N {tuple(targets_N.shape)}; pass (N, H) and (N,): "
            "select the response positions of all rows first"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: it must be above 0 (a greedy choice has no log-probability)")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: it must be at least 1 row, or None")

    vocabulary, head_trains = _inspect_head(logits_of, hidden_NH)
    if chunk is None:
        chunk = rows_of_chunk(vocabulary, hidden_NH.device)
    if head_trains:
        return _with_trainable_head(hidden_NH, targets_N, logits_of, temperature, chunk, want_entropy)
    if torch.is_grad_enabled() and hidden_NH.requires_grad:
        return LogprobStats(
            *_FrozenHeadLogprobs.apply(hidden_NH, targets_N, logits_of, temperature, chunk, want_entropy)
        )
    with torch.no_grad():
        logprobs_N, entropies_N, _ = _sweep(hidden_NH, targets_N, logits_of, temperature, chunk, want_entropy, False)
    return LogprobStats(logprobs_N, entropies_N)


def rows_of_chunk(vocabulary: int, device: torch.device) -> int:
    """How many rows of logits suit the device."""
    if device.type == "cpu":
        return max(LEAST_CPU_ROWS, CPU_CHUNK_ELEMENTS // vocabulary)
    return max(1, GPU_CHUNK_ELEMENTS // vocabulary)


def _inspect_head(logits_of: LogitsOf, hidden_NH: Tensor) -> tuple[int, bool]:
    """The vocabulary's size, and whether a gradient would reach anything but the hidden states.

    Asked with no rows at all, so it costs nothing. The answer comes from the recorded graph, not from the caller: a
    trainable parameter that was forgotten would get no gradient, without an error.
    """
    no_hidden = hidden_NH.new_zeros((0, hidden_NH.shape[1])).requires_grad_()
    with torch.enable_grad():
        no_logits = logits_of(no_hidden)
    if no_logits.ndim != 2 or no_logits.shape[0] != 0:
        raise ShapeError(f"logits_of gave {tuple(no_logits.shape)} for hidden states (0, H); it must give (0, V)")
    nodes, seen = [no_logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # AccumulateGrad: where a leaf's gradient arrives
        if leaf is not None and leaf is not no_hidden:
            return no_logits.shape[1], True
        nodes.extend(parent for parent, _ in node.next_functions)
    return no_logits.shape[1], False


class _FrozenHeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        targets_N: Tensor,
        logits_of: LogitsOf,
        temperature: float,
        chunk: int,
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logprobs_N, entropies_N, slopes_NH = _sweep(
            hidden_NH, targets_N, logits_of, temperature, chunk, want_entropy, True
        )
        ctx.save_for_backward(slopes_NH)
        if entropies_N is not None:
            ctx.mark_non_differentiable(entropies_N)
        return logprobs_N, entropies_N

    @staticmethod
    @once_differentiable  # which hides the signature from pyright
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (slopes_NH,) = ctx.saved_tensors
        return grads[0][:, None] * slopes_NH, None, None, None, None, None


def _sweep(
    hidden_NH: Tensor,
    targets_N: Tensor,
    logits_of: LogitsOf,
    temperature: float,
    chunk: int,
    want_entropy: bool,
    want_slopes: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probs, entropies and slopes d logprob / d hidden, (N, H), in one pass over the chunks."""
    parts: list[_Softmax] = []
    slopes: list[Tensor] = []
    buffers: dict[
        str, Tensor
    ] = {}  # one each for all chunks: on a CPU fresh pages cost more than the arithmetic in them

    def in_buffer(name: str, like_cV: Tensor, dtype: torch.dtype) -> Tensor:
        if name not in buffers:
            buffers[name] = torch.empty_like(like_cV, dtype=dtype)
        return buffers[name][: len(like_cV)]

    for rows_cH, targets_c in zip(hidden_NH.split(chunk), targets_N.split(chunk), strict=True):
        rows_cH = rows_cH.detach().requires_grad_(want_slopes)
        with torch.set_grad_enabled(want_slopes):
            logits_cV = logits_of(rows_cH)
        with torch.no_grad():
            wide = torch.promote_types(logits_cV.dtype, torch.float32)
            wide_cV = logits_cV if logits_cV.dtype == wide else in_buffer("wide", logits_cV, wide)
            is_free = wide_cV is not logits_cV and not want_entropy
            weights_cV = wide_cV if is_free else in_buffer("weights", logits_cV, wide)
            slopes_cV = weights_cV
            if want_slopes and logits_cV.dtype != wide:
                slopes_cV = in_buffer("narrow", logits_cV, logits_cV.dtype)
            group, given = _rows_of_group(logits_cV), (logits_cV, wide_cV, weights_cV, slopes_cV, targets_c)
            of_chunk = [
                _softmax(given_r, temperature, want_entropy, want_slopes)
                for given_r in zip(*(x.split(group) for x in given), strict=True)
            ]
            parts += of_chunk
            if want_slopes:
                # d logprob / d logits = (onehot - weights / totals) / temperature. The two divisions are done on the
                # (c, H) result, since the head's derivative is linear and keeps rows apart.
                (pulled_cH,) = torch.autograd.grad(logits_cV, rows_cH, slopes_cV)
                totals_c1 = torch.cat([part.totals_c1 for part in of_chunk])
                slopes.append(pulled_cH.to(wide) / (-temperature * totals_c1))
    return (
        torch.cat([part.logprobs_c1 for part in parts])[:, 0],
        torch.cat([part.entropies_c1 for part in parts])[:, 0] if want_entropy else None,
        torch.cat(slopes) if want_slopes else None,
    )


class _Softmax(NamedTuple):
    logprobs_c1: Tensor
    entropies_c1: Tensor
    totals_c1: Tensor


def _rows_of_group(logits_cV: Tensor) -> int:
    """Rows that are gone over together: on a CPU so many that they stay in its cache while they are."""
    if logits_cV.device.type != "cpu":
        return len(logits_cV)
    return max(LEAST_GROUP_ROWS, CPU_GROUP_ELEMENTS // logits_cV.shape[1])


def _softmax(given_c: tuple[Tensor, ...], temperature: float, want_entropy: bool, want_slopes: bool) -> _Softmax:
    """Log-probs, entropies (zero if not wanted) and totals of some rows, and what is pulled back in `slopes_cV`.

    softmax = weights / totals, with weights = exp((logits - max) / temperature).

    Args:
        given_c: logits_cV; wide_cV, the same or room for them in fp32; weights_cV, room, or the same as that;
            slopes_cV, room in the logits' precision, or the same as the weights; targets_c.
    """
    logits_cV, wide_cV, weights_cV, slopes_cV, targets_c = given_c
    if wide_cV.data_ptr() != logits_cV.data_ptr():
        wide_cV.copy_(logits_cV)
    shifts_c1 = wide_cV.amax(dim=1, keepdim=True) / -temperature
    chosen_c1 = wide_cV.gather(1, targets_c[:, None]) / temperature
    torch.add(shifts_c1, wide_cV, alpha=1 / temperature, out=weights_cV).exp_()
    totals_c1 = weights_cV.sum(dim=1, keepdim=True)
    logsumexp_c1 = totals_c1.log() - shifts_c1
    entropies_c1 = torch.zeros_like(logsumexp_c1)
    if want_entropy:
        mean_logits_c1 = _row_dots(weights_cV, wide_cV) / totals_c1
        entropies_c1 = logsumexp_c1 - mean_logits_c1 / temperature
    if want_slopes:
        weights_cV.scatter_add_(1, targets_c[:, None], -totals_c1)
        if slopes_cV.dtype != weights_cV.dtype:
            slopes_cV.copy_(weights_cV)
    return _Softmax(chosen_c1 - logsumexp_c1, entropies_c1, totals_c1)


def _with_trainable_head(
    hidden_NH: Tensor, targets_N: Tensor, logits_of: LogitsOf, temperature: float, chunk: int, want_entropy: bool
) -> LogprobStats:
    def of_chunk(rows_cH: Tensor, targets_c: Tensor) -> tuple[Tensor, Tensor | None]:
        logits_cV = logits_of(rows_cH)
        logits_cV = logits_cV if logits_cV.dtype == torch.float64 else logits_cV.float()
        # The same operations as in _sweep, so that both paths give the same bits.
        shifts_c1 = logits_cV.detach().amax(dim=1, keepdim=True) / -temperature
        weights_cV = torch.add(shifts_c1, logits_cV, alpha=1 / temperature).exp()
        totals_c1 = weights_cV.sum(dim=1, keepdim=True)
        logsumexp_c1 = totals_c1.log() - shifts_c1
        logprobs_c = (logits_cV.gather(1, targets_c[:, None]) / temperature - logsumexp_c1)[:, 0]
        entropies_c = None
        if want_entropy:
            with torch.no_grad():
                mean_logits_c1 = _row_dots(weights_cV, logits_cV) / totals_c1
                entropies_c = (logsumexp_c1 - mean_logits_c1 / temperature)[:, 0]
        return logprobs_c, entropies_c

    logprobs, entropies = [], []
    for rows_cH, targets_c in zip(hidden_NH.split(chunk), targets_N.split(chunk), strict=True):
        logprobs_c, entropies_c = checkpoint(of_chunk, rows_cH, targets_c, use_reentrant=False)
        logprobs.append(logprobs_c)
        entropies.append(entropies_c)
    return LogprobStats(torch.cat(logprobs), torch.cat(entropies) if want_entropy else None)


def _row_dots(a_cV: Tensor, b_cV: Tensor) -> Tensor:
    """The scalar product of each row of a with that of b, (c, 1); on a CPU without their (c, V) product."""
    if a_cV.device.type != "cpu":
        return (a_cV * b_cV).sum(dim=1, keepdim=True)  # a product of matrices may be rounded to TF32
    dots_c1 = a_cV.new_empty((len(a_cV), 1))
    for row, (a_V, b_V) in enumerate(zip(a_cV, b_cV, strict=True)):
        dots_c1[row, 0] = a_V.dot(b_V)  # a quarter of the time of the batched product on a CPU
    return dots_c1
