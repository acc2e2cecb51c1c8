"""The benchmark's work in TRL's PPO. Runs in an environment of its own and imports nothing of solotune.

TRL's PPO takes four models: the policy, here with the same LoRA as ours, whose adapter is switched off for the
reference, and a value and a reward model, both sequence classifiers. They get the policy's shape, as in TRL's own
examples; the value model trains whole, because `peft_config` reaches the policy alone.

The settings are the fastest ones TRL offers for this work: one generation batch and one no-gradient batch for all
rollouts, a whole minibatch in one backward pass, no gradient checkpointing, no evaluation, no logging, no saving.
TRL's own functions are called as they are; the clocks around them read the time and change nothing.
"""

import tempfile
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from shapes import KL_COEF, LEARNING_RATE, LORA_ALPHA, LORA_R, LORA_TARGETS, PPO_EPOCHS, Shape
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    OPTForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from worker import RoundClock, Worker, arguments

MANY_ROUNDS = 1000  # TRL wants to know when training ends; the benchmark ends it by closing stdin


class Clocks(TrainerCallback):
    """Times a round of `PPOTrainer.train` and its phases.

    The phases follow from the order in which TRL calls its own functions: `batch_generation` samples, `get_reward` of
    the reward model scores, the first `forward` with gradients opens the updates, and what lies between is measuring.
    TRL computes advantages between measuring and updating: credit runs from the last measuring call to the update.
    """

    def __init__(self, worker: Worker, clock: RoundClock) -> None:
        self._worker = worker
        self._clock = clock
        self._measured_until = 0.0
        self._update_start: float | None = None

    def install(self, reward_model: torch.nn.Module) -> None:
        sample, forward, get_reward = ppo_trainer.batch_generation, ppo_trainer.forward, ppo_trainer.get_reward

        def timed_sample(*args: Any, **kwargs: Any) -> Any:
            with self._clock.phase("sample"):
                return sample(*args, **kwargs)

        def timed_forward(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                if self._update_start is None:
                    self._update_start = self._clock.now()
                return forward(*args, **kwargs)
            return self._timed("measure", forward, *args, **kwargs)

        def timed_get_reward(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._timed("score" if model is reward_model else "measure", get_reward, model, *args, **kwargs)

        ppo_trainer.batch_generation = timed_sample
        ppo_trainer.forward = timed_forward
        ppo_trainer.get_reward = timed_get_reward

    def _timed(self, phase: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        with self._clock.phase(phase):
            result = function(*args, **kwargs)
        self._measured_until = self._clock.now()
        return result

    def _start_round(self) -> None:
        self._worker.wait()
        self._update_start = None
        self._clock.start()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._worker.answer(
            {
                "name": "trl",
                "threads": torch.get_num_threads(),
                "versions": {
                    "trl": trl.__version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            }
        )
        self._start_round()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self._update_start is not None
        self._clock.phases["credit"] = self._update_start - self._measured_until
        self._clock.phases["update"] = self._clock.now() - self._update_start
        self._worker.answer(self._clock.record())
        self._start_round()


def number_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word a token id. The pad id lies above the model's vocabulary, so that no sampled token looks like padding
    and every response keeps all its tokens."""
    words = ["<unk>", "<s>", "</s>", *map(str, range(3, vocabulary)), "<pad>"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="left")


def build_trainer(shape: Shape, device: str, dtype: str, output_dir: str, worker: Worker) -> PPOTrainer:
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    policy = OPTForCausalLM(OPTConfig.from_dict(shape.opt_config()))
    classifier_config = {**shape.opt_config(), "num_labels": 1}
    value_model = OPTForSequenceClassification(OPTConfig.from_dict(classifier_config))
    reward_model = OPTForSequenceClassification(OPTConfig.from_dict(classifier_config))
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(3, shape.vocabulary, (4 * shape.rollouts, shape.prompt_tokens)).tolist()
    clocks = Clocks(worker, RoundClock(shape, device))
    clocks.install(reward_model)
    return PPOTrainer(
        args=PPOConfig(
            output_dir=output_dir,
            use_cpu=device == "cpu",
            bf16=False,  # the weights already have the dtype asked for
            gradient_checkpointing=False,
            # Minibatches of batch_size with an optimizer step each. The other way to spell it, a device batch of
            # batch_size and accumulation over the rest, makes accelerate step once an epoch only.
            per_device_train_batch_size=shape.rollouts,
            gradient_accumulation_steps=1,
            num_mini_batches=shape.rollouts // shape.batch_size,
            num_ppo_epochs=PPO_EPOCHS,
            total_episodes=MANY_ROUNDS * shape.rollouts,
            local_rollout_forward_batch_size=shape.rollouts,
            response_length=shape.new_tokens,
            stop_token=None,
            missing_eos_penalty=None,
            temperature=1.0,
            kl_coef=KL_COEF,
            gamma=1.0,
            lam=0.95,
            learning_rate=LEARNING_RATE,
            num_sample_generations=0,
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=number_tokenizer(shape.vocabulary),
        model=policy,
        ref_model=None,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=LORA_R,
            lora_alpha=LORA_ALPHA,
            lora_dropout=0.0,
            target_modules=list(LORA_TARGETS),
            layers_to_transform=shape.lora_blocks,
        ),
        callbacks=[clocks],
    )


def main() -> None:
    worker = Worker()
    shape, device, dtype = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as output_dir:
        build_trainer(shape, device, dtype, output_dir, worker).train()


if __name__ == "__main__":
    main()
