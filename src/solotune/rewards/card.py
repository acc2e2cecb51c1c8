"""`reward_model.json`: what a trained reward model's score means, where it comes from and how good it is."""

import dataclasses
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from solotune.errors import ModelError

if TYPE_CHECKING:
    from solotune.config import RewardTrainingConfig

CARD_FILE = "reward_model.json"
PACKAGES = ("solotune", "torch", "transformers")


def write_card(
    folder: Path,
    cfg: "RewardTrainingConfig",
    identity: str,
    offset: float,
    heldout: dict[str, Any],
    train_rows: int,
    seconds: float,
) -> None:
    """Write the card of a reward model to its folder; numbers that do not exist are null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in heldout.items()}
    card = {
        "fingerprint": identity,
        "score": "logit of a good text; 0 is the middle of the rating range (of pairs without ratings: the mean score)",
        "offset": offset,  # to be added to the model's logit; 0 unless its head has no bias to hold it
        "heldout": finite,
        "train_rows": train_rows,
        "seconds": round(seconds, 1),
        "training": dataclasses.asdict(cfg),
        "versions": {name: version(name) for name in PACKAGES},
    }
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card in a reward model's folder.

    Raises:
        ModelError: it is not what `write_card` wrote.
    """
    path = Path(folder) / CARD_FILE
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(card["fingerprint"], str) and math.isfinite(card["offset"])):
            raise ValueError("its fingerprint is no text or its offset no number")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ModelError(
            f"{str(path)!r} is not the card of a reward model that solotune trained: {type(error).__name__}: {error}"
        ) from error
    return card


def card_table(card: dict[str, Any]) -> Table:
    """The held-out results, for the terminal."""
    heldout = card["heldout"]
    table = Table(title=f"Reward model on {heldout['rows']:,} held-out rows")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for key, name in (
        ("pairwise_accuracy", "pairwise accuracy"),
        ("sign_accuracy", "sign accuracy"),
        ("brier", "Brier score (0.25 is a coin)"),
    ):
        value = heldout[key]
        table.add_row(name, "-" if value is None else f"{value:.3f}")
    table.add_row("training rows", f"{card['train_rows']:,}")
    table.add_row("seconds", f"{card['seconds']:.0f}")
    return table
