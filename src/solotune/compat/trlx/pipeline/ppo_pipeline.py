"""trlX's store of rollouts, which this project does not have."""

from solotune.compat.shims import absent

__all__ = ["PPORolloutStorage"]

PPORolloutStorage = absent("PPORolloutStorage", "a round's rollouts are one solotune.rollout.records.Rollouts")
