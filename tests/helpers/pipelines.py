"""A tiny decoder trained whole, and the same one cut into a pipeline, for tests to compare."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from scalellm.batches import Batch
from scalellm.config import ModelConfig, TrainConfig
from scalellm.model import Decoder, RowLosses
from scalellm.model.attention import document_mask
from scalellm.strategies._part import Part
from scalellm.strategies._pipeline import Pipeline
from scalellm.strategies._pipeline_cut import cut, named_parameters, share_embedding, split_layers
from scalellm.strategies._pipeline_schedule import Action, stages_of, stages_per_rank
from scalellm.strategies._transforms import apply_transforms

SHAPE = {
    "num_layers": 5, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 61,
    "seq_len": 16,
}  # fmt: skip
LEARNING_RATE = 0.05
SCALE = 1 / 64


@dataclass
class Outcome:
    """Of each step: the loss sums of the micro-batches, their rows', and gradients by name."""

    losses: list[Tensor] = field(default_factory=list)
    row_losses: list[list[Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    evaluated: list[Tensor] = field(default_factory=list)
    orders: list[list[Action]] = field(default_factory=list)
    bubbles: list[float] = field(default_factory=list)


def decoder(config: ModelConfig) -> Decoder:
    torch.manual_seed(3)
    return Decoder(config).double()


def batches_of(step: int, config: ModelConfig, count: int, seq_len: int = 16) -> list[Batch]:
    """Two rows each, packed with documents in every second one; targets padded raggedly."""
    generator = torch.Generator().manual_seed(step)
    batches = []
    for index in range(count):
        rows = torch.randint(config.vocab_size or 0, (2, seq_len + 1), generator=generator)
        targets = rows[:, 1:].clone()
        targets[index % 2, seq_len - 1 - index :] = -100
        documents = torch.tensor([[0] * 5 + [1] * (seq_len - 5), [0] * seq_len])
        positions = torch.arange(seq_len) - 5 * documents
        packed = {"documents_BT": documents, "positions_BT": positions} if index % 2 else {}
        batches.append(Batch(rows[:, :-1], targets, row_losses=RowLosses(), **packed))
    return batches


def unseen(config: ModelConfig, seq_len: int) -> Batch:
    """Other rows, and another number of them."""
    tokens, targets = zip(
        *((b.tokens_BT, b.targets_BT) for b in batches_of(99, config, 2, seq_len)), strict=True
    )
    return Batch(torch.cat(tokens)[:3], torch.cat(targets)[:3])


def masked(batch: Batch) -> Batch:
    """The same, with the mask given that the documents make."""
    if batch.documents_BT is None:
        return batch
    return Batch(
        batch.tokens_BT,
        batch.targets_BT,
        batch.positions_BT,
        row_losses=batch.row_losses,
        mask_B1TS=document_mask(batch.documents_BT),
    )


def row_losses_of(batches: list[Batch]) -> list[Tensor]:
    filled = [batch.row_losses.losses_B for batch in batches if batch.row_losses]
    return [losses_B for losses_B in filled if losses_B is not None]


def trained_whole(
    shape: dict[str, Any], lengths: list[int], count: int, groups: int = 1
) -> Outcome:
    """Steps of plain gradient descent; `groups` is how many pipelines share a step's batches."""
    config = ModelConfig.model_validate({**SHAPE, **shape})
    model, outcome = decoder(config), Outcome()
    for step, seq_len in enumerate(lengths):
        batches = batches_of(step, config, count * groups, seq_len)
        losses = [forward(model, batch) for batch in batches]
        (SCALE * torch.stack(losses).sum()).backward()
        outcome.losses.append(torch.stack(losses).detach())
        outcome.row_losses.append(row_losses_of(batches))
        _descend(outcome, [(name, p, True) for name, p in model.named_parameters()])
        with torch.no_grad():
            outcome.evaluated.append(forward(model, unseen(config, seq_len)))
    return outcome


def forward(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(
        batch.tokens_BT,
        batch.targets_BT,
        positions_BT=batch.positions_BT,
        documents_BT=batch.documents_BT,
        row_losses=batch.row_losses,
    )
    return loss


def _descend(outcome: Outcome, parameters: list[tuple[str, nn.Parameter, bool]]) -> None:
    gradients = {}
    for name, parameter, counts in parameters:
        assert parameter.grad is not None, name
        gradient = parameter.grad
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
        if counts:
            gradients[name] = whole
        else:
            outcome.copies.append(whole)
        with torch.no_grad():
            parameter.sub_(gradient, alpha=LEARNING_RATE)
        parameter.grad = None
    outcome.gradients.append(gradients)


def _transform(part: Part, train: dict[str, Any]) -> None:
    original = nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self: original(self, backend="aot_eager"))
        apply_transforms(part.module, TrainConfig.model_validate(train))


def make_parts(
    config: ModelConfig, schedule: str, rank: int, ranks: int, per_rank: int, train: dict[str, Any]
) -> list[tuple[int, Part]]:
    num_stages = ranks * per_rank
    whole, layers = decoder(config), split_layers(config, num_stages)
    parts = []
    for stage in stages_of(schedule, rank, ranks, per_rank):
        last = stage == num_stages - 1
        part = cut(copy.deepcopy(whole), layers[stage], is_first=stage == 0, is_last=last)
        _transform(part, train)
        parts.append((stage, part))
    return parts


def trained_in_pipeline(
    schedule: str,
    shape: dict[str, Any],
    lengths: list[int],
    count: int,
    shards: int = 1,
    train: dict[str, Any] | None = None,
) -> Outcome:
    """One rank's part of `trained_whole`; with `shards` FSDP divides each stage among as many."""
    config = ModelConfig.model_validate({**SHAPE, **shape})
    ranks = torch.distributed.get_world_size() // shards
    mesh = init_device_mesh("cpu", (ranks, shards), mesh_dim_names=("pp", "fsdp"))
    rank, shard = mesh.get_local_rank("pp"), mesh.get_local_rank("fsdp")
    per_rank = stages_per_rank(schedule)
    numbered = make_parts(config, schedule, rank, ranks, per_rank, train or {})
    parts = [part for _, part in numbered]
    if shards > 1:
        for part in parts:
            for block in (*part.module.layers.children(), part):
                fully_shard(block, mesh=mesh["fsdp"])  # with the default, which must not matter
    else:
        share_embedding(parts)
    device = torch.device("cpu")
    pipeline = Pipeline(numbered, ranks * per_rank, mesh.get_group("pp"), device, schedule)
    outcome = Outcome()
    for step, seq_len in enumerate(lengths):
        batches = batches_of(step, config, count * shards, seq_len)[shard * count :][:count]
        # The same by documents and by masks.
        given = [masked(batch) if index == 1 else batch for index, batch in enumerate(batches)]
        outcome.losses.append(torch.stack(pipeline.run(given, SCALE * shards)))
        outcome.row_losses.append(row_losses_of(given))
        assert pipeline.time is not None
        outcome.orders.append([action for action, _ in pipeline.time.computations])
        outcome.bubbles.append(pipeline.time.bubble)
        pipeline.sync_tied()
        _descend(outcome, list(named_parameters(parts)))
        outcome.evaluated.append(pipeline.evaluate(unseen(config, seq_len)))
        kinds = {isinstance(p, DTensor) for part in parts for p in part.parameters()}
        assert kinds == {shards > 1}  # evaluation gives gathered parameters up
    pipeline.close()
    return outcome
