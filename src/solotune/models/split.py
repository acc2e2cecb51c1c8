"""The trunk/top split: a Hugging Face decoder resumed at block `start` by running its own forward.

    ids -> [ embeddings, blocks 0..start-1 ] -> trunk_BTH -> [ blocks start.., final norm ] -> hidden_BTH -> [ head ]

Nothing is re-implemented per architecture. The top is a shallow copy of the decoder (same parameters, same forward)
whose list of blocks is cut and whose first block takes the trunk's output in place of what the forward hands it. The
head is a shallow copy of the whole language model whose decoder answers with a given hidden state, so that soft caps
and scales of the logits are the model's own.

Shapes: B batch, T time, H hidden, V vocabulary, N tokens picked out of B x T.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from solotune.errors import ModelError


class Encoded(NamedTuple):
    """What an encoder-decoder's blocks attend to: the encoder's output, (B, E, H), and True on its tokens, (B, E)."""

    hidden_BEH: Tensor
    mask_BE: Tensor


class Decoder:
    """Where a language model keeps its blocks; of an encoder-decoder, those of the decoder.

    Args:
        lm: a `...ForCausalLM` or an encoder-decoder; LoRA layers may already be injected.
    Raises:
        ModelError: no list of `config.num_hidden_layers` blocks is found.
    """

    def __init__(self, lm: PreTrainedModel):
        self.lm = lm
        if lm.config.is_encoder_decoder:
            decoder = lm.get_decoder()
            self.name = next(name for name, module in lm.named_modules() if module is decoder)
            self.list_name = next(name for name, m in decoder.named_children() if isinstance(m, nn.ModuleList))
            self.blocks_name = f"{self.name}.{self.list_name}"
            return
        n_blocks = int(lm.config.get_text_config(decoder=True).num_hidden_layers)
        lists = [
            name for name, m in lm.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_blocks and name != ""
        ]
        if not lists:
            raise ModelError(
                f"model {type(lm).__name__}: no list of {n_blocks} decoder blocks found; allowed are causal language "
                "models of transformers whose blocks stand in one nn.ModuleList"
            )
        self.blocks_name = min(lists, key=lambda name: name.count("."))
        self.name, _, self.list_name = self.blocks_name.rpartition(".")

    @property
    def module(self) -> nn.Module:
        return self.lm.get_submodule(self.name)

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.lm.get_submodule(self.blocks_name))

    @property
    def final_norms(self) -> dict[str, nn.Module]:
        """The norms that stand beside the blocks and are not part of the embeddings, by name."""
        return {
            name: child
            for name, child in self.module.named_children()
            if ("norm" in name or name.startswith("ln")) and "embed" not in name
        }

    def lowest_trainable_block(self) -> int:
        """The lowest block that holds a trainable tensor; the last block where only what lies above it is trained.

        A trained tensor outside the blocks, the final norms and the LM head (embeddings, position embeddings) gives 0:
        everything depends on it. So does an LM head tied to the embeddings.
        """
        blocks, norms = self.blocks, self.final_norms
        above = {id(p) for norm in norms.values() for p in norm.parameters()}
        head = self.lm.get_output_embeddings()
        embedding = self.lm.get_input_embeddings()
        if head is not None and getattr(head, "weight", None) is not getattr(embedding, "weight", None):
            above |= {id(p) for p in head.parameters()}
        start = len(blocks) - 1
        in_blocks = set()
        for index in reversed(range(len(blocks))):
            parameters = list(blocks[index].parameters())
            in_blocks |= {id(p) for p in parameters}
            if any(p.requires_grad for p in parameters):
                start = index
        below = (p for p in self.lm.parameters() if id(p) not in in_blocks and id(p) not in above)
        return 0 if any(p.requires_grad for p in below) else start


class InputRecorder:
    """Keeps what entered a block in the last forward, while `active`: the trunk's output, for the lowest trained block.

    Args:
        block: whose input is kept.
        detach: without its gradient.
    """

    def __init__(self, block: nn.Module, detach: bool = True):
        self._last: Tensor | None = None
        self._detach = detach
        self.active = False
        block.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.active:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._last = hidden.detach() if self._detach else hidden

    def take(self) -> Tensor:
        """What entered the block in the forward that just ran, (B, T, H); it is not kept."""
        hidden_BTH, self._last = self._last, None
        assert hidden_BTH is not None, "no forward ran since the last take()"
        return hidden_BTH


def hidden_dtype(block: nn.Module) -> torch.dtype:
    """What a block computes in: the precision of its frozen numbers (LoRA's are fp32, quantised weights are bytes), or
    of the trained ones where all are."""
    floating = [p for p in block.parameters() if p.is_floating_point()]
    frozen = [p for p in floating if not p.requires_grad]
    return (frozen or floating)[0].dtype


def cast_input(block: nn.Module) -> None:
    """Make a block take hidden states of another precision than its own: the first block above a bf16 trunk."""
    dtype = hidden_dtype(block)

    def cast(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (args[0].to(dtype), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].to(dtype)}

    block.register_forward_pre_hook(cast, with_kwargs=True)


class Top:
    """Blocks `start`.. and the final norm of a decoder, resumed from the trunk's output.

    Args:
        decoder: where the blocks are.
        start: first block of the top; 0 runs the whole decoder from token ids.
        blocks: other blocks to run in their place (the frozen copy), default the decoder's own.
        norms: other final norms by name, default the decoder's own.
    Attributes:
        dtype: what the blocks compute in, autocast aside.
    """

    def __init__(
        self,
        decoder: Decoder,
        start: int,
        blocks: nn.ModuleList | None = None,
        norms: dict[str, nn.Module] | None = None,
    ):
        module = decoder.module
        self.start = start
        self.takes_positions = "position_ids" in inspect.signature(module.forward).parameters
        self._embedding_dim = int(cast(nn.Embedding, decoder.lm.get_input_embeddings()).weight.shape[1])
        self._trunk: Tensor | None = None
        own = list(blocks if blocks is not None else list(decoder.blocks)[start:])
        self.dtype = hidden_dtype(own[0])
        if start == 0:
            self._module = module
            return
        own[0] = _without_hooks(_with_position_bias(own[0], decoder.blocks[0]))
        own[0].register_forward_pre_hook(self._replace, with_kwargs=True)
        self._module = _shallow_copy(module, {decoder.list_name: nn.ModuleList(own), **(norms or {})})
        self._module.__dict__["config"] = _cut_config(module.config, start)

    def _replace(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        assert self._trunk is not None
        trunk_BTH = self._trunk.to(self.dtype)  # blocks trained in place are fp32, the trunk may be bf16
        if args:
            return (trunk_BTH, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": trunk_BTH}

    def train(self, mode: bool) -> None:
        """Set training mode on the blocks of the top: gradient checkpointing is active in it alone."""
        self._module.train(mode)

    def __call__(
        self,
        trunk_BTH: Tensor | None,
        ids_BT: Tensor,
        mask_BT: Tensor,
        positions_BT: Tensor,
        encoded: Encoded | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, H); the decoder of an encoder-decoder needs `encoded`.

        The trunk's output is kept until the next call, because gradient checkpointing runs the blocks a second time.
        """
        inputs: dict = {"attention_mask": mask_BT, "use_cache": False}
        if encoded is not None:
            inputs |= {"encoder_hidden_states": encoded.hidden_BEH, "encoder_attention_mask": encoded.mask_BE.long()}
        if self.takes_positions:
            inputs["position_ids"] = positions_BT
        if self.start == 0:
            return self._module(input_ids=ids_BT, **inputs).last_hidden_state
        assert trunk_BTH is not None
        self._trunk = trunk_BTH
        parameter = next(self._module.parameters())
        inputs["inputs_embeds"] = torch.zeros(
            (*trunk_BTH.shape[:2], self._embedding_dim), device=trunk_BTH.device, dtype=parameter.dtype
        )
        return self._module(**inputs).last_hidden_state


class Head:
    """Hidden states to logits, by the language model's own forward around a decoder that is skipped."""

    def __init__(self, lm: PreTrainedModel, decoder_name: str):
        self._answer = _GivenHidden()
        self._lm = _with_replaced(lm, decoder_name, self._answer)
        self._dtype = cast(nn.Linear, lm.get_output_embeddings()).weight.dtype
        self._has_encoder = lm.config.is_encoder_decoder

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        """Logits (N, V) of hidden states after the final norm, (N, H)."""
        self._answer.hidden = hidden = hidden_NH.to(self._dtype).unsqueeze(0)
        inputs: dict[str, Any] = {"inputs_embeds": hidden}
        if self._has_encoder:  # it is not run, and nobody looks at what it gave
            inputs = {"decoder_inputs_embeds": hidden, "encoder_outputs": BaseModelOutput(hidden)}  # type: ignore[arg-type]
        try:
            return self._lm(**inputs, use_cache=False).logits.squeeze(0)
        finally:
            self._answer.hidden = None


class _GivenHidden(nn.Module):
    hidden: Tensor | None = None

    def forward(self, *args: object, **kwargs: object) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=cast(torch.FloatTensor, self.hidden))


