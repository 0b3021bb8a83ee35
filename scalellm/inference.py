"""A trained run, loaded to be used: evaluation on any dataset, text generation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

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
    data_path: Path | str
    splits: tuple[str, ...]
    evaluation: Evaluation
    num_words: int
    num_bytes: int

    def figures(self) -> dict[str, float]:
        result = self.evaluation
        return {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "perplexity_per_word": result.perplexity_per_word(self.num_words),
            "bits_per_byte": result.bits_per_byte(self.num_bytes),
            "tokens": result.num_tokens,
            "words": self.num_words,
            "bytes": self.num_bytes,
        }

    def to_json(self) -> str:
        return json.dumps({"data": str(self.data_path), "splits": self.splits} | self.figures())

    def __str__(self) -> str:
        figures = self.figures()
        return (
            f"{self.data_path} ({' + '.join(self.splits)}): {figures['tokens']:,} tokens, "
            f"{figures['words']:,} words, {figures['bytes']:,} bytes\n"
            f"loss                 {figures['loss']:.4f} nats per token\n"
            f"perplexity           {figures['perplexity']:.2f} per token\n"
            f"perplexity per word  {figures['perplexity_per_word']:.6g}\n"
            f"bits per byte        {figures['bits_per_byte']:.4f}"
        )


def evaluate_run(
    path: Path, data_path: Path | str | None, split: str | None, batch_size: int
) -> EvaluationReport:
    """Evaluates a run's newest checkpoint in one process.

    Without `split`: the validation split of the run's own dataset, or all of another one.

    Raises:
        DataError: the dataset's ids are of another tokenizer than the run's.
    """
    source = checkpoint.open_checkpoint(path)
    config = load_run_config(_run_dir(source))
    store = open_store(data_path or config.data.path, config.data.remote)
    manifest = load_manifest(store)
    is_own = _absolute(store.location) == _absolute(config.data.path)
    everything = tuple(manifest.splits)
    splits = (split,) if split else (("validation",) if is_own else everything)
    datasets = [data.TokenDataset(store, name, manifest) for name in splits]
    _check_own_tokenizer(source)
    _check_tokenizer(_run_dir(source), datasets[0])
    model = _load_model(source)
    with ranks("auto", config.run.threads, process_group=False) as world:
        strategy = Single(world, TrainConfig(precision=config.train.precision), Options())
        strategy.setup(model, lambda parameters: torch.optim.SGD(p for _, p in parameters))
        results = [_evaluate_split(strategy, dataset, config, batch_size) for dataset in datasets]
    num_tokens = sum(result.num_tokens for result in results)
    nats = sum(result.loss * result.num_tokens for result in results)
    return EvaluationReport(
        store.location,
        splits,
        Evaluation(nats / max(1, num_tokens), num_tokens),
        sum(dataset.num_words_text for dataset in datasets),
        sum(dataset.num_bytes_text for dataset in datasets),
    )


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
