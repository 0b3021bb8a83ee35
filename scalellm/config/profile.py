"""Which steps of a run are looked at closely: see `train/profiling.py`."""

from __future__ import annotations

from scalellm.config.section import Section, setting


class ProfileConfig(Section):
    enabled: bool = setting(
        False, "write profile/: a trace, the costliest operators, the communication; or --profile"
    )
    skip_steps: int = setting(
        3, "steps before the first recorded one; the first compiles", unit="steps", ge=1
    )
    steps: int = setting(5, "recorded steps", unit="steps", ge=1, le=100)
