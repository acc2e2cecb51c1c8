"""A script in trlX's style for a sweep of seconds: a random OPT of 2 blocks learns to write even numbers.

    solotune sweep --config benchmarks/sweep.yml benchmarks/sweep_script.py

Its folder then holds the table and the plot of docs/sweeps.md. The model and the tokenizer are made on the spot.
"""

import json
import sys
import tempfile

import trlx
from solotune_round import number_tokenizer
from transformers import OPTConfig
from trlx.data.default_configs import TRLConfig, default_ppo_config

WORDS = 64

MODEL = OPTConfig(
    vocab_size=WORDS,
    hidden_size=64,
    word_embed_proj_dim=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=128,
    max_position_embeddings=64,
)


def reward_fn(outputs, **kwargs):
    numbers = [output.split() for output in outputs]
    return [sum(word.isdigit() and int(word) % 2 == 0 for word in row) / max(len(row), 1) for row in numbers]


def main(hparams={}):  # noqa: B006  as trlX's examples have it
    with tempfile.TemporaryDirectory() as folder:
        number_tokenizer(WORDS).save_pretrained(folder)
        settings = {
            "model.num_layers_unfrozen": -1,
            "tokenizer.tokenizer_path": folder,
            "train": {"seq_length": 32, "batch_size": 32, "epochs": 12, "eval_interval": 20, "tracker": None},
            "method": {"num_rollouts": 128, "chunk_size": 128, "gen_kwargs": {"max_new_tokens": 12}},
        }
        config = TRLConfig.update(TRLConfig.update(default_ppo_config(), settings), hparams)
        trlx.train(MODEL, reward_fn=reward_fn, prompts=[f"{word} {word + 1}" for word in range(5, 37)], config=config)


if __name__ == "__main__":
    main({} if len(sys.argv) == 1 else json.loads(sys.argv[1]))
