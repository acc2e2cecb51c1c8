# As written for trlX's last main: peft_config in place of delta_kwargs, a base model's defaults, tensorboard.
import json
import sys

import trlx
from peft import LoraConfig
from peft.utils.config import TaskType
from trlx.data.default_configs import TRLConfig, default_ppo_config

logger = trlx.logging.get_logger(__name__)


def main(hparams={}):
    config = TRLConfig.update(default_ppo_config().to_dict(), hparams)
    config.model.peft_config = LoraConfig(
        r=8, task_type=TaskType.CAUSAL_LM, lora_alpha=32, lora_dropout=0.1
    )

    def reward_fn(samples, prompts, outputs, tokenizer, **kwargs):
        logger.info("scoring %d", len(samples))
        return [float(len(set(output))) for output in outputs]

    trainer = trlx.train(reward_fn=reward_fn, prompts=["What do you", "I think that"] * 16, config=config)
    print("evaluated:", round(trainer.evaluate().reward, 3))


if __name__ == "__main__":
    main({} if len(sys.argv) == 1 else json.loads(sys.argv[1]))
