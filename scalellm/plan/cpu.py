"""What the resident set of a rank on a CPU has beside its tensors, measured, with the reasons.

Figures of torch 2.13 on Linux with glibc, above the size a process has before its model is built.
"""

from __future__ import annotations

from scalellm import strategies
from scalellm.config import Config
from scalellm.dist import World
from scalellm.model import count_parameters
from scalellm.plan.types import Memory

# Modules and kernels that are loaded with the first model and the first step: a model of two
# blocks of 64 features, whose own tensors take 3 MiB, grew by 98 MiB.
PROCESS_BYTES = 95 << 20


def beside_tensors(config: Config, world_size: int, memory: Memory) -> int:
    """Returns the bytes to add to a prediction made for a CPU."""
    return PROCESS_BYTES + _heap_bytes(config, world_size, memory)


def _heap_bytes(config: Config, world_size: int, memory: Memory) -> int:
    """What the heap keeps of gradients that are not alive at the tensors' peak.

    glibc returns blocks of 32 MiB and more at once, smaller ones only from the heap's end, and
    gradients do not fit into the gaps that activations of other sizes leave: the resident set
    grows as if both had been there together. In a step of 59M parameters it was 880 MiB after the
    backward, where tensors took 650 at their peak and gradients 226.
    """
    strategy_class = strategies.resolve(config.strategy.name)
    world = World(world_size=world_size, launcher="the planner")
    options = strategies.parse_options(config.strategy, strategy_class, world, config.train)
    sharding = strategy_class.sharding(options, world, config.train)
    element_bytes = sharding.working_bytes or (8 if config.train.precision == "fp64" else 4)
    all_bytes = count_parameters(config.model) * element_bytes // sharding.gradients
    return max(0, all_bytes - memory.gradients_bytes)
