"""trlX's records of offline samples; ILQL is not there yet."""

from solotune.compat.shims import absent

__all__ = ["ILQLBatch", "ILQLElement", "ILQLSeq2SeqBatch", "ILQLSeq2SeqElement"]

_REASON = "ILQL is not there yet"
ILQLElement = absent("ILQLElement", _REASON)
ILQLBatch = absent("ILQLBatch", _REASON)
ILQLSeq2SeqElement = absent("ILQLSeq2SeqElement", _REASON)
ILQLSeq2SeqBatch = absent("ILQLSeq2SeqBatch", _REASON)
