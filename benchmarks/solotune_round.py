"""The benchmark's work in solotune, and one thing more: an update with nothing cached, to compare with."""

import tempfile
from statistics import median
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from shapes import KL_COEF, LEARNING_RATE, LORA_ALPHA, LORA_BLOCKS, LORA_R, PPO_EPOCHS, Shape
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import OPTConfig, PreTrainedTokenizerFast
from worker import PHASES, RoundClock, Worker, arguments

import solotune
from solotune.config import (
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainConfig,
    TRLConfig,
)
from solotune.data.prompts import Prompts
from solotune.models.policy import Measured, PolicyModel
from solotune.rollout.records import Rollouts
from solotune.trainers.ppo import PPOTrainer

NEVER = 10**9
FULL_UPDATES = 3  # the median of so many is reported


def trivial_reward(outputs: list[str]) -> list[float]:
    return [len(output) / 100 for output in outputs]


class WholeModel:
    """Stands in for the policy in an update and runs all of its blocks, as a trainer that keeps no trunk has to.

    The head still runs on the positions that predict response tokens only.
    """

    def __init__(self, policy: PolicyModel) -> None:
        self._policy = policy

    def __call__(self, task: str, rollouts: Rollouts, temperature: float) -> Measured:
        assert task == "update"
        ids_bS, mask_bS, positions_bS = rollouts.inputs
        decoder: Any = self._policy.decoder.module
        hidden_bSH = decoder(ids_bS, attention_mask=mask_bS, position_ids=positions_bS, use_cache=False)[0]
        hidden_bTH = hidden_bSH[:, rollouts.prompt_width - 1 :]
        head: Any = self._policy.lm.get_output_embeddings()
        logprobs_bTV = (head(hidden_bTH).float() / temperature).log_softmax(-1)
        with torch.no_grad():
            entropies_bT = -(logprobs_bTV.exp() * logprobs_bTV).sum(-1)
        logprobs_bT = logprobs_bTV.gather(-1, rollouts.response_ids_NT[..., None])[..., 0]
        return Measured(logprobs_bT, self._policy.value_head(hidden_bTH), entropies_bT)


class Rounds:
    def __init__(self, trainer: PPOTrainer, clock: RoundClock) -> None:
        self._trainer, self._clock = trainer, clock

    def play_round(self) -> dict[str, Any]:
        self._clock.start()
        metrics = self._trainer.train_round()
        self._clock.phases.update({phase: metrics[f"time/{phase}"] for phase in PHASES})
        return self._clock.record()

    def full_update(self) -> dict[str, Any]:
        """Seconds of one optimizer step through the whole model, on a batch of fresh rollouts."""
        trainer = self._trainer
        rollouts = trainer.sample_rollouts()
        measured = trainer.measure(rollouts)
        credit = trainer.credit(rollouts, torch.zeros(rollouts.n_rollouts, device=trainer.device), measured)
        rows = torch.arange(trainer.config.train.batch_size, device=trainer.device)
        policy, trainer.policy = trainer.policy, WholeModel(trainer.model)
        try:
            seconds = []
            for _ in range(FULL_UPDATES):
                self._clock.start()
                with self._clock.phase("update"):
                    trainer.optimizer_step(rollouts, measured, credit, rows)
                seconds.append(self._clock.phases["update"])
        finally:
            trainer.policy = policy
        return {"seconds_per_full_update": median(seconds)}


def build_trainer(shape: Shape, device: str, dtype: str, tokenizer_dir: str) -> PPOTrainer:
    number_tokenizer(shape.vocabulary).save_pretrained(tokenizer_dir)
    torch.manual_seed(0)
    return PPOTrainer(
        ppo_config(shape, dtype, tokenizer_dir),
        reward_fn=trivial_reward,
        prompts=random_prompts(shape.rollouts, shape),
        eval_prompts=random_prompts(1, shape),  # never sampled
        accelerator=Accelerator(cpu=device == "cpu"),
    )


def number_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word a token id, so that a prompt of 8 numbers has 8 tokens."""
    words = ["<unk>", "<pad>", "</s>", *map(str, range(3, vocabulary))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def random_prompts(count: int, shape: Shape) -> Prompts:
    ids = torch.randint(3, shape.vocabulary, (count, shape.prompt_tokens)).tolist()
    return Prompts.from_list([" ".join(map(str, row)) for row in ids])


def ppo_config(shape: Shape, dtype: str, tokenizer_dir: str) -> TRLConfig:
    """The classic recipe at the benchmark's sizes."""
    return TRLConfig(
        method=PPOConfig(
            ppo_epochs=PPO_EPOCHS,
            num_rollouts=shape.rollouts,
            chunk_size=shape.rollouts,
            init_kl_coef=KL_COEF,
            target=6,
            horizon=10000,
            gen_kwargs={
                "max_new_tokens": shape.new_tokens,
                "eos_token_id": -1,  # nothing ends a response early
                "do_sample": True,
                "top_k": 0,
                "top_p": 1.0,
            },
        ),
        model=ModelConfig(
            model_path=OPTConfig.from_dict(shape.opt_config()),
            num_layers_unfrozen=LORA_BLOCKS,
            delta_kwargs={
                "delta_type": "lora",
                "modified_modules": "attention",
                "lora_r": LORA_R,
                "lora_alpha": LORA_ALPHA,
                "lora_dropout": 0.0,
            },
            model_extra_configs={"dtype": dtype},
        ),
        optimizer=OptimizerConfig("adamw", {"lr": LEARNING_RATE, "betas": [0.9, 0.95]}),
        scheduler=SchedulerConfig("constant"),
        tokenizer=TokenizerConfig(tokenizer_dir),
        train=TrainConfig(
            total_steps=NEVER,
            seq_length=shape.length,
            epochs=NEVER,
            batch_size=shape.batch_size,
            checkpoint_interval=NEVER,
            eval_interval=NEVER,
            seed=0,
        ),
    )


def main() -> None:
    worker = Worker()
    shape, device, dtype = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as tokenizer_dir:
        rounds = Rounds(build_trainer(shape, device, dtype, tokenizer_dir), RoundClock(shape, device))
        worker.answer(
            {
                "name": "solotune",
                "threads": torch.get_num_threads(),
                "versions": {
                    "solotune": solotune.__version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            }
        )
        worker.serve({"round": rounds.play_round, "full_update": rounds.full_update})


if __name__ == "__main__":
    main()
