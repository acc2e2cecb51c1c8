"""The work of `ppo_round.py --shape deep` as a trlX script: what the trlx face costs.

    solotune trlx benchmarks/trlx_script.py

Prints one JSON object on the last line: seconds a round, the median after the first.
"""

import json
import random
import statistics
import tempfile
from pathlib import Path

import trlx
from shapes import KL_COEF, LEARNING_RATE, LORA_ALPHA, LORA_BLOCKS, LORA_R, PPO_EPOCHS, SHAPES
from solotune_round import number_tokenizer
from transformers import OPTConfig
from trlx.data.default_configs import TRLConfig, default_ppo_config

ROUNDS = 4

shape = SHAPES["deep"]


def reward_fn(samples, outputs, **kwargs):
    return [len(output) / 100 for output in outputs]


def main(folder: Path) -> None:
    number_tokenizer(shape.vocabulary).save_pretrained(folder / "tokenizer")
    config = TRLConfig.update(
        default_ppo_config().to_dict(),
        {
            "model": {
                "num_layers_unfrozen": LORA_BLOCKS,
                "delta_kwargs": {
                    "delta_type": "lora",
                    "modified_modules": "attention",
                    "lora_r": LORA_R,
                    "lora_alpha": LORA_ALPHA,
                },
            },
            "tokenizer.tokenizer_path": str(folder / "tokenizer"),
            "optimizer.kwargs.lr": LEARNING_RATE,
            "train": {
                "seq_length": shape.length,
                "batch_size": shape.batch_size,
                "epochs": ROUNDS,
                "eval_interval": 10000,
                "tracker": None,
                "checkpoint_dir": str(folder / "ckpts"),
            },
            "method": {
                "num_rollouts": shape.rollouts,
                "chunk_size": shape.rollouts,
                "ppo_epochs": PPO_EPOCHS,
                "init_kl_coef": KL_COEF,
                "target": 6,
                "gen_kwargs": {"max_new_tokens": shape.new_tokens, "eos_token_id": -1},
            },
        },
    )
    draw = random.Random(0)
    words = [[str(draw.randrange(3, shape.vocabulary)) for _ in range(shape.prompt_tokens)] for _ in range(128)]
    trainer = trlx.train(
        OPTConfig.from_dict(shape.opt_config()),
        reward_fn=reward_fn,
        prompts=[" ".join(row) for row in words],
        eval_prompts=["5 6 7"],
        config=config,
    )
    rows = [json.loads(line) for line in trainer.run.metrics.read_text().splitlines()]
    # A round's own phases; the last one also evaluates and is left out, as the first one, which warms up.
    seconds = [row["time/round"] for row in rows][1:-1]
    print(json.dumps({"seconds_per_round": statistics.median(seconds), "rounds": len(seconds)}))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
