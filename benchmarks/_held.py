"""What theory says that a rank holds of a model."""

from __future__ import annotations

from scalellm.config import ModelConfig
from scalellm.model import count_parameters
from scalellm.parity import Variant
from scalellm.strategies._pipeline_cut import split_layers
from scalellm.strategies._pipeline_schedule import owner_of, stages_per_rank


def parameters_of_fullest(variant: Variant, model: ModelConfig) -> int:
    """All of them; of a pipeline as many as would be if all stages were like the fullest one."""
    parameters = count_parameters(model)
    ranks = variant.options.get("mesh", {}).get("pp", 1)
    if ranks == 1:
        return parameters
    embedding = (model.vocab_size or 0) * model.hidden_size
    layer = (parameters - embedding - model.hidden_size) // model.num_layers
    schedule = variant.options["schedule"]
    stages = split_layers(model, ranks * stages_per_rank(schedule))
    held = [0] * ranks
    for stage, layers in enumerate(stages):
        ends = (stage == 0) + (stage == len(stages) - 1)  # tied: one copy at either end
        if schedule == "zero_bubble" and stage == len(stages) - 1:
            ends = 0  # the rank of the first stage has it
        held[owner_of(schedule, stage, ranks)] += len(layers) * layer + ends * embedding
    return max(held) * ranks
