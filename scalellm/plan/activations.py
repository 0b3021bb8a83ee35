"""What a micro-batch needs beside parameters, gradients and optimizer, asked of the decoder itself.

The decoder runs on fake tensors with a few blocks, of which the middle one is repeated as often as
the model has blocks (`dry_run.stretched`): exact for any option, and as fast for 100 as for 5.
"""

from __future__ import annotations

from collections import Counter

from scalellm.config import Config, ModelConfig, TrainConfig
from scalellm.plan._record import FEW_LAYERS, Passes, Trace, record_passes
from scalellm.plan.dry_run import remembered, stretched
from scalellm.plan.live import Kind


def activations(
    model: ModelConfig,
    train: TrainConfig,
    micro_batch: int,
    seq_len: int,
    device_type: str = "cuda",
) -> tuple[int, int]:
    """Returns (bytes kept for the backward when the loss is there, bytes the peak has beyond).

    Args:
        micro_batch: in samples.
        seq_len: in tokens.
        device_type: see `dry_run`.
    """
    config = Config(model=model.model_copy(update={"seq_len": seq_len}), train=train)
    return kept_and_beyond(trace_of(config, Passes(micro_batch), device_type))


def trace_of(config: Config, passes: Passes, device_type: str) -> Trace:
    """Returns the trace of `passes` through the whole model; see `record_passes`."""
    layers = config.model.num_layers
    few = config.model.model_copy(update={"num_layers": min(layers, FEW_LAYERS)})
    # Only what the passes depend on, so that plans which differ in something else share a trace.
    train = TrainConfig(
        precision=config.train.precision,
        activation_checkpointing=config.train.activation_checkpointing,
    )
    small = Config(model=few, train=train, data=config.data)
    key = f"{few!r} {train!r} {config.data.document_mask} {passes!r} {device_type}"
    trace = remembered(key, lambda: record_passes(small, passes, device_type))
    return stretched(trace, layers) if layers > FEW_LAYERS else trace


def kept_and_beyond(trace: Trace) -> tuple[int, int]:
    """Splits passes without gradients into what is kept at the loss and what the peak has beyond.

    Both in bytes.
    """
    level: Counter[Kind] = Counter()
    kept_bytes = most_bytes = 0
    for segment in trace.segments:
        if segment.label.endswith(" loss"):
            kept_bytes = sum(level.values())
        most_bytes = max(most_bytes, sum(level.values()) + sum(segment.peak.values()))
        level.update(segment.change)
    return kept_bytes, most_bytes - kept_bytes
