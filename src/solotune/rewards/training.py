"""Learn a reward model from human feedback: an encoder or a causal LM with a scalar head.

One loss serves both objectives. An example is a text with a soft label p, or a pair (chosen, rejected) with p = 1:

    loss = -p log sigmoid(m) - (1 - p) log sigmoid(-m),    m = score(text)  or  score(chosen) - score(rejected)

With ratings, p = (rating - rating_min) / (rating_max - rating_min), so a score of 0 means the middle of the range. With
pairs (Bradley and Terry 1952; Christiano et al. 2017, arXiv:1706.03741) only differences are learned, and the zero is
set afterwards; see `_calibrate`. The result is an ordinary folder for `AutoModelForSequenceClassification`.
"""

import logging
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from solotune.data.assets import build_once, cache_dir
from solotune.data.ratings import Pairs, Ratings, Split, load_feedback, split
from solotune.errors import ConfigError, DataError, ModelError
from solotune.models.products import use_fastest_products
from solotune.progress import phase_progress, show, tracked
from solotune.rewards.base import fingerprint, load_base
from solotune.rewards.batching import logits, pad, pad_id_of, tokenize
from solotune.rewards.card import CARD_FILE, card_table, read_card, write_card
from solotune.rewards.quality import brier_score, fit_logistic, pairwise_accuracy, sign_accuracy

if TYPE_CHECKING:
    from solotune.config import RewardTrainingConfig

logger = logging.getLogger(__name__)

WARMUP_SHARE = 0.1
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
# Half of the rated texts are shown as a beginning of 4 to 20 words, under the whole text's rating: in RL the model
# scores texts that are cut off after so many tokens.
PREFIX_SHARE = 0.5
PREFIX_WORDS = (4, 20)
CALIBRATION_TEXTS = 2000
_BATCHES_SORTED_TOGETHER = 50


class Example(NamedTuple):
    """One text with a soft label in [0, 1], or (chosen, rejected) with the label 1."""

    texts: tuple[str, ...]
    label: float


def train_reward_model(cfg: "RewardTrainingConfig", device: str | torch.device | None = None) -> Path:
    """Train a reward model, report on held-out texts, save it; or return the one of an earlier, equal training.

    Args:
        cfg: without `output_dir` the folder is one in the cache, named after everything that the result depends on.
        device: where to train; the first GPU if there is one.
    Returns:
        The folder: model.safetensors, config, tokenizer, and reward_model.json with the held-out results.
    Raises:
        DataError: the feedback cannot be read or split.
        ModelError: the base model cannot be loaded, or training went to NaN.
        ConfigError: `output_dir` holds something else.
    """
    feedback = feedback_of(cfg)
    identity = fingerprint(cfg, feedback)
    folder = folder_of(cfg, identity)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if folder.exists() and (not (folder / CARD_FILE).is_file() or read_card(folder)["fingerprint"] != identity):
        raise ConfigError(
            f"reward.training.output_dir = {str(folder)!r} exists and holds something else than what these settings "
            "give; it is not overwritten: choose another folder, or remove it"
        )
    if folder.exists():
        logger.info("reusing the reward model in %s", folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    build_once(folder, lambda temporary: _train(cfg, feedback, device, identity, temporary))
    show(card_table(read_card(folder)))
    return folder


def feedback_of(cfg: "RewardTrainingConfig") -> Ratings | Pairs:
    """What a training learns from."""
    return load_feedback(
        cfg.data,
        cfg.objective,
        text_column=cfg.text_column,
        rating_column=cfg.rating_column,
        low=cfg.rating_min,
        high=cfg.rating_max,
        chosen_column=cfg.chosen_column,
        rejected_column=cfg.rejected_column,
    )


def folder_of(cfg: "RewardTrainingConfig", identity: str) -> Path:
    """Where the reward model of a training is kept."""
    return Path(cfg.output_dir) if cfg.output_dir else cache_dir() / "reward-models" / identity[:16]


def _train(
    cfg: "RewardTrainingConfig", feedback: Ratings | Pairs, device: torch.device, identity: str, folder: Path
) -> None:
    started = time.perf_counter()
    parts = split(feedback.groups(), cfg.holdout, cfg.seed)
    n_rows = min(len(parts.train), cfg.max_rows or len(parts.train))
    logger.info("training a reward model on %d rows, %d held out", n_rows, len(parts.heldout))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        use_fastest_products(device)
        torch.manual_seed(cfg.seed)
        model, tokenizer = load_base(cfg.base, device, cfg.num_layers_unfrozen)
        if isinstance(feedback, Pairs):
            tokenizer.truncation_side = "left"  # the two differ at the end
        _fit(model, tokenizer, feedback, parts.train, cfg)
    offset = 0.0
    with phase_progress(f"reward model: scoring {len(parts.heldout):,} held-out rows"):
        if cfg.objective == "pairs":
            offset = _calibrate(model, tokenizer, feedback, parts.train, cfg)
        heldout = _evaluate(model, tokenizer, feedback, parts, cfg, offset)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, cfg, identity, offset, heldout, n_rows, time.perf_counter() - started)


