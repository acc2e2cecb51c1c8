"""ILQL's heads on the last hidden state: V, one or two Qs, and their targets; and decoding by them.

Q has an output for every token of the vocabulary. Training needs, at the places where a token was chosen, its own Q and
(for CQL) the logarithm of the sum over all: the first is a dot product with one row of the last layer, the second comes
chunk by chunk. So no N x V tensor stays, and the targets never see the vocabulary at all. Tokens that the data never
choose are all alike to Q, and share one row of its last layer.

Shapes: N chosen tokens, K Q heads, H hidden, I = 2 H inner, V vocabulary, R rows of the last layer, C tokens with a row
of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from solotune.algorithms.cross_entropy import linear_cross_entropy
from solotune.algorithms.logprobs import chunked_logprobs
from solotune.data.batches import Batch
from solotune.errors import ModelError
from solotune.models.critic import ValueHead
from solotune.models.offline import OfflineModel
from solotune.models.split import Head
from solotune.rollout.records import Rollouts


class QValues(NamedTuple):
    """What the model says of the chosen tokens.

    Args:
        logprobs_N: log-prob of each under the policy; 0 where nobody asked.
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


class TokenRows(nn.Module):
    """Which row of a Q head's last layer is whose.

    That layer is zero at the start, and all that a token's row learns from, where no sample chooses the token, is CQL's
    logarithm of a sum, in which such tokens are alike: their rows would have the same gradient in every step and stay
    equal, under any optimizer that treats numbers one by one. So one row, the last, stands for all of them. Where the
    data choose 20,309 of 262,144 tokens, products, weights and the optimizer's state are a 13th; Q is the same.

    Args:
        vocabulary: tokens there are.
        tokens_C: those with a row of their own, ascending; None for all.
    Raises:
        ValueError: they are not ascending tokens of the vocabulary.
    """

    def __init__(self, vocabulary: int, tokens_C: Tensor | None = None, device: torch.device | str | None = None):
        super().__init__()
        own = vocabulary if tokens_C is None else len(tokens_C)
        self.n_sharing = vocabulary - own
        self.n_rows = own + (self.n_sharing > 0)
        self.rows_V: Tensor | None  # saved with the heads
        self.register_buffer("rows_V", None)
        if tokens_C is not None:
            bounds = torch.tensor([-1, *tokens_C.tolist(), vocabulary])
            if not (bounds.diff() > 0).all():
                raise ValueError(f"the tokens with a Q of their own are not ascending numbers below {vocabulary}")
            self.rows_V = torch.full((vocabulary,), own, device=device)
            self.rows_V[tokens_C.to(device)] = torch.arange(own, device=device)

    def of(self, tokens_N: Tensor) -> Tensor:
        """The row of each token, (N,)."""
        return tokens_N if self.rows_V is None else self.rows_V[tokens_N]

    def widened(self, q_NR: Tensor) -> Tensor:
        """From a number a row to a number a token, (N, V)."""
        return q_NR if self.rows_V is None else q_NR[:, self.rows_V]


