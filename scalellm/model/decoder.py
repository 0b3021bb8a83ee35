"""The decoder: one causal language model in every shape `ModelConfig` can say.

It knows nothing of ranks, files or training: strategies wrap, shard, compile and checkpoint
`Decoder.layers` from outside. Submodules carry the names of Hugging Face's Llama, so a prefix
(`model.`) turns one state dict into the other.

Shapes: B batch, T tokens of a row, C features of the residual stream, H query heads,
G key/value heads, D features of a head, R = D / 2 rotated pairs, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalellm.config import ModelConfig
from scalellm.errors import ConfigError, UserError
from scalellm.model.attention import KVCache, LayerCache, attend, document_mask
from scalellm.model.loss import RowLosses, chunked_sum_of_losses, token_losses


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Draws nothing: `Decoder.init_weights` sets every weight, once."""


class Output(nn.Module):
    """Logits, or the loss of each token: a part without weights, so that it compiles like a block.

    Eager cross-entropy goes over the logits, the largest tensor of a small model, once an operator.
    """

    def forward(self, x_BTC: Tensor, weight_VC: Tensor, targets_BT: Tensor | None) -> Tensor:
        logits_BTV = F.linear(x_BTC, weight_VC)
        return logits_BTV if targets_BT is None else token_losses(logits_BTV, targets_BT)


class Head(Linear):
    """The output projection. It takes the loss too, where its weight is whole."""

    def forward(  # type: ignore[override]  # it takes more than nn.Linear's
        self,
        x_BTC: Tensor,
        output: Output,
        targets_BT: Tensor | None = None,
        chunk_tokens: int = 0,
        row_losses: RowLosses | None = None,
    ) -> Tensor:
        return logits_or_loss(output, x_BTC, self.weight, targets_BT, chunk_tokens, row_losses)


def logits_or_loss(
    output: Output,
    x_BTC: Tensor,
    weight_VC: Tensor,
    targets_BT: Tensor | None,
    chunk_tokens: int,
    row_losses: RowLosses | None,
) -> Tensor:
    if targets_BT is not None and chunk_tokens:
        return chunked_sum_of_losses(x_BTC, weight_VC, targets_BT, chunk_tokens, row_losses)
    result: Tensor = output(x_BTC, weight_VC, targets_BT)
    if targets_BT is None:
        return result
    if row_losses is not None:
        row_losses.put(result)
    return result.sum()


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Draws nothing: `Decoder.init_weights` sets every weight, once."""


def rotation_table(positions_BT: Tensor, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """Returns the cosines and sines of rotary positions, (2, B, T, 1, R) in fp32 or wider.

    RoFormer (Su et al. 2021), in the half-split layout of Hugging Face's Llama. Computed anew in
    every forward (microseconds), so there is no buffer to lose on the meta device or to round
    when a model is cast to half precision.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    exponents_R = torch.arange(0, config.head_size, 2, device=positions_BT.device, dtype=dtype)
    frequencies_R = config.rope_theta ** (-exponents_R / config.head_size)
    angles_BT1R = positions_BT[..., None, None].to(dtype) * frequencies_R
    return torch.stack((angles_BT1R.cos(), angles_BT1R.sin()))


def rotate(x_BTHD: Tensor, rotation_2BT1R: Tensor) -> Tensor:
    """Turns each pair (i, i + R) of a head's features by its position's angle."""
    cos_BT1R, sin_BT1R = rotation_2BT1R
    a_BTHR, b_BTHR = x_BTHD.chunk(2, dim=-1)
    turned = (a_BTHR * cos_BT1R - b_BTHR * sin_BT1R, b_BTHR * cos_BT1R + a_BTHR * sin_BT1R)
    return torch.cat(turned, dim=-1).to(x_BTHD.dtype)


def sinusoids(positions_BT: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """Returns (B, T, features): sine and cosine alternate (Vaswani et al. 2017, section 3.5)."""
    dtype = torch.promote_types(dtype, torch.float32)
    exponents_F = torch.arange(0, features, 2, device=positions_BT.device, dtype=dtype) / features
    angles_BTF = positions_BT[..., None].to(dtype) * 10000.0**-exponents_F
    return torch.stack((angles_BTF.sin(), angles_BTF.cos()), dim=-1).flatten(-2)[..., :features]


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)


