"""ILQL's heads on the last hidden state: V, one or two Qs, and their targets; and decoding by them.

Q has an output for every token of the vocabulary. Training needs, at the places where a token was chosen, its own Q and
(for CQL) the logarithm of the sum over all: the first is a dot product with one row of the last layer, the second comes
chunk by chunk. So no N x V tensor stays, and the targets never see the vocabulary at all.

Shapes: N chosen tokens, K Q heads, H hidden, I = 2 H inner, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from solotune.algorithms.cross_entropy import linear_cross_entropy
from solotune.algorithms.logprobs import chunked_logprobs
from solotune.data.batches import Batch
from solotune.models.offline import OfflineModel
from solotune.models.policy import ValueHead
from solotune.models.split import Head
from solotune.rollout.records import Rollouts


class QValues(NamedTuple):
    """What the model says of the chosen tokens.

    Args:
        logprobs_N: log-prob of each under the policy.
        qs_KN: its Q, by each head.
        target_qs_KN: its Q by each target head, without gradient.
        values_N: V before it was chosen.
        cql: sum over the heads and tokens of weights_n * -log softmax(Q)[token]; 0 where no weights were given.
    """

    logprobs_N: Tensor
    qs_KN: Tensor
    target_qs_KN: Tensor
    values_N: Tensor
    cql: Tensor


class QHead(nn.Module):
    """Q(s, .) from the last hidden state: Linear(h, 2h), ReLU, Linear(2h, V) in fp32, the last layer zero at the start
    (decoding then begins as the language model)."""

    def __init__(self, hidden_size: int, vocabulary: int, device: torch.device | str | None = None):
        super().__init__()
        self.inner = nn.Linear(hidden_size, 2 * hidden_size, device=device)
        self.outer = nn.Linear(2 * hidden_size, vocabulary, device=device)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def features(self, hidden_NH: Tensor) -> Tensor:
        """What the last layer is given, (N, I)."""
        return self.inner(hidden_NH.float()).relu()

    def of(self, features_NI: Tensor, tokens_N: Tensor) -> Tensor:
        """Q of one token each, (N,)."""
        return (features_NI * self.outer.weight[tokens_N]).sum(-1) + self.outer.bias[tokens_N]

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Q of every token, (N, V)."""
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return self.outer(self.features(hidden_NH))


class Heads(nn.Module):
    """V, one or two Qs and their frozen targets."""

    def __init__(
        self, hidden_size: int, vocabulary: int, two_qs: bool = True, device: torch.device | str | None = None
    ):
        super().__init__()
        self.value_head = ValueHead(hidden_size, device)
        self.q_heads = nn.ModuleList(QHead(hidden_size, vocabulary, device) for _ in range(2 if two_qs else 1))
        self.target_q_heads = copy.deepcopy(self.q_heads).requires_grad_(False)

    @torch.no_grad()
    def sync(self, alpha: float) -> None:
        """Move the targets towards the Q heads: target <- alpha q + (1 - alpha) target."""
        for target, q in zip(self.target_q_heads.parameters(), self.q_heads.parameters(), strict=True):
            target.lerp_(q, alpha)

    def of(self, hidden_NH: Tensor, tokens_N: Tensor, cql_weights_N: Tensor | None) -> tuple[Tensor, ...]:
        """qs_KN, target_qs_KN, values_N and cql of the chosen tokens; see `QValues`.

        CQL's products with the vocabulary are in bf16 where the language model's own are, all else is in fp32.
        """
        device = hidden_NH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
        dtype = dtype if dtype == torch.bfloat16 else torch.float32  # in fp16 small gradients would be 0
        with torch.autocast(device, enabled=False):
            qs, targets, cql = [], [], hidden_NH.new_zeros((), dtype=torch.float32)
            for head in self.q_heads:
                assert isinstance(head, QHead)
                features_NI = head.features(hidden_NH)
                qs.append(head.of(features_NI, tokens_N))
                if cql_weights_N is not None:
                    weight, bias = head.outer.weight, head.outer.bias
                    cql = cql + linear_cross_entropy(features_NI, weight, bias, tokens_N, cql_weights_N, dtype=dtype)
            with torch.no_grad():
                for head in self.target_q_heads:
                    assert isinstance(head, QHead)
                    targets.append(head.of(head.features(hidden_NH), tokens_N))
            return torch.stack(qs), torch.stack(targets), self.value_head(hidden_NH), cql

    def advantages(self, hidden_NH: Tensor) -> Tensor:
        """min over the targets of Q, less V: of every token, (N, V)."""
        q_NV = cast(Tensor, self.target_q_heads[0](hidden_NH))
        for head in list(self.target_q_heads)[1:]:
            q_NV = torch.minimum(q_NV, head(hidden_NH))
        return q_NV - self.value_head(hidden_NH)[:, None]


