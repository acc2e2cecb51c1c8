"""ILQL's models; the method itself is not there yet."""

from solotune.compat.shims import absent
from solotune.config import ILQLConfig

__all__ = [
    "AutoModelForCausalLMWithILQLHeads",
    "AutoModelForSeq2SeqLMWithILQLHeads",
    "ILQLConfig",
    "ILQLHeads",
    "batched_index_select",
    "topk_mask",
]

_REASON = "ILQL is not there yet"
ILQLHeads = absent("ILQLHeads", _REASON)
AutoModelForCausalLMWithILQLHeads = absent("AutoModelForCausalLMWithILQLHeads", _REASON)
AutoModelForSeq2SeqLMWithILQLHeads = absent("AutoModelForSeq2SeqLMWithILQLHeads", _REASON)
batched_index_select = absent("batched_index_select", _REASON)
topk_mask = absent("topk_mask", _REASON)
