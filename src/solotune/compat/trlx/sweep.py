"""trlX's hyper-parameter search, which is not there yet."""

from solotune.errors import NotYetError

__all__ = ["main"]


def main(*_args: object, **_kwargs: object) -> None:
    """Not there yet.

    Raises:
        NotYetError: always.
    """
    raise NotYetError("trlx.sweep is not there yet; call main(hparams) of the script in a loop")


if __name__ == "__main__":
    main()
