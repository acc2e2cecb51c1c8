"""A recipe's own sections: where its data come from, and its rewards."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import PlainValidator
from pydantic.dataclasses import dataclass

from solotune.config.section import Section
from solotune.config.values import (
    STRICT,
    CountInt,
    NonNegativeReal,
    PathText,
    PositiveInt,
    PositiveReal,
    Real,
    own_copy,
    shown,
)
from solotune.errors import ConfigError


def _prompts(value: Any) -> Any:
    if hasattr(value, "__fspath__"):
        value = value.__fspath__()
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if not isinstance(item, str | Mapping):
                raise ValueError(f"item {index} is {shown(item)}: must be text, or a mapping with the key prompt")
        return own_copy(value)
    raise ValueError("must be a list of prompts, a file, a dataset's name, or asset:film-snippets")


def _samples(value: Any) -> Any:
    if value is None:
        return None
    if hasattr(value, "__fspath__"):
        value = value.__fspath__()
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if not isinstance(item, str | list | tuple | Mapping):
                raise ValueError(f"item {index} is {shown(item)}: must be text, a list of phrases, or a mapping")
        return own_copy(value)
    raise ValueError("must be a list of samples, a file, a dataset's name, or asset:film-snippets")


OptionalSamples = Annotated[list[Any] | str | None, PlainValidator(_samples)]
OptionalPrompts = Annotated[
    list[str | dict[str, Any]] | str | None, PlainValidator(lambda v: None if v is None else _prompts(v))
]


@dataclass(config=STRICT)
class DataConfig(Section):
    """Where the prompts, or the samples to learn from, come from.

    prompts, eval_prompts: a list of texts or mappings; a .txt .json .jsonl .csv .parquet file; a Hugging Face dataset's
    name; asset:film-snippets. prompt_column: which column is the prompt. prompt_template: a prompt is made of several
    columns, e.g. "### Instruction:\n{instruction}". prompt_until: only up to the last place of this text, which is
    kept, e.g. "\n\nAssistant:". prompt_words: only the first so many words. long_prompts: those that `train.seq_length`
    leaves no room for are an error, or are left out. eval_repeats: each evaluation prompt is sampled so many times.
    stop_sequences: texts that end a response and are cut off it.

    For methods that learn from given samples: samples: a list of texts, of [prompt, output, prompt, output, ...], or of
    mappings; or a file, a dataset's name or asset:film-snippets as for prompts. sample_column: the column with the
    text, or with the list of a dialogue; or output_column beside prompt_column. reward_column: the samples' rewards
    (ILQL). rewards: those of a list of samples. least_reward: samples with less in reward_column are left out.
    """

    SECTION: ClassVar[str] = "data"

    prompts: OptionalPrompts = None
    prompt_column: str | None = None
    split: str = "train"
    prompt_template: str | None = None
    prompt_until: PathText | None = None
    prompt_words: PositiveInt | None = None
    long_prompts: Literal["error", "drop"] = "error"
    stop_sequences: list[str] = field(default_factory=list)
    max_prompts: PositiveInt | None = None
    eval_prompts: OptionalPrompts = None
    eval_repeats: PositiveInt = 1
    samples: OptionalSamples = None
    sample_column: str | None = None
    output_column: str | None = None
    reward_column: str | None = None
    rewards: list[Real] | None = None
    least_reward: Real | None = None

    def check(self) -> None:
        if self.sample_column is not None and self.output_column is not None:
            raise ConfigError("data.sample_column and data.output_column are both given: keep one of them")
        if self.rewards is not None and self.reward_column is not None:
            raise ConfigError("data.rewards and data.reward_column are both given: keep one of them")
        if self.least_reward is not None and self.reward_column is None:
            raise ConfigError("data.least_reward needs data.reward_column, whose values it is compared with")
        if self.prompt_template is not None and self.prompt_column is not None:
            raise ConfigError("data.prompt_template and data.prompt_column are both given: keep one of them")


@dataclass(config=STRICT)
class RewardTrainingConfig(Section):
    """A reward model learned from human ratings or from pairs of chosen and rejected texts.

    holdout: texts kept back for the report. rating_min, rating_max: the ratings' range, mapped to 0 .. 1.
    num_layers_unfrozen: blocks of the base that learn, the last ones; -1: all of it, embeddings included.
    max_rows: at most so many rows are learned from in a pass, drawn at random.
    """

    SECTION: ClassVar[str] = "reward.training"

    base: PathText
    data: PathText
    objective: Literal["ratings", "pairs"] = "ratings"
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 32
    lr: PositiveReal = 5e-5
    holdout: PositiveInt = 1000
    max_length: PositiveInt = 64
    num_layers_unfrozen: int = -1
    max_rows: PositiveInt | None = None
    rating_min: Real = -4.0
    rating_max: Real = 4.0
    seed: CountInt = 0
    output_dir: PathText | None = None
    text_column: str = "text"
    rating_column: str = "rating"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"

    def check(self) -> None:
        if self.num_layers_unfrozen < 1 and self.num_layers_unfrozen != -1:
            raise ConfigError(
                f"reward.training.num_layers_unfrozen = {self.num_layers_unfrozen}: must be 1 or more blocks, or -1: "
                "all of them"
            )
        if self.rating_min >= self.rating_max:
            raise ConfigError(
                f"reward.training.rating_min = {self.rating_min}: must be less than reward.training.rating_max, "
                f"which is {self.rating_max}"
            )


@dataclass(config=STRICT)
class RewardConfig(Section):
    """What rewards a sample: exactly one of function, classifier, model; or `training` alone.

    function: file.py:name. classifier: a text-classification model, whose probability of `label` is the reward.
    model: folder of a reward model that solotune trained. training: such a model is trained first and reused.
    transform: of the reward model's score; sigmoid unless given (a function's values are taken as they are).
    on_error: what to do when it raises, returns something else than finite numbers, or takes longer than `timeout`
    seconds: stop the run, its state saved; retry, `retries` times after `backoff` seconds, doubled each time; skip the
    samples that it fails on.
    """

    SECTION: ClassVar[str] = "reward"

    function: str | None = None
    classifier: PathText | None = None
    model: PathText | None = None
    label: str | None = None
    transform: Literal["none", "sigmoid"] | None = None
    batch_size: PositiveInt = 32
    training: RewardTrainingConfig | None = None
    on_error: Literal["stop", "retry", "skip"] = "stop"
    retries: CountInt = 3
    backoff: NonNegativeReal = 1.0
    timeout: PositiveReal | None = None

    def check(self) -> None:
        sources = [name for name in ("function", "classifier", "model", "training") if getattr(self, name) is not None]
        if len(sources) != 1:
            given = " and ".join(f"reward.{name}" for name in sources) + " are" if sources else "no reward is"
            raise ConfigError(
                f"{given} given: exactly one of reward.function, reward.classifier, reward.model and reward.training "
                "says where rewards come from"
            )
        source = sources[0]
        if self.function is not None and not all(self.function.rpartition(":")[::2]):
            raise ConfigError(f"reward.function = {shown(self.function)}: must be file.py:name_of_the_function")
        if source == "classifier" and not self.label:
            raise ConfigError("reward.label is missing: the label of reward.classifier whose probability is the reward")
        if source != "classifier" and self.label is not None:
            raise ConfigError(f"reward.label = {shown(self.label)}: belongs to reward.classifier, which is not given")
        if self.transform is None and source != "classifier":
            self.transform = "none" if source == "function" else "sigmoid"
