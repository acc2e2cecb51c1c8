"""The sections of a configuration other than `method`; names and order of the settings are trlX's."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainValidator
from pydantic.dataclasses import dataclass

from solotune.config.section import Section
from solotune.config.values import (
    STRICT,
    CountInt,
    Flag,
    FreeDict,
    FreeKeyError,
    NonNegativeReal,
    NumberDict,
    PathText,
    PositiveInt,
    PositiveReal,
    Whole,
    nearest,
    own_copy,
    real_number,
    shown,
    whole_number,
)
from solotune.errors import ConfigError


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]

DEFAULT_TRAINER = "AcceleratePPOTrainer"
"""trlX's default for every method, and so read as: the method's own trainer."""


@dataclass(config=STRICT)
class TrainConfig(Section):
    """How long, how much at a time, and where to (trlX's fields and order; the last two are ours).

    total_steps: cap on optimizer steps. seq_length: tokens of prompt and response together.
    epochs: rounds of rollouts (PPO), passes over the data (SFT, ILQL). batch_size: samples an optimizer step, per
    process. checkpoint_interval, eval_interval: in optimizer steps. minibatch_size: samples a forward pass.
    checkpoint_dir: the folder that run folders lie in. max_grad_norm: None for no clipping. max_skipped_steps: steps in
    a row whose gradient is not finite, which are left out, before the run stops. deterministic: on a GPU too, the same
    settings give the same bits, a little slower (a CPU does so anyway). trunk_cache_gb: memory for what the frozen
    trunk makes of given samples (SFT, ILQL); more than that goes to a memory-mapped file in the run's folder; None
    computes it anew in every pass. pack: several given samples in a row, no token seeing another sample.
    """

    SECTION: ClassVar[str] = "train"

    total_steps: PositiveInt
    seq_length: PositiveInt
    epochs: PositiveInt
    batch_size: PositiveInt
    checkpoint_interval: PositiveInt
    eval_interval: PositiveInt
    pipeline: str = "PromptPipeline"
    trainer: str = DEFAULT_TRAINER
    trainer_kwargs: FreeDict = field(default_factory=dict)
    project_name: str = "solotune"
    run_name: str | None = None
    entity_name: str | None = None
    group_name: str | None = None
    checkpoint_dir: PathText = "runs"
    rollout_logging_dir: PathText | None = None
    save_best: Flag = True
    save_optimizer: Flag = True
    resume_from_checkpoint: PathText | None = None
    tracker: Annotated[Tracker | None, BeforeValidator(_lower)] = None
    logging_dir: PathText | None = None
    tags: list[str] = field(default_factory=list)
    seed: CountInt = 1000
    minibatch_size: PositiveInt | None = None
    max_grad_norm: PositiveReal | None = 1.0
    gradient_checkpointing: Flag = False
    keep_checkpoints: PositiveInt = 2
    max_skipped_steps: PositiveInt = 3
    deterministic: Flag = False
    trunk_cache_gb: NonNegativeReal | None = 4.0
    pack: Flag = True

    def check(self) -> None:
        if self.minibatch_size is not None and self.batch_size % self.minibatch_size:
            divisors = [n for n in range(1, min(self.batch_size, 1000) + 1) if self.batch_size % n == 0]
            raise ConfigError(
                f"train.minibatch_size = {self.minibatch_size}: must divide train.batch_size, which is "
                f"{self.batch_size}: one of {', '.join(map(str, divisors))}"
            )


# ---- model --------------------------------------------------------------------------------------------------------

_MODEL_CLASSES = {"PreTrainedConfig", "PretrainedConfig", "PreTrainedModel"}  # by name: transformers stays unimported
_PRESETS = ("all", "attention", "mlp")


def _is_a(value: Any, names: set[str]) -> bool:
    return any(cls.__name__ in names for cls in type(value).__mro__)


def _model_path(value: Any) -> Any:
    if _is_a(value, _MODEL_CLASSES):
        return value
    if hasattr(value, "__fspath__"):
        value = value.__fspath__()
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be a model's name or folder, or a transformers config or model object")
    return value


def _peft_config(value: Any) -> Any:
    if value is None or _is_a(value, {"PeftConfig", "PeftConfigMixin"}):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("must be a mapping with the settings of a PEFT config, or a PeftConfig object")
    if "peft_type" not in value:
        raise FreeKeyError("peft_type", None, "must be given, e.g. LORA")
    return own_copy(value)


def _modified_modules(value: Any) -> Any:
    if isinstance(value, str) and value in _PRESETS:
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) and name for name in value):
        return list(value)
    hint = f"; {nearest(value, _PRESETS)}" if isinstance(value, str) else ""
    raise ValueError(f"must be one of {', '.join(_PRESETS)}, or a list of module paths inside a block{hint}")


def _within(convert: Any, fits: Any, wording: str) -> Any:
    def check(value: Any) -> Any:
        value = convert(value)
        if not fits(value):
            raise ValueError(wording)
        return value

    return check


def _delta_type(value: Any) -> str:
    if _lower(value) != "lora":
        raise ValueError("must be lora, the only kind that is supported")
    return "lora"


_DELTA = {
    "delta_type": _delta_type,
    "modified_modules": _modified_modules,
    "lora_r": _within(whole_number, lambda v: v >= 1, "must be at least 1"),
    "lora_alpha": _within(real_number, lambda v: v > 0, "must be greater than 0"),
    "lora_dropout": _within(real_number, lambda v: 0 <= v < 1, "must be at least 0 and less than 1"),
}


def _delta_kwargs(value: Any) -> Any:
    """trlX's (OpenDelta's) LoRA settings, checked name by name."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a mapping with {', '.join(_DELTA)}")
    checked, problems = {}, []
    for name, given in {"delta_type": None, **value}.items():
        path = f"model.delta_kwargs.{name}"
        if name not in _DELTA:
            problems.append(f"unknown setting {path} in model.delta_kwargs: {nearest(str(name), _DELTA)}")
        elif name == "delta_type" and name not in value:
            problems.append(f"{path} is missing: must be lora")
        else:
            try:
                checked[name] = _DELTA[name](given)
            except ValueError as error:
                problems.append(f"{path} = {shown(given)}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return checked


def _architecture(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not isinstance(value.get("model_type"), str):
        raise ValueError("must be a mapping of a transformers configuration that includes model_type, e.g. opt")
    return own_copy(value)


@dataclass(config=STRICT)
class ModelConfig(Section):
    """Which model, and which part of it is trained.

    model_path: hub id or folder; from Python also a transformers config (random weights) or model object.
    model_arch_type: seq2seq for an encoder-decoder (T5), whose blocks that are counted and adapted are the decoder's.
    num_layers_unfrozen: -1 everything, k > 0 the last k blocks. LoRA: `delta_kwargs` (trlX v0.4-0.6; on the last
    num_layers_unfrozen blocks) or `peft_config` (PEFT's own settings, as a mapping or an object).
    model_extra_configs: handed to from_pretrained (dtype, trust_remote_code). architecture: keys of the transformers
    configuration, so that `solotune tree` needs no hub. quantization: the frozen weights in 4 or 8 bits (bitsandbytes),
    with LoRA on top.
    """

    SECTION: ClassVar[str] = "model"

    model_path: Annotated[Any, PlainValidator(_model_path)]
    model_arch_type: Literal["causal", "seq2seq"] = "causal"
    num_layers_unfrozen: Annotated[Whole, Field(ge=-1)] = -1
    peft_config: Annotated[Any, PlainValidator(_peft_config)] = None
    model_extra_configs: FreeDict = field(default_factory=dict)
    delta_kwargs: Annotated[dict[str, Any] | None, PlainValidator(_delta_kwargs)] = None
    architecture: Annotated[dict[str, Any] | None, PlainValidator(_architecture)] = None
    quantization: Literal["nf4", "int8"] | None = None

    @property
    def is_seq2seq(self) -> bool:
        """Whether the model is an encoder-decoder, whose outputs do not continue their prompts."""
        return self.model_arch_type == "seq2seq"

    def check(self) -> None:
        if self.quantization is not None and self.delta_kwargs is None and self.peft_config is None:
            raise ConfigError(
                f"model.quantization = {self.quantization}: weights in so few bits cannot be trained themselves; give "
                "model.delta_kwargs or model.peft_config, or remove it"
            )
        if self.delta_kwargs is not None and self.peft_config is not None:
            raise ConfigError("model.delta_kwargs and model.peft_config are both given: keep one of them")
        if self.delta_kwargs is not None and self.num_layers_unfrozen == 0:
            raise ConfigError(
                "model.num_layers_unfrozen = 0: model.delta_kwargs puts LoRA on the last num_layers_unfrozen blocks, "
                "so nothing would train; must be -1 (all blocks) or at least 1"
            )


@dataclass(config=STRICT)
class TokenizerConfig(Section):
    """The tokenizer; add_special_tokens: encode prompts with its own BOS and the like (trlX: false)."""

    SECTION: ClassVar[str] = "tokenizer"

    tokenizer_path: PathText
    padding_side: Literal["left", "right"] = "left"
    truncation_side: Literal["left", "right"] = "right"
    tokenizer_extra_configs: FreeDict = field(default_factory=dict)
    add_special_tokens: Flag = True


@dataclass(config=STRICT)
class OptimizerConfig(Section):
    """kwargs: arguments of the torch (or bitsandbytes) optimizer: lr, betas, eps, weight_decay."""

    SECTION: ClassVar[str] = "optimizer"

    name: Annotated[Literal["adam", "adamw", "adam_8bit_bnb", "adamw_8bit_bnb", "sgd"], BeforeValidator(_lower)]
    kwargs: NumberDict = field(default_factory=dict)


@dataclass(config=STRICT)
class SchedulerConfig(Section):
    """kwargs: arguments of torch's CosineAnnealingLR (T_max, eta_min) or LinearLR; constant takes none."""

    SECTION: ClassVar[str] = "scheduler"

    name: Annotated[Literal["cosine_annealing", "linear", "constant"], BeforeValidator(_lower)]
    kwargs: NumberDict = field(default_factory=dict)
