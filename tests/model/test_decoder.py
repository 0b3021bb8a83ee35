"""The laws a decoder obeys, whatever wraps it. Its numbers: see test_numpy_parity.py."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers.tiny_decoders import GPT2, LLAMA, SHAPES, VASWANI, VOCAB, build, draw_tokens
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from scalellm.config import PRESETS, ModelConfig
from scalellm.errors import ConfigError, UserError
from scalellm.model import Decoder, KVCache


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SHAPES[request.param]


def loss_and_gradients(model: Decoder, *args: Tensor, **kwargs: Any) -> list[Tensor]:
    loss = model(*args, **kwargs)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def assert_equal_to(results: list[Tensor], expected: list[Tensor], atol: float = 1e-10) -> None:
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# --- laws ----------------------------------------------------------------------------------------


def test_future_tokens_do_not_change_the_past(shape: dict[str, Any]) -> None:
    model, tokens_BT = build(shape), draw_tokens(2, 12)
    changed_BT = tokens_BT.clone()
    changed_BT[:, 7:] = (changed_BT[:, 7:] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(tokens_BT), model(changed_BT)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-13)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(2).min() > 1e-3


def test_gradients_match_finite_differences(shape: dict[str, Any]) -> None:
    model, tokens_BT = build(shape, num_layers=1), draw_tokens(1, 4)
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(*parameters: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, parameters, strict=True)), (tokens_BT,) * 2)

    assert torch.autograd.gradcheck(loss, values, fast_mode=True, atol=1e-6)


def test_tied_weights_collect_both_gradients() -> None:
    tied = build(LLAMA, tie_embeddings=True)
    untied = Decoder(ModelConfig(**LLAMA)).double()
    state = tied.state_dict()
    assert "lm_head.weight" not in state
    untied.load_state_dict({**state, "lm_head.weight": state["embed_tokens.weight"]})
    tokens_BT = draw_tokens(2, 9)
    tied(tokens_BT, tokens_BT).backward()
    untied(tokens_BT, tokens_BT).backward()
    both = untied.embed_tokens.weight.grad + untied.lm_head.weight.grad
    torch.testing.assert_close(tied.embed_tokens.weight.grad, both, rtol=0, atol=1e-11)


def test_packed_documents_equal_documents_apart(shape: dict[str, Any]) -> None:
    model = build(shape)
    rows = [(5, 4, 3), (12,), (1, 11)]
    tokens_BT, targets_BT = draw_tokens(3, 12), draw_tokens(3, 12, seed=1)
    positions_BT = torch.tensor([[p for n in row for p in range(n)] for row in rows])
    documents_BT = torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in rows])
    packed = loss_and_gradients(
        model, tokens_BT, targets_BT, positions_BT=positions_BT, documents_BT=documents_BT
    )
    pieces = [
        [x.unsqueeze(0) for x in pair]
        for b, row in enumerate(rows)
        for pair in zip(tokens_BT[b].split(row), targets_BT[b].split(row), strict=True)
    ]
    apart = zip(*(loss_and_gradients(model, *piece) for piece in pieces), strict=True)
    assert_equal_to(packed, [sum(parts) for parts in apart])


@pytest.mark.parametrize("chunks", [(1,) * 12, (7, 1, 1, 3), (12,)])
def test_cache_equals_full_forward(shape: dict[str, Any], chunks: tuple[int, ...]) -> None:
    model, tokens_BT = build(shape), draw_tokens(2, 12)
    cache = KVCache(model.config, batch=2, max_tokens=12, dtype=torch.float64)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens_BT.split(chunks, dim=1)]
        expected = model(tokens_BT)
        torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-10)
        last = model(tokens_BT, last_only=True)
    torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=1e-10)


def test_kernels_give_the_same_model(shape: dict[str, Any]) -> None:
    tokens_BT = draw_tokens(2, 12)
    results = [
        loss_and_gradients(build(shape, attention=kernel), tokens_BT, tokens_BT)
        for kernel in ("sdpa", "explicit", "auto")
    ]
    assert_equal_to(results[0], results[1], atol=1e-11)
    assert_equal_to(results[0], results[2], atol=0)


def test_loss_is_a_sum_without_ignored_targets(shape: dict[str, Any]) -> None:
    model, tokens_BT, targets_BT = build(shape), draw_tokens(2, 6), draw_tokens(2, 6, seed=1)
    with torch.no_grad():
        whole = model(tokens_BT, targets_BT)
        rows = sum(model(tokens_BT[b : b + 1], targets_BT[b : b + 1]) for b in range(2))
        torch.testing.assert_close(whole, rows, rtol=1e-13, atol=0)
        ignored_BT = targets_BT.clone()
        ignored_BT[1, 2:] = -100
        kept = model(tokens_BT[:1], targets_BT[:1]) + model(tokens_BT[1:, :2], targets_BT[1:, :2])
        torch.testing.assert_close(model(tokens_BT, ignored_BT), kept, rtol=1e-13, atol=0)
        assert model(tokens_BT, torch.full_like(targets_BT, -100)).item() == 0.0


# --- from outside: compile, checkpointing, autocast, types ---------------------------------------


def test_compiled_and_checkpointed_blocks_agree(shape: dict[str, Any]) -> None:
    model, tokens_BT = build(shape), draw_tokens(2, 12)
    documents_BT = torch.tensor([[0] * 5 + [1] * 7] * 2)
    kwargs = {"documents_BT": documents_BT}
    expected = loss_and_gradients(model, tokens_BT, tokens_BT, **kwargs)
    compiled = copy.deepcopy(model)
    for block in compiled.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    assert_equal_to(loss_and_gradients(compiled, tokens_BT, tokens_BT, **kwargs), expected)
    for block in model.layers:
        forward = block.forward
        block.forward = lambda *args, inner=forward: checkpoint(inner, *args, use_reentrant=False)
    assert_equal_to(loss_and_gradients(model, tokens_BT, tokens_BT, **kwargs), expected)


def test_autocast_loss_is_fp32_and_near(shape: dict[str, Any]) -> None:
    model, tokens_BT = Decoder(ModelConfig(**shape)), draw_tokens(4, 12)
    exact = model(tokens_BT, tokens_BT)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens_BT).dtype == torch.bfloat16
        rounded = model(tokens_BT, tokens_BT)
    assert exact.dtype == rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=5e-3, atol=0)
    rounded.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    half = model.bfloat16()(tokens_BT, tokens_BT)  # without autocast, the sum is still wide
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=2e-2, atol=0)


def test_dropout_only_in_training(shape: dict[str, Any]) -> None:
    model, tokens_BT, dropped = build(shape, dropout=0.5), draw_tokens(2, 12), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda m, x, y: dropped.append((y == 0).double().mean()))
    with torch.no_grad():
        assert not torch.equal(model(tokens_BT), model(tokens_BT))
        assert len(dropped) == 2 * (1 + 2 * 2)  # the embedding's and two a block, twice
        assert all(0.3 < share < 0.7 for share in dropped)
        plain = build(shape)
        torch.testing.assert_close(model.eval()(tokens_BT), plain(tokens_BT), rtol=0, atol=1e-12)


def test_it_learns_a_row_by_heart(shape: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, tokens_BT = Decoder(ModelConfig(**{**shape, "hidden_size": 32})), draw_tokens(2, 13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    for _ in range(60):
        loss = model(inputs_BT, targets_BT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() / targets_BT.numel() < 0.1 * math.log(VOCAB)


# --- construction --------------------------------------------------------------------------------


def test_names_are_those_of_hugging_face_llama() -> None:
    model = build(LLAMA, num_layers=1)
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    parts += ["input_layernorm", "post_attention_layernorm"]
    names = {f"layers.0.{part}.weight" for part in parts}
    names |= {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
    assert set(model.state_dict()) == names
    assert set(build(GPT2).state_dict()) >= {"embed_positions.weight", "layers.1.mlp.up_proj.bias"}


def test_initial_weights_have_their_spread() -> None:
    config = ModelConfig(num_layers=8, hidden_size=128, vocab_size=512, norm="layernorm", bias=True)
    torch.manual_seed(0)
    for name, parameter in Decoder(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / 4 if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(parameter.mean().item()) < expected / 20, name


@pytest.mark.parametrize("preset", ["char-tiny", "stdlib-small", "transformer-base"])
def test_untrained_loss_is_that_of_guessing(preset: str) -> None:
    # Thousands of tokens: Vaswani's scaled, tied embeddings favour the input token itself at first,
    # which a small vocabulary would feel.
    torch.manual_seed(0)
    model = Decoder(ModelConfig(preset=preset, vocab_size=8192)).eval()
    tokens_BT = torch.randint(8192, (2, 65))
    with torch.no_grad():
        loss = model(tokens_BT[:, :-1], tokens_BT[:, 1:]).item() / 128
    assert loss == pytest.approx(math.log(8192), abs=0.15)


def test_one_seed_gives_one_model_however_built(shape: dict[str, Any]) -> None:
    config = ModelConfig(**shape)
    torch.manual_seed(7)
    first = Decoder(config).state_dict()
    with torch.device("meta"):
        late = Decoder(config)
    assert all(p.is_meta for p in late.parameters()) and not list(late.buffers())
    late.double().to_empty(device="cpu").init_weights(torch.Generator().manual_seed(7))
    drawn = dict(late.initial_weights(torch.Generator().manual_seed(7)))
    other = Decoder(config).state_dict()
    for name, value in late.state_dict().items():
        assert torch.equal(value.float(), first[name]) and torch.equal(drawn[name], first[name])
    assert not torch.equal(other["embed_tokens.weight"], first["embed_tokens.weight"])
    assert late(draw_tokens(1, 4)).isfinite().all()


def test_default_dtype_is_respected() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = Decoder(ModelConfig(**LLAMA))
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_it_can_be_simulated_without_memory() -> None:
    with FakeTensorMode():
        model, tokens_BT = Decoder(ModelConfig(**GPT2)), torch.zeros(2, 8, dtype=torch.long)
        model(tokens_BT, tokens_BT).backward()
    assert all(isinstance(p.grad, FakeTensor) for p in model.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_on_meta(preset: str) -> None:
    config = ModelConfig(preset=preset)
    with torch.device("meta"):
        model = Decoder(config.model_copy(update={"vocab_size": config.vocab_size or 97}))
        logits_BTV = model(torch.zeros(2, 8, dtype=torch.long))
    assert logits_BTV.shape == (2, 8, model.config.vocab_size)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size is null"):
        Decoder(ModelConfig())
    too_long_BT = draw_tokens(1, 13)
    for shape in (GPT2, VASWANI):
        with pytest.raises(UserError, match="13 tokens are more than the 12 positions"):
            build(shape)(too_long_BT)
    model = build(LLAMA)
    assert model(too_long_BT).shape == (1, 13, VOCAB)  # rotary positions have no table to leave
    cache = KVCache(model.config, batch=1, max_tokens=13, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot be combined"):
        model(too_long_BT, documents_BT=too_long_BT, cache=cache)
