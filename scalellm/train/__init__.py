"""The training loop and what it needs: schedule, optimizer, guards, the run's folder."""

from scalellm.train.build import Outcome, check_config, run_training
from scalellm.train.folder import (
    RunFolder,
    check_own_tokenizer,
    dump_config,
    load_run_config,
    tokenizer_sha256,
)

__all__ = [
    "Outcome",
    "RunFolder",
    "check_config",
    "check_own_tokenizer",
    "dump_config",
    "load_run_config",
    "run_training",
    "tokenizer_sha256",
]
