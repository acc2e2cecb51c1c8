"""Prompts keep their metadata beside them, are never cut in silence, and go on: nothing is added at their end."""

import copy
import json
import logging

import pytest

from solotune.config import DataConfig
from solotune.data.prompts import Prompts, encode, fitting, load_eval_prompts, load_prompts
from solotune.errors import DataError
from tests.tiny import byte_tokenizer


def test_metadata_stays_beside_its_prompt():
    prompts = Prompts.from_list([{"prompt": p, "label": i} for i, p in enumerate(["a", "b", "c", "d"])])
    chosen = prompts.select([3, 1, 1])
    assert list(zip(chosen.texts, chosen.metadata["label"], strict=True)) == [("d", 3), ("b", 1), ("b", 1)]


def test_the_callers_rows_are_not_changed():
    rows = [{"prompt": "a b c", "label": [1]}, {"prompt": "d e f", "label": [2]}]
    before = copy.deepcopy(rows)
    load_prompts(DataConfig(prompts=rows, prompt_words=2))
    Prompts.from_list(rows)
    assert rows == before


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no prompts"),
        (["a", "  "], "prompt 1 is empty"),
        (["a", {"prompt": "b", "label": 1}], "prompt 1 has the keys"),
        ([{"text": "a"}], "no key 'prompt'"),
        ([{"prompt": "a"}, {"prompt": 3}], "prompt 1 is a int"),
        ([{"prompt": "a", "outputs": "b"}], "outputs"),
    ],
)
def test_unusable_prompts_are_named(rows, said):
    with pytest.raises(DataError, match=said):
        Prompts.from_list(rows)


def test_first_words_drops_short_and_repeated_prompts_and_keeps_the_order():
    data = DataConfig(prompts=["a b c", "a", "d  e f", "a b d", "a b"], prompt_words=2)
    assert load_prompts(data).texts == ["a b", "d e"]
    with pytest.raises(DataError, match="prompt_words"):
        load_prompts(DataConfig(prompts=["a b"], prompt_words=9))


def test_prompts_with_equal_words_and_other_metadata_are_both_kept():
    rows = [{"prompt": "a b c", "label": 0}, {"prompt": "a b d", "label": 1}, {"prompt": "a b e", "label": 1}]
    assert load_prompts(DataConfig(prompts=rows, prompt_words=2)).metadata == {"label": [0, 1]}


def test_fewer_prompts_come_from_all_over_the_data():
    few = load_prompts(DataConfig(prompts=[str(i) for i in range(1000)], max_prompts=10)).texts
    assert len(few) == len(set(few)) == 10
    assert max(map(int, few)) >= 900
    assert min(map(int, few)) < 100
    assert len(load_prompts(DataConfig(prompts=["a", "b"], max_prompts=10))) == 2


def test_every_evaluation_prompt_is_repeated_with_its_metadata():
    rows = [{"prompt": "this is a", "n": 1}, {"prompt": "b", "n": 2}]
    data = DataConfig(prompts=["c d e f"], eval_prompts=rows, eval_repeats=3, prompt_words=2)
    prompts = load_eval_prompts(data)
    assert prompts.texts == ["this is a"] * 3 + ["b"] * 3  # a written list is not cut to two words
    assert prompts.metadata["n"] == [1, 1, 1, 2, 2, 2]


def test_without_evaluation_prompts_training_prompts_are_used():
    data = DataConfig(prompts=[f"p {i}" for i in range(500)], eval_repeats=2)
    prompts = load_eval_prompts(data)
    assert len(prompts) == 64
    assert set(prompts.texts) <= set(data.prompts)


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl", "csv", "parquet"])
def test_files_of_every_kind(tmp_path, suffix):
    texts = ['this movie, "was', "naïve café"]
    path = tmp_path / f"prompts.{suffix}"
    rows = [{"query": text, "label": i} for i, text in enumerate(texts)]
    if suffix == "txt":
        path.write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pandas

        frame = pandas.DataFrame(rows)
        frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    prompts = load_prompts(DataConfig(prompts=str(path)))
    assert prompts.texts == texts
    assert prompts.metadata == ({} if suffix == "txt" else {"label": [0, 1]})


def test_a_column_that_is_not_guessed_has_to_be_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"title": "a b", "n": 1}\n')
    with pytest.raises(DataError, match=r"n', 'title.*data\.prompt_column"):
        load_prompts(DataConfig(prompts=str(path)))
    assert load_prompts(DataConfig(prompts=str(path), prompt_column="title")).texts == ["a b"]


def test_missing_and_malformed_sources(tmp_path):
    with pytest.raises(DataError, match="no file"):
        load_prompts(DataConfig(prompts=str(tmp_path / "none.jsonl")))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    with pytest.raises(DataError, match=r"bad\.jsonl"):
        load_prompts(DataConfig(prompts=str(tmp_path / "bad.jsonl")))
    (tmp_path / "x.weird").write_text("a")
    with pytest.raises(DataError, match=r"\.parquet"):
        load_prompts(DataConfig(prompts=str(tmp_path / "x.weird")))


