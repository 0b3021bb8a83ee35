"""What a micro-batch needs beside parameters, gradients and optimizer, asked of the decoder itself.

The decoder runs on fake tensors with a few blocks, of which the middle one is repeated as often as
the model has blocks (`dry_run.stretched`): exact for any option, and as fast for 100 as for 5.
"""

from __future__ import annotations

from collections import Counter

from scalellm.config import Config, ModelConfig, TrainConfig
from scalellm.plan._record import Passes, Trace, record_passes
from scalellm.plan._steps import FEW_LAYERS
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


# Of what blocks keep without checkpointing, what a compiled block does not: Inductor's partitioner
# computes again what is cheap where it is needed. Measured on a block of this decoder, torch 2.13:
# 0.24 in fp32, 0.34 in bf16.
_COMPILED_SPARES = 0.3


def spared_by_compiling(config: Config, micro_batch: int, device_type: str = "cuda") -> int:
    """Returns the bytes that the model keeps for the backward uncompiled, and compiled does not.

    Args:
        micro_batch: in samples.
    """
    if not config.train.compile:
        return 0
    blocks_bytes = _spared_in_blocks(config, micro_batch, device_type)
    return blocks_bytes + _spared_in_output(config, micro_batch)


def _spared_in_output(config: Config, micro_batch: int) -> int:
    """Compiled, the loss keeps the logits in half precision; eagerly, their softmax's fp32."""
    model = config.model
    if config.train.precision in ("fp64", "fp32") or model.loss_chunk_tokens:
        return 0
    return micro_batch * model.seq_len * (model.vocab_size or 0) * 2


def _spared_in_blocks(config: Config, micro_batch: int, device_type: str) -> int:
    """Checkpointing's policies keep the result of a block's last product, which no derivative
    needs; a compiled block sees that and does not.
    """
    mode, model = config.train.activation_checkpointing, config.model
    if mode == "full":
        return 0
    if mode == "none":
        few, more = (
            activations(
                _with_layers(model, n), config.train, micro_batch, model.seq_len, device_type
            )
            for n in (FEW_LAYERS, FEW_LAYERS + 1)
        )
        return int(_COMPILED_SPARES * model.num_layers * (more[0] - few[0]))
    num_products = 7 if model.mlp == "swiglu" else 6
    if mode == "alternate" and num_products % 2 == 0:
        return 0
    element_bytes = {"fp64": 8, "fp32": 4}.get(config.train.precision, 2)
    numbers = micro_batch * model.seq_len * model.hidden_size
    return model.num_layers * numbers * element_bytes


def _with_layers(model: ModelConfig, layers: int) -> ModelConfig:
    return model.model_copy(update={"num_layers": layers})
