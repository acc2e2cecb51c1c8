"""What a method has in hand: model, optimizer, samplers, reward function; the loop around it is `trainers/base.py`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from solotune.config.methods.base import MethodConfig
from solotune.data.prompts import Prompts, encode
from solotune.errors import ConfigError, ModelError
from solotune.models.loading import build_policy, load_tokenizer
from solotune.models.policy import PolicyModel
from solotune.models.products import allow_tf32_beside, use_fastest_products
from solotune.progress import phase_progress
from solotune.rewards.guard import OnError
from solotune.rollout.records import Rollouts
from solotune.rollout.settings import SamplingSettings, sweep
from solotune.runs.clock import Clock
from solotune.runs.console import say
from solotune.runs.evaluation import Evaluation
from solotune.runs.folder import RunFolder
from solotune.trainers.evaluation import evaluate
from solotune.trainers.optim import Stepper, build_optimizer, build_scheduler
from solotune.trainers.order import Stream
from solotune.trainers.sampling import PromptSampler, Texts, separator_of
from solotune.trainers.scoring import Scorer

if TYPE_CHECKING:
    from solotune.config import TRLConfig

T = TypeVar("T")
log = logging.getLogger("solotune")
DDP = DistributedDataParallelKwargs(broadcast_buffers=False)
"""Forward passes of evaluations differ in number between processes, and no buffer is trained."""


class Learner:
    """A model that learns, and all that is needed for it.

    Args:
        config: trlX's configuration.
        reward_fn: called with the keywords among samples, prompts, outputs, tokenizer and the prompts' metadata that it
            takes; a number per sample, or a list of numbers per sample, one a response token. None: evaluations have no
            reward.
        eval_prompts: what is continued at every evaluation.
        room: tokens a prompt may have.
        run: where files go; None writes none.
        metric_fn: called at every evaluation with samples, prompts, outputs and metadata; a dict of named numbers.
        stop_sequences: texts that end a response and are cut off it.
        prompts: the training prompts, checked before weights are loaded.
        scores_on_main: call `reward_fn` and `metric_fn` on the first process alone, with the samples of all (as trlX);
            otherwise every process scores its own.
        on_error: what to do when `reward_fn` fails; default to stop.
        accelerator: default a new one.
        clock: phases are counted here, default a clock that starts now.
    Raises:
        ConfigError, DataError, ModelError: before weights are loaded where that can be told.
    """

    METHOD: ClassVar[type[MethodConfig]] = MethodConfig
    """Whose trainer it is: the method that is configured has to be of this class."""

    def __init__(
        self,
        config: TRLConfig,
        reward_fn: Callable[..., Any] | None,
        eval_prompts: Prompts,
        room: int,
        run: RunFolder | None = None,
        metric_fn: Callable[..., dict[str, Any]] | None = None,
        stop_sequences: Sequence[str] = (),
        prompts: Prompts | None = None,
        scores_on_main: bool = False,
        on_error: OnError | None = None,
        accelerator: Accelerator | None = None,
        clock: Clock | None = None,
    ):
        self.config = config
        self.run = run
        self.accelerator = accelerator or Accelerator(kwargs_handlers=[DDP])
        self.device = self.accelerator.device
        self.clock = clock or Clock(self.device)
        use_fastest_products(self.device)

        self.tokenizer = load_tokenizer(config.tokenizer)
        self._scorer = Scorer(
            reward_fn,
            metric_fn,
            self.tokenizer,
            self.accelerator,
            scores_on_main,
            on_error or OnError(),
            config.train.seed,
        )
        self._room = room
        prompt_ids = [] if prompts is None else self._encode(prompts)
        eval_ids = self._encode(eval_prompts)
        main = self.accelerator.is_main_process
        with phase_progress("loading the model", shown=main), self.clock.phase("load"):
            policy = self.build_policy()
        allow_tf32_beside(p for p in policy.parameters() if not p.requires_grad)
        self._check_vocabulary(policy)
        self._check_positions(policy, self._longest([*prompt_ids, *eval_ids]))
        self._has_reference = policy.has_reference
        self.parameters = policy.trainable_parameters()
        optimizer = build_optimizer(config.optimizer, self.parameters)
        self.scheduler = build_scheduler(config.scheduler, optimizer)
        self.policy, self.optimizer = self.accelerator.prepare(policy, optimizer)
        self.stepper = Stepper(
            self.accelerator,
            self.parameters,
            self.optimizer,
            self.scheduler,
            config.train.max_grad_norm,
            config.train.max_skipped_steps,
        )

        self._eos, self._stops = _eos_token_ids(policy, self.tokenizer), list(stop_sequences)
        self._gen_kwargs: dict[str, Any] = getattr(config.method, "gen_kwargs", {})
        self.eval_settings = [(s.label, self.settings(s.gen_kwargs)) for s in sweep(self._gen_kwargs)]
        self._sample_eval = self.sampler(eval_prompts, eval_ids, Stream.EVALUATION)
        if prompts is not None:
            self.sampled = self.sampler(prompts, prompt_ids, Stream.ROLLOUTS)
        self.n_eval_prompts = len(eval_prompts)
        self.micro_batch = config.train.minibatch_size or config.train.batch_size
        self._evaluation_seconds: float | None = None
        self.rounds_done = 0
        self.steps_done = 0

    @classmethod
    def method_of(cls, config: TRLConfig) -> Any:
        """The configured method.

        Raises:
            ConfigError: it is another one than this trainer's.
        """
        if not isinstance(config.method, cls.METHOD):
            wanted = cls.METHOD.__name__
            raise ConfigError(
                f"method.name {config.method.name!r} is not {wanted.removesuffix('Config')}; this trainer needs a "
                f"{wanted}"
            )
        return config.method

    def build_policy(self) -> PolicyModel:
        """The model, on this process's device, before anything is wrapped around it."""
        return build_policy(self.config, self.device)

    def score(self, texts: Texts, stream: Stream = Stream.ROLLOUTS) -> list[Any]:
        """The reward function's answer: a number or a list of numbers a sample; None for one without a reward."""
        return self._scorer.rewards(
            texts, stream, self.steps_done, self.run.path if self.run is not None else Path.cwd()
        )

    def evaluate(self, settings: SamplingSettings | None = None) -> Evaluation:
        """Sample the evaluation prompts with the same random numbers as ever, and score them.

        Args:
            settings: how to sample, default `gen_kwargs` (of a sweep, its first value).
        """
        count, shown = self.n_eval_prompts, self.accelerator.is_main_process
        name = f"evaluating {count:,} sample{'' if count == 1 else 's'}"
        with (
            phase_progress(name, expected=self._evaluation_seconds, shown=shown) as phase,
            self.clock.phase("evaluate"),
        ):
            evaluation = evaluate(
                self.accelerator,
                self.policy,
                self._sample_eval,
                self.n_eval_prompts,
                settings or self.eval_settings[0][1],
                lambda texts: self.score(texts, Stream.EVALUATION),
                lambda texts: self._scorer.metrics(texts, self.steps_done),
                self.in_memory,
                measures_kl=self._has_reference,
                told=phase.doing,
            )
        self._evaluation_seconds = phase.seconds
        return evaluation

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter (or the whole model, where it was trained itself) and the tokenizer; PEFT or transformers
        load it without solotune."""
        if self.accelerator.is_main_process:
            self.model.save_pretrained(Path(folder))
            self.tokenizer.save_pretrained(folder)

    def keep_failure(self, rollouts: Rollouts | None = None) -> Path | None:
        """Write down what a failure can be understood by; the folder it is in."""
        return None if self.run is None else self.run.save_failure(self.model, rollouts)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """`transformers.generate` of the tuned model, with the `gen_kwargs` of rollouts where none are given."""
        own = getattr(self.config.method, "gen_experience_kwargs", None) or sweep(self._gen_kwargs)[0].gen_kwargs
        return self._hf_generate(input_ids, attention_mask, {**own, **kwargs})

    def generate_eval(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The same with the `gen_kwargs` of evaluations."""
        return self._hf_generate(input_ids, attention_mask, {**sweep(self._gen_kwargs)[0].gen_kwargs, **kwargs})

    def _hf_generate(self, input_ids: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        ids = input_ids.to(self.device)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(self.device)
        if options.get("eos_token_id") == -1:
            options["eos_token_id"] = None
        options = {"pad_token_id": self.tokenizer.pad_token_id, **options}
        return self.model.generate(input_ids=ids, attention_mask=mask, **options)

    @property
    def model(self) -> PolicyModel:
        """The policy without what `accelerate` wrapped around it."""
        return self.accelerator.unwrap_model(self.policy)

    def settings(self, gen_kwargs: dict[str, Any]) -> SamplingSettings:
        """How to sample, with the model's and tokenizer's EOS unless `gen_kwargs` name others."""
        return SamplingSettings.from_gen_kwargs(gen_kwargs, self._eos, self._stops)

    def sampler(self, prompts: Prompts, prompt_ids: list[list[int]], stream: Stream) -> PromptSampler:
        """A sampler over these prompts with random numbers of its own."""
        chunk_size = getattr(self.config.method, "chunk_size", self.config.train.batch_size)
        seed, separator = self.config.train.seed, separator_of(self.config)
        return PromptSampler(
            self.policy, self.tokenizer, prompts, prompt_ids, seed, stream, chunk_size, self.device, separator
        )

    def say(self, line: str) -> None:
        """One line on the terminal, from one process."""
        if self.accelerator.is_main_process:
            say(line)

    def in_memory(self, run: Callable[[int], T]) -> T:
        """`run(micro_batch)`, repeated with half the rows a pass whenever the GPU's memory does not hold them.

        What `run` does must not depend on the size of its passes; training draws no random numbers that would have to
        be put back. Several processes do not recover: the others are waiting inside a reduction.
        """
        while True:
            try:
                return run(self.micro_batch)
            except torch.OutOfMemoryError:
                if self.micro_batch == 1 or self.accelerator.num_processes > 1:
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.micro_batch = -(-self.micro_batch // 2)
            log.warning(
                "out of GPU memory: the pass is repeated with %d rows at a time, to the same result; "
                "train.minibatch_size: %d says so from the start",
                self.micro_batch,
                self.micro_batch,
            )

    def sum_over_processes(self, x: Tensor) -> Tensor:
        """The same tensor with the values of all processes added up."""
        return self.accelerator.reduce(x, reduction="sum") if self.accelerator.num_processes > 1 else x  # type: ignore[return-value]

    def _encode(self, prompts: Prompts) -> list[list[int]]:
        special, goes_on = self.config.tokenizer.add_special_tokens, not self.config.model.is_seq2seq
        return encode(prompts, self.tokenizer, self._room, special, goes_on)

    def _check_vocabulary(self, policy: PolicyModel) -> None:
        embeddings: int = policy.lm.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        if len(self.tokenizer) > embeddings:
            raise ModelError(
                f"tokenizer.tokenizer_path {self.config.tokenizer.tokenizer_path!r} has {len(self.tokenizer):,} "
                f"tokens, but the model has embeddings for {embeddings:,}; use the model's own tokenizer"
            )

    def _longest(self, prompt_ids: list[list[int]]) -> int:
        """Tokens of the longest sequence that the model may be given."""
        prompt, new = max(map(len, prompt_ids), default=0), self.config.train.seq_length - self._room
        return max(prompt, new) if self.config.model.is_seq2seq else prompt + new

    def _check_positions(self, policy: PolicyModel, longest: int) -> None:
        if policy.n_positions is not None and longest > policy.n_positions:
            raise ModelError(
                f"{type(policy.lm).__name__} has {policy.n_positions:,} positions, but sequences have up to "
                f"{longest:,} tokens; lower train.seq_length = {self.config.train.seq_length:,} or max_new_tokens in "
                "method.gen_kwargs"
            )


def _eos_token_ids(policy: PolicyModel, tokenizer: Any) -> list[int]:
    """The model's own end-of-sequence tokens and the tokenizer's."""
    generation = getattr(policy.lm, "generation_config", None)
    given = getattr(generation, "eos_token_id", None)
    ids = given if isinstance(given, list) else [given]
    vocabulary = int(policy.lm.get_output_embeddings().weight.shape[0])  # type: ignore[union-attr,arg-type]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None and i < vocabulary})
