# A script that brings its own method, trainer and pipeline.
from dataclasses import dataclass

import trlx
from trlx.data.configs import TRLConfig
from trlx.data.default_configs import default_ppo_config
from trlx.data.method_configs import register_method
from trlx.models.modeling_ppo import PPOConfig
from trlx.pipeline import register_datapipeline
from trlx.pipeline.offline_pipeline import PromptPipeline
from trlx.trainer import register_trainer
from trlx.trainer.accelerate_ppo_trainer import AcceleratePPOTrainer


@dataclass
@register_method
class LouderPPOConfig(PPOConfig):
    loudness: float = 2.0

    def loss(self, logprobs, values, old_logprobs, old_values, advantages, returns, mask):
        loss, stats = super().loss(logprobs, values, old_logprobs, old_values, advantages, returns, mask)
        return loss * self.loudness, {**stats, "losses/policy_loss": 17.0}

    def get_advantages_and_returns(self, values, rewards, response_length, use_whitening=True):
        advantages, returns = super().get_advantages_and_returns(values, rewards, response_length, use_whitening)
        return advantages, returns


@register_trainer
class CountingTrainer(AcceleratePPOTrainer):
    def __init__(self, config, word="x", **kwargs):
        super().__init__(config, **kwargs)
        self.word, self.passes, self.rounds = word, 0, 0

    def post_backward_callback(self):
        self.passes += 1

    def post_epoch_callback(self):
        self.rounds += 1


@register_datapipeline
class ShoutingPipeline(PromptPipeline):
    def __init__(self, prompts, max_prompt_length, tokenizer, add_special_tokens=False):
        super().__init__([p.upper() for p in prompts], max_prompt_length, tokenizer, add_special_tokens)


values = default_ppo_config().to_dict()
values["method"] = {"name": "louderppoconfig", "loudness": 0.5, "num_rollouts": 6, "ppo_epochs": 3}
values["method"]["gen_kwargs"] = {"max_new_tokens": 4}
values["train"].update(trainer="countingtrainer", pipeline="ShoutingPipeline", total_steps=12, batch_size=4)
values["train"]["trainer_kwargs"] = {"word": "y"}
seen = set()
trainer = trlx.train(
    prompts=["quiet", "still"],
    reward_fn=lambda prompts, outputs, **_: seen.update(prompts) or [float(len(o)) for o in outputs],
    config=TRLConfig.from_dict(values),
)
print("told:", trainer.word, trainer.passes, trainer.rounds, sorted(seen), trainer.method.loudness)
