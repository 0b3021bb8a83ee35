"""Configuration: `schema` says what exists, `yaml_text` reads it, `explain` words the mistakes."""

from scalellm.config.cluster import ClusterConfig, WorkerRange
from scalellm.config.data import ALONE, DataConfig
from scalellm.config.presets import PRESETS
from scalellm.config.profile import ProfileConfig
from scalellm.config.schema import (
    BatchPlan,
    CheckpointConfig,
    Config,
    EvalConfig,
    MetricsConfig,
    ModelConfig,
    RunConfig,
    StrategyConfig,
    TrainConfig,
    load_config,
    parse_config,
)
from scalellm.config.section import Section, setting
from scalellm.config.yaml_text import read_yaml

__all__ = [
    "ALONE",
    "PRESETS",
    "BatchPlan",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "MetricsConfig",
    "ModelConfig",
    "ProfileConfig",
    "RunConfig",
    "Section",
    "StrategyConfig",
    "TrainConfig",
    "WorkerRange",
    "load_config",
    "parse_config",
    "read_yaml",
    "setting",
]
