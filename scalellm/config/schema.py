"""The typed configuration of a run: YAML, then `key.sub=value` overrides, validated, then frozen.

Every field states its unit and meaning here and only here: the help text, the JSON schema and the
error messages are drawn from these classes. Options of a strategy live in the strategy's own file
(`strategies/<name>.py`), so `StrategyConfig` keeps them unread until that file validates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from scalellm.config.cluster import ClusterConfig
from scalellm.config.data import DataConfig
from scalellm.config.explain import explain
from scalellm.config.presets import PRESETS
from scalellm.config.profile import ProfileConfig
from scalellm.config.section import Section, setting
from scalellm.config.yaml_text import merge_overrides, read_yaml
from scalellm.errors import ConfigError, did_you_mean


class RunConfig(Section):
    dir: Path = setting(Path("runs/default"), "folder of this run: metrics, checkpoints, plots")
    seed: int = setting(0, "seed of initialisation, sample order and dropout", ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to train; auto prefers cuda")
    threads: int = setting(
        0, "CPU threads per rank; 0: cores / local ranks", unit="threads", ge=0, le=4096
    )
    bind_cores: bool = setting(False, "each rank on its own share of the host's cores (Linux)")


class ModelConfig(Section):
    """The decoder's shape. `preset` fills what is not given; see `presets.py`."""

    preset: str | None = setting(None, "named shape: " + ", ".join(PRESETS))
    num_layers: int = setting(2, "decoder blocks", unit="layers", ge=1, le=4096)
    hidden_size: int = setting(64, "width of the residual stream", unit="features", ge=1)
    num_heads: int = setting(4, "attention heads", unit="heads", ge=1)
    num_kv_heads: int | None = setting(
        None, "key/value heads; null: as many as num_heads (MHA), fewer: GQA", unit="heads", ge=1
    )
    head_dim: int | None = setting(None, "null: hidden_size / num_heads", unit="features", ge=2)
    intermediate_size: int | None = setting(
        None, "MLP width; null: 4 x hidden for gelu, 8/3 x hidden for swiglu", unit="features", ge=1
    )
    vocab_size: int | None = setting(None, "null: the dataset's", unit="tokens", ge=2, le=2**31 - 1)
    seq_len: int = setting(128, "context length of a sample", unit="tokens", ge=1, le=2**24)
    norm: Literal["rmsnorm", "layernorm"] = setting("rmsnorm", "normalisation")
    norm_position: Literal["pre", "post"] = setting("pre", "before or after each sub-layer")
    norm_eps: float = setting(1e-5, "added to the variance", gt=0)
    positions: Literal["rope", "learned", "sinusoidal"] = setting("rope", "position encoding")
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", gt=1)
    mlp: Literal["swiglu", "gelu"] = setting("swiglu", "feed-forward")
    bias: bool = setting(False, "biases in the linear layers and LayerNorm")
    tie_embeddings: bool = setting(True, "output projection shares the token embedding")
    dropout: float = setting(0.0, "probability, on embeddings and residuals", ge=0, lt=1)
    init_std: float = setting(0.02, "standard deviation of the initial weights", gt=0)
    attention: Literal["auto", "sdpa", "explicit"] = setting("auto", "attention kernel")
    loss_chunk_tokens: int = setting(
        0, "as many logits exist at a time, to save memory; 0: all", unit="tokens", ge=0, le=2**31
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset") is None:
            return given
        name = given["preset"]
        if not isinstance(name, str) or name not in PRESETS:
            near = did_you_mean(str(name), PRESETS)
            raise ValueError(f"{name!r} is no preset{near}; presets: {', '.join(PRESETS)}")
        return {**PRESETS[name], **given}

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            low = self.hidden_size // self.num_heads * self.num_heads
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; "
                f"try hidden_size={low or self.num_heads} or {low + self.num_heads}"
            )
        if self.num_heads % self.kv_heads:
            fits = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"num_kv_heads={self.kv_heads} does not divide num_heads={self.num_heads}; "
                f"try one of {', '.join(map(str, fits))}"
            )
        if self.positions == "rope" and self.head_size % 2:
            raise ValueError(f"rope needs an even head size, not {self.head_size} features")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the MLP in features; SwiGLU's 8/3 is rounded up to a multiple of 32."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        if self.mlp == "gelu":
            return 4 * self.hidden_size
        return -(-8 * self.hidden_size // 3 // 32) * 32


class StrategyConfig(BaseModel):
    """`name` is the file under `strategies/`; its own options stand beside it, checked there."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = setting("single", "how the ranks train together: a file name under strategies/")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TrainConfig(Section):
    steps: int = setting(500, "optimizer steps of the whole run", unit="steps", ge=1)
    global_batch_size: int = setting(
        32,
        "samples of seq_len tokens per optimizer step, over all ranks",
        unit="samples",
        ge=1,
        le=2**24,
    )
    micro_batch_size: int | None = setting(
        None, "samples per rank and forward; null: no accumulation", unit="samples", ge=1
    )
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = setting("fp32", "bf16, fp16: autocast")
    learning_rate: float = setting(3e-3, "peak of the schedule", unit="per step", gt=0)
    min_learning_rate: float = setting(0.0, "end of the schedule", unit="per step", ge=0)
    schedule: Literal["constant", "cosine", "linear", "wsd"] = setting(
        "cosine", "after the warm-up"
    )
    warmup_steps: int = setting(0, "linear warm-up; may be longer than the run", unit="steps", ge=0)
    decay_steps: int | None = setting(
        None, "length of wsd's final decay; null: a fifth of steps", unit="steps", ge=0
    )
    weight_decay: float = setting(0.1, "on matrices only, not on biases and norms", ge=0)
    beta1: float = setting(0.9, "AdamW's first moment", ge=0, lt=1)
    beta2: float = setting(0.95, "AdamW's second moment", ge=0, lt=1)
    eps: float = setting(1e-8, "AdamW's epsilon", gt=0)
    grad_clip: float = setting(1.0, "largest global gradient norm; 0: no clipping", ge=0)
    compile: bool = setting(False, "torch.compile each decoder block, and the loss")
    compile_scope: Literal["parts", "model"] = setting(
        "parts",
        "what `compile` makes one graph of: each part, or the whole model, which is faster by some "
        "percent and needs whole weights in every rank",
    )
    activation_checkpointing: Literal["none", "selective", "alternate", "full"] = setting(
        "none",
        "recompute in the backward: nothing, all but matrix products, every second product too, "
        "whole blocks",
    )
    max_nonfinite_steps: int = setting(
        10, "give up after so many skipped steps in a row", unit="steps", ge=1
    )
    log_every_steps: int = setting(1, "rows in metrics.jsonl", unit="steps", ge=1)

    @model_validator(mode="after")
    def _check_schedule(self) -> TrainConfig:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate:g} is above "
                f"learning_rate={self.learning_rate:g}; lower it"
            )
        return self

    @property
    def wsd_decay_steps(self) -> int:
        return self.steps // 5 if self.decay_steps is None else self.decay_steps


class EvalConfig(Section):
    every_steps: int = setting(0, "validation loss; 0: only at the end", unit="steps", ge=0)
    max_samples: int | None = setting(
        None, "of the validation split; null: all of it", unit="samples", ge=1
    )
    batch_size: int | None = setting(
        None, "samples per rank and forward; null: micro_batch_size", unit="samples", ge=1
    )
    early_stop_patience: int = setting(
        0, "stop after so many evaluations without improvement; 0: never", unit="evaluations", ge=0
    )
    early_stop_min_delta: float = setting(0.0, "smallest improvement", unit="nats per token", ge=0)
    sample_prompt: str | None = setting(None, "shown continued at the end of the run")
    sample_tokens: int = setting(200, "length of that sample", unit="tokens", ge=1)

    @model_validator(mode="after")
    def _check_patience(self) -> EvalConfig:
        if self.early_stop_patience and not self.every_steps:
            raise ValueError(
                f"early_stop_patience={self.early_stop_patience} evaluations needs every_steps "
                "above 0; try every_steps=100"
            )
        return self


class CheckpointConfig(Section):
    every_steps: int = setting(0, "0: only at the end", unit="steps", ge=0)
    keep: int = setting(2, "newest complete checkpoints kept", unit="checkpoints", ge=1)
    asynchronous: bool = setting(
        True,
        "write in the background from a copy in host memory, kept between saves; false: training "
        "waits, no copy",
    )


class WandbConfig(Section):
    project: str = setting("scalellm", "W&B project")
    entity: str | None = setting(None, "W&B team or user; null: your default")
    name: str | None = setting(None, "name of the run; null: the run folder's")
    mode: Literal["online", "offline"] = setting(
        "online", "offline: written to the run folder only"
    )


class MetricsConfig(Section):
    tensorboard: bool = setting(True, "event files under tensorboard/ in the run folder")
    wandb: WandbConfig | None = setting(None, "Weights & Biases; null: off")
    predict_memory: bool = setting(
        True, "predict the peak in a process beside the run, and say how far off it was"
    )


class Config(Section):
    """A whole run. Load it with `load_config`; it is frozen after validation."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    strategy: StrategyConfig = StrategyConfig()
    cluster: ClusterConfig = ClusterConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="after")
    def _check_profile(self) -> Config:
        if self.profile.enabled and self.train.steps < 2:
            raise ValueError(
                f"profile.enabled=true needs train.steps of 2 or more, not {self.train.steps}: "
                "the first step compiles and is left out"
            )
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Config:
        for stage in self.data.stages:
            if (stage.seq_len or 1) > self.model.seq_len:
                raise ValueError(
                    f"data.stages: seq_len={stage.seq_len} tokens from step {stage.from_step} is "
                    f"longer than model.seq_len={self.model.seq_len}; raise model.seq_len"
                )
        return self

    def batches(self, world_size: int, readers: str = "world_size") -> BatchPlan:
        """Splits the global batch over `world_size` readers; ConfigError if it does not divide.

        `readers` is what the error calls them, where they are not all ranks.
        """
        train = self.train
        return BatchPlan.of(train.global_batch_size, train.micro_batch_size, world_size, readers)


