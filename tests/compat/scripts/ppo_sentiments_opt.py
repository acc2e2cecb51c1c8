# The classic experiment as a trlX 0.6 script: OPT-1.3B, LoRA on the attention of its last two blocks, film reviews.
import json
import os
import sys
from typing import Dict, List

from datasets import load_dataset
from transformers import pipeline

import trlx
from trlx.data.configs import (
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainConfig,
    TRLConfig,
)
from trlx.models.modeling_ppo import PPOConfig


def get_positive_score(scores: List[Dict[str, float]]) -> float:
    return {entry["label"]: entry["score"] for entry in scores}["POSITIVE"]


default_config = TRLConfig(
    train=TrainConfig(
        seq_length=128,
        epochs=100,
        total_steps=10000,
        batch_size=32,
        checkpoint_interval=10000,
        eval_interval=100,
        pipeline="PromptPipeline",
        trainer="AcceleratePPOTrainer",
    ),
    model=ModelConfig(
        model_path="facebook/opt-1.3b",
        num_layers_unfrozen=2,
        delta_kwargs={
            "delta_type": "lora",
            "modified_modules": "attention",
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
        },
    ),
    tokenizer=TokenizerConfig(tokenizer_path="facebook/opt-1.3b", truncation_side="right"),
    optimizer=OptimizerConfig(name="adamw", kwargs=dict(lr=1.0e-4, betas=(0.9, 0.95), eps=1.0e-8, weight_decay=1.0e-6)),
    scheduler=SchedulerConfig(name="cosine_annealing", kwargs=dict(T_max=10000, eta_min=1.0e-4)),
    method=PPOConfig(
        name="PPOConfig",
        num_rollouts=128,
        chunk_size=128,
        ppo_epochs=4,
        init_kl_coef=0.05,
        target=6,
        horizon=10000,
        gamma=1,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=1,
        scale_reward="ignored",
        ref_mean=None,
        ref_std=None,
        cliprange_reward=10,
        gen_kwargs=dict(max_new_tokens=40, top_k=0.0, top_p=1.0, do_sample=True),
    ),
)


def main(hparams={}):
    config = TRLConfig.update(default_config.to_dict(), hparams)
    device = int(os.environ.get("LOCAL_RANK", 0)) if os.environ.get("WITH_GPU") else -1
    sentiment_fn = pipeline(
        "sentiment-analysis", "lvwerra/distilbert-imdb", top_k=2, truncation=True, batch_size=256, device=device
    )

    def reward_fn(samples: List[str], **kwargs) -> List[float]:
        return list(map(get_positive_score, sentiment_fn(samples)))

    imdb = load_dataset("imdb", split="train+test")
    prompts = [" ".join(review.split()[:4]) for review in imdb["text"]]
    trainer = trlx.train(
        reward_fn=reward_fn,
        prompts=prompts,
        eval_prompts=["I don't know much about Hungarian underground"] * 16,
        config=config,
    )
    trainer.save_pretrained("tuned")


if __name__ == "__main__":
    hparams = {} if len(sys.argv) == 1 else json.loads(sys.argv[1])
    main(hparams)
