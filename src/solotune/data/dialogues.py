"""Strings and dialogues to token ids, with a mask of the tokens to learn: those of outputs.

A dialogue is [prompt, output, prompt, output, ...]; a string is one output that follows the tokenizer's BOS (where it
has none, its EOS).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from solotune.config.values import is_unicode, shown
from solotune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("solotune")


class Phrase(NamedTuple):
    """A prompt or an output of a dialogue, as token ids."""

    is_output: bool
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Samples:
    """N tokenised samples with at least one token to learn each.

    Args:
        ids: token ids of each.
        is_output: of each of its tokens, whether it belongs to an output.
        index: which of the given samples each is: those with nothing to learn are left out.
        prompts: for an encoder-decoder, what the encoder is given of each; `ids` are then the decoder's alone, with a
            place for its start token before them.
    """

    ids: list[list[int]] = field(default_factory=list)
    is_output: list[list[bool]] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def positions(self, index: int) -> int:
        """Positions that are fed to the model for one sample: all of its tokens but the last, and its prompt's."""
        return len(self.ids[index]) - 1 + (len(self.prompts[index]) if self.prompts else 0)

    @cached_property
    def chosen_tokens(self) -> list[int]:
        """The tokens to learn, each once, ascending."""
        return sorted({token for index in range(len(self)) for _, token in self.learned(index)})

    def learned(self, index: int) -> list[tuple[int, int]]:
        """Place and token of all that is learned of one sample; the very first token is predicted from nothing."""
        both = zip(self.ids[index], self.is_output[index], strict=True)
        return [(t, token) for t, (token, is_output) in enumerate(both) if is_output and t > 0]


def tokenize_dialogue(
    dialogue: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int = 2048
) -> list[Phrase]:
    """The phrases of one sample as `encode_samples` makes them, without the tokenizer's own special tokens.

    Raises:
        DataError: it is neither a text nor of even length, or it is empty.
    """
    return _tokenize([dialogue], tokenizer, max_length, add_special_tokens=False)[0][0]


