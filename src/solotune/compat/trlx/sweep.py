"""trlX's hyper-parameter search: `solotune sweep` under its name and with its options.

solotune trlx -m trlx.sweep --config X.yml script.py         where one typed `python -m trlx.sweep ...`
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from solotune.cli import app

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sweep that the command line (or `arguments`) describes, and exit."""
    app(["sweep", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()
