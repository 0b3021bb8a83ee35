"""`python -m scalellm`: the same as the `scalellm` command."""

from scalellm.cli import run

run()
