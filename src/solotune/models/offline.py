"""A language model that learns from given samples: no reference and no critic, and a trunk that stays as it is.

Shapes: R rows, S positions, M positions of all samples together, N tokens to learn, H hidden; see `data.batches.Batch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from solotune.algorithms.logprobs import chunked_logprobs
from solotune.data.batches import Batch
from solotune.models.policy import PolicyModel
from solotune.models.split import hidden_dtype
from solotune.rollout.masks import takes_masks


class _Reached(Exception):  # noqa: N818  no error
    """The forward has come to the lowest trained block: what follows is not wanted."""


class OfflineModel(PolicyModel):
    """A `PolicyModel` without reference and critic.

    Its further tasks: `trunk`, what enters the lowest trained block; `learn`, the log-probs of the tokens to learn.
    """

    RECORDS_TRUNK = False

    def __init__(self, backbone: PreTrainedModel | PeftModel, gradient_checkpointing: bool = False):
        super().__init__(backbone, gradient_checkpointing, has_reference=False, has_critic=False)
        self._exits = False
        if self.start > 0:
            self.decoder.blocks[self.start].register_forward_pre_hook(self._exit)

    @property
    def can_pack(self) -> bool:
        """Whether rows may hold several samples: the architecture takes ready-made masks and its parity is tested."""
        return takes_masks(self.decoder.module.config)

    @property
    def trunk_dtype(self) -> torch.dtype:
        """The precision in which the trunk's output comes out, and is kept."""
        return hidden_dtype(self.decoder.blocks[0])

    def _passes(self) -> dict[str, Callable[..., Any]]:
        return {**super()._passes(), "trunk": self._trunk, "learn": self._learn}

    @torch.no_grad()
    def _trunk(self, batch: Batch) -> Tensor:
        """What enters the lowest trained block at the samples' positions, (M, H); nothing above it runs."""
        inputs: dict[str, Any] = {"attention_mask": self._masks(batch, self.trunk_dtype), "use_cache": False}
        if self.top.takes_positions:
            inputs["position_ids"] = batch.positions_RS
        return batch.gathered(self._entering(batch.ids_RS, inputs))

    def _entering(self, ids_RS: Tensor, inputs: dict[str, Any]) -> Tensor:
        """What enters the lowest trained block, (R, S, H); nothing above it runs."""
        with self._recording() as take_trunk:
            assert take_trunk is not None, "nothing is frozen below the trained blocks"
            self._exits = True
            try:
                self.decoder.module(input_ids=ids_RS, **inputs)
            except _Reached:
                pass
            finally:
                self._exits = False
            return take_trunk()

    def _exit(self, module: nn.Module, args: tuple) -> None:
        if self._exits:
            raise _Reached

    def _learn(self, batch: Batch, trunk_MH: Tensor | None = None) -> Tensor:
        """Log-probs of the tokens to learn, (N,); see `_hidden`."""
        hidden_NH = self._hidden(batch, trunk_MH)
        return chunked_logprobs(hidden_NH, batch.targets_N, self.head, want_entropy=False).logprobs_N

    def _hidden(self, batch: Batch, trunk_MH: Tensor | None) -> Tensor:
        """Hidden states from which the tokens to learn are predicted, (N, H), with gradients; only the top runs where
        the trunk's output is given."""
        if trunk_MH is None and self.start > 0:
            trunk_MH = self._trunk(batch)
        trunk_RSH = None if trunk_MH is None else batch.scattered(trunk_MH)
        if self._checkpointing:
            self.top.train(torch.is_grad_enabled())
        hidden_RSH = self.top(trunk_RSH, batch.ids_RS, self._masks(batch, self.top.dtype), batch.positions_RS)
        return hidden_RSH.flatten(0, 1)[batch.picks_N]

    def _masks(self, batch: Batch, dtype: torch.dtype) -> Any:
        if batch.is_packed or (batch.ids_RS.is_cuda and self.can_pack):
            return self._ready_masks(batch.segments_RS, dtype)
        return batch.segments_RS
