"""A trained run, loaded to be used: evaluation on any dataset, text generation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scalellm import checkpoint, data
from scalellm.config import Config, ModelConfig, TrainConfig
from scalellm.data.format import load_manifest
from scalellm.data.store import open_store
from scalellm.data.tokenizer import Tokenizer, load_tokenizer
from scalellm.dist import ranks
from scalellm.errors import CheckpointError, DataError
from scalellm.evaluate import Evaluation, evaluate
from scalellm.model import Decoder
from scalellm.strategies import Options, check_names
from scalellm.strategies.single import Single
from scalellm.train import check_own_tokenizer, load_run_config


def load_run(path: Path) -> tuple[Decoder, Tokenizer]:
    """Loads the newest complete checkpoint of a run folder (or the one given) and its tokenizer.

    Raises:
        UserError: no such run, no complete checkpoint, or a damaged one.
    """
    source = checkpoint.open_checkpoint(path)
    _check_own_tokenizer(source)
    return _load_model(source), load_tokenizer(_run_dir(source))


def _run_dir(source: checkpoint.Checkpoint) -> Path:
    return source.path.resolve().parent.parent


def _check_own_tokenizer(source: checkpoint.Checkpoint) -> None:
    check_own_tokenizer(_run_dir(source), source.meta.get("tokenizer_sha256"))


def _load_model(source: checkpoint.Checkpoint) -> Decoder:
    try:
        config = ModelConfig.model_validate(source.meta["model"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{source.path} does not say which model it is of: {error}") from None
    with torch.device("meta"):
        model = Decoder(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    check_names(shapes, source)
    weights = {
        name: source.read(f"model.{name}", (0,) * len(shape), shape)
        for name, shape in shapes.items()
    }
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


@dataclass(frozen=True)
class EvaluationReport:
    """Loss and perplexity; without the text's size in words and bytes, nothing per word or byte.

    Nor of packed rows, whose first token is not predicted, though its text is counted.
    """

    data_path: Path | str
    splits: tuple[str, ...]
    evaluation: Evaluation
    num_words: int
    num_bytes: int
    is_packed: bool = False

    def figures(self) -> dict[str, Any]:
        result = self.evaluation
        figures: dict[str, Any] = {"loss": result.loss, "perplexity": result.perplexity}
        if self.num_words and self.num_bytes and not self.is_packed:
            figures["perplexity_per_word"] = result.perplexity_per_word(self.num_words)
            figures["bits_per_byte"] = result.bits_per_byte(self.num_bytes)
        if result.loss_by_source:
            figures["loss_by_source"] = dict(result.loss_by_source)
        counts = {"tokens": result.num_tokens, "words": self.num_words, "bytes": self.num_bytes}
        return figures | counts

    def to_json(self) -> str:
        return json.dumps({"data": str(self.data_path), "splits": self.splits} | self.figures())

    def __str__(self) -> str:
        figures = self.figures()
        lines = [
            f"{self.data_path} ({' + '.join(self.splits)}): {figures['tokens']:,} tokens, "
            f"{figures['words']:,} words, {figures['bytes']:,} bytes",
            f"loss                 {figures['loss']:.4f} nats per token",
            f"perplexity           {figures['perplexity']:.2f} per token",
        ]
        if "bits_per_byte" in figures:
            lines.append(f"perplexity per word  {figures['perplexity_per_word']:.6g}")
            lines.append(f"bits per byte        {figures['bits_per_byte']:.4f}")
        for name, loss in figures.get("loss_by_source", {}).items():
            lines.append(f"  {name:<18} {loss:.4f} nats per token")
        return "\n".join(lines)


def evaluate_run(
    path: Path, data_path: Path | str | None, split: str | None, batch_size: int
) -> EvaluationReport:
    """Evaluates a run's newest checkpoint in one process.

    Without `data_path`: every dataset of the run. Without `split`: the validation split of the
    run's own datasets, or all of another one.

    Raises:
        DataError: the dataset's ids are of another tokenizer than the run's.
    """
    source = checkpoint.open_checkpoint(path)
    config = load_run_config(_run_dir(source))
    opened = _open_datasets(config, data_path, split)
    datasets = list(opened.values())
    _check_own_tokenizer(source)
    for dataset in datasets:
        _check_tokenizer(_run_dir(source), dataset)
    model = _load_model(source)
    with ranks("auto", config.run.threads, process_group=False) as world:
        strategy = Single(world, TrainConfig(precision=config.train.precision), Options())
        strategy.setup(model, lambda parameters: torch.optim.SGD(p for _, p in parameters))
        results = {
            name: _evaluate_split(strategy, dataset, config, batch_size)
            for name, dataset in opened.items()
        }
    return EvaluationReport(
        ", ".join(dict.fromkeys(str(dataset.path) for dataset in datasets)),
        tuple(dict.fromkeys(dataset.split for dataset in datasets)),
        Evaluation.of_all(results) if len(results) > 1 else next(iter(results.values())),
        sum(dataset.num_words_text for dataset in datasets),
        sum(dataset.num_bytes_text for dataset in datasets),
        any(dataset.packed_seq_len for dataset in datasets),
    )


def _open_datasets(
    config: Config, data_path: Path | str | None, split: str | None
) -> dict[str, data.TokenDataset]:
    """Opens what is to be evaluated, by a name that tells the parts from each other."""
    if data_path is None:
        if len(config.data.paths) > 1:
            return {
                name: data.TokenDataset.open(path, split or "validation", config.data.remote)
                for name, path in config.data.paths.items()
            }
        [data_path] = config.data.paths.values()
    store = open_store(data_path, config.data.remote)
    manifest = load_manifest(store)
    is_own = _absolute(store.location) in map(_absolute, config.data.paths.values())
    splits = (split,) if split else (("validation",) if is_own else tuple(manifest.splits))
    return {name: data.TokenDataset(store, name, manifest) for name in splits}


def _absolute(location: Path | str) -> Path | str:
    return location if isinstance(location, str) else location.resolve()


def _evaluate_split(
    strategy: Single, dataset: data.TokenDataset, config: Config, batch_size: int
) -> Evaluation:
    batches = data.evaluation_batches(
        dataset,
        seq_len=config.model.seq_len,
        batch_size=batch_size,
        rank=0,
        world_size=1,
        document_mask=config.data.document_mask,
    )
    return evaluate(strategy, batches)


def _check_tokenizer(run_dir: Path, dataset: data.TokenDataset) -> None:
    theirs = dataset.tokenizer_path
    own = next(run_dir.glob("tokenizer.*"), None)
    if theirs is None or own is None:
        return  # ids from elsewhere: nothing says which tokenizer made them
    if own.read_bytes() != theirs.read_bytes():
        raise DataError(
            f"{theirs.name} of {dataset.path} is not the tokenizer this run was trained with: "
            f"prepare the data again with --tokenizer {own}"
        )
