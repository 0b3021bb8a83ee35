"""Configuration: `schema` says what exists, `yaml_text` reads it, `explain` words the mistakes."""

from scalellm.config.presets import PRESETS
from scalellm.config.schema import (
    BatchPlan,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    MetricsConfig,
    ModelConfig,
    RunConfig,
    Section,
    StrategyConfig,
    TrainConfig,
    load_config,
    parse_config,
    setting,
)
from scalellm.config.yaml_text import read_yaml

__all__ = [
    "PRESETS",
    "BatchPlan",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "MetricsConfig",
    "ModelConfig",
    "RunConfig",
    "Section",
    "StrategyConfig",
    "TrainConfig",
    "load_config",
    "parse_config",
    "read_yaml",
    "setting",
]
