"""What is measured, defined once, and where it is written."""

from scalellm.metrics.meters import (
    StepClock,
    peak_device_bytes,
    peak_rss_bytes,
    process_age_s,
    rss_bytes,
)
from scalellm.metrics.progress import Progress
from scalellm.metrics.writers import (
    JSONL_NAME,
    Row,
    Writer,
    check_writers,
    open_writers,
    read_rows,
)

__all__ = [
    "JSONL_NAME",
    "Progress",
    "Row",
    "StepClock",
    "Writer",
    "check_writers",
    "open_writers",
    "peak_device_bytes",
    "peak_rss_bytes",
    "process_age_s",
    "read_rows",
    "rss_bytes",
]
