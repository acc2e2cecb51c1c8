"""trlX's records of offline samples, which this project does not have."""

from solotune.compat.shims import absent

__all__ = ["ILQLBatch", "ILQLElement", "ILQLSeq2SeqBatch", "ILQLSeq2SeqElement"]

_REASON = "a batch of samples is one solotune.data.batches.Batch"
ILQLElement = absent("ILQLElement", _REASON)
ILQLBatch = absent("ILQLBatch", _REASON)
ILQLSeq2SeqElement = absent("ILQLSeq2SeqElement", _REASON)
ILQLSeq2SeqBatch = absent("ILQLSeq2SeqBatch", _REASON)
