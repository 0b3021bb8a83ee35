"""The one script that every launcher starts.

python launch/train.py --config configs/char-tiny.yaml train.steps=100
torchrun --nproc-per-node 2 launch/train.py --config configs/char-tiny.yaml
"""

import sys

from scalellm.cli import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
