"""trlX's comparison of its own branches on W&B, which has no counterpart."""

from solotune.errors import NotYetError

__all__ = ["main"]


def main(*_args: object, **_kwargs: object) -> None:
    """Compared trlX with trlX.

    Raises:
        NotYetError: always.
    """
    raise NotYetError("trlx.reference is not supported; benchmarks/ppo_round.py compares with peers")


if __name__ == "__main__":
    main()
