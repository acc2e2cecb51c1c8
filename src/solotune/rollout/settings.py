"""Which of `gen_kwargs` the project's own sampler does itself, and which it hands to `transformers.generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

KNOWN = frozenset(
    {
        "do_sample",
        "eos_token_id",
        "max_new_tokens",
        "min_new_tokens",
        "pad_token_id",
        "temperature",
        "top_k",
        "top_p",
        "use_cache",
    }
)


LIST_VALUED = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "eos_token_id",
        "force_words_ids",
        "forced_eos_token_id",
        "sequence_bias",
        "stop_strings",
        "suppress_tokens",
    }
)
"""Arguments that transformers takes as lists; a list for any other one is a sweep."""


class Setting(NamedTuple):
    """One of the ways an evaluation samples: `label` is '' or, in a sweep, `@temperature=0.7`."""

    label: str
    gen_kwargs: dict[str, Any]


def sweep(gen_kwargs: dict[str, Any]) -> list[Setting]:
    """`gen_kwargs` once for each value of the argument that is a list (trlX's generation sweeps), else as they are."""
    for name, values in gen_kwargs.items():
        if isinstance(values, list) and name not in LIST_VALUED:
            return [Setting(f"@{name}={value}", {**gen_kwargs, name: value}) for value in values]
    return [Setting("", gen_kwargs)]


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are drawn.

    Args:
        max_new_tokens: tokens a response has at most.
        min_new_tokens: no EOS is drawn before so many tokens.
        temperature: divides the logits; log-probabilities everywhere are taken at this temperature.
        top_k, top_p: see `draw.draw`; 0 and 1 draw from the whole vocabulary.
        do_sample: False takes the most likely token.
        eos_token_ids: tokens that end a response; empty for never.
        stop_strings: texts that end a response as soon as they stand in it.
        beta: weight of a token's advantage in drawing, for a model that has Q heads (ILQL).
        other: arguments only `transformers.generate` knows; non-empty sends the whole call there.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    do_sample: bool = True
    eos_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    beta: float = 0.0
    other: dict[str, Any] = field(default_factory=dict)

    @property
    def is_biased(self) -> bool:
        """Whether tokens are drawn from less than the whole distribution, so that PPO's ratio is biased."""
        return self.do_sample and (self.top_k > 0 or self.top_p < 1.0)

    @property
    def drawing(self) -> tuple[Any, ...]:
        """What decides how a token is drawn from its logits, to tell captured steps apart."""
        return self.do_sample, self.temperature, self.top_k, self.top_p, self.eos_token_ids, self.beta

    @classmethod
    def from_gen_kwargs(
        cls, gen_kwargs: dict[str, Any], eos_token_id: int | list[int] | None, stop_strings: list[str] | None = None
    ) -> SamplingSettings:
        """Read trlX's `gen_kwargs`; `eos_token_id: -1` means that nothing ends a response early."""
        known = {key: value for key, value in gen_kwargs.items() if key in KNOWN and value is not None}
        eos = known.pop("eos_token_id", eos_token_id)
        eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        known.pop("pad_token_id", None)
        known.pop("use_cache", None)
        return cls(
            max_new_tokens=int(known.pop("max_new_tokens", 40)),
            min_new_tokens=int(known.pop("min_new_tokens", 0)),
            temperature=float(known.pop("temperature", 1.0)),
            top_k=int(known.pop("top_k", 0)),
            top_p=float(known.pop("top_p", 1.0)),
            do_sample=bool(known.pop("do_sample", True)),
            eos_token_ids=tuple(token for token in eos_ids if token >= 0),
            stop_strings=tuple(stop_strings or ()),
            other={key: value for key, value in gen_kwargs.items() if key not in KNOWN},
        )
