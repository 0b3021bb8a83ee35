"""What is measured, defined once, and where it is written."""

from scalellm.metrics.meters import peak_device_bytes, peak_rss_bytes
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
    "Writer",
    "check_writers",
    "open_writers",
    "peak_device_bytes",
    "peak_rss_bytes",
    "read_rows",
]
