"""No test reaches a hub; every test starts from the same random state and two threads at the most."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

from tests.tiny import save_tiny

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny OPT and its byte tokenizer, saved as a hub would give them."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-opt")
