"""No bars and no advice of other libraries while this project says itself what goes on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """While the block runs, transformers and huggingface_hub show no bars and say errors alone; then as before."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as models

    levels = models.get_verbosity(), hub.get_verbosity()
    has_bars, hub_has_bars = models.is_progress_bar_enabled(), not are_progress_bars_disabled()
    models.set_verbosity_error()
    hub.set_verbosity_error()
    _without_warnings(models.disable_progress_bar)
    try:
        yield
    finally:
        models.set_verbosity(levels[0])
        hub.set_verbosity(levels[1])
        if has_bars:
            _without_warnings(models.enable_progress_bar)
        _without_warnings(enable_progress_bars if hub_has_bars else disable_progress_bars)


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """The same for `datasets`, which takes seconds to import: around what uses it."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    level, has_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    _without_warnings(disable_progress_bars)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            _without_warnings(enable_progress_bars)


def _without_warnings(switch: Callable[[], object]) -> None:
    """Call it; where a variable of the environment has the say, the library warns that it has no effect."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        switch()
