"""From a configuration to a finished run: build the parts, resume, train, leave a full folder."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from scalellm import checkpoint, data, launched, process, strategies
from scalellm.config import BatchPlan, Config
from scalellm.dist import World, detect, ranks, together
from scalellm.errors import ConfigError
from scalellm.metrics import Progress, check_writers, open_writers
from scalellm.model import Decoder, count_parameters, cpu_multiplies_bf16
from scalellm.train.datasets import (
    SourceMeter,
    make_evaluator,
    open_mixture,
    open_stream,
    with_vocabulary,
)
from scalellm.train.folder import RunFolder
from scalellm.train.forecast import Forecast, MemoryWatch
from scalellm.train.guards import EarlyStopping, NonFiniteGuard, StopSignal
from scalellm.train.launchers import check_launcher
from scalellm.train.limits import check_disk, check_resources
from scalellm.train.loop import Run, train
from scalellm.train.optimizer import make_adamw
from scalellm.train.profiling import Profiler
from scalellm.train.resume import find_checkpoint, load_run_state, save_run
from scalellm.train.session import Session

# Ranks that are started again may meet those they replace, which are still saving.
_HANDOVER_S = 180.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `reason` is "done", "early stop", or a signal's name."""

    reason: str
    step: int
    run_dir: Path
    is_main: bool

    @property
    def stopped_by_signal(self) -> bool:
        return self.reason not in ("done", "early stop")


def run_training(
    config: Config, resume: str | None = None, forecast: Forecast | None = None
) -> Outcome:
    """Trains as `config` says, in as many ranks as the launcher started.

    Args:
        resume: None: a new run; "auto": the newest complete checkpoint of `run.dir`, if there is
            one; else the path of a checkpoint or of another run's folder.
        forecast: predicts the memory beside the run, to be compared.

    Raises:
        UserError: nothing was trained, and nothing half-written is left.
        DivergedError: the gradients stayed non-finite.
    """
    strategy_class = strategies.resolve(config.strategy.name)
    check_launcher(config, detect())  # before the ranks wait for each other
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        world = stack.enter_context(
            ranks(
                config.run.device,
                config.run.threads,
                process_group=strategy_class.needs_process_group,
                bind_cores=config.run.bind_cores,
            )
        )
        options, plan = check_config(config, world)
        check_writers(config)
        mixture = open_mixture(config)
        config = with_vocabulary(config, mixture)
        check_resources(config, plan, world, strategy_class.sharding(options, world, config.train))
        memory = MemoryWatch(forecast, world)
        resuming = resume is not None or world.restarts > 0
        folder = stack.enter_context(_claimed(config, world, resuming=resuming))
        source = find_checkpoint(folder, resume, world)
        strategy = strategy_class(world, config.train, options)
        stack.callback(strategy.close)
        strategy.load_libraries()
        stack.enter_context(process.collecting_when_told(freezing=True))
        if world.device.type == "cpu":
            process.stock_small_blocks()
        run = _build(config, world, strategy, plan, mixture, folder, source, memory, stack)
        _announce(run, plan, mixture, source, world)
        launched.tell("started", step=run.step, world_size=world.world_size)
        reason = train(run, stop)
        return Outcome(reason, run.step, folder.path, world.is_main)


def check_config(config: Config, world: World) -> tuple[strategies.Options, BatchPlan]:
    """Raises ConfigError if this world cannot run this config; allocates and starts nothing."""
    strategy_class = strategies.resolve(config.strategy.name)
    options = strategies.parse_options(config.strategy, strategy_class, world, config.train)
    data_rank = strategy_class.data_rank(options, world)
    plan = config.batches(data_rank.world_size, data_rank.name)
    strategy_class.check_model(options, world, config.train, config.model, plan)
    for stage in config.data.stages:
        model = config.model.model_copy(update={"seq_len": stage.seq_len or config.model.seq_len})
        try:
            strategy_class.check_model(options, world, config.train, model, plan)
        except ConfigError as error:
            where = f"data.stages, from step {stage.from_step}"
            raise ConfigError(f"{where}: {error}".replace("model.seq_len", "seq_len")) from None
    return options, plan


