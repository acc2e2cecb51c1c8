"""The version of this project, for every floor: nothing below the command imports the package's root."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("solotune")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0"
