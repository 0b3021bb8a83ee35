"""litgpt's GPT under Lightning Fabric, in the order of litgpt's own `pretrain.py`.

As litgpt ships, it compiles, trains in bf16-mixed, and fuses AdamW on CUDA only. `options.true`
takes its bf16-true instead, where weights and optimizer state are bf16 too: faster, less exact.
Logging (CSV, throughput, a line for each step) is left out, in litgpt's favour.
"""

from __future__ import annotations

import lightning
import torch
from _worker import Gate, Task
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer
from torch import Tensor

_NAMES = {
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    "self_attn.o_proj": "attn.proj",
    "mlp.gate_proj": "mlp.fc_1",
    "mlp.up_proj": "mlp.fc_2",
    "mlp.down_proj": "mlp.proj",
}


def make_config(task: Task) -> Config:
    return Config(
        name="peers",
        block_size=task.seq_len,
        vocab_size=task.vocab_size,
        padded_vocab_size=task.vocab_size,
        n_layer=task.num_layers,
        n_head=task.num_heads,
        n_embd=task.hidden_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
        intermediate_size=task.mlp_size,
    )


def renamed(weights: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The initial weights under litgpt's names: q, k and v are one matrix there."""
    table = weights["embed_tokens.weight"]
    out = {"transformer.wte.weight": table, "lm_head.weight": table}
    out["transformer.ln_f.weight"] = weights["norm.weight"]
    for layer in range(num_layers):
        theirs, ours = f"transformer.h.{layer}", f"layers.{layer}"
        qkv = [weights[f"{ours}.self_attn.{letter}_proj.weight"] for letter in "qkv"]
        out[f"{theirs}.attn.qkv.weight"] = torch.cat(qkv)
        for our_name, their_name in _NAMES.items():
            out[f"{theirs}.{their_name}.weight"] = weights[f"{ours}.{our_name}.weight"]
    return out


def main() -> None:
    task = Task.read()
    kind = "true" if task.options.get("true") else "mixed"
    precision = "32-true" if task.precision == "fp32" else f"bf16-{kind}"
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    with fabric.init_module(empty_init=True):
        model = GPT(make_config(task))
    model.load_state_dict(renamed(task.weights(), task.num_layers))
    model.transformer.wte.weight = model.lm_head.weight
    gate = Gate(task.size_of(model), ("litgpt", "lightning"))
    optimizer = instantiate_torch_optimizer(
        "AdamW",
        task.decay_groups(model),
        fused=False,
        lr=task.learning_rate,
        betas=task.betas,
        eps=task.eps,
    )
    if task.compile:
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(optimizer)
    loader = torch.utils.data.DataLoader(task.samples("ids", "targets"), batch_size=task.batch)
    for batch in fabric.setup_dataloaders(loader):
        gate.wait()
        loss = chunked_cross_entropy(model(batch["ids"]), batch["targets"])
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=task.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        gate.losses.append(loss.detach())


if __name__ == "__main__":
    main()
