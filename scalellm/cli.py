"""The `scalellm` command: arguments in, exit code out; the work is done elsewhere.

Exit codes: 0 done, 1 failure, 2 a mistake of the user's (one sentence on stderr), 3 stopped by a
signal after saving.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from scalellm import __version__
from scalellm.commands import COMMANDS as PLAIN_COMMANDS
from scalellm.data_command import data
from scalellm.errors import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_USER_ERROR,
    DivergedError,
    UserError,
    did_you_mean,
    is_out_of_memory,
)
from scalellm.plan_command import plan
from scalellm.prepare_command import prepare
from scalellm.process import begin_anew, leave, set_environment
from scalellm.train_command import train

COMMANDS = {
    "prepare": (prepare, "text in, a dataset of token shards out"),
    "train": (train, "train a decoder as a config says"),
    **PLAIN_COMMANDS,
    "data": (data, "inspect, verify, diff or convert datasets"),
    "plan": (plan, "what fits, how fast, before it is run"),
}


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and ends the process: what scripts call."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        begin_anew()
    leave(main(arguments))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; a user's mistake is one sentence on stderr."""
    set_environment()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the letters of a sample
    try:
        return _dispatch(arguments)
    except UserError as error:
        _complain(error)
        return EXIT_USER_ERROR
    except DivergedError as error:
        _complain(error)
        return EXIT_FAILURE
    except BrokenPipeError:
        # The reader of our output left; Python's own flush at exit would complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _complain(
            UserError(f"the disk is full writing {error.filename or 'a file'}: free space"),
            rank_only=True,
        )
        return EXIT_USER_ERROR
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _complain(UserError(_OUT_OF_MEMORY), rank_only=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("scalellm: interrupted", file=sys.stderr)
        return EXIT_FAILURE


_OUT_OF_MEMORY = (
    "out of memory; lower train.micro_batch_size (accumulation makes up for it), model.seq_len or "
    "the model's size, or set train.activation_checkpointing=full"
)


def _complain(error: Exception, *, rank_only: bool = False) -> None:
    """Says it once: all ranks meet the same mistake, rank 0 speaks for them.

    `rank_only`: what the others may not have met, as a full disk or memory.
    """
    rank_only = rank_only or getattr(error, "rank_only", False)
    if not rank_only and not _is_main_rank():
        if not _launcher().startswith("--nproc"):
            # Other launchers end all ranks as soon as one has left, rank 0 before it could speak.
            time.sleep(_MAIN_SPEAKS_WITHIN_S)
        return
    print(f"scalellm: {error}", file=sys.stderr, flush=True)


_MAIN_SPEAKS_WITHIN_S = 10.0


def _is_main_rank() -> bool:
    from scalellm.dist import detect

    try:
        return detect().is_main
    except UserError:
        return True


def _launcher() -> str:
    from scalellm.dist import detect

    return detect().launcher


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return EXIT_DONE
    if arguments[0] == "--version":
        print(f"scalellm {__version__}")
        return EXIT_DONE
    name, *rest = arguments
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS)
        raise UserError(f"unknown command {name!r}{near}; commands: {', '.join(COMMANDS)}")
    return COMMANDS[name][0](rest)


def _usage() -> str:
    lines = ["usage: scalellm COMMAND ...", "", (__doc__ or "").partition("\n")[0], ""]
    lines += [f"  {name:<10} {meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join([*lines, "", "`scalellm COMMAND --help` says more."])
