"""Collectives in a trace: how much they moved and how long they took.

The dispatcher notes what was asked for (`c10d::allreduce_`, with shapes); gloo's own threads, or
NCCL's kernels, carry it out later. Gloo knows no reduce-scatter and notes an all-reduce instead, so
names and sizes are taken from the request and times from its execution.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from scalellm.metrics._spans import Event, Interval, interval, length, merged

TRANSPORTS = ("gloo:", "nccl:")
_REQUEST = "c10d::"
_TENSOR_LIST = "TensorList"
_ITEM_BYTES = {
    **dict.fromkeys(("double", "long", "long int"), 8),
    **dict.fromkeys(("float", "int"), 4),
    **dict.fromkeys(("c10::half", "half", "c10::bfloat16", "bfloat16", "short"), 2),
    **dict.fromkeys(("unsigned char", "signed char", "char", "byte", "bool"), 1),
}
# The dispatcher's name without its last underscore -> what people call it, if that differs.
_NAMES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
}


def communication(events: list[Event], steps: int, world_size: int) -> dict[str, Any]:
    """Returns what the collectives that began in these `steps` steps cost, per step and by kind.

    Bytes are the payload: the whole tensor that is reduced, gathered or scattered, whatever the
    algorithm makes of it on the wire. Time is how long at least one was under way on this rank,
    waiting for other ranks included, and whatever was computed meanwhile.
    """
    asked = sorted(filter(_is_request, events), key=lambda event: event["ts"])
    carried = sorted(filter(_is_transfer, events), key=lambda event: event["ts"])
    notes = [event for event in events if event["name"] == "record_param_comms"]
    calls: dict[str, int] = defaultdict(int)
    payload_bytes: dict[str, int] = defaultdict(int)
    intervals: dict[str, list[Interval]] = defaultdict(list)
    for event in asked:
        name = _name(event)
        transfer = _take_transfer(event, carried)
        calls[name] += 1
        payload_bytes[name] += _payload_bytes(event, transfer or _note_of(event, notes), world_size)
        intervals[name] += [interval(transfer)] if transfer else []
    for event in carried:  # asked for in a thread that is not recorded
        intervals[_name(event)].append(interval(event))
    times_us = {name: length(merged(spans)) for name, spans in intervals.items()}
    everything = merged(span for spans in intervals.values() for span in spans)
    return {
        "bytes_per_step": sum(payload_bytes.values()) / steps,
        "time_s_per_step": length(everything) / steps / 1e6,
        "by_operation": [
            {
                "name": name,
                "calls_per_step": calls[name] / steps,
                "bytes_per_step": payload_bytes[name] / steps,
                "time_s_per_step": time_us / steps / 1e6,
            }
            for name, time_us in sorted(times_us.items(), key=lambda item: (-item[1], item[0]))
        ],
    }


def is_nccl_kernel(event: Event) -> bool:
    return event.get("cat") == "kernel" and event["name"].lower().startswith("nccl")


def _is_request(event: Event) -> bool:
    return bool(event["name"].startswith(_REQUEST))


def _is_transfer(event: Event) -> bool:
    return event["name"].startswith("gloo:") or is_nccl_kernel(event)


def _name(event: Event) -> str:
    if _is_request(event):
        name = event["name"].removeprefix(_REQUEST).removesuffix("_")
        return _NAMES.get(name, name)
    name = event["args"].get("Collective name") or event["name"].removeprefix("gloo:")
    return _NAMES.get(name, name)


def _take_transfer(request: Event, carried: list[Event]) -> Event | None:
    """Removes and returns the first transfer after the request that has as many elements.

    They are started in the order asked for; nothing else ties the two together.
    """
    sizes = {sum(map(math.prod, shapes)) for shapes, _ in _tensors(request)}
    for index, event in enumerate(carried):
        size = _num_elements(event)
        if event["ts"] >= request["ts"] and (size is None or not sizes or size in sizes):
            return carried.pop(index)
    return None


def _note_of(request: Event, notes: list[Event]) -> Event | None:
    start, end = interval(request)
    inside = (note for note in notes if note["tid"] == request["tid"])
    return next((note for note in inside if start <= note["ts"] <= end), None)


def _tensors(event: Event) -> Iterator[tuple[list[list[int]], str]]:
    """Yields (shapes, type) of each argument that is a tensor or a list of tensors."""
    arguments = event["args"]
    shapes = arguments.get("Input Dims", [])
    for shape, kind in zip(shapes, arguments.get("Input type", []), strict=False):
        if kind == _TENSOR_LIST:
            yield shape, kind
        elif kind.lower() in _ITEM_BYTES:
            yield [shape], kind


def _num_elements(transfer: Event) -> int | None:
    """What goes into a transfer; None if it is not noted."""
    if "In msg nelems" in transfer["args"]:
        return int(transfer["args"]["In msg nelems"])
    sizes = [sum(map(math.prod, shapes)) for shapes, _ in _tensors(transfer)]
    return sum(sizes) if sizes else None


def _payload_bytes(request: Event, executed: Event | None, world_size: int) -> int:
    sizes = [0]
    for shapes, kind in _tensors(request):
        item_bytes = _ITEM_BYTES.get(kind.lower()) or _item_bytes(executed)
        sizes.append(sum(map(math.prod, shapes)) * item_bytes)
    # A list of lists of outputs has no shapes here: as many as ranks, as large as the input.
    factor = world_size if request["name"] == "c10d::allgather_" else 1
    return max(sizes) * factor


def _item_bytes(executed: Event | None) -> int:
    """Of a list of tensors the request does not say the type, but what carries it out does."""
    if executed is None:
        return 0
    kinds = [executed["args"].get("dtype", ""), *executed["args"].get("Input type", [])]
    return next((_ITEM_BYTES[kind.lower()] for kind in kinds if kind.lower() in _ITEM_BYTES), 0)
