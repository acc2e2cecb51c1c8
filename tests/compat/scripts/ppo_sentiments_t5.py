# An encoder-decoder continues the beginnings of film reviews; everything is trained, nothing ends a response early.
import json
import sys
from typing import Dict, List

import numpy as np
from datasets import load_dataset
from transformers import AutoTokenizer, pipeline

import trlx
from trlx.data.configs import ModelConfig, OptimizerConfig, SchedulerConfig, TokenizerConfig, TrainConfig, TRLConfig
from trlx.models.modeling_ppo import PPOConfig

MODEL = "lvwerra/t5-imdb"

default_config = TRLConfig(
    train=TrainConfig(
        seq_length=128,
        epochs=100,
        total_steps=100000,
        batch_size=12,
        checkpoint_interval=10000,
        eval_interval=100,
        pipeline="PromptPipeline",
        trainer="AcceleratePPOTrainer",
        save_best=False,
    ),
    model=ModelConfig(model_path=MODEL, num_layers_unfrozen=-1, model_arch_type="seq2seq"),
    tokenizer=TokenizerConfig(tokenizer_path=MODEL, padding_side="right", truncation_side="right"),
    optimizer=OptimizerConfig(name="adamw", kwargs={"lr": 5e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-6}),
    scheduler=SchedulerConfig(name="cosine_annealing", kwargs={"T_max": 100000, "eta_min": 5e-5}),
    method=PPOConfig(
        name="PPOConfig",
        num_rollouts=128,
        chunk_size=12,
        ppo_epochs=4,
        init_kl_coef=0.05,
        target=6,
        horizon=10000,
        gamma=0.99,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=1,
        scale_reward=None,
        ref_mean=None,
        ref_std=None,
        cliprange_reward=10,
        gen_kwargs={"max_new_tokens": 50, "do_sample": True, "top_k": 0, "top_p": 1, "eos_token_id": -1},
    ),
)


def positive(scores: List[Dict[str, float]]) -> float:
    return next(entry["score"] for entry in scores if entry["label"] == "POSITIVE")


def main(hparams={}):
    config = TRLConfig.update(default_config, hparams)
    sentiment = pipeline("sentiment-analysis", "lvwerra/distilbert-imdb", top_k=2, truncation=True, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def metric_fn(samples: List[str], prompts: List[str], outputs: List[str], **kwargs) -> Dict[str, List[float]]:
        joined = [prompt + "<sep>" + output for prompt, output in zip(prompts, outputs)]
        return {"sentiments": [positive(scores) for scores in sentiment(samples)], "same": [float(samples == joined)]}

    def reward_fn(samples: List[str], **kwargs) -> List[float]:
        return [positive(scores) for scores in sentiment(samples)]

    random = np.random.default_rng(0)
    reviews = load_dataset("imdb", split="train")["text"]
    ids = [tokenizer(review)["input_ids"][: random.integers(2, 8)] for review in reviews]
    prompts = [tokenizer.decode(each, skip_special_tokens=True) for each in ids]
    trainer = trlx.train(
        reward_fn=reward_fn, metric_fn=metric_fn, prompts=prompts[:40], eval_prompts=prompts[40:48], config=config
    )
    given = tokenizer("the film was", return_tensors="pt")
    print("generated", tuple(trainer.generate(**given, max_new_tokens=5).shape))
    trainer.save_pretrained("tuned")


if __name__ == "__main__":
    main({} if len(sys.argv) == 1 else json.loads(sys.argv[1]))
