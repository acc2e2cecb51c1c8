import weakref

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from solotune.algorithms import ShapeError, chunked_logprobs

N, H, V = 37, 6, 211


class Head(torch.nn.Module):
    """A linear head with Gemma 2's soft-capping, and optionally a low-rank adapter."""

    def __init__(self, adapter=False, cap=4.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(V, H, dtype=torch.float64), requires_grad=False)
        self.down = torch.nn.Parameter(torch.randn(2, H, dtype=torch.float64), requires_grad=adapter)
        self.up = torch.nn.Parameter(torch.randn(V, 2, dtype=torch.float64), requires_grad=adapter)
        self.cap = cap

    def forward(self, hidden):
        logits = hidden @ self.weight.T + hidden @ self.down.T @ self.up.T
        return self.cap * torch.tanh(logits / self.cap)


@pytest.fixture(name="hidden_NH")
def make_hidden():
    return torch.randn(N, H, dtype=torch.float64, requires_grad=True)


@pytest.fixture(name="targets_N")
def make_targets():
    return torch.randint(V, (N,))


def reference(hidden_NH, targets_N, head, temperature):
    distribution = torch.distributions.Categorical(logits=head(hidden_NH) / temperature)
    return distribution.log_prob(targets_N), distribution.entropy()


# 1 row, sizes that do not divide 37, exactly 37, more than 37, and the default
CHUNKS = [1, 5, 36, 37, 100, None]


@pytest.mark.parametrize("adapter", [False, True], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_values_and_gradients_are_those_of_all_logits_at_once(hidden_NH, targets_N, adapter, temperature, chunk):
    head = Head(adapter)
    expected_N, expected_entropies_N = reference(hidden_NH, targets_N, head, temperature)
    stats = chunked_logprobs(hidden_NH, targets_N, head, temperature, chunk)
    torch.testing.assert_close(stats.logprobs_N, expected_N)
    torch.testing.assert_close(stats.entropies_N, expected_entropies_N)
    assert not stats.entropies_N.requires_grad

    learnt = [hidden_NH, *(p for p in head.parameters() if p.requires_grad)]
    upstream_N = torch.randn(N, dtype=torch.float64)
    grads = torch.autograd.grad(stats.logprobs_N, learnt, upstream_N)
    expected_grads = torch.autograd.grad(expected_N, learnt, upstream_N)
    assert len(grads) == (3 if adapter else 1)
    for grad, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("adapter", [False, True], ids=["frozen head", "trainable head"])
def test_gradients_are_the_slopes_of_the_values(targets_N, adapter):
    head = Head(adapter)
    hidden_NH = torch.randn(5, H, dtype=torch.float64, requires_grad=True)
    learnt = [hidden_NH, *((head.down,) if adapter else ())]

    def logprobs(hidden_NH, *_):
        return chunked_logprobs(hidden_NH, targets_N[:5], head, 0.8, 2).logprobs_N

    assert gradcheck(logprobs, learnt, fast_mode=False)


def test_a_loss_that_is_not_a_mean_gets_its_gradient_too(hidden_NH, targets_N):
    head = Head()
    losses = [
        (logprobs_N.exp() * torch.arange(N)).square().sum()
        for logprobs_N in (
            chunked_logprobs(hidden_NH, targets_N, head, chunk=8).logprobs_N,
            reference(hidden_NH, targets_N, head, 1.0)[0],
        )
    ]
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden_NH)[0] for loss in losses))


def test_a_head_that_trains_on_frozen_hidden_states(hidden_NH, targets_N):
    head = Head(adapter=True)
    chunked_logprobs(hidden_NH.detach(), targets_N, head, chunk=8).logprobs_N.sum().backward()
    (expected,) = torch.autograd.grad(reference(hidden_NH, targets_N, head, 1.0)[0].sum(), head.up)
    torch.testing.assert_close(head.up.grad, expected)


def test_a_frozen_head_runs_once_for_forward_and_backward(hidden_NH, targets_N):
    head, rows = Head(), 0

    def counted(hidden):
        nonlocal rows
        rows += len(hidden)
        return head(hidden)

    chunked_logprobs(hidden_NH, targets_N, counted, chunk=8).logprobs_N.sum().backward()
    assert rows == N


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("adapter", [False, True], ids=["frozen head", "trainable head"])
def test_without_gradients_the_values_are_the_same_to_the_bit(hidden_NH, targets_N, adapter, mode):
    head = Head(adapter)
    with_grad = chunked_logprobs(hidden_NH, targets_N, head, 0.7, 8)
    with mode():
        without = chunked_logprobs(hidden_NH, targets_N, head, 0.7, 8)
    assert not without.logprobs_N.requires_grad
    assert torch.equal(without.logprobs_N, with_grad.logprobs_N)  # to the bit: the first ratio of a round is 1
    assert torch.equal(without.entropies_N, with_grad.entropies_N)


