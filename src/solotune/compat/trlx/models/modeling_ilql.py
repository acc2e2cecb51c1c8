"""ILQL's configuration, its heads, and language models with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from solotune.config import ILQLConfig, default_ilql_config
from solotune.models.ilql import Heads, ILQLModel
from solotune.models.loading import build_policy
from solotune.rollout.records import positions_of

__all__ = [
    "AutoModelForCausalLMWithILQLHeads",
    "AutoModelForSeq2SeqLMWithILQLHeads",
    "CausalILQLOutput",
    "ILQLConfig",
    "ILQLHeads",
    "batched_index_select",
    "topk_mask",
]


def batched_index_select(x: Tensor, idxs: Tensor, dim: int) -> Tensor:
    """The places `idxs` (B, K) of each row along a dimension: (B, T, H) to (B, K, H)."""
    shape = [*idxs.shape[:2], *x.shape[2:]] if dim == 1 else list(x.shape)
    index = idxs.unsqueeze(-1).expand(shape) if x.ndim == 3 else idxs
    return x.gather(dim, index)


def topk_mask(xs: Tensor, k: int) -> Tensor:
    """All but the k largest numbers of each row become minus infinity."""
    if k >= xs.shape[-1]:
        return xs
    return xs.masked_fill(xs < xs.topk(k).values[..., -1:], -torch.inf)


class ILQLHeads(Heads):
    """V, one or two Qs and their targets, on hidden states (B, T, H)."""

    def __init__(
        self, hidden_size: int, vocab_size: int, two_qs: bool = True, alpha: float = 0.001, dtype: Any = torch.float32
    ) -> None:
        super().__init__(hidden_size, vocab_size, two_qs)
        self.alpha = alpha
        self.to(dtype)

    def forward(
        self, hs: Tensor, states_ixs: Tensor | None = None, actions_ixs: Tensor | None = None, **_: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """Qs and target Qs at the places of actions, (B, A, V) each, and V at those of states, (B, S, 1)."""
        states = hs if states_ixs is None else batched_index_select(hs, states_ixs, 1)
        actions = hs if actions_ixs is None else batched_index_select(hs, actions_ixs, 1)
        qs, targets = (
            tuple(head(actions.flatten(0, 1)).unflatten(0, actions.shape[:2]) for head in heads)
            for heads in (self.q_heads, self.target_q_heads)
        )
        values = self.value_head(states.flatten(0, 1)).unflatten(0, states.shape[:2])
        return qs, targets, values.unsqueeze(-1)

    def sync_target_q_heads(self) -> None:
        """Move the targets by `alpha` towards the Qs."""
        self.sync(self.alpha)


@dataclass
class CausalILQLOutput(ModelOutput):
    """logits (B, T, V), qs and target_qs, tuples of (B, T, V), and vs (B, T, 1)."""

    logits: Tensor | None = None
    qs: tuple[Tensor, ...] | None = None
    target_qs: tuple[Tensor, ...] | None = None
    vs: Tensor | None = None


class AutoModelForCausalLMWithILQLHeads(nn.Module):
    """A causal language model with ILQL's heads; a face on `ILQLModel`."""

    ARCH_TYPE: ClassVar[str] = "causal"

    def __init__(self, policy: ILQLModel) -> None:
        super().__init__()
        self.policy = policy

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PreTrainedModel,
        two_qs: bool = True,
        peft_config: Any = None,
        **options: Any,
    ) -> Any:
        """A model by name or folder, with the heads that were saved in the folder, or new ones."""
        given = pretrained_model_name_or_path
        config = default_ilql_config().evolve(
            model={
                "model_path": given,
                "model_arch_type": cls.ARCH_TYPE,
                "peft_config": peft_config,
                "model_extra_configs": options,
            },
            method={"two_qs": two_qs},
        )
        policy = cast(ILQLModel, build_policy(config))
        if isinstance(given, str | Path):
            policy.load_critic(Path(given))
        return cls(policy)

    @property
    def base_model(self) -> nn.Module:
        """The language model, with its adapter."""
        return self.policy.backbone

    @property
    def ilql_heads(self) -> Heads:
        return self.policy.heads

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **_: Any
    ) -> CausalILQLOutput:
        """Logits, Qs, target Qs and values at every position."""
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions_BT = positions_of(mask_BT) if position_ids is None else position_ids
        whole = self.policy("whole_values", input_ids, mask_BT, positions_BT)
        return CausalILQLOutput(*whole)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """`transformers.generate` of the language model, without the heads."""
        return self.policy.generate(*args, **kwargs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what PEFT or transformers load, and the heads beside it."""
        self.policy.save_pretrained(folder)


class AutoModelForSeq2SeqLMWithILQLHeads(AutoModelForCausalLMWithILQLHeads):
    """The same on an encoder-decoder: the heads are on the decoder's last hidden state."""

    ARCH_TYPE = "seq2seq"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        **_: Any,
    ) -> CausalILQLOutput:
        """Logits, Qs, target Qs and values at every position of the decoder."""
        lm: Any = self.policy.lm
        whole = lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            output_hidden_states=True,
            use_cache=False,
        )
        return CausalILQLOutput(whole.logits, *self.policy.heads_at(whole.decoder_hidden_states[-1]))