def encode_samples(
    samples: Sequence[str | Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    add_special_tokens: bool = True,
) -> Samples:
    """Token ids and output masks of strings and dialogues.

    The last output ends in one EOS, also where its text brings one. A sample of more than `max_length` tokens is cut at
    the tokenizer's `truncation_side`; one line says how many are. What is cut on the right has no EOS: it did not end.
    Empty phrases are left out, and where an output then comes first a BOS is put before it, or the EOS where the
    tokenizer has no BOS; with neither, its first token is not learned.

    Args:
        add_special_tokens: start a dialogue's prompt with what the tokenizer puts before a text.
    Raises:
        DataError: there are none; one is not a text, of odd length or empty (its index is named); none has anything
            left to learn.
    """
    if len(samples) == 0:
        raise DataError("there are no samples: give at least one text or [prompt, output]")
    tokenized, n_cut = _tokenize(samples, tokenizer, max_length, add_special_tokens)
    if n_cut:
        log.info(
            "%d of %d samples have more than train.seq_length = %d tokens and are cut on the %s",
            n_cut, len(samples), max_length, tokenizer.truncation_side,
        )  # fmt: skip
    found = Samples()
    for index, phrases in enumerate(tokenized):
        is_output = [phrase.is_output for phrase in phrases for _ in phrase.tokens]
        if any(is_output[1:]):
            found.ids.append([token for phrase in phrases for token in phrase.tokens])
            found.is_output.append(is_output)
            found.index.append(index)
    if not found.ids:
        raise DataError(
            f"none of {len(samples)} samples has an output token within train.seq_length = {max_length}: raise it, or "
            "set tokenizer.truncation_side to left"
        )
    if len(found) < len(samples):
        left_out = len(samples) - len(found)
        log.warning("%d of %d samples have no output token left to learn and are left out", left_out, len(samples))
    return found


def encode_pairs(
    samples: Sequence[str | Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    add_special_tokens: bool = True,
) -> Samples:
    """Token ids of [prompt, output] pairs for an encoder-decoder; an output ends in one EOS.

    A prompt and an output may have `max_length` tokens each. What has more is cut at the tokenizer's `truncation_side`,
    a prompt before the end that the tokenizer gives it; one line says how many are.

    Args:
        add_special_tokens: give the prompt what the tokenizer puts around a text (T5: its EOS).
    Raises:
        DataError: there are none, or one is no pair of texts, of which both have tokens (its index is named).
    """
    if len(samples) == 0:
        raise DataError("there are no samples: give at least one [prompt, output]")
    texts = [_texts(sample, index) for index, sample in enumerate(samples)]
    for index, pair in enumerate(texts):
        if len(pair) != 2 or not all(pair):
            raise DataError(
                f"sample {index} is {samples[index]!r}: an encoder-decoder learns from [prompt, output], two texts "
                "that are not empty"
            )
    columns = [[pair[place] for pair in texts] for place in (0, 1)]
    plain, outputs = (tokenizer(column, add_special_tokens=False)["input_ids"] for column in columns)
    whole = tokenizer(columns[0], add_special_tokens=add_special_tokens)["input_ids"]
    found, n_cut, eos = Samples(), 0, tokenizer.eos_token_id
    for index, (prompt, bare, output) in enumerate(zip(whole, plain, outputs, strict=True)):
        ended = [*output, eos] if eos is not None and list(output[-1:]) != [eos] else list(output)
        short = _shortened(list(bare), max_length - (len(prompt) - len(bare)), tokenizer)
        around = _around(list(prompt), list(bare))
        kept = _shortened(ended, max_length, tokenizer)
        if not kept or not [*around[0], *short, *around[1]]:
            raise DataError(
                f"sample {index} is {samples[index]!r}: the tokenizer has no tokens for one of its two texts"
            )
        n_cut += len(short) < len(bare) or len(kept) < len(ended)
        found.prompts.append([*around[0], *short, *around[1]])
        found.ids.append([0, *kept])  # the model puts its start token in the first place
        found.is_output.append([False] + [True] * len(kept))
        found.index.append(index)
    if n_cut:
        log.info(
            "%d of %d samples have more than train.seq_length = %d tokens and are cut on the %s",
            n_cut, len(samples), max_length, tokenizer.truncation_side,
        )  # fmt: skip
    return found


def _shortened(tokens: list[int], room: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    room = max(room, 0)
    return tokens[max(len(tokens) - room, 0) :] if tokenizer.truncation_side == "left" else tokens[:room]


def _around(whole: list[int], plain: list[int]) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text."""
    for first in range(len(whole) - len(plain) + 1):
        if whole[first : first + len(plain)] == plain:
            return whole[:first], whole[first + len(plain) :]
    return [], []


MOST = 1e100
"""Rewards beyond it have no variance in double precision."""


def checked_rewards(rewards: Any, n_samples: int) -> list[float]:
    """One finite number a sample.

    Args:
        rewards: a sequence of numbers, a tensor or an array.
    Raises:
        DataError: another number of them than of samples, or one that is not a finite number.
    """
    values: Any = rewards.tolist() if hasattr(rewards, "tolist") else rewards
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise DataError(f"rewards= is {rewards!r}: it has to be a list of numbers, one a sample")
    values = list(values)
    if len(values) != n_samples:
        raise DataError(f"{len(values)} rewards for {n_samples} samples: one number a sample is needed")
    for index, value in enumerate(values):
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, int | float) or not abs(value) <= MOST:
            raise DataError(
                f"the reward of sample {index} is {shown(value)}: it has to be a finite number, of at most {MOST:g}"
            )
        values[index] = float(value)
    return values


def _tokenize(
    samples: Sequence[str | Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    add_special_tokens: bool,
) -> tuple[list[list[Phrase]], int]:
    """The phrases of each sample, and how many samples were cut."""
    texts = [_texts(sample, index) for index, sample in enumerate(samples)]
    flat = [text for sample in texts for text in sample if text]
    encoded = iter(tokenizer(flat, add_special_tokens=False)["input_ids"])
    start: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    leading = _leading(tokenizer) if add_special_tokens else []
    eos = tokenizer.eos_token_id
    if eos is None:
        log.warning("the tokenizer has no EOS: samples do not end in one, so where to stop is not learned")
    tokenized, n_cut = [], 0
    for given, sample in zip(samples, texts, strict=True):
        first_output = 0 if isinstance(given, str) else 1
        phrases = []
        for place, text in enumerate(sample):
            tokens = list(next(encoded)) if text else []
            is_output = place % 2 == first_output
            if place == 0 and not is_output and tokens and tokens[: len(leading)] != leading:
                tokens = leading + tokens
            if place == len(sample) - 1 and eos is not None and tokens[-1:] != [eos]:
                tokens = [*tokens, eos]
            phrases.append(Phrase(is_output, tuple(tokens)))
        kept, was_cut = _fitted(phrases, start, max_length, tokenizer.truncation_side)
        tokenized.append(kept)
        n_cut += was_cut
    return tokenized, n_cut


def _texts(sample: Any, index: int) -> list[str]:
    """The texts of one sample; [output] for a string."""
    if isinstance(sample, str):
        texts = [sample]
    elif isinstance(sample, Sequence):
        texts = list(sample)
        if len(texts) % 2 or not texts:
            raise DataError(
                f"sample {index} has {len(texts)} phrases: a dialogue is [prompt, output, prompt, output, ...], of an "
                "even number"
            )
    else:
        raise DataError(f"sample {index} is a {type(sample).__name__}: it has to be a text or [prompt, output, ...]")
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"sample {index} holds a {type(text).__name__} ({str(text)[:80]!r}), expected a text")
        if not is_unicode(text):
            raise DataError(f"sample {index} holds half a character ({ascii(text)[:80]}), which no tokenizer takes")
    if not any(texts):
        raise DataError(f"sample {index} is empty ({sample!r}): remove it or give it a text")
    return texts


def _fitted(phrases: list[Phrase], start: int | None, max_length: int, side: str) -> tuple[list[Phrase], bool]:
    """The phrases with a start token where an output comes first, cut to `max_length` tokens; whether any was cut."""
    kept, was_cut = _cut(phrases, max_length, side)
    if kept and kept[0].is_output and start is not None:
        begins = kept[0].tokens[0] == start
        if begins and len(kept[0].tokens) > 1:  # the text brings its own
            return [Phrase(False, (start,)), Phrase(True, kept[0].tokens[1:]), *kept[1:]], was_cut
        shorter, again = _cut(kept, max_length - 1, side)
        was_cut = was_cut or again
        kept = [Phrase(False, (start,)), *shorter]
    return kept, was_cut


def _cut(phrases: list[Phrase], max_length: int, side: str) -> tuple[list[Phrase], bool]:
    excess = sum(len(phrase.tokens) for phrase in phrases) - max_length
    was_cut = excess > 0
    ordered = phrases if side == "left" else phrases[::-1]
    kept = []
    for phrase in ordered:
        drop = min(max(excess, 0), len(phrase.tokens))
        excess -= drop
        tokens = phrase.tokens[drop:] if side == "left" else phrase.tokens[: len(phrase.tokens) - drop]
        if tokens:
            kept.append(Phrase(phrase.is_output, tokens))
    return (kept if side == "left" else kept[::-1]), was_cut


def _leading(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
    whole = list(tokenizer("a", add_special_tokens=True)["input_ids"])  # type: ignore[arg-type]
    return _around(whole, plain)[0]
