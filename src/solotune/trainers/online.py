"""What methods share that learn from what they sample: sampling prompts, and scoring the responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from solotune.config import TRLConfig
from solotune.data.prompts import Prompts
from solotune.rollout.records import Rollouts
from solotune.rollout.settings import sweep
from solotune.trainers.base import Trainer
from solotune.trainers.rollout_log import RolloutLog
from solotune.trainers.sampling import Texts, room_for_prompts


class Scored(NamedTuple):
    """Rollouts and what the reward function said of them.

    Args:
        rollouts: with no response tokens in rows that got no score.
        texts: what the reward function saw.
        given: a number or a list of numbers a row; None for one without a score.
    """

    rollouts: Rollouts
    texts: Texts
    given: list[Any]


class OnlineTrainer(Trainer):
    """Learns from responses that it samples to prompts; see `Trainer` for the other arguments.

    Args:
        config: trlX's configuration with the trainer's method.
        prompts, eval_prompts: what is continued.
    """

    def __init__(
        self, config: TRLConfig, reward_fn: Callable[..., Any], prompts: Prompts, eval_prompts: Prompts, **shared: Any
    ):
        method = self.method_of(config)
        room = room_for_prompts(config)
        super().__init__(config, method.plan(config.train), reward_fn, eval_prompts, room, prompts=prompts, **shared)
        self.method, self.n_prompts = method, len(prompts)
        of_eval, of_rollouts = sweep(method.gen_kwargs), getattr(method, "gen_experience_kwargs", None)
        self.rollout_settings = self.settings(of_rollouts or of_eval[0].gen_kwargs)
        if len(of_eval) > 1 and of_rollouts is None:
            self.say(f"rollouts are sampled with {of_eval[0].label[1:]}, the first of method.gen_kwargs' sweep")
        self.rollout_log = None
        if config.train.rollout_logging_dir is not None:
            self.rollout_log = RolloutLog(config, self.accelerator)

    def scored(self, rollouts: Rollouts) -> Scored:
        """What the reward function says of rollouts."""
        eos_text = self.tokenizer.eos_token or "" if self.config.AS_TRLX else ""
        texts = self.sampled.texts(rollouts, self.rollout_settings.stop_strings, eos_text)
        given = self.score(texts)
        return Scored(rollouts.without([row for row, value in enumerate(given) if value is None]), texts, given)
