"""Packages that are installed by an extra."""

import importlib

from solotune.errors import MissingExtraError


def require_package(module: str, purpose: str):
    """Import an optional module, or say which extra brings it.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the package {module!r}, which is not installed ({error}); "
            "install it with: pip install 'solotune[quickstart]'"
        ) from error
