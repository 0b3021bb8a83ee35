"""Hugging Face's Trainer, told no more than it needs, with Hugging Face's Llama.

It waits in a callback at the beginning of each step. Saving and reporting are off; the optimizer
is the one it ships with.
"""

from __future__ import annotations

from typing import Any

from _llama import make_llama
from _worker import Gate, Task
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments


class Turns(TrainerCallback):
    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._gate.wait()


class InOrder(Trainer):
    """The Trainer, but for the order of samples and for keeping the losses."""

    gate: Gate

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.gate.losses.append(loss.detach())
        return loss


def main() -> None:
    task = Task.read()
    model = make_llama(task)
    gate = Gate(task.size_of(model), ("transformers", "accelerate"))
    samples = task.samples("input_ids", "labels", "shift_labels")
    arguments = TrainingArguments(
        output_dir=str(task.folder / "hf-trainer"),
        use_cpu=True,
        seed=task.seed,
        bf16=task.precision == "bf16",
        torch_compile=task.compile,
        per_device_train_batch_size=task.batch,
        max_steps=len(samples) // task.batch,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=task.betas[0],
        adam_beta2=task.betas[1],
        adam_epsilon=task.eps,
        weight_decay=task.weight_decay,
        max_grad_norm=task.grad_clip,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = InOrder(model, arguments, train_dataset=samples, callbacks=[Turns(gate)])
    trainer.gate = gate
    trainer.train()


if __name__ == "__main__":
    main()
