"""The parity task with what `train` does to the blocks: checkpointing, compiling."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from scalellm.config import ModelConfig, TrainConfig
from scalellm.dist import detect
from scalellm.parity import Curve, Task, run_curve


def transformed_curve(
    model: ModelConfig, name: str, options: dict[str, Any], train: dict[str, Any]
) -> Curve:
    """Three steps in fp64, two rows a micro-batch; run it in ranks."""
    original = nn.Module.compile

    class Transformed(Task):
        def train_config(self) -> TrainConfig:
            return super().train_config().model_copy(update=train)

    with pytest.MonkeyPatch.context() as patch:
        # Inductor takes a minute to warm up; what is tested is the order of the wrappers.
        patch.setattr(nn.Module, "compile", lambda self: original(self, backend="aot_eager"))
        return run_curve(Transformed(model, 3, "fp64", micro_batch=2), name, options, detect())
