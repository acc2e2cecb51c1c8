# Rejection-sampling fine-tuning of a model of film reviews, as people wrote it for trlX.
import json
import sys
from typing import Dict, List

import trlx
from datasets import load_dataset
from transformers import pipeline
from trlx.data.configs import ModelConfig, OptimizerConfig, SchedulerConfig, TokenizerConfig, TrainConfig, TRLConfig
from trlx.trainer.accelerate_rft_trainer import RFTConfig

default_config = TRLConfig(
    train=TrainConfig(
        seq_length=64,
        epochs=10,
        total_steps=1000,
        batch_size=16,
        checkpoint_interval=10000,
        eval_interval=100,
        pipeline="PromptPipeline",
        trainer="AccelerateRFTTrainer",
        tracker=None,
    ),
    model=ModelConfig(model_path="lvwerra/gpt2-imdb", num_layers_unfrozen=-1),
    tokenizer=TokenizerConfig(tokenizer_path="gpt2", truncation_side="right"),
    optimizer=OptimizerConfig(name="adamw", kwargs=dict(lr=3e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-6)),
    scheduler=SchedulerConfig(name="cosine_annealing", kwargs=dict(T_max=1e12, eta_min=3e-5)),
    method=RFTConfig(
        name="RFTConfig",
        n_generations_per_prompt=4,
        start_percentile=0.9,
        end_percentile=0.95,
        n_improve_steps=1,
        gen_kwargs=dict(max_new_tokens=8, top_k=0, top_p=1.0, temperature=1.0, do_sample=True),
    ),
)


def positive(scores: List[Dict[str, float]]) -> float:
    return {each["label"]: each["score"] for each in scores}["POSITIVE"]


def main(hparams={}):
    config = TRLConfig.update(default_config.to_dict(), hparams)
    sentiment = pipeline("sentiment-analysis", "lvwerra/distilbert-imdb", top_k=2, truncation=True, batch_size=32, device=-1)

    def reward_fn(samples: List[str], prompts: List[str], outputs: List[str]) -> List[float]:
        return [positive(scores) for scores in sentiment(samples)]

    imdb = load_dataset("imdb", split="train+test")
    prompts = [" ".join(review.split()[:4]) for review in imdb["text"]]
    trainer = trlx.train(
        reward_fn=reward_fn, prompts=sorted(set(prompts)), eval_prompts=["I don't know much about"] * 8, config=config
    )
    print("trained:", type(trainer).__name__, trainer.steps_done)
    trainer.save_pretrained("tuned")


if __name__ == "__main__":
    hparams = {} if len(sys.argv) == 1 else json.loads(sys.argv[1])
    main(hparams)