def test_entropy_is_left_out_when_not_wanted(hidden_NH, targets_N):
    for adapter in (False, True):
        assert chunked_logprobs(hidden_NH, targets_N, Head(adapter), want_entropy=False).entropies_N is None


def test_rows_do_not_depend_on_their_company(hidden_NH, targets_N):
    head = Head()
    alone = chunked_logprobs(hidden_NH[3:4], targets_N[3:4], head).logprobs_N
    torch.testing.assert_close(alone, chunked_logprobs(hidden_NH, targets_N, head, chunk=10).logprobs_N[3:4])


@pytest.mark.parametrize("adapter", [False, True], ids=["frozen head", "trainable head"])
def test_no_rows_are_no_logprobs(hidden_NH, targets_N, adapter):
    stats = chunked_logprobs(hidden_NH[:0], targets_N[:0], Head(adapter))
    assert stats.logprobs_N.shape == stats.entropies_N.shape == (0,)
    stats.logprobs_N.sum().backward()  # a process without tokens still takes part in the step
    assert (hidden_NH.grad == 0).all()


@pytest.mark.parametrize("adapter", [False, True], ids=["frozen head", "trainable head"])
def test_bfloat16_logits_are_summed_in_float32(adapter):
    hidden_NH = torch.randn(N, H, dtype=torch.bfloat16, requires_grad=True)
    targets_N = torch.randint(V, (N,))
    weight = torch.randn(V, H, dtype=torch.bfloat16, requires_grad=adapter)
    stats = chunked_logprobs(hidden_NH, targets_N, lambda x: x @ weight.T, 0.7, 8)
    expected_N = ((hidden_NH @ weight.T).float() / 0.7).log_softmax(dim=1).gather(1, targets_N[:, None])[:, 0]
    assert stats.logprobs_N.dtype == stats.entropies_N.dtype == torch.float32
    torch.testing.assert_close(stats.logprobs_N, expected_N, atol=2e-6, rtol=0)
    (grad,) = torch.autograd.grad(stats.logprobs_N.sum(), hidden_NH)
    (expected,) = torch.autograd.grad(expected_N.sum(), hidden_NH)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, expected, atol=0.05, rtol=0.02)


def test_extreme_logits_stay_finite(targets_N):
    weight = torch.randn(V, H) * 200
    hidden_NH = torch.randn(N, H, requires_grad=True)
    stats = chunked_logprobs(hidden_NH, targets_N, lambda x: x @ weight.T, 0.1, 8)
    expected_N = (hidden_NH @ weight.T / 0.1).log_softmax(dim=1).gather(1, targets_N[:, None])[:, 0]
    torch.testing.assert_close(stats.logprobs_N, expected_N)
    assert torch.autograd.grad(stats.logprobs_N.sum(), hidden_NH)[0].isfinite().all()
    assert (stats.entropies_N > -1e-2).all()


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


class Kept:
    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("adapter", [False, True], ids=["frozen head", "trainable head"])
def test_all_logits_never_exist_at_once_nor_are_they_kept_in_pieces(adapter):
    tokens, chunk = 600, 7
    hidden_NH = torch.randn(tokens, H, dtype=torch.float64, requires_grad=True)
    head = Head(adapter)
    alive = weakref.WeakSet()

    def keep(tensor):
        kept = Kept(tensor.detach())
        alive.add(kept)
        return kept

    with LargestTensor() as largest:
        with saved_tensors_hooks(keep, lambda kept: kept.tensor):
            logprobs_N = chunked_logprobs(hidden_NH, torch.randint(V, (tokens,)), head, 0.7, chunk).logprobs_N
        forward_peak = largest.numel
        kept_for_backward = sum(kept.tensor.numel() for kept in alive)
        logprobs_N.sum().backward()
    allowed = max(chunk * V, tokens * H)
    assert chunk * V <= forward_peak <= allowed  # the mode did see the logits
    assert largest.numel <= allowed
    assert kept_for_backward <= 2 * tokens * H < tokens * V / 10


def test_misuse_is_named(hidden_NH, targets_N):
    head = Head()
    with pytest.raises(ShapeError, match=r"targets_N \(36,\)"):
        chunked_logprobs(hidden_NH, targets_N[:-1], head)
    with pytest.raises(ShapeError, match="logits_of gave"):
        chunked_logprobs(hidden_NH, targets_N, lambda x: head(x).sum(dim=1))
    with pytest.raises(ValueError, match="temperature=0"):
        chunked_logprobs(hidden_NH, targets_N, head, temperature=0.0)
    with pytest.raises(ValueError, match="chunk=0"):
        chunked_logprobs(hidden_NH, targets_N, head, chunk=0)
