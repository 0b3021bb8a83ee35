"""What products keep, against what was seen at malloc."""

from __future__ import annotations

import pytest

from scalellm.config import parse_config
from scalellm.plan._packed import Packing
from scalellm.plan._record import record_events
from scalellm.plan.allocator import LIBRARY, MIB


@pytest.mark.parametrize(
    ("rows", "hidden", "mlp", "seen"),
    [
        (256, 448, 1216, [6.5, 4.64, 5.3, 11.24]),
        (512, 448, 1216, [6.5, 4.75, 5.4, 11.35]),
        (256, 1024, 2752, [6.5, 5.93, 8.46, 16.41]),
        (512, 1024, 2752, [6.5, 6.12, 8.65, 16.6]),
    ],
)
def test_what_a_process_keeps_is_what_was_seen(
    rows: int, hidden: int, mlp: int, seen: list[float]
) -> None:
    packing = Packing()
    widths = (hidden, hidden, hidden, mlp, mlp, hidden, 8192)
    taken = [packing.multiply(rows, hidden, width) / MIB for width in widths]
    assert [size for size in taken if size] == pytest.approx(seen, rel=0.02)
    assert packing.kept_bytes == pytest.approx(sum(seen) * MIB, rel=0.02)
    assert packing.multiply(rows, hidden, 8192) == 0


def test_it_is_in_the_events_of_a_cpu_and_in_no_trace() -> None:
    shape = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 512, "seq_len": 16}
    config = parse_config({"model": shape, "train": {"global_batch_size": 1}})
    traces = {}
    for device_type, buffers in (("cpu", 5), ("cuda", 0)):
        traces[device_type], events = record_events(config, 1, device_type)
        kept = [event.size_bytes for event in events if event.stream == LIBRARY]
        assert len(kept) == buffers
        assert all(size_bytes > 4 * MIB for size_bytes in kept)
    peaks = [max(sum(one.peak.values()) for one in trace.segments) for trace in traces.values()]
    assert max(peaks) < 4 * MIB