class SelfAttention(nn.Module):
    """Multi-head or grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size, self.kernel = config.head_size, config.attention
        q_size, kv_size = config.num_heads * self.head_size, config.kv_heads * self.head_size
        self.q_proj = Linear(config.hidden_size, q_size, bias=config.bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.bias)

    def forward(
        self,
        x_BTC: Tensor,
        rotation_2BT1R: Tensor | None,
        mask_B1TS: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        # -1, not H or G: under tensor parallelism a rank holds only some of the heads.
        q_BTHD = self.q_proj(x_BTC).unflatten(-1, (-1, self.head_size))
        k_BTGD = self.k_proj(x_BTC).unflatten(-1, (-1, self.head_size))
        v_BGSD = self.v_proj(x_BTC).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        if rotation_2BT1R is not None:
            q_BTHD, k_BTGD = rotate(q_BTHD, rotation_2BT1R), rotate(k_BTGD, rotation_2BT1R)
        k_BGSD = k_BTGD.transpose(1, 2)
        if cache is not None:
            k_BGSD, v_BGSD = cache.append(k_BGSD, v_BGSD)
        y_BHTD = self.mix(q_BTHD.transpose(1, 2), k_BGSD, v_BGSD, mask_B1TS)
        return self.o_proj(y_BHTD.transpose(1, 2).flatten(2))

    def mix(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_B1TS: Tensor | None
    ) -> Tensor:
        """`attend`: a seam for strategies in which a rank has only some of a row's positions."""
        return attend(q_BHTD, k_BGSD, v_BGSD, mask_B1TS, self.kernel)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020) or GPT-2's GELU, which is the tanh approximation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        if self.gated:
            self.gate_proj = Linear(config.hidden_size, config.mlp_size, bias=config.bias)
        self.up_proj = Linear(config.hidden_size, config.mlp_size, bias=config.bias)
        self.down_proj = Linear(config.mlp_size, config.hidden_size, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(F.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))
        return self.down_proj(F.gelu(self.up_proj(x_BTC), approximate="tanh"))


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream.

    In training all arguments are tensors or None and the output has the shape of `x_BTC`, so a
    block can be compiled, checkpointed or sharded alone. `rotation_2BT1R` is fp32 on purpose:
    wrappers that cast a block's inputs (FSDP2's `cast_forward_inputs`) would round the angles.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_position == "pre"
        self.input_layernorm = make_norm(config)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BTC: Tensor,
        rotation_2BT1R: Tensor | None = None,
        mask_B1TS: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        norm1, norm2, drop = self.input_layernorm, self.post_attention_layernorm, self.dropout
        if self.norm_first:
            x_BTC = x_BTC + drop(self.self_attn(norm1(x_BTC), rotation_2BT1R, mask_B1TS, cache))
            return x_BTC + drop(self.mlp(norm2(x_BTC)))
        x_BTC = norm1(x_BTC + drop(self.self_attn(x_BTC, rotation_2BT1R, mask_B1TS, cache)))
        return norm2(x_BTC + drop(self.mlp(x_BTC)))