class WeighedHead:
    """Hidden states to logits for decoding: log pi + beta * (min target Q - V) (Snell et al. 2022, section 4.3)."""

    def __init__(self, head: Head, heads: Heads):
        self._head, self._heads = head, heads
        self.beta = 0.0

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        logits_NV = self._head(hidden_NH)
        if self.beta == 0.0:
            return logits_NV  # of which log pi differs by a constant a row
        return logits_NV.float().log_softmax(-1) + self.beta * self._heads.advantages(hidden_NH)


class ILQLModel(OfflineModel):
    """A language model with ILQL's heads; its further task `values` gives `QValues`."""

    CRITIC_FILE = "ilql_heads.safetensors"

    def __init__(
        self, backbone: PreTrainedModel | PeftModel, two_qs: bool = True, gradient_checkpointing: bool = False
    ):
        super().__init__(backbone, gradient_checkpointing)
        vocabulary = int(cast(nn.Linear, self.lm.get_output_embeddings()).weight.shape[0])
        self.heads = Heads(self.hidden_size, vocabulary, two_qs, self.device)
        self._sampling_head = self._weighed = WeighedHead(self.head, self.heads)

    @property
    def critic(self) -> nn.ModuleDict:
        return nn.ModuleDict(dict(self.heads.named_children()))

    def changing_tensors(self) -> dict[str, Tensor]:
        """Trained tensors, and the targets that follow them."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad or ".target_q_heads." in f".{name}"}

    def sync(self, alpha: float) -> None:
        self.heads.sync(alpha)

    def _passes(self) -> dict[str, Callable[..., Any]]:
        return {**super()._passes(), "values": self._values, "whole_values": self._whole_values}

    def _whole_values(self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor) -> tuple[Any, ...]:
        """Logits (B, T, V), Qs and target Qs (tuples of the same shape) and values (B, T, 1) at every position. For
        looking at a model: training needs them at the chosen tokens alone."""
        inputs: dict[str, Any] = {"position_ids": positions_BT} if self.top.takes_positions else {}
        hidden_BTH = self.decoder.module(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **inputs)[0]
        return self.head(hidden_BTH.flatten(0, 1)).unflatten(0, ids_BT.shape), *self.heads_at(hidden_BTH)

    def heads_at(self, hidden_BTH: Tensor) -> tuple[Any, ...]:
        """Qs and target Qs, tuples of (B, T, V), and values (B, T, 1) of hidden states after the final norm."""
        hidden_NH, shape = hidden_BTH.flatten(0, 1), hidden_BTH.shape[:2]
        qs, targets = (
            tuple(head(hidden_NH).unflatten(0, shape) for head in heads)
            for heads in (self.heads.q_heads, self.heads.target_q_heads)
        )
        values_BT1 = self.heads.value_head(hidden_NH).unflatten(0, shape).unsqueeze(-1)
        return qs, targets, values_BT1

    def _values(self, batch: Batch, trunk_MH: Tensor | None = None, cql_weights_N: Tensor | None = None) -> QValues:
        """What the policy and the heads say of the tokens to learn; see `OfflineModel._hidden`."""
        hidden_NH = self._hidden(batch, trunk_MH)
        logprobs_N = chunked_logprobs(hidden_NH, batch.targets_N, self.head, want_entropy=False).logprobs_N
        return QValues(logprobs_N, *self.heads.of(hidden_NH, batch.targets_N, cql_weights_N))

    def _sample(self, *args: Any, **kwargs: Any) -> Rollouts:
        """As `PolicyModel`, with tokens drawn by the weight of their advantage that the settings say."""
        settings = kwargs["settings"] if "settings" in kwargs else args[4]
        self._weighed.beta = settings.beta
        return super()._sample(*args, **kwargs)
