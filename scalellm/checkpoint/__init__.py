"""One checkpoint for every strategy: safetensors and JSON, whole or not there at all.

The format is described in docs/checkpoint-format.md.
"""

from scalellm.checkpoint.read import Checkpoint, latest, open_checkpoint
from scalellm.checkpoint.write import clean_up, save

__all__ = ["Checkpoint", "clean_up", "latest", "open_checkpoint", "save"]
