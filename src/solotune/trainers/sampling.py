"""From prompts to rollouts and back to text: what training and evaluation share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from solotune.data.prompts import Prompts
from solotune.errors import RewardError
from solotune.rollout.draw import row_uniforms
from solotune.rollout.records import FinishReason, Rollouts, concatenate
from solotune.rollout.settings import SamplingSettings, sweep
from solotune.trainers.order import Stream

if TYPE_CHECKING:
    from solotune.config import TRLConfig

log = logging.getLogger("solotune")


class Texts(NamedTuple):
    """What a reward function sees of N rollouts."""

    samples: list[str]
    prompts: list[str]
    outputs: list[str]
    metadata: dict[str, list[Any]]


def has_room(trunk_bytes: float, device: torch.device) -> bool:
    """Whether a round's trunk activations may stay on the device: where they take at most a quarter of what is free.

    Twice that is needed while chunks are joined, and the update needs the rest.
    """
    if device.type != "cuda":
        return True
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return trunk_bytes <= (torch.cuda.mem_get_info(device)[0] + unused) / 4


def separator_of(config: TRLConfig) -> str | None:
    """What stands between a prompt and its output in a sample: nothing where a response continues its prompt; for an
    encoder-decoder a space, and in trlX's scripts what trlX put there."""
    if not config.model.is_seq2seq:
        return None
    return "<sep>" if config.AS_TRLX else " "


def room_for_prompts(config: TRLConfig) -> int:
    """Tokens a prompt may have: `train.seq_length` less the longest response of rollouts and evaluations."""
    method: Any = config.method
    settings = [setting.gen_kwargs for setting in sweep(method.gen_kwargs)]
    if getattr(method, "gen_experience_kwargs", None) is not None:
        settings.append(method.gen_experience_kwargs)
    longest = max(SamplingSettings.from_gen_kwargs(kwargs, None).max_new_tokens for kwargs in settings)
    return config.train.seq_length - longest


