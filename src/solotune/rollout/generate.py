"""Sampling by `transformers.generate`, for arguments the project's own sampler does not know."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from solotune.errors import ConfigError
from solotune.rollout.records import FinishReason, Rollouts, positions_of
from solotune.rollout.sampler import FindStop
from solotune.rollout.settings import SamplingSettings

log = logging.getLogger("solotune")

_told: set[tuple[str, ...]] = set()


@torch.no_grad()
def generate(
    lm: PreTrainedModel,
    prompt_ids_BP: Tensor,
    prompt_mask_BP: Tensor,
    prompt_index_B: Tensor,
    uniforms_BT: Tensor,
    settings: SamplingSettings,
    pad_token_id: int,
    take_trunk: Callable[[], Tensor] | None = None,
    find_stop: FindStop | None = None,
) -> Rollouts:
    """As `sampler.sample`, with `settings.other` handed to `transformers.generate` and one full pass for the trunk.

    The log-probabilities of the draws are not known here (NaN): processors may have changed them.

    The random numbers come from torch's global generator, seeded from the rows' own numbers, so that a round is still
    repeated by its seed; unlike with the own sampler a row depends on the batch it is sampled in.

    Raises:
        ConfigError: transformers refuses the arguments, or they do not give one response a prompt.
    """
    names = tuple(sorted(settings.other))
    if names not in _told:
        _told.add(names)
        log.info("method.gen_kwargs: %s handed to transformers.generate, which is slower", ", ".join(names))
    n_rows, width_P = prompt_ids_BP.shape
    with torch.random.fork_rng(devices=[prompt_ids_BP.device] if prompt_ids_BP.is_cuda else []):
        torch.manual_seed(int(uniforms_BT.sum() * 2**32) if uniforms_BT.numel() else 0)
        try:
            sequences_BS = lm.generate(  # type: ignore[operator]
                input_ids=prompt_ids_BP,
                attention_mask=prompt_mask_BP.long(),
                max_new_tokens=settings.max_new_tokens,
                min_new_tokens=settings.min_new_tokens or None,
                do_sample=settings.do_sample,
                temperature=settings.temperature if settings.do_sample else None,
                top_k=settings.top_k if settings.do_sample else None,
                top_p=settings.top_p if settings.do_sample else None,
                eos_token_id=list(settings.eos_token_ids) or None,
                pad_token_id=pad_token_id,
                **settings.other,
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"method.gen_kwargs: transformers.generate refused {settings.other!r}: {error}"
            ) from error
    if len(sequences_BS) != n_rows:
        raise ConfigError(
            f"method.gen_kwargs {settings.other!r} gave {len(sequences_BS)} responses for {n_rows} prompts; allowed is "
            "one each (repeat the prompts instead)"
        )
    response_ids_BT = sequences_BS[:, width_P:]
    lengths_B, finish_B = ends_of(response_ids_BT, settings, find_stop)
    width_T = int(lengths_B.max()) if n_rows else 0
    response_mask_BT = torch.arange(width_T, device=response_ids_BT.device) < lengths_B[:, None]
    response_ids_BT = response_ids_BT[:, :width_T].masked_fill(~response_mask_BT, pad_token_id)
    mask_BS = torch.cat([prompt_mask_BP.bool(), response_mask_BT[:, :-1]], dim=1).long()
    positions = {"position_ids": positions_of(mask_BS)} if _takes_positions(lm) else {}
    if take_trunk is not None:
        ids_BS = torch.cat([prompt_ids_BP, response_ids_BT[:, :-1]], dim=1)
        lm(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False, logits_to_keep=1, **positions)
    return Rollouts(
        prompt_ids_NP=prompt_ids_BP,
        prompt_mask_NP=prompt_mask_BP.bool(),
        response_ids_NT=response_ids_BT,
        response_mask_NT=response_mask_BT,
        sample_logprobs_NT=torch.full(response_ids_BT.shape, torch.nan, device=response_ids_BT.device),
        finish_N=finish_B,
        prompt_index_N=prompt_index_B,
        trunk_NSH=None if take_trunk is None else take_trunk(),
    )


def _takes_positions(lm: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(lm.forward).parameters


def ends_of(response_ids_BT: Tensor, settings: SamplingSettings, find_stop: FindStop | None) -> tuple[Tensor, Tensor]:
    """Length and finish reason of each row, (B,): up to and with the first EOS, or the last token of a stop string."""
    lengths, reasons = [], []
    for ids in response_ids_BT.tolist():
        length, reason = len(ids), FinishReason.LENGTH
        for position, token in enumerate(ids):
            if token in settings.eos_token_ids:
                length, reason = position + 1, FinishReason.EOS
                break
            if find_stop is not None and settings.stop_strings and find_stop(ids[: position + 1]):
                length, reason = position + 1, FinishReason.STOP_STRING
                break
        lengths.append(length)
        reasons.append(int(reason))
    device = response_ids_BT.device
    return torch.tensor(lengths, device=device), torch.tensor(reasons, device=device)
