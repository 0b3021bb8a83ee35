"""What a recorded trace says: operators, communication, device memory.

The trace is the Chrome JSON of torch's profiler, recorded with shapes. Its times are microseconds;
everything returned is in seconds and bytes. Only what begins inside a span named `STEP_SPAN`
counts, so an evaluation or a save between two steps does not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from scalellm.metrics._collectives import TRANSPORTS, communication, is_nccl_kernel
from scalellm.metrics._spans import Event, interval, length, starts_in

STEP_SPAN = "train step "
NUM_OPERATORS = 10
CUDA = 1  # torch's number of this kind of device, in events of memory
_HOST_WORK = ("cpu_op", "user_annotation")
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def summarize(trace: Mapping[str, Any], complete_steps: int | None = None) -> dict[str, Any]:
    """Returns what `profile/summary.json` holds, of the first `complete_steps` steps or of all.

    steps, step_s       recorded steps and their mean wall time
    operators           the ten costliest: `self_s` and `calls` are sums over the recorded steps,
                        `share` is of the self time of all operators; on a GPU self time is that of
                        the kernels an operator started
    communication       per step, see `_collectives.communication`
    """
    spans = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = sorted(
        interval(event)
        for event in spans
        if event.get("cat") == "user_annotation" and event["name"].startswith(STEP_SPAN)
    )[:complete_steps]
    inside = [event for event in spans if starts_in(steps, event["ts"])]
    world_size = trace.get("distributedInfo", {}).get("world_size", 1)
    return {
        "steps": len(steps),
        "step_s": length(steps) / len(steps) / 1e6,
        "operators": _operators(inside),
        "communication": communication(inside, len(steps), world_size),
    }


def memory_timeline(trace: Mapping[str, Any], device_type: int = CUDA) -> list[list[float]]:
    """Returns [ts in us, allocated bytes, reserved bytes] after each change, oldest first."""
    return sorted(
        [event["ts"], event["args"]["Total Allocated"], event["args"]["Total Reserved"]]
        for event in trace["traceEvents"]
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == device_type
    )


def _operators(events: list[Event]) -> list[dict[str, Any]]:
    """The costliest first: by the device's time if it worked at all, else by the host's."""
    host = [
        event
        for event in events
        if event.get("cat") in _HOST_WORK and not event["name"].startswith(TRANSPORTS)
    ]
    device = [
        event for event in events if event.get("cat") in _DEVICE_WORK and not is_nccl_kernel(event)
    ]
    found = _device_self_us(host, device) if device else _host_self_us(host)
    total_us = sum(self_us for self_us, _ in found.values()) or 1.0
    costliest = sorted(found.items(), key=lambda item: item[1], reverse=True)[:NUM_OPERATORS]
    return [
        {"name": name, "self_s": self_us / 1e6, "calls": calls, "share": self_us / total_us}
        for name, (self_us, calls) in costliest
    ]


def _host_self_us(host: list[Event]) -> dict[str, tuple[float, int]]:
    """Name -> time without that of the operators it called, and calls."""
    self_us: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    open_spans: list[tuple[Any, float, str]] = []  # (thread, end, name), the outermost first
    for event in sorted(host, key=lambda event: (event["tid"], event["ts"], -event["dur"])):
        start, end = interval(event)
        while open_spans and (open_spans[-1][0] != event["tid"] or open_spans[-1][1] <= start):
            open_spans.pop()
        if open_spans:
            _, outer_end, outer = open_spans[-1]
            self_us[outer] -= min(end, outer_end) - start
        self_us[event["name"]] += event["dur"]
        calls[event["name"]] += 1
        open_spans.append((event["tid"], end, event["name"]))
    # What is left of a step itself is Python, and waiting.
    return {name: (self_us[name], calls[name]) for name in calls if not name.startswith(STEP_SPAN)}


def _device_self_us(host: list[Event], device: list[Event]) -> dict[str, tuple[float, int]]:
    """Name -> time of the kernels it started, and calls; a kernel nobody owns stands for itself."""
    names = {event["args"].get("External id"): event["name"] for event in host}
    self_us: dict[str, float] = defaultdict(float)
    calls: dict[str, set[Any]] = defaultdict(set)
    for event in device:
        owner = event["args"].get("External id")
        name: str = names.get(owner) or event["name"]
        self_us[name] += event["dur"]
        calls[name].add(owner if owner in names else event["ts"])
    return {name: (self_us[name], len(calls[name])) for name in self_us}