def on_main(accelerator: Accelerator, function: Callable[[Texts], list[Any]], own: Texts) -> list[Any]:
    """What `function` says of the texts of all processes, asked on the first one alone; each process gets its own part.

    Raises:
        RewardError: on every process, where `function` raised on the first.
    """
    shares: list[Texts] = gather_object([own])
    answer: list[Any] = [None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            answer[0] = function(_joined(shares))
        except Exception as error:  # the others wait for an answer
            failure, answer[1] = error, str(error)
    broadcast_object_list(answer)
    if failure is not None:
        raise RewardError(str(failure)) from failure  # the same kind everywhere: what follows is done together
    if answer[1] is not None:
        raise RewardError(f"on the first process: {answer[1]}")
    start = sum(len(share.samples) for share in shares[: accelerator.process_index])
    return answer[0][start : start + len(own.samples)]


def _joined(shares: list[Texts]) -> Texts:
    names = next((list(share.metadata) for share in shares if share.samples), [])
    metadata = {name: [value for share in shares for value in share.metadata.get(name, [])] for name in names}
    samples, prompts, outputs = ([text for share in shares for text in share[column]] for column in range(3))
    return Texts(samples, prompts, outputs, metadata)


class PromptSampler:
    """Samples responses to prompts given by their index, in chunks.

    Args:
        policy: the `PolicyModel`, as `accelerator.prepare` returned it.
        prompts: texts and metadata.
        prompt_ids: their token ids.
        stream: which random numbers the rows draw from.
        separator: what stands between prompt and output in a sample, where an output does not continue its prompt (an
            encoder-decoder's); None where it does.
    """

    def __init__(
        self,
        policy: Callable[..., Any],
        tokenizer: Any,
        prompts: Prompts,
        prompt_ids: list[list[int]],
        seed: int,
        stream: Stream,
        chunk_size: int,
        device: torch.device,
        separator: str | None = None,
    ):
        self._separator = separator
        self._policy, self._tokenizer = policy, tokenizer
        self._prompts, self._prompt_ids = prompts, prompt_ids
        self._seed, self._stream, self._chunk_size, self._device = seed, stream, chunk_size, device

    @torch.no_grad()
    def __call__(
        self,
        prompt_indices: list[int],
        row_ids: Sequence[int],
        settings: SamplingSettings,
        groups: Sequence[int] | None = None,
        told: Callable[[str], None] | None = None,
    ) -> Rollouts:
        """One response for each index.

        Args:
            row_ids: name the rows' random streams.
            groups: which rows belong together; default each to itself.
            told: hears of each chunk.
        """
        task = "generate" if settings.other else "sample"
        rows = list(zip(prompt_indices, row_ids, strict=True))
        parts: list[Rollouts] = []
        on_host = False
        for first in range(0, len(rows), self._chunk_size):
            chunk = rows[first : first + self._chunk_size]
            ids_BP, mask_BP = self._left_padded([index for index, _ in chunk])
            part: Rollouts = self._policy(
                task,
                ids_BP,
                mask_BP,
                torch.tensor([index for index, _ in chunk], device=self._device),
                row_uniforms(self._seed, self._stream, (row for _, row in chunk), settings.max_new_tokens),
                settings,
                self._tokenizer.pad_token_id,
                find_stop=self._stop_finder(settings.stop_strings),
            )
            if not parts and part.trunk_NSH is not None:
                on_host = not has_room(part.trunk_NSH.nbytes * len(rows) / len(chunk), self._device)
            parts.append(part.with_trunk_on_host() if on_host else part)
            if told is not None and first + len(chunk) < len(rows):
                told(f"sampling, {first + len(chunk):,} of {len(rows):,}")
        group_N = torch.tensor(list(row_ids if groups is None else groups), device=self._device)
        return concatenate(parts, self._tokenizer.pad_token_id)._replace(group_N=group_N)

    def texts(self, rollouts: Rollouts, stop_strings: Iterable[str] = (), eos_text: str = "") -> Texts:
        """Decoded outputs, without special tokens and cut at stop strings, and what belongs to their prompts.

        `eos_text` is put behind outputs that ended of themselves or at a stop string, as trlX did.

        A prompt and its response are decoded together, because tokenizers drop a space at the start of a text.
        """
        chosen = self._prompts.select(rollouts.prompt_index_N.tolist())
        outputs: list[str] = []
        finishes = rollouts.finish_N.tolist()
        for row, index in enumerate(rollouts.prompt_index_N.tolist()):
            prompt_ids = self._prompt_ids[index] if self._separator is None else []
            prompt = self._decode(prompt_ids)
            whole = self._decode(prompt_ids + rollouts.response_tokens(row))
            output = whole[len(prompt) :] if whole.startswith(prompt) else self._decode(rollouts.response_tokens(row))
            output = cut_at(output, stop_strings)
            outputs.append(output if finishes[row] == FinishReason.LENGTH else output + eos_text)
        between = self._separator or ""
        samples = [prompt + between + output for prompt, output in zip(chosen.texts, outputs, strict=True)]
        return Texts(samples, chosen.texts, outputs, chosen.metadata)

    def _left_padded(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows = [self._prompt_ids[index] for index in indices]
        width = max(len(row) for row in rows)
        pad = self._tokenizer.pad_token_id
        ids = [[pad] * (width - len(row)) + row for row in rows]
        mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
        return torch.tensor(ids, device=self._device), torch.tensor(mask, device=self._device)

    def _stop_finder(self, stop_strings: tuple[str, ...]) -> Callable[[list[int]], bool] | None:
        if not stop_strings:
            return None
        # A token has at least one character or is part of one, and a character at most four such parts.
        tail = 4 * max(len(stop) for stop in stop_strings)

        def find(ids: list[int]) -> bool:
            text = self._decode(ids[-tail:])
            return any(stop in text for stop in stop_strings)

        return find

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut_at(output: str, stop_strings: Iterable[str]) -> str:
    """The text before each stop string, in their order; right-stripped where it was cut (as trlX)."""
    for stop in stop_strings:
        position = output.find(stop)
        if position >= 0:
            output = output[:position].rstrip()
    return output
