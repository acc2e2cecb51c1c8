"""One backbone, four roles: policy, frozen reference, critic, and the trunk they share.

Every pass goes through `PolicyModel.forward`, because that is what DDP, FSDP2 and DeepSpeed wrap: calling an inner
method under DDP would leave gradients unsynchronised without an error.

Shapes: b rows of a micro-batch, P padded prompt length, T padded response length, S = P + T - 1, H hidden.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from solotune.algorithms.logprobs import chunked_logprobs
from solotune.models.critic import CRITIC_FILE, ValueBranch, ValueHead, checkpoint_like
from solotune.models.packed import packed_weights
from solotune.models.split import Decoder, Encoded, Head, InputRecorder, Top, cast_input, hidden_dtype
from solotune.rollout.generate import generate
from solotune.rollout.masks import sequence_masks, takes_masks
from solotune.rollout.records import Rollouts
from solotune.rollout.sampler import sample
from solotune.rollout.static import StaticSampler

log = logging.getLogger("solotune")


class Measured(NamedTuple):
    """One pass over the responses; zero outside the response mask, all (b, T) float32.

    Args:
        logprobs_bT: log-probability of each response token under the policy, at the sampling temperature.
        values_bT: the critic's value before that token was emitted; None without a critic.
        entropies_bT: entropy of the policy where that token was drawn, nats; zero in an update, which needs none.
        ref_logprobs_bT: under the frozen reference; None without one, and in an update.
    """

    logprobs_bT: Tensor
    values_bT: Tensor | None
    entropies_bT: Tensor
    ref_logprobs_bT: Tensor | None = None


class WholePass(NamedTuple):
    """Every position of whole sequences: logits of policy and reference, (B, T, V), and values, (B, T)."""

    logits_BTV: Tensor
    ref_logits_BTV: Tensor
    values_BT: Tensor


class PolicyModel(nn.Module):
    """Policy, reference, critic and sampler on one backbone.

    Args:
        backbone: a causal LM whose trainable tensors require gradients, or a `PeftModel` around one. Everything that is
            trained decides where the split lies.
        gradient_checkpointing: recompute the top's blocks in the backward pass.
        value_branch: blocks that the critic has to itself; without it, it reads the policy's last hidden state.
        has_reference: keep what the model is now beside what it becomes.
        has_critic: learn values with it.
    """

    CRITIC_FILE = CRITIC_FILE
    RECORDS_TRUNK: ClassVar[bool] = True
    """Whether what is sampled is learned from: the trunk's output is then kept with it."""

    def __init__(
        self,
        backbone: PreTrainedModel | PeftModel,
        gradient_checkpointing: bool = False,
        value_branch: ValueBranch | None = None,
        has_reference: bool = True,
        has_critic: bool = True,
    ):
        super().__init__()
        self.backbone = backbone
        lm: Any = backbone.get_base_model() if isinstance(backbone, PeftModel) else backbone
        self.decoder = Decoder(lm)
        self.start = self.decoder.lowest_trainable_block()
        if value_branch is not None:
            self.start = min(self.start, value_branch.start)
        self._checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            # Renamed in transformers 5.2x; the old name warns there.
            enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.eval()
        self.has_reference = has_reference
        self.value_head: ValueHead | None = None
        if has_critic:
            self.value_head = ValueHead(self.hidden_size, device=self.device)
        self.top = Top(self.decoder, self.start)
        self.head = Head(lm, self.decoder.name)
        self._sampling_head: Callable[[Tensor], Tensor] = self.head
        self.reference = nn.ModuleDict()  # frozen copies of what is trained in place; empty with LoRA
        if not has_reference:
            pass
        elif isinstance(backbone, PeftModel):
            self.reference_top, self.reference_head = self.top, self.head
        elif self.start == 0:
            self.reference["lm"] = _frozen_copy(lm)
            reference = Decoder(self.reference["lm"])  # type: ignore[arg-type]
            self.reference_top, self.reference_head = Top(reference, 0), Head(reference.lm, reference.name)
        else:
            self.reference["blocks"] = _frozen_copy(nn.ModuleList(self.decoder.blocks[self.start :]))
            norms = {name: _frozen_copy(norm) for name, norm in self.decoder.final_norms.items()}
            self.reference["norms"] = nn.ModuleDict(norms)
            blocks: Any = self.reference["blocks"]
            self.reference_top, self.reference_head = Top(self.decoder, self.start, blocks, norms), self.head
        frozen = {p.dtype for p in lm.parameters() if not p.requires_grad}
        self._is_mixed = torch.bfloat16 in frozen and not isinstance(backbone, PeftModel)
        self._recorder = None
        if self.start > 0:
            self._recorder = InputRecorder(self.decoder.blocks[self.start])
            cast_input(self.decoder.blocks[self.start])
        if (projection := getattr(self.decoder.module, "project_out", None)) is not None:
            cast_input(projection)  # of a small OPT, frozen where the blocks below it are trained in fp32
        self.value_branch = value_branch
        self._packed: contextlib.AbstractContextManager | None = None
        self._static_sampler: StaticSampler | None = None
        dtypes = {hidden_dtype(block) for block in self.decoder.blocks}  # its masks are of one
        is_one_dtype = self._is_mixed or len(dtypes) == 1
        self._samples_in_steps = is_one_dtype and StaticSampler.admits(self.decoder.module.config)
        self._told_growing = False
        self._branch_input = None  # where the branch starts above the split: what the policy hands to that block
        if value_branch is not None:
            checkpoint_like(self.decoder.blocks[-1], value_branch.blocks)
            self._value_top = Top(
                self.decoder, value_branch.start, value_branch.blocks, dict(value_branch.norms.items())
            )
            if value_branch.start > self.start:
                self._branch_input = InputRecorder(self.decoder.blocks[value_branch.start], detach=False)

    @property
    def lm(self) -> PreTrainedModel:
        return self.decoder.lm

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that the LM head takes."""
        return int(cast(nn.Linear, self.lm.get_output_embeddings()).weight.shape[1])

    @property
    def device(self) -> torch.device:
        return cast(nn.Linear, self.lm.get_output_embeddings()).weight.device

    @property
    def n_positions(self) -> int | None:
        """Places that a table of learned positions has; None where positions are computed."""
        tables = [
            module.num_embeddings - getattr(module, "offset", 0)
            for name, module in self.lm.named_modules()
            if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in ("wpe", "embed_positions")
        ]
        return min(tables, default=None)

    @property
    def critic(self) -> nn.ModuleDict:
        """The value head and the value branch, as far as there are any."""
        parts = {"value_head": self.value_head, "value_branch": self.value_branch}
        return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})

    def changing_tensors(self) -> dict[str, Tensor]:
        """What training changes, by name: the trained tensors."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    @property
    def base_model(self) -> PreTrainedModel | PeftModel:
        """The language model, with its adapter."""
        return self.backbone

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """`transformers.generate` of the policy."""
        if self._checkpointing:
            self.top.train(False)  # checkpointed blocks would drop their cache
        with torch.no_grad(), self._autocast():
            return self.backbone.generate(*args, **kwargs)  # type: ignore[operator]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a standard PEFT adapter, or the whole model where it was trained itself, and the critic beside it; all
        as safetensors."""
        self.backbone.save_pretrained(str(folder), safe_serialization=True)
        if critic := {name: tensor.contiguous() for name, tensor in self.critic.state_dict().items()}:
            save_file(critic, Path(folder) / self.CRITIC_FILE)

    def load_critic(self, folder: Path) -> None:
        """Read the critic that `save_pretrained` wrote; one that was not saved stays as it is."""
        if (folder / self.CRITIC_FILE).exists():
            self.critic.load_state_dict(load_file(folder / self.CRITIC_FILE))

    def forward(self, task: str, *args: Any, **kwargs: Any) -> Any:
        """Run one pass; the tasks are the methods of these names with an underscore."""
        if self._packed is None:  # not before: weights may be loaded until now
            self._packed = packed_weights(self, self.decoder.lm.get_output_embeddings())
        with self._autocast(), self._packed:
            return self._passes()[task](*args, **kwargs)

    def _passes(self) -> dict[str, Callable[..., Any]]:
        return {
            "sample": self._sample,
            "generate": self._generate,
            "measure": self._measure,
            "update": self._update,
            "whole": self._whole,
        }

    def _sample(self, *args: Any, **kwargs: Any) -> Rollouts:
        """`rollout.sampler.sample`, with the trunk's output recorded as the tokens are made; on a GPU the same with
        fixed-shape steps (`rollout.static`) where the architecture's parity is tested."""
        with self._recording(self.RECORDS_TRUNK) as take_trunk:
            if self.device.type == "cuda" and self._samples_in_steps:
                if self._static_sampler is None:
                    self._static_sampler = StaticSampler(self.decoder.module, self._sampling_head, take_trunk)
                return self._static_sampler.sample(*args, **kwargs)
            if self.device.type == "cuda" and not self._told_growing:
                self._told_growing = True
                log.info("%s is sampled with growing shapes, which is slower", self.decoder.module.config.model_type)  # type: ignore[union-attr]
            return sample(self.decoder.module, self._sampling_head, *args, take_trunk=take_trunk, **kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Rollouts:
        """`rollout.generate.generate` and one full pass for the trunk's output."""
        with self._recording(self.RECORDS_TRUNK) as take_trunk:
            return generate(self.lm, *args, take_trunk=take_trunk, **kwargs)

    @torch.no_grad()
    def _measure(self, rollouts: Rollouts, temperature: float) -> Measured:
        """Log-probabilities of policy and reference, values and entropies, as far as there are any, in one pass over
        the top."""
        measured = self._evaluate(rollouts, temperature, entropy=True)
        if not self.has_reference:
            return measured
        with self._reference():
            hidden_bTH = self._response_hidden(rollouts, self.reference_top)
            ref_logprobs_bT, _ = self._logprobs(hidden_bTH, rollouts, temperature, self.reference_head, entropy=False)
        return measured._replace(ref_logprobs_bT=ref_logprobs_bT)

    def _update(self, rollouts: Rollouts, temperature: float) -> Measured:
        """Log-probabilities and values with gradients; only the top runs."""
        return self._evaluate(rollouts, temperature, entropy=False)

    def _whole(self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor) -> WholePass:
        """Logits and values of given sequences, from token ids; the reference without gradients. For looking at a
        model: training needs no logits."""
        given = (ids_BT, mask_BT, positions_BT)
        with self._recording() as take_trunk, self._keeping_branch_input(), torch.no_grad():
            inputs: dict[str, Any] = {"position_ids": positions_BT} if self.top.takes_positions else {}
            self.decoder.module(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **inputs)
            trunk_BTH = None if take_trunk is None else take_trunk()
        with self._keeping_branch_input():
            hidden_BTH = value_hidden_BTH = self.top(trunk_BTH, *given)
        if self.value_branch is not None:
            branch_BTH = trunk_BTH if self._branch_input is None else self._branch_input.take()
            value_hidden_BTH = self._value_top(branch_BTH, *given)
        with torch.no_grad(), self._reference():
            ref_hidden_BTH = self.reference_top(trunk_BTH, *given)
            ref_logits_NV = self.reference_head(ref_hidden_BTH.flatten(0, 1))
        assert self.value_head is not None
        logits_NV, values_N = self.head(hidden_BTH.flatten(0, 1)), self.value_head(value_hidden_BTH.flatten(0, 1))
        shape = ids_BT.shape
        return WholePass(*(x_N.unflatten(0, shape) for x_N in (logits_NV, ref_logits_NV, values_N)))

    def _evaluate(self, rollouts: Rollouts, temperature: float, entropy: bool) -> Measured:
        with self._keeping_branch_input():
            hidden_bTH = self._response_hidden(rollouts, self.top)
        logprobs_bT, entropies_bT = self._logprobs(hidden_bTH, rollouts, temperature, self.head, entropy)
        if self.value_head is None:
            return Measured(logprobs_bT, None, entropies_bT)
        mask_bT = rollouts.response_mask_NT
        if self.value_branch is not None:
            hidden_bTH = self._response_hidden(rollouts, self._value_top, self._branch_input)
        values_bT = self.value_head(hidden_bTH).masked_fill(~mask_bT, 0.0)
        return Measured(logprobs_bT, values_bT, entropies_bT)

    def _response_hidden(self, rollouts: Rollouts, top: Top, given: InputRecorder | None = None) -> Tensor:
        """Hidden states from which each response token was predicted, (b, T, H); `given` has the top's input where that
        is not the trunk's output."""
        ids_bS, mask_bS, positions_bS = rollouts.inputs
        if mask_bS.is_cuda and takes_masks(self.decoder.module.config):
            mask_bS = self._ready_masks(mask_bS, top.dtype)
        if self._checkpointing:
            top.train(torch.is_grad_enabled())
        trunk_bSH = rollouts.trunk_NSH if given is None else given.take()
        hidden_bSH = top(trunk_bSH, ids_bS, mask_bS, positions_bS, self._encoded(rollouts, top))
        return hidden_bSH[:, rollouts.prompt_width - 1 :]

    def _ready_masks(self, segments_BS: Tensor, dtype: torch.dtype) -> Any:
        """The masks of blocks that compute in `dtype`, or as autocast has it."""
        return sequence_masks(self.decoder.module.config, segments_BS, torch.bfloat16 if self._is_mixed else dtype)

    def _encoded(self, rollouts: Rollouts, top: Top) -> Encoded | None:
        """What the blocks attend to beside the tokens; see `models.seq2seq`."""
        return None

    def _logprobs(
        self, hidden_bTH: Tensor, rollouts: Rollouts, temperature: float, head: Head, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        mask_bT = rollouts.response_mask_NT
        zeros_bT = torch.zeros(mask_bT.shape, device=mask_bT.device)
        # Picking the response tokens out saves the head's work on padding; on a GPU it would make the host wait.
        picks = not hidden_bTH.is_cuda
        hidden_NH = hidden_bTH[mask_bT] if picks else hidden_bTH.flatten(0, 1)
        targets_N = rollouts.response_ids_NT[mask_bT] if picks else rollouts.response_ids_NT.flatten()

        def back(x_N: Tensor) -> Tensor:
            return zeros_bT.masked_scatter(mask_bT, x_N) if picks else x_N.view_as(mask_bT).masked_fill(~mask_bT, 0.0)

        stats = chunked_logprobs(hidden_NH, targets_N, head, temperature=temperature, want_entropy=entropy)
        entropies_bT = zeros_bT if stats.entropies_N is None else back(stats.entropies_N)
        return back(stats.logprobs_N), entropies_bT

    def _autocast(self) -> contextlib.AbstractContextManager:
        """Blocks trained in place are fp32 between bf16 neighbours: they are multiplied in bf16 as well."""
        return torch.autocast(self.device.type, torch.bfloat16) if self._is_mixed else contextlib.nullcontext()

    def _reference(self) -> contextlib.AbstractContextManager:
        return self.backbone.disable_adapter() if isinstance(self.backbone, PeftModel) else contextlib.nullcontext()

    @contextlib.contextmanager
    def _keeping_branch_input(self) -> Iterator[None]:
        if self._branch_input is None:
            yield
            return
        self._branch_input.active = True
        try:
            yield
        finally:
            self._branch_input.active = False

    @contextlib.contextmanager
    def _recording(self, wanted: bool = True) -> Iterator[Callable[[], Tensor] | None]:
        if self._checkpointing:
            self.top.train(False)
        if self._recorder is None or not wanted:
            yield None
            return
        self._recorder.active = True
        try:
            yield self._recorder.take
        finally:
            self._recorder.active = False


def _frozen_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)