def _build(
    config: Config,
    world: World,
    strategy: strategies.Strategy,
    plan: BatchPlan,
    mixture: data.Mixture,
    folder: RunFolder,
    source: checkpoint.Checkpoint | None,
    memory: MemoryWatch,
    stack: ExitStack,
) -> Run:
    torch.manual_seed(config.run.seed)
    session = Session()
    memory.baseline_rss_bytes = session.baseline_rss_bytes
    with torch.device("meta"):  # the strategy gives it memory, as much as this rank holds
        model = Decoder(config.model)
    strategy.setup(model, functools.partial(make_adamw, train=config.train))
    saver = checkpoint.Saver(
        folder.checkpoints,
        world,
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
        on_saved=lambda path: launched.tell("saved", path=str(path)),
    )
    stack.callback(saver.close)
    run = Run(
        config=config,
        world=world,
        strategy=strategy,
        stream=iter(()),
        micro_batch_size=plan.micro_batch_size,
        evaluate=make_evaluator(config, strategy, plan, mixture),
        save=functools.partial(save_run, folder, saver),
        finish_copying=saver.wait_for_copy,
        finish_saving=saver.wait,
        writers=[],
        early_stopping=EarlyStopping(
            config.eval.early_stop_patience, config.eval.early_stop_min_delta
        ),
        guard=NonFiniteGuard(config.train.max_nonfinite_steps),
        session=session,
        profiler=Profiler(config, world),
        sources=SourceMeter(mixture, counts=strategy.data.counts),
        memory=memory,
    )
    stack.callback(run.profiler.close)
    if source is not None:
        load_run_state(run, source, mixture, folder)
    stream = open_stream(config, strategy.data, mixture, run.cursor)
    stack.callback(stream.close)
    run.stream = iter(stream)
    together(lambda: _open_folder(run, folder, mixture, source), world, main_only=True)
    for writer in run.writers:
        stack.callback(writer.close)
    return run


def _open_folder(
    run: Run, folder: RunFolder, mixture: data.Mixture, source: checkpoint.Checkpoint | None
) -> None:
    tokenizer = next(iter(mixture.datasets.values())).tokenizer_path
    folder.describe(run.config, run.world, tokenizer)
    # Without a checkpoint the run begins anew, also if rows of an earlier start are there.
    run.writers = open_writers(run.config, folder.path, -1 if source is None else run.step)
    run.writers.append(Progress(run.step, run.config.train.steps, shown=True))


@contextmanager
def _claimed(config: Config, world: World, *, resuming: bool) -> Iterator[RunFolder]:
    """Rank 0 holds the folder; if it may not, every rank hears of it and leaves."""
    folder = RunFolder(config.run.dir)

    def claim() -> None:
        folder.claim(resuming=resuming, wait_s=_HANDOVER_S if world.restarts else 0.0)
        check_disk(config, folder.path)

    try:
        together(claim, world, main_only=True)
        yield folder
    finally:
        folder.release()


def _announce(
    run: Run,
    plan: BatchPlan,
    mixture: data.Mixture,
    source: checkpoint.Checkpoint | None,
    world: World,
) -> None:
    if not world.is_main:
        return
    config = run.config
    samples = config.train.global_batch_size
    readers = "ranks" if plan.world_size == world.world_size else "groups of ranks"
    factors = f"{plan.world_size} x {plan.micro_batch_size} x {plan.grad_accumulation}"
    print(
        f"{config.strategy.name}: {world.describe()}\n"
        f"model: {count_parameters(config.model):,} parameters, {config.train.precision}\n"
        f"data: {mixture.num_tokens:,} tokens in {config.data.where}\n"
        f"step: {samples} samples of {config.model.seq_len} tokens = {factors} "
        f"({readers} x micro-batch x accumulation)"
    )
    if source is not None:
        print(f"resumed from {source.path}")
    if config.train.compile:
        print("compiling the decoder: about a minute before the first step")
    if (
        config.train.precision == "bf16"
        and world.device.type == "cpu"
        and not cpu_multiplies_bf16()
    ):
        print("note: this CPU has no bf16 instructions; fp32 is about three times faster on it")
