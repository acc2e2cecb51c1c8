"""PPO's configuration, KL controllers and value-head models.

trlX had a decoder loop per architecture (`...ModelBranch`) to resume a model at one of its blocks. Here one mechanism
does that for all of them (`solotune.models.split`), so those classes are gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from solotune.algorithms.kl import AdaptiveKLController, FixedKLController
from solotune.compat.shims import absent
from solotune.config import PPOConfig, default_ppo_config
from solotune.errors import ConfigError, ModelError
from solotune.models.adapters import switch_off_dropout
from solotune.models.critic import ValueBranch, saved_branch_blocks
from solotune.models.loading import auto_class, build_policy
from solotune.models.policy import PolicyModel, WholePass
from solotune.models.seq2seq import Seq2SeqPolicy
from solotune.models.split import Decoder
from solotune.rollout.records import positions_of

__all__ = [
    "AdaptiveKLController",
    "AutoModelForCausalLMWithHydraValueHead",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithHydraValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "CausalLMOutputWithValue",
    "FixedKLController",
    "ModelBranch",
    "PPOConfig",
    "Seq2SeqLMOutputWithValue",
    "hf_get_branch_class",
]

_BRANCH = "not needed: solotune.models.split resumes every architecture by its own forward"
ModelBranch = GPTModelBranch = OPTModelBranch = BloomModelBranch = absent("ModelBranch", _BRANCH)
LlamaModelBranch = GPTBigCodeModelBranch = T5Branch = ModelBranch
hf_get_branch_class = absent("hf_get_branch_class", _BRANCH)


@dataclass
class CausalLMOutputWithValue(ModelOutput):
    """logits (B, T, V) and value (B, T)."""

    logits: Tensor | None = None
    value: Tensor | None = None


@dataclass
class Seq2SeqLMOutputWithValue(CausalLMOutputWithValue):
    """The same of the decoder."""


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A causal language model and a value head; a face on `PolicyModel`."""

    ARCH_TYPE: ClassVar[str] = "causal"

    def __init__(self, policy: PolicyModel) -> None:
        super().__init__()
        self.policy = policy

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PreTrainedModel,
        num_layers_unfrozen: int = -1,
        num_value_layers_unfrozen: int = 0,
        peft_config: Any = None,
        **options: Any,
    ) -> Any:
        """A model by name or folder, with the value head (and adapter) that was saved in the folder, or new ones."""
        given = pretrained_model_name_or_path
        folder = Path(given) if isinstance(given, str | Path) else None
        branch = num_value_layers_unfrozen or (saved_branch_blocks(folder) if folder is not None else 0)
        if peft_config is None and folder is not None and (folder / "adapter_config.json").exists():
            base = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
            if not (folder / "adapter_model.safetensors").is_file():
                raise ModelError(f"{str(folder)!r} has no adapter_model.safetensors; pickled adapters are not loaded")
            kind = auto_class(AutoConfig.from_pretrained(base), cls.ARCH_TYPE)
            lm = kind.from_pretrained(base, **{**options, "use_safetensors": True}).requires_grad_(False)
            value_branch = ValueBranch(Decoder(lm), branch) if branch else None
            tuned = PeftModel.from_pretrained(lm, str(folder), is_trainable=True)
            switch_off_dropout(tuned)
            is_seq2seq = cls.ARCH_TYPE == "seq2seq"
            policy = Seq2SeqPolicy(tuned) if is_seq2seq else PolicyModel(tuned, value_branch=value_branch)
        else:
            config = default_ppo_config().evolve(
                model={
                    "model_path": given,
                    "model_arch_type": cls.ARCH_TYPE,
                    "num_layers_unfrozen": num_layers_unfrozen,
                    "peft_config": peft_config,
                    "model_extra_configs": options,
                },
                method={"num_value_layers_unfrozen": branch},
            )
            policy = build_policy(config)
        if folder is not None:
            policy.load_critic(folder)
        return cls(policy)

    @property
    def base_model(self) -> nn.Module:
        """The language model, with its adapter."""
        return self.policy.backbone

    @property
    def v_head(self) -> nn.Module:
        return self.policy.critic["value_head"]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> CausalLMOutputWithValue | tuple[Tensor, ...]:
        """Logits of the policy and values, at every position; without `return_dict` a tuple with the values last."""
        whole = self._whole(input_ids, attention_mask, position_ids)
        output = CausalLMOutputWithValue(logits=whole.logits_BTV, value=whole.values_BT)
        return output if return_dict else output.to_tuple()

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """`transformers.generate` of the language model."""
        return self.policy.generate(*args, **kwargs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what PEFT or transformers load, and the value head beside it."""
        self.policy.save_pretrained(folder)

    def _whole(self, ids_BT: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None) -> WholePass:
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        return self.policy("whole", ids_BT, mask_BT, positions_of(mask_BT) if positions_BT is None else positions_BT)


class AutoModelForCausalLMWithHydraValueHead(AutoModelForCausalLMWithValueHead):
    """The same with the frozen reference."""

    @torch.no_grad()
    def forward_hydra(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Logits of the reference, (B, T, V)."""
        return self._whole(input_ids, attention_mask, position_ids).ref_logits_BTV


class AutoModelForSeq2SeqLMWithValueHead(AutoModelForCausalLMWithValueHead):
    """An encoder-decoder and a value head on its decoder."""

    ARCH_TYPE: ClassVar[str] = "seq2seq"

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # trlX's order
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> Seq2SeqLMOutputWithValue | tuple[Tensor, ...]:
        """Logits of the policy and values, at every position of the decoder."""
        whole = self._passed(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask)
        output = Seq2SeqLMOutputWithValue(logits=whole.logits_BTV, value=whole.values_BT)
        return output if return_dict else output.to_tuple()

    def _passed(
        self, ids_BP: Tensor, mask_BP: Tensor | None, of_decoder: Tensor | None, mask: Tensor | None
    ) -> WholePass:
        if of_decoder is None:
            raise ConfigError("decoder_input_ids is missing: the decoder's input, its start token first")
        mask_BP = torch.ones_like(ids_BP) if mask_BP is None else mask_BP
        return self.policy("whole", ids_BP, mask_BP, of_decoder, torch.ones_like(of_decoder) if mask is None else mask)


class AutoModelForSeq2SeqLMWithHydraValueHead(AutoModelForSeq2SeqLMWithValueHead):
    """The same with the frozen reference."""

    @torch.no_grad()
    def forward_hydra(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Logits of the reference, (B, T, V)."""
        return self._passed(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask).ref_logits_BTV
