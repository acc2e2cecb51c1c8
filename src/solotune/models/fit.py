"""How much GPU memory a recipe needs, part by part: from its modules on the meta device, without a GPU or weights.

What an update keeps for its backward pass is not estimated from formulas: the top runs forward on the meta device, and
the tensors that autograd saves are counted.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from solotune.algorithms.logprobs import GPU_CHUNK_ELEMENTS
from solotune.errors import ConfigError
from solotune.models.ilql import ILQLModel
from solotune.models.loading import build_policy
from solotune.models.policy import PolicyModel
from solotune.models.tree import format_bytes
from solotune.rollout.masks import MASK_STEP, layer_masks, rounded
from solotune.rollout.settings import SamplingSettings, sweep
from solotune.rollout.static import PROMPT_STEP, StaticSampler

if TYPE_CHECKING:
    from solotune.config import TRLConfig

BF16, FP32 = 2, 4
CONTEXT_BYTES = 0.6e9
"""CUDA's own context and libraries; torch does not count them."""
FRAGMENTS = 0.05
"""Share of the rest that an allocator loses to gaps."""
QUANTIZED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes of a weight: nf4 has a scale of 8 bits for 64 weights, and one of 32 bits for 256 of those."""
BUFFERS_OF_A_CHUNK = 3
"""Logits-sized buffers that `chunked_logprobs` has at most."""


class Part(NamedTuple):
    """A part of the memory; `only_while` names the phase that needs it, '' for always."""

    name: str
    size: float
    only_while: str = ""


class Fit(NamedTuple):
    """The parts, and the most that is needed at one time, in bytes."""

    parts: list[Part]

    @property
    def total(self) -> float:
        always = sum(part.size for part in self.parts if not part.only_while)
        phases = {part.only_while for part in self.parts if part.only_while}
        peak = max((sum(p.size for p in self.parts if p.only_while == phase) for phase in phases), default=0.0)
        return (always + peak) * (1 + FRAGMENTS) + CONTEXT_BYTES

    def table(self) -> Table:
        """The parts for the terminal."""
        table = Table("part", "memory", "while", title="without the reward model")
        for part in self.parts:
            table.add_row(part.name, format_bytes(part.size), part.only_while or "always")
        table.add_section()
        table.add_row(
            "CUDA context and gaps", format_bytes(self.total - (self.total - CONTEXT_BYTES) / (1 + FRAGMENTS))
        )
        table.add_row("most at one time", format_bytes(self.total))
        return table


def fit(config: TRLConfig) -> Fit:
    """The memory of a recipe on one GPU.

    Raises:
        ConfigError, ModelError: the recipe cannot be read or its model's configuration is not found.
    """
    method, train = config.method, config.train
    if config.model.is_seq2seq:
        raise ConfigError("model.model_arch_type = 'seq2seq': `solotune fit` counts decoders alone, so far")
    is_adapted = config.model.delta_kwargs is not None or config.model.peft_config is not None
    policy = build_policy(config, meta=True, meta_dtype=torch.bfloat16 if is_adapted else torch.float32)
    text_config: Any = policy.decoder.module.config
    settings = [SamplingSettings.from_gen_kwargs(s.gen_kwargs, None) for s in sweep(getattr(method, "gen_kwargs", {}))]
    steps = max(setting.max_new_tokens for setting in settings)
    width = max(train.seq_length - steps, 1)
    capacity = rounded(rounded(width, PROMPT_STEP) + steps - 1, MASK_STEP)
    n_rollouts = int(getattr(method, "num_rollouts", train.batch_size))
    rows = min(int(getattr(method, "chunk_size", n_rollouts)), n_rollouts)
    micro_batch = train.minibatch_size or train.batch_size
    hidden, vocabulary = int(text_config.hidden_size), int(policy.lm.get_output_embeddings().weight.shape[0])  # type: ignore[union-attr,arg-type]

    trained = sum(p.numel() for p in policy.trainable_parameters())
    frozen = _frozen_bytes(policy, config.model.quantization)
    is_mixed = not is_adapted and policy.start > 0  # blocks trained in place are fp32 between bf16 neighbours
    n_blocks = int(text_config.num_hidden_layers)
    heads = int(getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads)
    head_width = int(getattr(text_config, "head_dim", None) or hidden // int(text_config.num_attention_heads))
    per_position = 2 * n_blocks * heads * head_width * (BF16 if is_adapted or is_mixed else FP32)
    kept = capacity * hidden * BF16 if policy.start > 0 else 0
    is_8bit = "8bit" in config.optimizer.name
    moments = {"sgd": 0}.get(config.optimizer.name, 2) * (1 if is_8bit else FP32)
    logits = min(GPU_CHUNK_ELEMENTS, micro_batch * steps * vocabulary)
    parts = [
        Part("weights, frozen" + (f" ({config.model.quantization})" if config.model.quantization else ""), frozen),
        Part("weights, trained", trained * FP32),
        Part("optimizer and gradients", trained * (FP32 + moments)),
        Part(f"keys and values of {rows} x {capacity} tokens", rows * capacity * per_position),
        Part(f"trunk activations of {n_rollouts} rollouts", n_rollouts * kept + rows * kept),
        Part("logits of a sampled token", rows * vocabulary * (BF16 + 2 * FP32), "sampling"),
        Part(f"prompts of {width} tokens", rows * width * 8 * hidden * BF16, "sampling"),
        Part(
            f"activations of {micro_batch} x {capacity} tokens",
            _saved_bytes(policy, micro_batch, capacity, train.gradient_checkpointing) * (0.5 if is_mixed else 1.0),
            "an update",
        ),
        Part("logits of a chunk of tokens", BUFFERS_OF_A_CHUNK * logits * FP32, "an update"),
    ]
    if isinstance(policy, ILQLModel):  # taken in the forward pass, and scaled in the backward pass
        weights = sum(p.numel() for p in policy.heads.q_heads.parameters())
        parts.append(Part("gradients of the Q heads by CQL", weights * FP32, "an update"))
    return Fit(parts)


def advice(config: TRLConfig, fitted: Fit, limit: float) -> list[str]:
    """Settings that would make it fit, the ones that cost least first; those that change nothing are left out."""
    micro_batch = config.train.minibatch_size or config.train.batch_size
    smaller = next((n for n in range(micro_batch // 2, 0, -1) if config.train.batch_size % n == 0), None)
    chunk = int(getattr(config.method, "chunk_size", 1))
    changes: list[tuple[str, dict[str, Any]]] = []
    if smaller:
        changes.append((f"train.minibatch_size={smaller}", {"train": {"minibatch_size": smaller}}))
    if not config.train.gradient_checkpointing:
        changes.append(("train.gradient_checkpointing=true", {"train": {"gradient_checkpointing": True}}))
    if chunk > 1:
        changes.append((f"method.chunk_size={chunk // 2}", {"method": {"chunk_size": chunk // 2}}))
    if config.model.quantization is None and (config.model.delta_kwargs or config.model.peft_config):
        changes.append(("model.quantization=nf4", {"model": {"quantization": "nf4"}}))
    found = []
    for name, change in changes:
        try:
            total = fit(config.evolve(**change)).total
        except ConfigError:
            continue
        if total < fitted.total:
            verdict = "fits" if total <= limit else "does not fit alone"
            found.append(f"--set {name}: {format_bytes(total)}, {verdict}")
    return found


def parse_size(text: str) -> float:
    """`24GB`, `24 GB`, `24GiB` or `24` (GB) in bytes.

    Raises:
        ConfigError: it is none of these.
    """
    units = {"": 1e9, "gb": 1e9, "g": 1e9, "gib": 2**30, "mb": 1e6, "mib": 2**20}
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(number) :].strip().lower()
    try:
        size = float(number) * units[unit]
    except (ValueError, KeyError):
        size = math.nan
    if not size > 0:
        raise ConfigError(f"--gpu {text!r}: must be a size such as 24GB")
    return size


def _frozen_bytes(policy: PolicyModel, quantization: str | None) -> float:
    """Bytes of the frozen tensors: bf16, or few bits for the linear layers of the blocks."""
    in_few_bits: set[int] = set()
    if quantization is not None:
        layers = (m for m in policy.decoder.blocks.modules() if isinstance(m, nn.Linear))
        in_few_bits = {id(layer.weight) for layer in layers if not layer.weight.requires_grad}
    few = QUANTIZED_BYTES.get(quantization or "", BF16)
    wide = (policy.reference, policy.critic)  # copies of what is trained in fp32, and heads
    in_fp32 = {id(p) for part in wide for p in part.parameters()}

    def size(parameter: nn.Parameter) -> float:
        each = FP32 if id(parameter) in in_fp32 else few if id(parameter) in in_few_bits else BF16
        return parameter.numel() * each

    return sum(size(p) for p in policy.parameters() if not p.requires_grad)


def _saved_bytes(policy: PolicyModel, rows: int, width: int, checkpointed: bool) -> float:
    """What autograd keeps of one pass over the top, (rows, width) tokens, in the precision of the weights. (Blocks that
    are trained in place are fp32 and multiplied in bf16: the meta device has no autocast, so theirs is halved.)"""
    dtype = policy.lm.dtype
    hidden = int(policy.decoder.module.config.hidden_size)  # type: ignore[union-attr,arg-type]
    own = {id(p) for p in policy.parameters()}
    alive: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own and not isinstance(tensor, nn.Parameter):
            alive[tensor.untyped_storage()._cdata] = tensor
        return tensor

    device = torch.device("meta")
    ids = torch.zeros(rows, width, dtype=torch.long, device=device)
    if StaticSampler.admits(policy.decoder.module.config):
        full = torch.zeros(rows, 1, width, width, dtype=dtype, device=device)
        mask: Any = layer_masks(policy.decoder.module.config, full, full)
    else:
        mask = None  # the model's own causal mask, which is not kept
    trunk = None
    if policy.start > 0:
        trunk = torch.zeros(rows, width, hidden, dtype=dtype, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.top(trunk, ids, mask, ids)
    total = float(sum(t.untyped_storage().nbytes() for t in alive.values()))
    n_top = len(policy.decoder.blocks) - policy.start
    if not checkpointed:
        return total
    return total / n_top + n_top * rows * width * hidden * BF16  # one block at a time, and every block's input
