# Dense rewards: one number at the middle of each response and one at its end; metadata, metrics, stop strings, a sweep.
import json
import sys

import trlx
from trlx.data.default_configs import TRLConfig, default_ppo_config


def dense_reward_fn(samples, prompts, outputs, tokenizer, wanted, **kwargs):
    rewards = []
    for output, letter in zip(outputs, wanted):
        ids = tokenizer(output).input_ids
        dense = [0] * len(ids)
        dense[len(dense) // 2] = output[: len(output) // 2].count(letter)
        dense[-1] = output.count(letter)
        rewards.append(dense)
    return rewards


def metric_fn(samples, prompts, outputs, wanted, **kwargs):
    return {"letters": [output.count(letter) for output, letter in zip(outputs, wanted)], "constant": 1.0}


def main(hparams={}):
    config = TRLConfig.update(default_ppo_config(), hparams)
    config.method.gen_kwargs = dict(max_new_tokens=12, top_k=0, top_p=1.0, do_sample=True, temperature=[1.0, 0.7])
    config.method.gen_experience_kwargs = dict(max_new_tokens=10, top_k=0, top_p=1.0, do_sample=True)
    config.method.num_value_layers_unfrozen = 1
    config.train.rollout_logging_dir = "rollouts"
    prompts = [{"prompt": f"the letter {letter}", "wanted": letter} for letter in "aeiou"]
    trainer = trlx.train(
        reward_fn=dense_reward_fn, metric_fn=metric_fn, prompts=prompts, stop_sequences=["zq"], config=config
    )
    trainer.save("saved")
    trainer.load("saved")


if __name__ == "__main__":
    main({} if len(sys.argv) == 1 else json.loads(sys.argv[1]))
