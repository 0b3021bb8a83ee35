"""`python -m scalellm`: the same as the `scalellm` command."""

import sys

from scalellm.cli import main

sys.exit(main())
