"""A plain PyTorch loop with nanoGPT's settings on a CPU, and its GPT-2 block.

nanoGPT (Karpathy) on a CPU: fp32, eager, SDPA, AdamW tensor by tensor (its fused one is for CUDA
only), LayerNorm, GELU of width 4 d, learned positions, no biases, tied embeddings, no dropout.
`options.fused` takes the fused AdamW instead: what a user who knows would do.

Shapes: B rows, T tokens, C features, H heads, D features of a head, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from _worker import Gate, Task
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.heads = task.num_heads
        self.c_attn = nn.Linear(task.hidden_size, 3 * task.hidden_size, bias=False)
        self.c_proj = nn.Linear(task.hidden_size, task.hidden_size, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q, k, v = self.c_attn(x_BTC).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        y_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y_BHTD.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        size = task.hidden_size
        self.ln_1, self.ln_2 = (nn.LayerNorm(size, bias=False) for _ in range(2))
        self.attn = Attention(task)
        self.c_fc = nn.Linear(size, 4 * size, bias=False)
        self.c_proj = nn.Linear(4 * size, size, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC))
        return x_BTC + self.c_proj(F.gelu(self.c_fc(self.ln_2(x_BTC))))


class GPT(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.wte = nn.Embedding(task.vocab_size, task.hidden_size)
        self.wpe = nn.Embedding(task.seq_len, task.hidden_size)
        self.blocks = nn.ModuleList(Block(task) for _ in range(task.num_layers))
        self.ln_f = nn.LayerNorm(task.hidden_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                is_residual = name.endswith("c_proj.weight")
                scale = math.sqrt(2 * task.num_layers) if is_residual else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Returns the mean loss in nats."""
        x_BTC = self.wte(tokens_BT) + self.wpe(torch.arange(tokens_BT.shape[1]))
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits_BTV = F.linear(self.ln_f(x_BTC), self.wte.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def main() -> None:
    task = Task.read()
    model = GPT(task)
    optimizer = torch.optim.AdamW(
        task.decay_groups(model),
        lr=task.learning_rate,
        betas=task.betas,
        eps=task.eps,
        foreach=False,
        fused=bool(task.options.get("fused")),
    )
    gate = Gate(task.size_of(model, lookups=model.wpe.weight.numel()))
    forward = torch.compile(model) if task.compile else model
    for tokens_BT, targets_BT in task.batches():
        gate.wait()
        with task.autocast():
            loss = forward(tokens_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), task.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.losses.append(loss.detach())


if __name__ == "__main__":
    main()
