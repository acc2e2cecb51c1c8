"""Prompts: texts to continue, with the metadata that reward functions may ask for."""

import logging
import string
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solotune.config.values import is_unicode
from solotune.data.assets import FILM_SNIPPETS, PREFIX, resolve
from solotune.data.film_snippets import read as read_film_snippets
from solotune.data.tables import Row, read_rows
from solotune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from solotune.config import DataConfig

logger = logging.getLogger(__name__)

PROMPT_COLUMNS = ("prompt", "text", "query")
RESERVED = ("samples", "prompts", "outputs", "tokenizer")  # a reward function's own keywords
DEFAULT_EVAL_PROMPTS = 32


@dataclass(frozen=True)
class Prompts:
    """N prompts.

    Args:
        texts: N texts, none of them empty.
        metadata: name -> N values, passed to reward functions whose signature takes that name.
        ids: the token ids of each, where they are given and not encoded from the texts.
    """

    texts: list[str]
    metadata: dict[str, list[Any]] = field(default_factory=dict)
    ids: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def from_list(cls, rows: Sequence[Row], column: str = "prompt") -> "Prompts":
        """Texts, or mappings with the text under `column` and the same further keys in every row.

        Raises:
            DataError: there are none, one is empty, or the rows differ in their keys.
        """
        if not rows:
            raise DataError("there are no prompts: `data.prompts` is empty; give at least one text")
        texts, columns = [], []
        names = set(_mapping(rows[0], 0, column))
        for index, row in enumerate(rows):
            values = _mapping(row, index, column)
            if set(values) != names:
                raise DataError(
                    f"prompt {index} has the keys {_named(values)}, prompt 0 has {_named(names)}: "
                    "every prompt needs the same keys"
                )
            text = values.pop(column)
            if not isinstance(text, str):
                raise DataError(f"prompt {index} is a {type(text).__name__} ({str(text)[:80]!r}), expected a text")
            if not text.strip():
                raise DataError(f"prompt {index} is empty ({text!r}): remove it or give it a text")
            if bad := [
                name for name, x in {column: text, **values}.items() if isinstance(x, str) and not is_unicode(x)
            ]:
                raise DataError(f"prompt {index}: {bad[0]!r} is no text, it holds half of a surrogate pair; remove it")
            texts.append(text)
            columns.append(values)
        if taken := sorted((names - {column}) & set(RESERVED)):
            raise DataError(
                f"prompts have metadata called {', '.join(taken)}, which reward functions get as something else "
                f"({', '.join(RESERVED)}); rename it"
            )
        return cls(texts, {name: [values[name] for values in columns] for name in sorted(names - {column}, key=str)})

    def select(self, indices: Sequence[int]) -> "Prompts":
        """The prompts at `indices`, in that order."""
        metadata = {name: [values[i] for i in indices] for name, values in self.metadata.items()}
        ids = None if self.ids is None else [self.ids[i] for i in indices]
        return Prompts([self.texts[i] for i in indices], metadata, ids)

    def spread(self, count: int | None) -> "Prompts":
        """At most `count` prompts, evenly spaced: data sets are often sorted by label, and the first are all alike."""
        if count is None or count >= len(self):
            return self
        return self.select([i * len(self) // count for i in range(count)])

    def first_words(self, count: int) -> "Prompts":
        """The first `count` words of each prompt; shorter prompts and repeated ones are left out.

        Raises:
            DataError: none is left.
        """
        seen: set[tuple[str, str]] = set()
        kept, texts = [], []
        for index, text in enumerate(self.texts):
            words = text.split()[:count]
            key = (" ".join(words), repr([values[index] for values in self.metadata.values()]))
            if len(words) == count and key not in seen:
                seen.add(key)
                kept.append(index)
                texts.append(key[0])
        if not kept:
            raise DataError(f"no prompt has {count} words: lower `data.prompt_words`, or remove it")
        logger.info("%d prompts of %d words from %d texts", len(kept), count, len(self))
        return Prompts(texts, self.select(kept).metadata)


def load_prompts(data: "DataConfig") -> Prompts:
    """The training prompts of a recipe, in a fixed order.

    Raises:
        DataError: there are none, or the source is missing or malformed.
    """
    if data.prompts is None:
        raise DataError("there are no prompts: `data.prompts` is missing; give at least one text")
    prompts = _load(data.prompts, data)
    if data.prompt_words is not None:
        prompts = prompts.first_words(data.prompt_words)
    return prompts.spread(data.max_prompts)


def load_eval_prompts(data: "DataConfig") -> Prompts:
    """The evaluation prompts, each `eval_repeats` times in a row; 32 of the training prompts where none are given.

    `prompt_words` cuts those of a file or data set as well, but never a list that is written out in the recipe.

    Raises:
        DataError: as `load_prompts`.
    """
    if data.eval_prompts is None:
        prompts = load_prompts(data).spread(DEFAULT_EVAL_PROMPTS)
    else:
        prompts = _load(data.eval_prompts, data)
        if data.prompt_words is not None and isinstance(data.eval_prompts, str):
            prompts = prompts.first_words(data.prompt_words)
    return prompts.select([index for index in range(len(prompts)) for _ in range(data.eval_repeats)])


def fitting(
    prompts: Prompts, tokenizer: "PreTrainedTokenizerBase", max_length: int, add_special_tokens: bool
) -> Prompts:
    """Those prompts that have at most `max_length` tokens; says how many were left out.

    Raises:
        DataError: none is left.
    """
    rows = tokenizer(prompts.texts, add_special_tokens=add_special_tokens)["input_ids"]
    kept = [index for index, row in enumerate(rows) if len(row) <= max_length]
    if not kept:
        raise DataError(f"none of {len(prompts)} prompts has at most {max_length} tokens: raise `train.seq_length`")
    if len(kept) < len(prompts):
        left_out = len(prompts) - len(kept)
        logger.info("%d of %d prompts have more than %d tokens and are left out", left_out, len(prompts), max_length)
    return prompts.select(kept)


def cut(
    prompts: Prompts,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    add_special_tokens: bool,
    side: str,
    goes_on: bool = True,
) -> Prompts:
    """The prompts, cut to `max_length` tokens on one side ("left" keeps the end) as trlX did; says how many were."""
    rows = encode(prompts, tokenizer, sys.maxsize, add_special_tokens, goes_on)
    long = [index for index, row in enumerate(rows) if len(row) > max_length]
    if not long:
        return prompts
    logger.info("%d of %d prompts are cut on the %s to %d tokens", len(long), len(rows), side, max_length)
    texts = list(prompts.texts)
    for index in long:
        first = rows[index][:1] if rows[index][0] == tokenizer.bos_token_id else []
        last = rows[index][-1:] if not goes_on and rows[index][-1] == tokenizer.eos_token_id else []
        rest = rows[index][len(first) : len(rows[index]) - len(last)]
        room = max_length - len(first) - len(last)
        kept = rest[len(rest) - room :] if side == "left" else rest[:room]
        rows[index] = first + kept + last
        texts[index] = str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return Prompts(texts, prompts.metadata, rows)


def encode(
    prompts: Prompts | Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    add_special_tokens: bool = True,
    goes_on: bool = True,
) -> list[list[int]]:
    """Token ids of each prompt, never truncated.

    Args:
        max_length: room for a prompt in tokens, `train.seq_length` less the new tokens.
        add_special_tokens: let the tokenizer add its own (a BOS); what it adds at the end is dropped where a prompt
            goes on.
        goes_on: the response continues the prompt; False for the input of an encoder.
    Raises:
        DataError: there are no prompts; one has no tokens or more than `max_length`.
    """
    texts = list(prompts.texts if isinstance(prompts, Prompts) else prompts)
    if not texts:
        raise DataError("there are no prompts: `data.prompts` is empty; give at least one text")
    if isinstance(prompts, Prompts) and prompts.ids is not None:
        for index, (text, row) in enumerate(zip(texts, prompts.ids, strict=True)):
            _check_length(index, text, row, max_length)
        return [list(row) for row in prompts.ids]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if add_special_tokens and not goes_on:
        rows = tokenizer(texts, add_special_tokens=True)["input_ids"]
    elif add_special_tokens:
        plain_rows, rows = rows, tokenizer(texts, add_special_tokens=True)["input_ids"]
        rows = [_without_trailing(row, plain) for row, plain in zip(rows, plain_rows, strict=True)]
        dropped = tokenizer(texts[0], add_special_tokens=True)["input_ids"][len(rows[0]) :]
        if dropped:
            names = " ".join(tokenizer.convert_ids_to_tokens(dropped))
            logger.info("the tokenizer ends every text with %s; prompts go on, so it is left out of them", names)
    bos = tokenizer.bos_token_id
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        if not text.strip():
            raise DataError(f"prompt {index} is empty ({text!r}): remove it or give it a text")
        _check_length(index, text, row, max_length)
        if bos is not None and row[:2] == [bos, bos]:
            logger.warning(
                "prompt %d starts with %s twice: once in its text and once added by the tokenizer; "
                "set `tokenizer.add_special_tokens: false` if the texts have their own",
                index,
                tokenizer.bos_token,
            )
            bos = None  # said once
    return [list(row) for row in rows]


def _check_length(index: int, text: str, row: list[int], max_length: int) -> None:
    if not row:
        raise DataError(f"prompt {index} is empty ({text!r}): remove it or give it a text")
    if len(row) > max_length:
        raise DataError(
            f"prompt {index} has {len(row)} tokens, but there is room for {max_length} "
            "(`train.seq_length` less `max_new_tokens` of the generation settings): shorten it, raise "
            f"`train.seq_length` to at least {len(row) - max_length} more, or lower `max_new_tokens`. "
            f"It begins {text[:80]!r}"
        )


def _without_trailing(row: list[int], plain: list[int]) -> list[int]:
    """`row` = leading special tokens + `plain` + trailing ones -> the same without the trailing ones."""
    for start in range(len(row) - len(plain) + 1):
        if row[start : start + len(plain)] == plain:
            return row[: start + len(plain)]
    return row


def _mapping(row: Row, index: int, column: str | None) -> dict[str, Any]:
    if isinstance(row, str):
        return {column or "prompt": row}
    if not isinstance(row, dict):
        raise DataError(f"prompt {index} is a {type(row).__name__} ({str(row)[:80]!r}), expected a text or a mapping")
    if column is not None and column not in row:
        raise DataError(f"prompt {index} has no key {column!r}; its keys are {_named(row)}")
    return dict(row)


def _load(source: "str | list[Row]", data: "DataConfig") -> Prompts:
    if not isinstance(source, str):
        return _from_rows(list(source), data.prompt_column or "prompt", data)
    if source == FILM_SNIPPETS:
        return Prompts([snippet.text for snippet in read_film_snippets(Path(resolve(source)))])
    if source.startswith(PREFIX):
        raise DataError(f"{resolve(source)!r} is not a set of prompts; {FILM_SNIPPETS!r} is")
    rows = read_rows(source, data.split)
    column = data.prompt_column or "prompt"
    if data.prompt_column is None and data.prompt_template is None and rows and isinstance(rows[0], dict):
        first = rows[0]
        found = [name for name in PROMPT_COLUMNS if name in first]
        if not found:
            raise DataError(
                f"{source!r} has the columns {_named(first)}, none of which is {' or '.join(PROMPT_COLUMNS)}; "
                "name the one to use in `data.prompt_column`"
            )
        column = found[0]
    return _from_rows(rows, column, data)


def _from_rows(rows: list[Row], column: str, data: "DataConfig") -> Prompts:
    """Prompts of rows, by the template or up to the marker that the recipe names."""
    if data.prompt_template is not None:
        column = "prompt"
        rows = [{**_mapping(row, index, None), column: filled(data.prompt_template, row, index)}
                for index, row in enumerate(rows)]  # fmt: skip
    prompts = Prompts.from_list(rows, column)
    if (marker := data.prompt_until) is None:
        return prompts
    texts = []
    for index, text in enumerate(prompts.texts):
        position = text.rfind(marker)
        if position < 0:
            raise DataError(f"prompt {index} has no {marker!r} (`data.prompt_until`); it begins {text[:80]!r}")
        texts.append(text[: position + len(marker)])
    return Prompts(texts, prompts.metadata)


def filled(template: str, row: Row, index: int) -> str:
    """`template` with a column's text for every {column}; nothing else that str.format knows, since a recipe may be
    somebody else's: {prompt.__class__} would look into objects, {prompt:>9999999999} fill the memory."""
    values = row if isinstance(row, dict) else {"prompt": row}
    try:
        parts = list(string.Formatter().parse(template))
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise ValueError("{column} takes no format (:) and no conversion (!)")
        return "".join(literal + ("" if name is None else str(values[name])) for literal, name, _, _ in parts)
    except (KeyError, ValueError) as error:
        raise DataError(
            f"`data.prompt_template` {template[:400]!r} does not fit prompt {index}, which has the columns "
            f"{_named(values)}: {type(error).__name__} {error}"
        ) from error


def _named(columns: Iterable[Any]) -> str:
    return str(sorted(map(str, columns)))[:400]
