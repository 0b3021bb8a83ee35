"""The training loop. Everything a backend does differently is behind `strategy`."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from scalellm import data
from scalellm.batches import Batch, global_targets, micro_batches
from scalellm.config import Config
from scalellm.dist import World, sum_over_ranks
from scalellm.evaluate import Evaluation
from scalellm.metrics import Row, StepClock, Writer, peak_device_bytes, peak_rss_bytes
from scalellm.strategies import Strategy
from scalellm.train.datasets import SourceMeter
from scalellm.train.forecast import MemoryWatch
from scalellm.train.guards import EarlyStopping, NonFiniteGuard, StopSignal
from scalellm.train.profiling import Profiler
from scalellm.train.schedule import learning_rate
from scalellm.train.session import Session

_COLLECT_EVERY_STEPS = 50


@dataclass
class Run:
    """What one training run consists of, built by `train.build`."""

    config: Config
    world: World
    strategy: Strategy
    stream: Iterator[tuple[data.Batch, data.Cursor]]
    micro_batch_size: int
    evaluate: Callable[[], Evaluation] | None
    save: Callable[[Run], None]
    finish_copying: Callable[[], None]
    finish_saving: Callable[[], None]
    writers: list[Writer]
    early_stopping: EarlyStopping
    guard: NonFiniteGuard
    session: Session
    profiler: Profiler
    sources: SourceMeter
    memory: MemoryWatch
    step: int = 0
    tokens: int = 0
    cursor: data.Cursor | None = None
    saved_step: int = field(default=-1)


def train(run: Run, stop: StopSignal) -> str:
    """Trains to the last step and returns why it ended: "done", "early stop" or a signal's name.

    Each step is a function of the seed, the step, the weights and the cursor, so that a run resumed
    from a checkpoint takes the steps the uninterrupted one would have taken.

    Raises:
        DivergedError: too many steps in a row without finite gradients.
        CheckpointError: a save failed; one in the background is heard of at the next one or here.
    """
    config = run.config.train
    ended = "done"
    run.session.begin(run.tokens)
    if run.step == 0 and run.config.eval.every_steps:
        _evaluate(run)  # where it starts from
    while run.step < config.steps and not run.early_stopping.should_stop:
        run.memory.before_step()
        with run.profiler.step(run.step + 1):
            row, stop_asked = _train_step(run, stop)
        run.memory.after_step(row)
        if run.step % config.log_every_steps == 0 or run.step == config.steps:
            _write(run, row)
        if _is_due(run.step, run.config.eval.every_steps) and run.step < config.steps:
            _evaluate(run)
        if stop_asked and run.step < config.steps:
            ended = stop.received.name if stop.received else "a signal on another rank"
            break
        if _is_due(run.step, run.config.checkpoint.every_steps) and run.step < config.steps:
            _save(run)
        if _is_due(run.step, _COLLECT_EVERY_STEPS):
            gc.collect()  # on all ranks at once; see `process.collecting_when_told`
    if ended == "done":
        if run.early_stopping.should_stop and run.step < config.steps:
            ended = "early stop"
        elif run.saved_step != run.step:
            _evaluate(run)
    if run.saved_step != run.step:
        _save(run)
    with run.session.saving():
        run.finish_saving()
    if run.session.has_trained:
        row = run.session.row(run.config, run.world, run.step, run.tokens, ended)
        _write(run, {**row, "predicted_peak_bytes": run.memory.predicted_bytes})
    return ended


def _train_step(run: Run, stop: StopSignal) -> tuple[Row, bool]:
    """One optimizer step: micro-batches, update, metrics. Returns its row and whether to stop."""
    clock = StepClock()
    batch, cursor = next(run.stream)
    clock.lap("data_wait_s")
    step, strategy, device = run.step + 1, run.strategy, run.world.device
    target_tokens = global_targets(batch, device, counts=strategy.data.counts)
    divisor = max(1, target_tokens)  # packed rows may hold one token each, and no target
    _seed_step(run.config.run.seed, step, strategy.dropout_rank)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    of_mixture: list[Batch] = []
    for micro_batch, is_last in micro_batches(batch, run.micro_batch_size, device):
        with strategy.micro_step(is_last):
            loss = strategy.forward(micro_batch)
            clock.lap("forward_s")
            strategy.backward(loss, divisor)
        loss = loss.detach()  # its graph goes now, and not at the end of the step
        loss_sum += loss
        if micro_batch.row_losses is not None:
            of_mixture.append(micro_batch)
        clock.lap("backward_s")
    for micro_batch in of_mixture:  # a pipeline computes all of them in the last backward
        run.sources.add(micro_batch)
    rate = learning_rate(step, run.config.train)
    with run.session.saving():
        run.finish_copying()  # of a save in the background, before weights change
    clock.leave_out()
    result = strategy.step(rate)
    clock.lap("optimizer_s")
    asked = float(stop.received is not None)
    local = [float(loss_sum), asked, *run.sources.take()]
    global_loss_sum, stop_votes, *by_source = sum_over_ranks(local, device)
    run.step, run.cursor, run.tokens = step, cursor, run.tokens + target_tokens
    run.guard.observe(step, result.skipped, result.grad_norm)
    step_time_s = clock.total_s()
    run.session.observe(step_time_s)
    row: Row = {
        "kind": "train",
        "step": step,
        "loss": global_loss_sum / divisor,
        "grad_norm": result.grad_norm,
        "learning_rate": rate,
        "skipped": int(result.skipped),
        "tokens": run.tokens,
        "tokens_per_s": target_tokens / step_time_s,
        "step_time_s": step_time_s,
        **clock.seconds,
        **run.sources.fields(by_source),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(device),
    }
    return row, stop_votes > 0


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout is a function of (seed, step, rank): no generator state to save or to reshard."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def _evaluate(run: Run) -> None:
    if run.evaluate is None:
        return
    started_s = time.perf_counter()
    result = run.evaluate()
    run.early_stopping.observe(result.loss)
    eval_time_s = time.perf_counter() - started_s
    run.session.eval_s += eval_time_s
    row: Row = {
        "kind": "eval",
        "step": run.step,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "tokens": result.num_tokens,
        "eval_time_s": eval_time_s,
    }
    if result.loss_by_source:
        row["loss_by_source"] = dict(result.loss_by_source)
    _write(run, row)


def _save(run: Run) -> None:
    with run.session.saving():
        run.save(run)
    run.saved_step = run.step


def _write(run: Run, row: Row) -> None:
    for writer in run.writers:
        writer.write(row)


def _is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0