def _fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    feedback: Ratings | Pairs,
    indices: Sequence[int],
    cfg: "RewardTrainingConfig",
) -> None:
    rng = random.Random(cfg.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=WEIGHT_DECAY, fused=True)
    epochs = [_examples(feedback, _drawn(indices, cfg, rng), cfg, rng) for _ in range(cfg.epochs)]
    batches = [batch for epoch in epochs for batch in _batches(epoch, tokenizer, cfg, rng)]
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP_SHARE * len(batches)), len(batches))
    model.train()
    for step, (rows, labels) in enumerate(tracked(batches, "reward model")):
        label_B = torch.tensor(labels, device=model.device)
        scores_PB = model(**pad(rows, pad_id_of(tokenizer), model.device)).logits[:, 0].float().view(-1, len(labels))
        margin_B = scores_PB[0] - scores_PB[1] if len(scores_PB) == 2 else scores_PB[0]
        loss = F.binary_cross_entropy_with_logits(margin_B, label_B)
        if not torch.isfinite(loss):
            raise ModelError(
                f"the reward model's loss is {loss.item()} at step {step + 1} of {len(batches)}; "
                f"lower reward.training.lr, which is {cfg.lr:g}"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
    model.eval()


def _drawn(indices: Sequence[int], cfg: "RewardTrainingConfig", rng: random.Random) -> Sequence[int]:
    if cfg.max_rows is None or len(indices) <= cfg.max_rows:
        return indices
    return rng.sample(indices, cfg.max_rows)


def _examples(
    feedback: Ratings | Pairs, indices: Sequence[int], cfg: "RewardTrainingConfig", rng: random.Random
) -> list[Example]:
    """One epoch's examples in random order. Ratings become pairs, if that is the objective, of random neighbours."""
    order = list(indices)
    rng.shuffle(order)
    if isinstance(feedback, Pairs):
        return [Example((feedback.chosen[i], feedback.rejected[i]), 1.0) for i in order]
    span = cfg.rating_max - cfg.rating_min
    texts = {i: _maybe_prefix(feedback.texts[i], rng) for i in order}
    if cfg.objective == "ratings":
        return [Example((texts[i],), (feedback.ratings[i] - cfg.rating_min) / span) for i in order]
    examples = []
    for one, other in zip(order[::2], order[1::2], strict=False):  # an odd one out waits for another epoch
        if feedback.ratings[one] != feedback.ratings[other]:
            better, worse = sorted((one, other), key=feedback.ratings.__getitem__, reverse=True)
            examples.append(Example((texts[better], texts[worse]), 1.0))
    if not examples:
        raise DataError("no two ratings differ, so there are no pairs to learn from")
    return examples


def _maybe_prefix(text: str, rng: random.Random) -> str:
    words = text.split()
    shortest, longest = PREFIX_WORDS
    if rng.random() >= PREFIX_SHARE or len(words) <= shortest:
        return text
    return " ".join(words[: rng.randint(shortest, min(longest, len(words)))])


def _batches(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, cfg: "RewardTrainingConfig", rng: random.Random
) -> Iterator[tuple[list[list[int]], list[float]]]:
    """Batches of `batch_size` examples of similar length, in random order: rows (all first texts, then all second
    texts, if there are) and labels."""
    sides = [tokenize(side, tokenizer, cfg.max_length) for side in zip(*(e.texts for e in examples), strict=True)]
    lengths = [max(map(len, rows)) for rows in zip(*sides, strict=True)]
    if cut := sum(length >= cfg.max_length for length in lengths):
        logger.info("%d of %d examples fill or exceed max_length = %d tokens", cut, len(examples), cfg.max_length)
    window = cfg.batch_size * _BATCHES_SORTED_TOGETHER
    batches: list[list[int]] = []
    for start in range(0, len(examples), window):
        near = sorted(range(start, min(start + window, len(examples))), key=lengths.__getitem__)
        batches += [near[i : i + cfg.batch_size] for i in range(0, len(near), cfg.batch_size)]
    rng.shuffle(batches)
    for batch in batches:
        yield [rows[i] for rows in sides for i in batch], [examples[i].label for i in batch]


def _calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    feedback: Ratings | Pairs,
    indices: Sequence[int],
    cfg: "RewardTrainingConfig",
) -> float:
    """Give a score learned from pairs its zero, in the head's weights; returns the offset that they have no room for.

    With ratings: the scale and offset that make sigmoid(score) the likeliest probability that the rating is above the
    middle. Without: the mean score of the training texts is taken off. Only a head without a bias (causal LMs) leaves
    an offset, which is then kept in reward_model.json.
    """
    count = min(CALIBRATION_TEXTS, len(indices))
    chosen = [indices[i * len(indices) // count] for i in range(count)]
    if isinstance(feedback, Pairs):
        texts = [feedback.chosen[i] for i in chosen] + [feedback.rejected[i] for i in chosen]
        scale, offset = 1.0, -_scores(model, tokenizer, texts, cfg).mean().item()
    else:
        scores_N = _scores(model, tokenizer, [feedback.texts[i] for i in chosen], cfg)
        middle = (cfg.rating_min + cfg.rating_max) / 2
        positive_N = torch.tensor([feedback.ratings[i] > middle for i in chosen])
        scale, offset = fit_logistic(scores_N, positive_N)
        if scale <= 0:
            logger.warning("the scores do not rise with the ratings of the training texts: nothing was learned")
            scale, offset = 1.0, -scores_N.mean().item()
    head = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1][-1]
    with torch.no_grad():
        head.weight.mul_(scale)
        if head.bias is None:
            return offset
        head.bias.mul_(scale).add_(offset)
    return 0.0


def _evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    feedback: Ratings | Pairs,
    parts: Split,
    cfg: "RewardTrainingConfig",
    offset: float,
) -> dict[str, Any]:
    """Held-out results; the sign accuracy of pairs without ratings does not exist and is None."""
    count = len(parts.heldout)
    if isinstance(feedback, Pairs):
        chosen_N = _scores(model, tokenizer, [feedback.chosen[i] for i in parts.heldout], cfg)
        rejected_N = _scores(model, tokenizer, [feedback.rejected[i] for i in parts.heldout], cfg)
        margin_N = chosen_N - rejected_N
        accuracy = ((margin_N > 0).double() + 0.5 * (margin_N == 0).double()).mean().item()
        brier = brier_score(margin_N.sigmoid(), torch.ones(count))
        return {"rows": count, "pairwise_accuracy": accuracy, "sign_accuracy": None, "brier": brier}
    scores_N = _scores(model, tokenizer, [feedback.texts[i] for i in parts.heldout], cfg) + offset
    ratings_N = torch.tensor([feedback.ratings[i] for i in parts.heldout], dtype=torch.float64)
    ratings_N = ratings_N - (cfg.rating_min + cfg.rating_max) / 2
    rated = ratings_N != 0
    return {
        "rows": count,
        "pairwise_accuracy": pairwise_accuracy(scores_N, ratings_N),
        "sign_accuracy": sign_accuracy(scores_N, ratings_N),
        "brier": brier_score(scores_N[rated].sigmoid(), ratings_N[rated] > 0),
    }


def _scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], cfg: "RewardTrainingConfig"
) -> Tensor:
    return logits(model, tokenizer, texts, cfg.max_length, cfg.batch_size)[:, 0]
