"""Our decoder and our optimizer in a bare loop: what the whole trainer is measured against.

The same weights, transforms, loss and clipping as `scalellm train`, in a process with the same
settings, so its losses are the same; no loader, guards, metrics or checkpoints.
"""

from __future__ import annotations

import torch
from _worker import Gate, Task

from scalellm.config import ModelConfig, TrainConfig
from scalellm.model import Decoder, count_parameters, flops_per_token
from scalellm.process import keep_freed_memory, stock_small_blocks
from scalellm.products import fast_fp32
from scalellm.strategies._norm import norm_of
from scalellm.strategies._transforms import apply_transforms
from scalellm.train.optimizer import make_adamw


def main() -> None:
    keep_freed_memory()
    stock_small_blocks()
    with fast_fp32():
        _train(Task.read())


def _train(task: Task) -> None:
    config = ModelConfig(
        num_layers=task.num_layers,
        hidden_size=task.hidden_size,
        num_heads=task.num_heads,
        intermediate_size=task.mlp_size,
        vocab_size=task.vocab_size,
        seq_len=task.seq_len,
    )
    train = TrainConfig(
        compile=task.compile,
        compile_scope=task.options.get("compile_scope", "parts"),
        learning_rate=task.learning_rate,
        beta1=task.betas[0],
        beta2=task.betas[1],
        eps=task.eps,
        weight_decay=task.weight_decay,
    )
    model = Decoder(config)
    model.load_state_dict(task.weights())
    apply_transforms(model, train)
    optimizer = make_adamw(model.named_parameters(), train)
    parameters = list(model.parameters())
    size = {"parameters": count_parameters(config), "flops_per_token": flops_per_token(config)}
    gate = Gate(size, ("scalellm",))
    for tokens_BT, targets_BT in task.batches():
        gate.wait()
        with task.autocast():
            loss_sum = model(tokens_BT, targets_BT)
        (loss_sum / targets_BT.numel()).backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = norm_of(gradients)
        if norm > task.grad_clip:
            torch._foreach_mul_(gradients, task.grad_clip / norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.losses.append(loss_sum.detach() / targets_BT.numel())


if __name__ == "__main__":
    main()
