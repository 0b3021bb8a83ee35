"""Spans of a trace as intervals of microseconds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

Event = dict[str, Any]
Interval = tuple[float, float]


def interval(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Joins what overlaps; sorted."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def starts_in(intervals: list[Interval], ts: float) -> bool:
    """Whether `ts` lies in one of these sorted, disjoint intervals."""
    index = bisect_right(intervals, (ts, float("inf"))) - 1
    return index >= 0 and ts <= intervals[index][1]
