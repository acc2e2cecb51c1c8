"""From a GGUF file, as packages carry it, to a safetensors folder that loads in a second.

A GGUF holds blocks of 4 to 8 bits under float16 scales. bfloat16 would round 97 % of the dequantised values, by up to
0.3 % of the largest in a tensor; the folder is float32, which holds them exactly (memory-mapped on loading).
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from solotune.data.fetching import require_package
from solotune.progress import phase_progress
from solotune.quiet import quiet_libraries


def convert(gguf: Path, folder: Path, asset: str) -> None:
    """Write config, tokenizer and float32 weights of the language model in a GGUF file to `folder`.

    Args:
        asset: what it is called in messages.
    Raises:
        MissingExtraError: the package `gguf` is not installed.
    """
    require_package("gguf", asset)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with phase_progress(f"converting {asset} from GGUF to safetensors, once"), quiet_libraries(), _gguf_parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
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


@contextlib.contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """transformers parses the file three times (tokenizer, configuration, weights) and makes its table of names for
    each tensor, so what was made is remembered for as long as the conversion lasts: 18 s instead of 35."""
    import gguf
    import transformers.modeling_gguf_pytorch_utils

    reading: Any = transformers.modeling_gguf_pytorch_utils
    makers = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, make in makers.items():
        setattr(gguf, name, functools.cache(make))
    bar = reading.tqdm
    reading.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        reading.tqdm = bar
        for name, make in makers.items():
            setattr(gguf, name, make)
