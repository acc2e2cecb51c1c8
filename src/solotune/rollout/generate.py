"""Sampling by `transformers.generate`, for arguments the project's own sampler does not know."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from solotune.errors import ConfigError
from solotune.rollout.records import FinishReason, Rollouts
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
    sequences_BS = sequences_of(lm, prompt_ids_BP, prompt_mask_BP, uniforms_BT, settings, pad_token_id)
    response_ids_BT = sequences_BS[:, prompt_ids_BP.shape[1] :]
    rollouts = as_rollouts(
        prompt_ids_BP, prompt_mask_BP, response_ids_BT, prompt_index_B, settings, pad_token_id, find_stop
    )
    if take_trunk is None:
        return rollouts
    ids_BS, mask_BS, positions_BS = rollouts.inputs
    positions = {"position_ids": positions_BS} if _takes_positions(lm) else {}
    lm(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False, logits_to_keep=1, **positions)
    return rollouts._replace(trunk_NSH=take_trunk())


def sequences_of(
    lm: PreTrainedModel,
    prompt_ids_BP: Tensor,
    prompt_mask_BP: Tensor,
    uniforms_BT: Tensor,
    settings: SamplingSettings,
    pad_token_id: int,
) -> Tensor:
    """What `transformers.generate` returns, (B, S); see `generate` for its random numbers and errors."""
    names = tuple(sorted(settings.other))
    if names not in _told:
        _told.add(names)
        log.info("method.gen_kwargs: %s handed to transformers.generate, which is slower", ", ".join(names))
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
    found, wanted = len(sequences_BS), len(prompt_ids_BP)
    if found != wanted:
        raise ConfigError(
            f"method.gen_kwargs {settings.other!r} gave {found} responses for {wanted} prompts; allowed is "
            "one each (repeat the prompts instead)"
        )
    return sequences_BS


def as_rollouts(
    prompt_ids_BP: Tensor,
    prompt_mask_BP: Tensor,
    response_ids_BT: Tensor,
    prompt_index_B: Tensor,
    settings: SamplingSettings,
    pad_token_id: int,
    find_stop: FindStop | None = None,
) -> Rollouts:
    """Responses that were made elsewhere, cut where they end; their log-probabilities are not known (NaN)."""
    lengths_B, finish_B = ends_of(response_ids_BT, settings, find_stop)
    width_T = int(lengths_B.max()) if len(lengths_B) else 0
    response_mask_BT = torch.arange(width_T, device=response_ids_BT.device) < lengths_B[:, None]
    response_ids_BT = response_ids_BT[:, :width_T].masked_fill(~response_mask_BT, pad_token_id)
    return Rollouts(
        prompt_ids_NP=prompt_ids_BP,
        prompt_mask_NP=prompt_mask_BP.bool(),
        response_ids_NT=response_ids_BT,
        response_mask_NT=response_mask_BT,
        sample_logprobs_NT=torch.full(response_ids_BT.shape, torch.nan, device=response_ids_BT.device),
        finish_N=finish_B,
        prompt_index_N=prompt_index_B,
        trunk_NSH=None,
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
