"""What every strategy shares: lookup by word, transforms from outside, state, skipping."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from scalellm import strategies
from scalellm.batches import Batch
from scalellm.config import ModelConfig, StrategyConfig, TrainConfig
from scalellm.dist import World
from scalellm.errors import CheckpointError, ConfigError
from scalellm.model import Decoder, count_parameters
from scalellm.strategies import Options
from scalellm.strategies._loss_scale import GROWTH_INTERVAL_STEPS, INITIAL, LossScale
from scalellm.strategies._transforms import canonical_fqn
from scalellm.strategies.single import Single
from scalellm.train.optimizer import make_adamw

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, vocab_size=40, seq_len=16)
TOKENS = torch.arange(4 * 17).reshape(4, 17) * 7 % 40
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:])


def built(**train_values: Any) -> Single:
    train = TrainConfig.model_validate({"learning_rate": 1e-2, **train_values})
    strategy = Single(World(), train, Options())
    torch.manual_seed(0)
    strategy.setup(Decoder(MODEL), functools.partial(make_adamw, train=train))
    return strategy


def one_step(strategy: Single) -> tuple[float, dict[str, torch.Tensor]]:
    with strategy.micro_step(is_last=True):
        loss = strategy.forward(BATCH)
        strategy.backward(loss, 64)
    gradients = strategy.full_gradients()
    strategy.step(1e-2)
    return float(loss.detach()), gradients


def test_the_words_are_the_files() -> None:
    assert strategies.names() == ["accelerate", "ddp", "deepspeed", "fsdp", "parallel", "single"]
    assert strategies.resolve("ddp").__name__ == "DDP"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dpd", "did you mean 'ddp'; strategies|did you mean 'ddp'"),
        ("mypkg.mine", "there is no module 'mypkg'"),
        ("scalellm.errors", "defines 0 subclasses of Strategy"),
    ],
)
def test_a_wrong_word(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        strategies.resolve(name)


def test_options_are_checked_by_the_strategys_own_file() -> None:
    config = StrategyConfig.model_validate({"name": "ddp", "bucket_mb": 0})
    with pytest.raises(ConfigError, match=r"strategy\.bucket_mb=0 MiB is out of range"):
        strategies.parse_options(config, strategies.resolve("ddp"), World(), TrainConfig())


def test_a_strategy_without_options_says_so() -> None:
    config = StrategyConfig.model_validate({"name": "single", "shard_optimizer": True})
    with pytest.raises(
        ConfigError, match=r"unknown key strategy\.shard_optimizer; it takes no opt"
    ):
        strategies.parse_options(config, Single, World(), TrainConfig())


def test_single_refuses_company() -> None:
    with pytest.raises(ConfigError, match=r"use strategy\.name=ddp or start one process"):
        Single.check(Options(), World(world_size=2, launcher="torchrun"), TrainConfig())


@pytest.mark.parametrize("mode", ["selective", "alternate", "full"])
def test_activation_checkpointing_changes_no_bit(mode: str) -> None:
    plain, checkpointed = (
        built(precision="fp64"),
        built(precision="fp64", activation_checkpointing=mode),
    )
    loss, gradients = one_step(plain)
    found_loss, found = one_step(checkpointed)
    assert found_loss == loss
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)
    names = [piece.name for piece in checkpointed.state()]
    assert names == [piece.name for piece in plain.state()]  # wrappers leave no trace in names


def test_activation_checkpointing_keeps_fewer_activations() -> None:
    def saved_bytes(mode: str) -> int:
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        strategy = built(activation_checkpointing=mode)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            strategy.forward(BATCH)
        return sum(saved.values())

    assert saved_bytes("full") < saved_bytes("none") / 2


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["parts", "model"])
def test_compile_gives_the_same_loss_and_gradients(scope: str) -> None:
    loss, gradients = one_step(built())
    found_loss, found = one_step(built(compile=True, compile_scope=scope))
    assert found_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_bf16_autocast_keeps_fp32_weights_and_learns() -> None:
    strategy = built(precision="bf16")
    losses = [one_step(strategy)[0] for _ in range(5)]
    assert losses[-1] < losses[0]
    assert {p.dtype for _, p in strategy.named_parameters()} == {torch.float32}


def test_clipping_scales_to_the_limit() -> None:
    strategy = built(grad_clip=0.1, precision="fp64")
    strategy.backward(strategy.forward(BATCH), 64)
    seen = []
    strategy.optimizer.register_step_pre_hook(lambda *_: seen.append(strategy.grad_norm()))
    assert strategy.step(1e-2).grad_norm > 0.1
    assert seen == [pytest.approx(0.1)]


def test_a_non_finite_gradient_changes_nothing() -> None:
    strategy = built()
    one_step(strategy)
    before = {piece.name: piece.tensor.clone() for piece in strategy.state()}
    strategy.backward(strategy.forward(BATCH) * float("inf"), 64)
    assert strategy.step(1e-2).skipped
    assert all(torch.equal(piece.tensor, before[piece.name]) for piece in strategy.state())
    assert not any(gradient.any() for gradient in strategy.full_gradients().values())


def test_weight_decay_is_for_matrices_only() -> None:
    groups = built(weight_decay=0.3).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(p.dim() == 2 for p in groups[0]["params"])
    assert all(p.dim() == 1 for p in groups[1]["params"])


def test_memory_counts_what_adamw_holds() -> None:
    strategy = built()
    one_step(strategy)
    held = strategy.memory()
    assert held["parameters_bytes"] == 4 * count_parameters(MODEL)
    assert held["gradients_bytes"] == held["parameters_bytes"]
    assert held["optimizer_bytes"] == pytest.approx(2 * held["parameters_bytes"], rel=0.01)


def test_a_frozen_parameter_is_left_alone() -> None:
    train = TrainConfig(learning_rate=1e-2)
    strategy = Single(World(), train, Options())
    model = Decoder(MODEL)
    model.embed_tokens.weight.requires_grad_(False)
    before = model.embed_tokens.weight.clone()
    strategy.setup(model, functools.partial(make_adamw, train=train))
    one_step(strategy)
    assert torch.equal(model.embed_tokens.weight, before)
    other = built()
    other.load_state(Stored(strategy))
    assert torch.equal(other.model.get_parameter("embed_tokens.weight"), before)


class Stored:
    """A `StateSource` in memory: what a strategy's `state` yields."""

    def __init__(self, strategy: Single) -> None:
        self.tensors = {piece.name: piece.tensor.clone() for piece in strategy.state()}

    def names(self) -> set[str]:
        return set(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        del offsets, shape
        return self.tensors[name].clone()


def test_loaded_state_goes_on_bit_for_bit() -> None:
    first = built()
    for _ in range(3):
        one_step(first)
    second = built()
    second.load_state(Stored(first))
    assert one_step(second)[0] == one_step(first)[0]
    for ours, theirs in zip(first.state(), second.state(), strict=True):
        assert ours.name == theirs.name and torch.equal(ours.tensor, theirs.tensor)


def _broken(stored: Stored) -> Iterator[tuple[str, str]]:
    del stored.tensors["model.norm.weight"]
    yield "lacks norm.weight", "model.norm.weight"
    stored.tensors["model.norm.weight"] = torch.zeros(31)
    yield r"has \(31,\) for model.norm.weight, this model wants \(32,\)", ""
    stored.tensors["model.norm.weight"] = torch.zeros(32)
    stored.tensors["model.other"] = torch.zeros(1)
    yield "has, but this model lacks, other", ""
    del stored.tensors["model.other"]
    stored.tensors["optim.norm.weight.momentum"] = torch.zeros(1)
    yield "this optimizer lacks", ""


def test_state_of_another_model_is_refused_before_anything_changes() -> None:
    first, second = built(), built()
    one_step(first)
    stored = Stored(first)
    before = {piece.name: piece.tensor.clone() for piece in second.state()}
    for words, _ in _broken(stored):
        with pytest.raises(CheckpointError, match=words):
            second.load_state(stored)
    assert all(torch.equal(piece.tensor, before[piece.name]) for piece in second.state())


def test_names_lose_the_wrappers_segments() -> None:
    name = "module.layers.0._checkpoint_wrapped_module._orig_mod.mlp.up_proj.weight"
    assert canonical_fqn(name) == "layers.0.mlp.up_proj.weight"


def test_loss_scale_halves_on_overflow_and_doubles_after_good_steps() -> None:
    scale = LossScale(enabled=True)
    scale.update(overflowed=True)
    assert scale.value == INITIAL / 2
    for _ in range(GROWTH_INTERVAL_STEPS - 1):
        scale.update(overflowed=False)
    other = LossScale(enabled=True)
    other.load(scale.state())
    other.update(overflowed=False)
    assert other.value == INITIAL
    disabled = LossScale(enabled=False)
    disabled.update(overflowed=True)
    assert disabled.value == 1.0


def test_a_scaled_loss_gives_the_same_update() -> None:
    """fp16's loss scale, tried in fp32: powers of two change no bit."""
    plain, scaled = built(), built()
    scaled.loss_scale = LossScale(enabled=True)
    _, wanted = one_step(plain)
    _, found = one_step(scaled)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for ours, theirs in zip(plain.state(), scaled.state(), strict=True):
        assert torch.equal(ours.tensor, theirs.tensor)
