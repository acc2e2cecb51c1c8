"""How a method learns: what trainers share, and one file a method, which registers its trainer when it is imported."""

import solotune.trainers.ilql
import solotune.trainers.ppo
import solotune.trainers.rft
import solotune.trainers.sft  # noqa: F401