def _shallow_copy(module: nn.Module, replaced_children: dict[str, nn.Module]) -> nn.Module:
    """A module of the same class that shares every tensor, with some children replaced."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {**module._modules, **replaced_children}
    return twin


def _with_replaced(root: nn.Module, path: str, replacement: nn.Module) -> nn.Module:
    """A module of the root's class that shares every tensor, with the module at a dotted path replaced."""
    names = path.split(".")
    for depth in reversed(range(len(names))):
        replacement = _shallow_copy(root.get_submodule(".".join(names[:depth])), {names[depth]: replacement})
    return replacement


def _with_position_bias(block: nn.Module, lowest: nn.Module) -> nn.Module:
    """The block, or a copy that shares every tensor and makes the position bias which T5 hands from block to block.

    There the lowest block alone has the table of relative positions; a top without it would attend without positions.
    """
    for name, attention in lowest.named_modules():
        if not getattr(attention, "has_relative_attention_bias", False):
            continue
        own = block.get_submodule(name)
        if not own.has_relative_attention_bias:
            lent = _shallow_copy(own, {"relative_attention_bias": cast(nn.Module, attention.relative_attention_bias)})
            lent.__dict__["has_relative_attention_bias"] = True
            block = _with_replaced(block, name, lent)
    return block


def _without_hooks(block: nn.Module) -> nn.Module:
    twin = copy.copy(block)
    twin.__dict__["_forward_pre_hooks"] = OrderedDict()
    twin.__dict__["_forward_pre_hooks_with_kwargs"] = OrderedDict()
    return twin


def _cut_config(config: object, start: int) -> object:
    """The decoder's configuration without its first `start` blocks: masks are chosen by `layer_types`."""
    cut = copy.deepcopy(config)
    layer_types = getattr(cut, "layer_types", None)
    if layer_types is not None:
        cut.__dict__["layer_types"] = list(layer_types)[start:]
    return cut
