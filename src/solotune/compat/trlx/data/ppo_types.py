"""trlX's records of rollouts, which this project does not have."""

from solotune.compat.shims import absent

__all__ = ["PPORLBatch", "PPORLElement"]

_REASON = "a round's rollouts are one solotune.rollout.records.Rollouts"
PPORLElement = absent("PPORLElement", _REASON)
PPORLBatch = absent("PPORLBatch", _REASON)
