"""The recipes that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from solotune.config.recipe import Recipe
from solotune.config.values import nearest
from solotune.errors import ConfigError

if TYPE_CHECKING:
    from solotune.config.trl import TRLConfig

PACKAGE = Path(__file__).parents[1]
RECIPE_FOLDERS = (PACKAGE / "recipes", PACKAGE.parents[1] / "recipes")
"""Beside the code in an installed package, at the root of a checkout."""


def find_recipe(name: str) -> Path:
    """The file that `name` means: a path, or the name of a packaged recipe such as `quickstart`.

    Raises:
        ConfigError: it is neither; the packaged recipes are named.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged = {file.stem: file for folder in reversed(RECIPE_FOLDERS) for file in sorted(folder.glob("*.yaml"))}
    if name in packaged:
        return packaged[name]
    raise ConfigError(f"no recipe {name}: neither a file nor a packaged recipe; {nearest(name, packaged)}")


def is_packaged(name: str) -> bool:
    """Whether `find_recipe` finds one that came with the package."""
    return find_recipe(name).parent in RECIPE_FOLDERS


def load_recipe(name: str, overrides: Sequence[str] | None = None) -> Recipe:
    """The recipe, with the overrides, and with the name of its run: that of the file unless train.run_name is set."""
    path = find_recipe(name)
    recipe = Recipe.load_yaml(path, list(overrides or []))
    if recipe.config.train.run_name is None:
        recipe.config.train.run_name = path.stem
    return recipe


def quickstart_config(rounds: int = 8) -> TRLConfig:
    """The settings of the quickstart, for a reward of one's own: PPO on SmolLM2-135M-Instruct, LoRA on its last blocks.

    Args:
        rounds: of 64 texts each, 10 to 15 seconds on two CPU cores.
    """
    return load_recipe("quickstart", [f"train.epochs={rounds}", "train.run_name=own-reward"]).config
