"""One checkpoint for every strategy: safetensors and JSON, whole or not there at all.

The format is described in docs/checkpoint-format.md.
"""

from scalellm.checkpoint.read import Checkpoint, latest, open_checkpoint
from scalellm.checkpoint.saver import Saver
from scalellm.checkpoint.together import latest_together, open_together
from scalellm.checkpoint.write import clean_up, save

__all__ = [
    "Checkpoint",
    "Saver",
    "clean_up",
    "latest",
    "latest_together",
    "open_checkpoint",
    "open_together",
    "save",
]