class Decoder(nn.Module):
    """A causal language model on the current default device and dtype.

    Post-norm follows Vaswani et al. 2017: each sub-layer's sum is normalised, so there is no final
    norm; sinusoidal positions are added to embeddings scaled by sqrt(C), as there.

    Raises:
        ConfigError: `config.vocab_size` is not known yet.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError(
                "model.vocab_size is null: set it, in tokens, or take it from the prepared dataset"
            )
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = Embedding(config.seq_len, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.output = Output()
        if not config.tie_embeddings:
            self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        if not self.embed_tokens.weight.is_meta:
            self.init_weights()

    def initial_weights(
        self, generator: torch.Generator | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, initial value in fp32 on the CPU) of each parameter, one at a time.

        Matrices are normal(0, init_std); those that write to the residual stream are scaled by
        1/sqrt(2 num_layers) (GPT-2, Radford et al. 2019, section 2.3); norms are 1, biases 0. The
        draws are made on the CPU in the order of `named_parameters`, so one seed gives one model
        on any device, of any type, sharded in any way: a strategy whose parameters are shards
        takes its part of each value.
        """
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            if name.endswith("bias"):
                yield name, value.zero_()
            elif name.endswith("norm.weight"):
                yield name, value.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                yield name, value.normal_(0.0, residual_std, generator=generator)
            else:
                yield name, value.normal_(0.0, std, generator=generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Sets every parameter to `initial_weights`; None: the global CPU generator."""
        parameters = dict(self.named_parameters())
        for name, value in self.initial_weights(generator):
            parameters[name].copy_(value)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        row_losses: RowLosses | None = None,
    ) -> Tensor:
        """Returns the sum of the token losses, or the logits where there are no targets.

        Args:
            tokens_BT: token ids, any integer type embeddings take.
            targets_BT: the ids to predict; -100 is left out of the sum.
            positions_BT: each token's position; None: 0 .. T - 1 after what the cache holds.
            documents_BT: document numbers inside each row; attention stays inside a document.
            cache: filled with these tokens' keys and values, and read by the next call.
            last_only: logits of the last token only, (B, 1, V).
            row_losses: is given the loss of each row, which then sum up to the result.

        Returns:
            With targets the sum of cross-entropies in nats (a scalar; fp32, or fp64 in an fp64
            model), else the logits (B, T, V).

        Raises:
            UserError: a row longer than learned or sinusoidal positions reach.
            ValueError: documents together with a cache.
        """
        if cache is not None and documents_BT is not None:
            raise ValueError("documents_BT cannot be combined with a cache")
        past_tokens = cache.length if cache is not None else 0
        if positions_BT is None:
            end = past_tokens + tokens_BT.shape[1]
            positions_BT = torch.arange(past_tokens, end, device=tokens_BT.device).unsqueeze(0)
        x_BTC = self.embed(tokens_BT, positions_BT, past_tokens + tokens_BT.shape[1])
        rotation_2BT1R = self.rotation(positions_BT, x_BTC.dtype)
        mask_B1TS = document_mask(documents_BT) if documents_BT is not None else None
        for index, layer in enumerate(self.layers.children()):
            layer_cache = (cache.layers[index],) if cache is not None else ()
            x_BTC = layer(x_BTC, rotation_2BT1R, mask_B1TS, *layer_cache)
        return self.finish(x_BTC[:, -1:] if last_only else x_BTC, targets_BT, row_losses)

    def finish(
        self, x_BTC: Tensor, targets_BT: Tensor | None, row_losses: RowLosses | None = None
    ) -> Tensor:
        """From what the last block gives to the loss, or the logits: see `forward`."""
        x_BTC = self.norm(x_BTC)
        chunk_tokens = self.config.loss_chunk_tokens
        loss_of = (targets_BT, chunk_tokens, row_losses)
        if self.config.tie_embeddings:
            return logits_or_loss(self.output, x_BTC, self.embed_tokens.weight, *loss_of)
        loss: Tensor = self.lm_head(x_BTC, self.output, *loss_of)
        return loss

    def rotation(self, positions_BT: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Returns `rotation_table` of the positions, None if the model has others."""
        if self.config.positions != "rope":
            return None
        return rotation_table(positions_BT, self.config, dtype)

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor, end: int) -> Tensor:
        """Returns what the first block takes, (B, T, C); `end` is the longest row's last position.

        Raises:
            UserError: positions that are no rotations do not reach `end`.
        """
        kind, limit = self.config.positions, self.config.seq_len
        if kind != "rope" and end > limit:
            raise UserError(
                f"{end} tokens are more than the {limit} positions of this model "
                f"({kind} positions, model.seq_len={limit}); shorten the row"
            )
        x_BTC = self.embed_tokens(tokens_BT)
        if kind == "learned":
            x_BTC = x_BTC + self.embed_positions(positions_BT)
        elif kind == "sinusoidal":
            features = self.config.hidden_size
            table_BTC = sinusoids(positions_BT, features, x_BTC.dtype).to(x_BTC.dtype)
            x_BTC = x_BTC * math.sqrt(features) + table_BTC
        return self.dropout(x_BTC)
