"""From the config's `data` section to open datasets, the stream of batches, and the evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from scalellm import data
from scalellm.batches import Batch
from scalellm.config import ALONE, BatchPlan, Config
from scalellm.errors import ConfigError
from scalellm.evaluate import Evaluation, evaluate
from scalellm.model import IGNORED_TARGET
from scalellm.strategies import DataRank, Strategy

TRAIN, VALIDATION = "train", "validation"

Stream = data.TokenStream | data.MixedStream


def open_mixture(config: Config) -> data.Mixture:
    """Opens the datasets of the run; one alone is a mixture too.

    Raises:
        UserError: a dataset cannot be read, or the weights or stages are impossible.
    """
    datasets = {
        name: data.TokenDataset.open(path, TRAIN, config.data.remote)
        for name, path in config.data.paths.items()
    }
    weights = {name: dataset.weight for name, dataset in (config.data.mix or {}).items()}
    weights = weights or {ALONE: 1.0}
    seq_len = config.model.seq_len
    # By their first row, so that a stage from step 1 takes the place of what data.mix says.
    parts = {0: ("data.mix", seq_len, weights)}
    for number, stage in enumerate(config.data.stages):
        if stage.weights is not None:
            weights = {name: stage.weights.get(name, 0.0) for name in datasets}
        seq_len = stage.seq_len or seq_len
        start_row = (stage.from_step - 1) * config.train.global_batch_size
        parts[start_row] = (f"data.stages.{number}", seq_len, weights)
    stages = [
        data.Stage(start_row, seq_len, tuple(data.shares(weights, where).values()))
        for start_row, (where, seq_len, weights) in parts.items()
    ]
    return data.Mixture(datasets, tuple(stages))


def open_stream(
    config: Config, data_rank: DataRank, mixture: data.Mixture, cursor: data.Cursor | None
) -> Stream:
    """Opens this rank's stream of batches, after `cursor`."""
    make: Callable[..., Stream]
    if mixture.is_plain:
        [dataset] = mixture.datasets.values()
        [stage] = mixture.stages
        make = functools.partial(data.TokenStream, dataset, seq_len=stage.seq_len)
    else:
        make = functools.partial(data.MixedStream, mixture)
    return make(
        global_batch_size=config.train.global_batch_size,
        rank=data_rank.rank,
        world_size=data_rank.world_size,
        seed=config.run.seed,
        lanes=config.data.lanes,
        document_mask=config.data.document_mask,
        decode_threads=config.data.decode_threads,
        cursor=cursor,
    )


def with_vocabulary(config: Config, mixture: data.Mixture) -> Config:
    """Fills in the datasets' vocabulary size, or checks that the model's can hold it."""
    [held] = {dataset.vocab_size for dataset in mixture.datasets.values()}
    wanted = config.model.vocab_size
    if wanted is None:
        model = config.model.model_copy(update={"vocab_size": held})
        return config.model_copy(update={"model": model})
    if wanted < held:
        raise ConfigError(
            f"model.vocab_size={wanted} tokens is smaller than the dataset's {held}; leave it out "
            f"or set it to {held} or more"
        )
    return config


def make_evaluator(
    config: Config, strategy: Strategy, plan: BatchPlan, mixture: data.Mixture
) -> Callable[[], Evaluation] | None:
    """Returns what measures the validation loss, or None if no dataset has such a split."""
    datasets = {
        name: dataset.open_split(VALIDATION)
        for name, dataset in mixture.datasets.items()
        if VALIDATION in dataset.manifest.splits
    }
    if not datasets:
        if config.eval.early_stop_patience:
            raise ConfigError(
                f"eval.early_stop_patience={config.eval.early_stop_patience} needs a validation "
                f"split, which {config.data.where} lacks; prepare it with --val-fraction 0.01"
            )
        return None

    def measure(dataset: data.TokenDataset) -> Evaluation:
        batches = data.evaluation_batches(
            dataset,
            seq_len=config.model.seq_len,
            batch_size=config.eval.batch_size or plan.micro_batch_size,
            rank=strategy.data.rank,
            world_size=strategy.data.world_size,
            document_mask=config.data.document_mask,
            limit_samples=config.eval.max_samples,
        )
        return evaluate(strategy, batches)

    if config.data.mix is None:
        return lambda: measure(datasets[ALONE])
    return lambda: Evaluation.of_all({name: measure(one) for name, one in datasets.items()})


class SourceMeter:
    """Loss and tokens of each dataset of a mixture; of one dataset alone nothing is counted.

    Attributes:
        tokens: targets so far by dataset, of all ranks.
    """

    def __init__(self, mixture: data.Mixture, *, counts: bool = True) -> None:
        self._counts = counts
        is_one = mixture.is_plain or mixture.names == (ALONE,)
        self._names = () if is_one else mixture.names
        self.tokens = dict.fromkeys(self._names, 0)
        self._sums_2S = torch.zeros(2, len(self._names), dtype=torch.float64)

    def add(self, batch: Batch) -> None:
        """Adds a micro-batch of which the loss was computed, here or by ranks with the same rows.

        The losses of such ranks are shares, as those of `Strategy.forward`; one of them counts.
        """
        if batch.row_losses is None or batch.sources_B is None:
            return
        counts_B = (batch.targets_BT != IGNORED_TARGET).sum(1).double() * self._counts
        losses_B = batch.row_losses.losses_B
        losses_B = torch.zeros_like(counts_B) if losses_B is None else losses_B.double()
        rows_2B = torch.stack([losses_B, counts_B])
        self._sums_2S = self._sums_2S.to(rows_2B.device).index_add(1, batch.sources_B, rows_2B)

    def state(self) -> list[int]:
        """The counts in the order of the datasets: a name may change, its dataset may not."""
        return list(self.tokens.values())

    def load(self, state: list[int]) -> None:
        """Goes on from `state`; one of another number of datasets is passed over."""
        if len(state) == len(self._names):
            self.tokens = dict(zip(self._names, state, strict=True))

    def take(self) -> list[float]:
        """Returns this rank's losses and counts of the step, to be summed over ranks."""
        sums: list[float] = self._sums_2S.flatten().tolist()
        self._sums_2S = torch.zeros_like(self._sums_2S)
        return sums

    def fields(self, sums: list[float]) -> dict[str, dict[str, float]]:
        """Returns the step's loss and the tokens so far by dataset, given the sums of all ranks."""
        if not self._names:
            return {}
        size = len(self._names)
        losses = {}
        for name, loss_sum, count in zip(self._names, sums[:size], sums[size:], strict=True):
            self.tokens[name] += int(count)
            if count:
                losses[name] = loss_sum / count
        return {"loss_by_source": losses, "tokens_by_source": dict(self.tokens)}