def test_a_dataset_gives_its_text_column_and_the_rest_as_metadata(monkeypatch):
    import datasets

    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"text": ["a b c d", "e f g h"], "label": [0, 1]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    prompts = load_prompts(DataConfig(prompts="imdb", split="test", prompt_words=3))
    assert asked == [("imdb", "test")]
    assert prompts == Prompts(["a b c", "e f g"], {"label": [0, 1]})


def test_a_dataset_that_cannot_be_loaded_is_named(monkeypatch):
    import datasets

    def load(name, split):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"'imdb'.*offline"):
        load_prompts(DataConfig(prompts="imdb"))


@pytest.mark.parametrize("template", ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
def test_a_prompt_starts_with_the_tokenizers_tokens_and_ends_with_its_own(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    plain = [[tokenizer.convert_tokens_to_ids(w) for w in text.split()] for text in ("this movie", "a a a")]
    lead = [tokenizer.bos_token_id] if template.startswith("<bos>") else []
    assert encode(["this movie", "a a a"], tokenizer, 9) == [lead + ids for ids in plain]
    assert encode(["this movie", "a a a"], tokenizer, 9, add_special_tokens=False) == plain


def test_an_eos_that_the_text_itself_has_is_kept(make_tokenizer):
    tokenizer = make_tokenizer("$A <eos>")
    assert encode(["a <eos>"], tokenizer, 9)[0][-1] == tokenizer.eos_token_id
    assert len(encode(["a <eos>"], tokenizer, 9)[0]) == 2


def test_a_dropped_ending_and_a_double_start_are_said(make_tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        encode(["a"], make_tokenizer("$A <eos>"), 9)
    assert "<eos>" in caplog.text
    caplog.clear()
    encode(["<bos> a"], make_tokenizer("<bos> $A"), 9)
    assert "twice" in caplog.text


def test_a_prompt_without_room_names_itself_and_the_numbers(make_tokenizer):
    tokenizer = make_tokenizer("<bos> $A")
    assert len(encode(["a", "a b c"], tokenizer, 4)[1]) == 4
    with pytest.raises(DataError, match=r"prompt 1 has 5 tokens.*room for 4.*seq_length.*max_new_tokens.*'a b c d'"):
        encode(["a", "a b c d"], tokenizer, 4)


def test_no_prompts_and_empty_prompts_do_not_reach_the_model(make_tokenizer):
    with pytest.raises(DataError, match="no prompts"):
        encode([], make_tokenizer(), 4)
    with pytest.raises(DataError, match="prompt 1 is empty"):
        encode(["a", ""], make_tokenizer("<bos> $A"), 4)


def test_a_template_makes_prompts_of_several_columns():
    rows = [{"instruction": "review it", "input": "a film"}, {"instruction": "praise it", "input": ""}]
    prompts = load_prompts(DataConfig(prompts=rows, prompt_template="{instruction}: {input}\n"))
    assert prompts.texts == ["review it: a film\n", "praise it: \n"]
    assert prompts.metadata["instruction"] == ["review it", "praise it"]
    with pytest.raises(DataError, match=r"prompt_template.*prompt 0.*instruction.*KeyError 'task'"):
        load_prompts(DataConfig(prompts=rows, prompt_template="{task}"))


def test_a_dialogue_is_a_prompt_up_to_the_last_place_of_the_marker():
    rows = [{"chosen": "Human: a Assistant: b Human: c Assistant: d"}, {"chosen": "Human: e Assistant: f"}]
    data = DataConfig(prompts=rows, prompt_column="chosen", prompt_until="Assistant:")
    assert load_prompts(data).texts == ["Human: a Assistant: b Human: c Assistant:", "Human: e Assistant:"]
    with pytest.raises(DataError, match=r"prompt 0 has no 'Robot:'"):
        load_prompts(DataConfig(prompts=rows, prompt_column="chosen", prompt_until="Robot:"))


def test_long_prompts_are_left_out_where_that_is_asked_for(caplog):
    prompts = Prompts(["ab", "abcdef", "abc"], {"n": [1, 2, 3]})
    with caplog.at_level("INFO"):
        kept = fitting(prompts, byte_tokenizer(), 3, add_special_tokens=True)
    assert (kept.texts, kept.metadata) == (["ab", "abc"], {"n": [1, 3]})
    assert "1 of 3 prompts have more than 3 tokens" in caplog.text
    with pytest.raises(DataError, match="none of 3 prompts has at most 1 tokens"):
        fitting(prompts, byte_tokenizer(), 1, add_special_tokens=True)


def test_ids_that_are_given_are_used_as_they_are():
    prompts = Prompts(["", ""], ids=[[257], [257, 1]])
    assert encode(prompts, byte_tokenizer(), 4) == [[257], [257, 1]]
    assert prompts.select([1]).ids == [[257, 1]]
    with pytest.raises(DataError, match="prompt 1 has 2 tokens"):
        encode(prompts, byte_tokenizer(), 1)
