"""The quickstart's real assets, where they are installed and cached: nothing is downloaded or converted here."""

from pathlib import Path

import pytest

from solotune.config import DataConfig
from solotune.data.assets import GEMMA_ID, SMOLLM2, cache_dir, resolve
from solotune.data.film_snippets import ARCHIVE, read
from solotune.data.prompts import encode, load_prompts

pytestmark = pytest.mark.assets


@pytest.fixture
def snippets():
    if not (cache_dir() / "data" / f"film-snippets-{ARCHIVE.sha256[:8]}").is_dir():
        pytest.skip("the film snippets are not in the cache (a quickstart fetches them)")
    return read(Path(resolve("asset:film-snippets")))


@pytest.fixture(scope="module")
def smollm2():
    if not (cache_dir() / "models" / f"smollm2-135m-instruct-{SMOLLM2.sha256[:8]}").is_dir():
        pytest.skip("SmolLM2-135M-Instruct is not in the cache (a quickstart converts it)")
    return resolve("asset:smollm2-135m-instruct")


@pytest.fixture(scope="module")
def gemma():
    if not (cache_dir() / "models" / f"gemma-3-270m-{GEMMA_ID}").is_dir():
        pytest.skip("Gemma 3 270M is not in the cache (the recipe gemma-film-snippets converts it)")
    return resolve("asset:gemma-3-270m")


def test_all_snippets_are_there_with_ratings_on_the_papers_scale(snippets):
    assert len(snippets) == 10_605
    assert all(-4 <= s.rating <= 4 and 0 <= s.positive_share <= 1 and s.text.strip() for s in snippets)
    signs = [(s.rating > 0) == (s.positive_share > 0.5) for s in snippets if s.rating and s.positive_share != 0.5]
    assert sum(signs) / len(signs) > 0.98
    text = "\n".join(s.text for s in snippets)
    assert "clichés" in text
    assert not any(mark in text for mark in ("Ã", "''", "&amp;", "\t", "  "))


def test_prompts_are_the_first_four_words(snippets):
    prompts = load_prompts(DataConfig(prompts="asset:film-snippets", prompt_words=4))
    assert len(prompts) == len(set(prompts.texts)) > 10_000
    assert {len(text.split()) for text in prompts.texts} == {4}


def test_the_converted_tokenizer_starts_with_bos_and_gives_texts_back(gemma):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gemma)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    (ids,) = encode(["This movie was"], tokenizer, 8)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "This", "▁movie", "▁was"]
    for text in ("  two  spaces\n\nand\tlines", "naïve café “quotes” — 2024 😀 漢字"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_instruct_models_tokenizer_gives_texts_back_and_knows_its_chat_format(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<|im_start|>", "<|im_end|>", 49152)
    for text in ("This movie was", "  two  spaces\n\nand\tlines", "naïve café “quotes” — 2024 😀 漢字"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("model", ["smollm2", "gemma"])
def test_the_converted_model_is_float32_tied_and_not_marked_as_quantized(model, request):
    from safetensors import safe_open
    from transformers import AutoConfig

    folder = request.getfixturevalue(model)
    config = AutoConfig.from_pretrained(folder)
    assert config.tie_word_embeddings
    assert not hasattr(config, "quantization_config")
    with safe_open(f"{folder}/model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert "lm_head.weight" not in names
        assert {weights.get_slice(name).get_dtype() for name in names} == {"F32"}
    assert not list(Path(folder).glob("*.gguf"))
