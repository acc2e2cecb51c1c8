# ILQL from random weights on a toy language, with a logit mask of old, as people wrote it for trlX.
import json
import sys

import trlx
from transformers import GPT2Config
from trlx.data.default_configs import (
    ILQLConfig, ModelConfig, OptimizerConfig, SchedulerConfig, TokenizerConfig, TrainConfig, TRLConfig,
)

default_config = TRLConfig(
    train=TrainConfig(
        seq_length=16, batch_size=8, epochs=20, total_steps=10, checkpoint_interval=100000, eval_interval=5,
        pipeline="PromptPipeline", trainer="AccelerateILQLTrainer", tracker=None,
    ),
    model=ModelConfig(model_path=GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=259), num_layers_unfrozen=-1),
    tokenizer=TokenizerConfig(tokenizer_path="gpt2", truncation_side="right"),
    optimizer=OptimizerConfig(name="adamw", kwargs=dict(lr=2e-4, betas=(0.9, 0.95), eps=1.0e-8, weight_decay=1.0e-6)),
    scheduler=SchedulerConfig(name="cosine_annealing", kwargs=dict(T_max=1000, eta_min=2e-4)),
    method=ILQLConfig(
        name="ilqlconfig", tau=0.8, gamma=0.99, cql_scale=0.1, awac_scale=1, alpha=0.1, beta=0,
        steps_for_target_q_sync=5, two_qs=True,
        gen_kwargs=dict(max_new_tokens=9, top_k=10, beta=[0, 1, 100], temperature=1.0),
    ),
)


def main(hparams={}):
    config = TRLConfig.update(default_config, hparams)
    walks = ["abca", "bca", "cab", "ca"] * 10
    trainer = trlx.train(
        model_path=GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=259),
        dataset=([["a", walk] for walk in walks], [len(walk) / 4 for walk in walks]),
        eval_prompts=["a", "b", "c"],
        metric_fn=lambda samples, **kwargs: {"length": [len(s) for s in samples]},
        config=config,
    )
    print("qs:", len(trainer.model.heads.q_heads))


if __name__ == "__main__":
    main({} if len(sys.argv) == 1 else json.loads(sys.argv[1]))
