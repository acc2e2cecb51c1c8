"""What trlX 0.5 to 0.7 and its last main offered, as faces on this project's own objects.

`solotune trlx SCRIPT.py` makes `import trlx` resolve to this package. docs/trlx.md lists what differs, and why.
"""

from solotune.compat.trlx.trlx import train
from solotune.compat.trlx.utils import logging

__all__ = ["logging", "train"]