class BatchPlan(Section):
    """How one optimizer step's samples are split: global = micro x accumulation x world_size."""

    micro_batch_size: int
    grad_accumulation: int
    world_size: int

    @classmethod
    def of(
        cls,
        global_batch: int,
        micro_batch: int | None,
        world_size: int,
        readers: str = "world_size",
    ) -> BatchPlan:
        unit = world_size * (micro_batch or 1)
        if global_batch % unit:
            low = global_batch // unit * unit
            fits = " or ".join(str(size) for size in (low, low + unit) if size)
            terms = readers if micro_batch is None else f"micro_batch_size x {readers}"
            numbers = f"{unit}" if micro_batch is None else f"{micro_batch} x {world_size} = {unit}"
            raise ConfigError(
                f"train.global_batch_size={global_batch} samples is not a multiple of "
                f"{terms} = {numbers}; try {fits}"
            )
        micro = micro_batch or global_batch // world_size
        return cls(
            micro_batch_size=micro,
            grad_accumulation=global_batch // (micro * world_size),
            world_size=world_size,
        )


def parse_config(values: dict[str, Any], *, source: str = "config") -> Config:
    """Validates plain values. Raises ConfigError: one sentence, with the nearest right key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, Config, source)) from None


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `key.sub=value` overrides (values are YAML too).

    Raises:
        ConfigError: unreadable file, unknown key, wrong type or impossible value.
    """
    values = merge_overrides(read_yaml(Path(path)), overrides)
    return parse_config(values, source=str(path))
