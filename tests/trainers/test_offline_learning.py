"""SFT and ILQL learn: short versions; `make learn` has the long ones."""

import torch
from transformers import GPT2Config

import solotune
from benchmarks.learning import learn_sft
from benchmarks.walks import make_walks, walks_tokenizer
from solotune.runs.folder import read_lines


def config_of(default, folder, tokenizer, **sections):
    tokenizer.save_pretrained(folder / "tokenizer")
    config = default.evolve(
        tokenizer={"tokenizer_path": str(folder / "tokenizer")},
        train={"checkpoint_dir": str(folder), "run_name": "run", "save_best": False, "checkpoint_interval": 10**6},
    )
    return config.evolve(**sections)


def tiny_gpt2(layers, width):
    return GPT2Config(vocab_size=24, n_layer=layers, n_embd=width, n_head=4, n_positions=32, eos_token_id=23)


def test_sft_learns_to_say_letters_backwards(tmp_path):
    """Of words that it has not seen, at least 95 of 100 are right."""
    result = learn_sft(0, tmp_path)
    assert result.before < 0.1
    assert result.after >= 0.95


def test_ilql_finds_paths_that_are_shorter_than_the_walks_it_learned_from(tmp_path, capsys):
    torch.manual_seed(0)
    walks = make_walks(5)
    config = config_of(
        solotune.default_ilql_config(), tmp_path, walks_tokenizer(),
        train={"batch_size": 100, "total_steps": 100, "epochs": 100, "eval_interval": 10**6, "seq_length": 16},
        optimizer={"kwargs": {"lr": 3e-3}},
        method={"tau": 0.8, "alpha": 0.2, "gen_kwargs": {"max_new_tokens": 9, "top_k": 10, "beta": [0, 100]}},
    )  # fmt: skip
    solotune.train(
        tiny_gpt2(2, 48), samples=walks.pairs, rewards=walks.rewards, eval_prompts=walks.prompts * 5,
        reward_fn=walks.reward_fn, config=config,
    )  # fmt: skip
    rewards = {"beta=0.0": [], "beta=100.0": []}
    for row in read_lines(tmp_path / "run" / "samples.jsonl"):
        if row["step"] == 100:
            rewards[row["setting"]].append(row["reward"])
    plain, best = (sum(values) / len(values) for values in rewards.values())
    assert best > plain + 0.25, (best, plain, walks.data_mean)
    assert abs(plain - walks.data_mean) < 0.2, (best, plain, walks.data_mean)
    told = " ".join(capsys.readouterr().out.split())
    assert f"-> {plain:.3f}, reward at beta=100.0 " in told
    assert f" before, {best:.3f} after " in told  # the table shows the better one