class QHead(nn.Module):
    """Q(s, .) from the last hidden state: Linear(h, 2h), ReLU, Linear(2h, R) in fp32, the last layer zero at the start
    (decoding then begins as the language model)."""

    def __init__(self, hidden_size: int, n_rows: int, device: torch.device | str | None = None):
        super().__init__()
        self.inner = nn.Linear(hidden_size, 2 * hidden_size, device=device)
        self.outer = nn.Linear(2 * hidden_size, n_rows, device=device)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def features(self, hidden_NH: Tensor) -> Tensor:
        """What the last layer is given, (N, I)."""
        return self.inner(hidden_NH.float()).relu()

    def of(self, features_NI: Tensor, rows_N: Tensor) -> Tensor:
        """Q of one row each, (N,)."""
        weight_NI = functional.embedding(rows_N, self.outer.weight)  # whose gradient takes a quarter of an index's
        return (features_NI * weight_NI).sum(-1) + self.outer.bias[rows_N]

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Q of every row, (N, R)."""
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return self.outer(self.features(hidden_NH))


class Heads(nn.Module):
    """V, one or two Qs and their frozen targets.

    Args:
        tokens_C: the tokens that the data choose; see `TokenRows`.
    """

    def __init__(
        self,
        hidden_size: int,
        vocabulary: int,
        two_qs: bool = True,
        device: torch.device | str | None = None,
        tokens_C: Tensor | None = None,
    ):
        super().__init__()
        self.rows = TokenRows(vocabulary, tokens_C, device)
        self.value_head = ValueHead(hidden_size, device)
        self.q_heads = nn.ModuleList(QHead(hidden_size, self.rows.n_rows, device) for _ in range(2 if two_qs else 1))
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
        rows_N, copies = self.rows.of(tokens_N), max(self.rows.n_sharing, 1)
        with torch.autocast(device, enabled=False):
            qs, targets, cql = [], [], hidden_NH.new_zeros((), dtype=torch.float32)
            for head in self.q_heads:
                assert isinstance(head, QHead)
                features_NI = head.features(hidden_NH)
                qs.append(head.of(features_NI, rows_N))
                if cql_weights_N is not None:
                    cql = cql + linear_cross_entropy(
                        features_NI, head.outer.weight, head.outer.bias, rows_N, cql_weights_N,
                        dtype=dtype, copies_of_last=copies,
                    )  # fmt: skip
            with torch.no_grad():
                for head in self.target_q_heads:
                    assert isinstance(head, QHead)
                    targets.append(head.of(head.features(hidden_NH), rows_N))
            return torch.stack(qs), torch.stack(targets), self.value_head(hidden_NH), cql

    def advantages(self, hidden_NH: Tensor) -> Tensor:
        """min over the targets of Q, less V: of every token, (N, V)."""
        q_NR = cast(Tensor, self.target_q_heads[0](hidden_NH))
        for head in list(self.target_q_heads)[1:]:
            q_NR = torch.minimum(q_NR, head(hidden_NH))
        return self.rows.widened(q_NR - self.value_head(hidden_NH)[:, None])


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
    """A language model with ILQL's heads; its further task `values` gives `QValues`.

    Args:
        tokens_C: the tokens that the data choose; see `TokenRows`.
    """

    CRITIC_FILE = "ilql_heads.safetensors"

    def __init__(
        self,
        backbone: PreTrainedModel | PeftModel,
        two_qs: bool = True,
        gradient_checkpointing: bool = False,
        tokens_C: Tensor | None = None,
    ):
        super().__init__(backbone, gradient_checkpointing)
        vocabulary = int(cast(nn.Linear, self.lm.get_output_embeddings()).weight.shape[0])
        if tokens_C is not None and (largest := int(tokens_C.max())) >= vocabulary:
            raise ModelError(
                f"the samples have token {largest:,}, but the model has {vocabulary:,}; use the model's own tokenizer"
            )
        self.heads = Heads(self.hidden_size, vocabulary, two_qs, self.device, tokens_C)
        self._sampling_head = self._weighed = WeighedHead(self.head, self.heads)

    def load_critic(self, folder: Path) -> None:
        """Read the heads that `save_pretrained` wrote; a shared row becomes one of its own for each of its tokens, so
        that the heads can go on learning from any tokens.

        Raises:
            ModelError: the file's rows are not those of this model's tokens.
        """
        path = folder / self.CRITIC_FILE
        if not path.exists():
            return
        saved = load_file(path)
        if (rows_V := saved.pop("rows.rows_V", None)) is not None:
            n_rows = min((len(each) for name, each in saved.items() if ".outer." in name), default=0)
            vocabulary = self.heads.q_heads[0].outer.out_features  # type: ignore[union-attr]
            fits = rows_V.dtype == torch.int64 and rows_V.shape == (vocabulary,)
            if not fits or not ((rows_V >= 0) & (rows_V < n_rows)).all():
                raise ModelError(f"{str(path)!r}: 'rows.rows_V' must say for {vocabulary:,} tokens which row is theirs")
            saved = {name: each[rows_V] if ".outer." in name else each for name, each in saved.items()}
        self.critic.load_state_dict(saved)

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
            tuple(self.heads.rows.widened(head(hidden_NH)).unflatten(0, shape) for head in heads)
            for heads in (self.heads.q_heads, self.heads.target_q_heads)
        )
        values_BT1 = self.heads.value_head(hidden_NH).unflatten(0, shape).unsqueeze(-1)
        return qs, targets, values_BT1

    def _values(
        self,
        batch: Batch,
        trunk_MH: Tensor | None = None,
        cql_weights_N: Tensor | None = None,
        want_logprobs: bool = True,
    ) -> QValues:
        """What the policy and the heads say of the tokens to learn; see `OfflineModel._hidden`."""
        hidden_NH = self._hidden(batch, trunk_MH)
        logprobs_N = hidden_NH.new_zeros(len(hidden_NH), dtype=torch.float32)
        if want_logprobs or cast(nn.Linear, self.lm.get_output_embeddings()).weight.requires_grad:
            logprobs_N = chunked_logprobs(hidden_NH, batch.targets_N, self.head, want_entropy=False).logprobs_N
        return QValues(logprobs_N, *self.heads.of(hidden_NH, batch.targets_N, cql_weights_N))

    def _sample(self, *args: Any, **kwargs: Any) -> Rollouts:
        """As `PolicyModel`, with tokens drawn by the weight of their advantage that the settings say."""
        settings = kwargs["settings"] if "settings" in kwargs else args[4]
        self._weighed.beta = settings.beta
        return super()._sample(*args, **kwargs)
