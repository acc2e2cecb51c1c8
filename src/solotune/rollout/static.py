"""Sampling with one fixed-shape step, which a GPU replays as a CUDA graph.

`transformers.generate`, and the loop of `rollout.sampler`, launch some 400 small kernels a token from Python; a GPU
waits for them. Here every tensor of a step has one place and one shape: keys and values of all positions, the masks,
the tokens drawn so far. The step reads and writes them at an index that is itself a tensor, so it can be captured once
and replayed for every token: blocks, head, draw, log-prob, end-of-sequence bookkeeping, and the trunk's output written
to its place. The host looks every few steps which rows are finished, and goes on with a smaller batch (a view of the
same memory, captured on its own) when enough are.

On a CPU the same step runs uncaptured; that is what the tests compare with `transformers.generate`.

Shapes: B rows of the storage, b rows of the batch that still runs, P prompt width, T response length, S at
least P + T - 1 positions of the cache, V vocabulary, H hidden.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from solotune.rollout.cache import FixedLayer
from solotune.rollout.generate import ends_of
from solotune.rollout.masks import MASK_STEP, additive, layer_masks, rounded, takes_masks
from solotune.rollout.records import FinishReason, Rollouts, positions_of
from solotune.rollout.sampler import LOOK_EVERY, FindStop, choose
from solotune.rollout.settings import SamplingSettings

log = logging.getLogger("solotune")

PROMPT_STEP = 8
"""Prompts are padded to a multiple of this, so that few widths occur."""

SMALLEST_BATCH = 8
"""A batch shrinks by halves, down to this."""


class Storage(NamedTuple):
    """Everything a step reads and writes, for B rows; a smaller batch is a view of the first rows.

    Args:
        tokens_B1, positions_B1: what the next step is fed.
        attended_BS: True on the positions that hold a token.
        response_ids_BT, logprobs_BT, uniforms_BT: as in `Rollouts`, and the rows' random numbers.
        finish_B: `FinishReason`; a row that is not LENGTH is finished, and stays as it is.
        trunk_BSH: what entered the lowest trained block; None where nobody asks for it.
        slot_1, step_1: the position and the response token that the next step writes.
    """

    tokens_B1: Tensor
    positions_B1: Tensor
    attended_BS: Tensor
    response_ids_BT: Tensor
    logprobs_BT: Tensor
    uniforms_BT: Tensor
    finish_B: Tensor
    trunk_BSH: Tensor | None
    slot_1: Tensor
    step_1: Tensor

    def first_rows(self, count: int) -> Storage:
        """A view of the first `count` rows; the two counters are shared."""
        *rows, slot_1, step_1 = self
        return Storage._make([*(None if x is None else x[:count] for x in rows), slot_1, step_1])


class StaticSampler:
    """Samples with fixed-shape steps and keeps their memory and graphs from round to round.

    Args:
        decoder: ids to hidden states after the final norm.
        head: hidden states (b, H) to logits (b, V).
        take_trunk: returns what entered the lowest trained block in the last forward; None where nobody asks for it.
        captures: replay steps as CUDA graphs; default on a GPU.
    """

    def __init__(
        self,
        decoder: nn.Module,
        head: Callable[[Tensor], Tensor],
        take_trunk: Callable[[], Tensor] | None,
        captures: bool | None = None,
    ):
        self._decoder, self._head, self._take_trunk = decoder, head, take_trunk
        self._config: Any = decoder.config
        self._parameter = next(decoder.parameters())
        self.captures = self._parameter.is_cuda if captures is None else captures
        self._storage: Storage | None = None
        self._cache: Cache | None = None
        self._graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self._side: torch.cuda.Stream | None = None  # one for all captures: every stream keeps a workspace of its own

    @staticmethod
    def admits(config: Any) -> bool:
        """Whether the parity of this architecture is tested, and nothing in it makes the host wait in every step."""
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        quantization = getattr(config, "quantization_config", None)
        looks_for_outliers = getattr(quantization, "load_in_8bit", False)
        grows = isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope")
        return takes_masks(config) and not grows and not looks_for_outliers

    @torch.no_grad()
    def sample(
        self,
        prompt_ids_BP: Tensor,
        prompt_mask_BP: Tensor,
        prompt_index_B: Tensor,
        uniforms_BT: Tensor,
        settings: SamplingSettings,
        pad_token_id: int,
        find_stop: FindStop | None = None,
    ) -> Rollouts:
        """One response a row; the arguments and the result are those of `sampler.sample`."""
        n_rows, width = prompt_ids_BP.shape
        storage = self._prepared(n_rows, width, settings.max_new_tokens)
        extra = -width % PROMPT_STEP
        ids_BP = torch.nn.functional.pad(prompt_ids_BP, (extra, 0), value=pad_token_id)
        mask_BP = torch.nn.functional.pad(prompt_mask_BP.bool(), (extra, 0))
        self._prefill(storage, ids_BP, mask_BP, uniforms_BT, settings, pad_token_id)
        storage = self._storage or storage  # the prefill may have added the trunk's place

        out_ids_BT = torch.full_like(storage.response_ids_BT[:n_rows], pad_token_id)
        out_logprobs_BT = torch.zeros_like(storage.logprobs_BT[:n_rows])
        trunk_BSH = None if storage.trunk_BSH is None else storage.trunk_BSH.new_zeros(storage.trunk_BSH[:n_rows].shape)
        rows = list(range(n_rows))  # which row of the call each row of the batch is

        def keep_results() -> None:
            where = torch.tensor(rows, device=ids_BP.device)
            out_ids_BT[where] = storage.response_ids_BT[: len(rows)]
            out_logprobs_BT[where] = storage.logprobs_BT[: len(rows)]
            if trunk_BSH is not None and storage.trunk_BSH is not None:
                trunk_BSH[where] = storage.trunk_BSH[: len(rows)]

        batch = n_rows
        for step in range(1, settings.max_new_tokens):
            if step % LOOK_EVERY == 0:
                if find_stop is not None and settings.stop_strings:
                    self._mark_stops(storage, batch, step, settings, find_stop)
                running = (storage.finish_B[:batch] == FinishReason.LENGTH).tolist()
                n_running = sum(running)
                if n_running == 0:
                    break
                smaller = _smaller_batch(batch, n_running)
                if smaller < batch:
                    keep_results()
                    chosen = sorted(sorted(range(batch), key=lambda row: not running[row])[:smaller])
                    self._move_rows(storage, chosen)
                    rows, batch = [rows[row] for row in chosen], smaller
            self._step(storage, batch, step, settings, pad_token_id)
        keep_results()
        lengths_B, finish_B = ends_of(out_ids_BT[:, : settings.max_new_tokens], settings, find_stop)
        width_T = int(lengths_B.max()) if n_rows else 0
        response_mask_BT = torch.arange(width_T, device=ids_BP.device) < lengths_B[:, None]
        return Rollouts(
            prompt_ids_NP=prompt_ids_BP,
            prompt_mask_NP=prompt_mask_BP.bool(),
            response_ids_NT=out_ids_BT[:, :width_T].masked_fill(~response_mask_BT, pad_token_id),
            response_mask_NT=response_mask_BT,
            sample_logprobs_NT=out_logprobs_BT[:, :width_T].masked_fill(~response_mask_BT, 0.0),
            finish_N=finish_B,
            prompt_index_N=prompt_index_B,
            trunk_NSH=None if trunk_BSH is None else trunk_BSH[:, extra : extra + width + width_T - 1],
        )

    def _prepared(self, n_rows: int, width: int, steps: int) -> Storage:
        """Storage that is large enough, the one of the last call where it is."""
        old = self._storage
        width = rounded(width, PROMPT_STEP)
        if old is not None:
            old_steps = old.response_ids_BT.shape[1]
            old_width = (old.attended_BS.shape[1] - old_steps + 1) // PROMPT_STEP * PROMPT_STEP
            if n_rows <= len(old.finish_B) and width <= old_width and steps <= old_steps:
                return old
            n_rows, width, steps = max(n_rows, len(old.finish_B)), max(width, old_width), max(steps, old_steps)
        device, capacity = self._parameter.device, rounded(width + steps - 1, MASK_STEP)
        self._graphs.clear()
        self._cache, self._storage = None, None

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        storage = Storage(
            tokens_B1=zeros(n_rows, 1),
            positions_B1=zeros(n_rows, 1),
            attended_BS=zeros(n_rows, capacity, dtype=torch.bool),
            response_ids_BT=zeros(n_rows, steps),
            logprobs_BT=zeros(n_rows, steps, dtype=torch.float32),
            uniforms_BT=zeros(n_rows, steps, dtype=torch.float64),
            finish_B=zeros(n_rows),
            trunk_BSH=None,
            slot_1=zeros(1),
            step_1=zeros(1),
        )
        n_blocks = int(self._config.num_hidden_layers)
        self._cache = Cache(layers=[FixedLayer(n_rows, capacity, storage.slot_1) for _ in range(n_blocks)])
        self._storage = storage
        return storage

    def _prefill(
        self,
        storage: Storage,
        ids_BP: Tensor,
        mask_BP: Tensor,
        uniforms_BT: Tensor,
        settings: SamplingSettings,
        pad_token_id: int,
    ) -> None:
        """Run the prompts in one pass, write what a step needs, and draw the first tokens."""
        n_rows, width = ids_BP.shape
        self._set_stepping(False)
        output = self._decoder(
            input_ids=ids_BP,
            attention_mask=mask_BP.long(),
            position_ids=positions_of(mask_BP),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._set_stepping(True)
        if self._take_trunk is not None:
            trunk_BPH = self._take_trunk()
            if storage.trunk_BSH is None:
                shape = (*storage.attended_BS.shape, trunk_BPH.shape[-1])
                storage = self._storage = storage._replace(trunk_BSH=trunk_BPH.new_zeros(shape))
            assert storage.trunk_BSH is not None
            storage.trunk_BSH[:n_rows, :width] = trunk_BPH
        storage.attended_BS.zero_()
        storage.attended_BS[:n_rows, :width] = mask_BP
        storage.positions_B1[:n_rows, 0] = mask_BP.sum(-1)
        storage.uniforms_BT[:n_rows, : uniforms_BT.shape[1]] = uniforms_BT.to(ids_BP.device)
        storage.finish_B.fill_(int(FinishReason.EOS))  # rows beyond the call's are finished
        storage.finish_B[:n_rows] = int(FinishReason.LENGTH)
        storage.slot_1.fill_(width)
        storage.step_1.zero_()
        self._draw(
            storage.first_rows(n_rows),
            self._head(output.last_hidden_state[:, -1].contiguous()),
            settings,
            pad_token_id,
            _excluded(0, settings, ids_BP.device),
        )

    def _step(self, storage: Storage, batch: int, step: int, settings: SamplingSettings, pad_token_id: int) -> None:
        """One token a row: replayed from a graph on a GPU."""
        assert self._storage is not None
        view = self._storage.first_rows(batch)
        excluded_E = _excluded(step, settings, view.finish_B.device)
        key = (batch, excluded_E is not None, pad_token_id, settings.drawing)
        if self.captures and key not in self._graphs:
            try:
                self._graphs[key] = self._captured(view, settings, pad_token_id, excluded_E)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.captures = False
                self._graphs.clear()
                cause = error.__context__ or error  # the end of a capture fails for what failed within it
                log.warning("steps are not replayed as CUDA graphs, which is slower: capturing one failed (%s)", cause)
        if self.captures:
            self._graphs[key].replay()
        else:
            self._run_step(view, settings, pad_token_id, excluded_E)

    def _captured(
        self, view: Storage, settings: SamplingSettings, pad_token_id: int, excluded_E: Tensor | None
    ) -> torch.cuda.CUDAGraph:
        """The step as a graph. It runs twice before it is captured, after which everything it wrote is put back (keys
        and values need not be: the step writes them again)."""
        written = [x for x in view if x is not None and x is not view.trunk_BSH and x is not view.uniforms_BT]
        kept = [x.clone() for x in written]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        side = self._side = self._side or torch.cuda.Stream()

        def restore() -> None:
            for tensor, before in zip(written, kept, strict=True):
                tensor.copy_(before)

        # Autocast's cache of casted weights is freed when it ends, and would be read by every replay.
        uncached = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)
        try:
            with uncached if torch.is_autocast_enabled("cuda") else contextlib.nullcontext():
                side.wait_stream(stream)
                for _ in range(2):
                    with torch.cuda.stream(side):
                        self._run_step(view, settings, pad_token_id, excluded_E)
                        restore()
                stream.wait_stream(side)
                with torch.cuda.graph(graph, pool=pool, stream=side):
                    self._run_step(view, settings, pad_token_id, excluded_E)
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails may leave its own
            restore()
        return graph

    def _run_step(
        self, view: Storage, settings: SamplingSettings, pad_token_id: int, excluded_E: Tensor | None
    ) -> None:
        view.attended_BS.index_fill_(1, view.slot_1, True)
        output = self._decoder(
            input_ids=view.tokens_B1,
            attention_mask=self._masks(view),
            position_ids=view.positions_B1,
            past_key_values=self._cache,
            use_cache=True,
        )
        if self._take_trunk is not None and view.trunk_BSH is not None:
            view.trunk_BSH.index_copy_(1, view.slot_1, self._take_trunk())
        logits_bV = self._head(output.last_hidden_state[:, -1].contiguous())
        view.positions_B1.add_(1)
        view.slot_1.add_(1)
        self._draw(view, logits_bV, settings, pad_token_id, excluded_E)

    def _masks(self, view: Storage) -> Any:
        """What attention adds to its scores, (b, 1, 1, S): 0 where it may look, the smallest number where not."""
        full = additive(view.attended_BS, self._parameter.dtype)
        window = getattr(self._config, "sliding_window", None)
        if window is None:
            return layer_masks(self._config, full, full)
        positions_S = torch.arange(view.attended_BS.shape[1], device=full.device)
        near_BS = view.attended_BS & (positions_S > view.slot_1 - window)
        return layer_masks(self._config, full, additive(near_BS, self._parameter.dtype))

    def _draw(
        self,
        view: Storage,
        logits_bV: Tensor,
        settings: SamplingSettings,
        pad_token_id: int,
        excluded_E: Tensor | None,
    ) -> None:
        """Draw the token `step_1` of every row that is not finished, and note what ended."""
        uniforms_b = view.uniforms_BT.index_select(1, view.step_1).squeeze(1)
        drawn = choose(logits_bV, uniforms_b, settings, excluded_E)
        running_b = view.finish_B == int(FinishReason.LENGTH)
        tokens_b = torch.where(running_b, drawn.tokens_B, pad_token_id)
        view.response_ids_BT.index_copy_(1, view.step_1, tokens_b[:, None])
        logprobs_b = torch.where(running_b, drawn.logprobs_B, 0.0)
        view.logprobs_BT.index_copy_(1, view.step_1, logprobs_b[:, None])
        eos_E = _ids(settings.eos_token_ids, tokens_b.device)
        ended_b = running_b & (tokens_b[:, None] == eos_E).any(-1)
        view.finish_B.copy_(torch.where(ended_b, int(FinishReason.EOS), view.finish_B))
        view.tokens_B1.copy_(tokens_b[:, None])
        view.step_1.add_(1)

    def _mark_stops(
        self, storage: Storage, batch: int, step: int, settings: SamplingSettings, find_stop: FindStop
    ) -> None:
        """Finish the rows whose last few tokens completed a stop string; where exactly is found at the end."""
        rows = storage.response_ids_BT[:batch, :step].tolist()
        for row, finish in enumerate(storage.finish_B[:batch].tolist()):
            ends = range(step - LOOK_EVERY + 1, step + 1)
            if finish == FinishReason.LENGTH and any(find_stop(rows[row][:end]) for end in ends if end > 0):
                storage.finish_B[row] = int(FinishReason.STOP_STRING)

    def _move_rows(self, storage: Storage, sources: list[int]) -> None:
        """The rows `sources` become the first ones, in every tensor of the storage and in the cache."""
        assert self._storage is not None
        assert self._cache is not None
        where = torch.tensor(sources, device=storage.finish_B.device)
        *rows, _slot, _step = self._storage
        for tensor in rows:
            if tensor is not None:
                tensor[: len(sources)] = tensor[where]
        for layer in self._cache.layers:
            assert isinstance(layer, FixedLayer)
            layer.move_rows(where)

    def _set_stepping(self, is_stepping: bool) -> None:
        assert self._cache is not None
        for layer in self._cache.layers:
            assert isinstance(layer, FixedLayer)
            layer.is_stepping = is_stepping


_constants: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def _ids(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Token ids on the device, made once: a graph must not copy from the host."""
    key = (ids, device)
    if key not in _constants:
        _constants[key] = torch.tensor(ids, dtype=torch.long, device=device)
    return _constants[key]


def _excluded(step: int, settings: SamplingSettings, device: torch.device) -> Tensor | None:
    """The tokens that may not be drawn at a step: EOS before `min_new_tokens`."""
    return _ids(settings.eos_token_ids, device) if step < settings.min_new_tokens else None


def _smaller_batch(batch: int, n_running: int) -> int:
    """Half the batch, and half of that, as long as the running rows fit."""
    while batch // 2 >= max(n_running, SMALLEST_BATCH):
        batch //= 2
    return batch
