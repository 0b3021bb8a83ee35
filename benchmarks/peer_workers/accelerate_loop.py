"""The loop of Accelerate's documentation with Hugging Face's Llama.

Compiling is Accelerate's own switch (`dynamo_backend`). AdamW is torch's with its defaults, as
there.
"""

from __future__ import annotations

import torch
from _llama import make_llama
from _worker import Gate, Task
from accelerate import Accelerator


def main() -> None:
    task = Task.read()
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if task.precision == "bf16" else "no",
        dynamo_backend="inductor" if task.compile else "no",
    )
    model = make_llama(task)
    gate = Gate(task.size_of(model), ("accelerate", "transformers"))
    optimizer = torch.optim.AdamW(
        task.decay_groups(model), lr=task.learning_rate, betas=task.betas, eps=task.eps
    )
    samples = task.samples("input_ids", "labels", "shift_labels")
    loader = torch.utils.data.DataLoader(samples, batch_size=task.batch)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        gate.wait()
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), task.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        gate.losses.append(loss.detach())


if __name__ == "__main__":
    main()
