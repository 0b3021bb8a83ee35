"""`scalellm prepare`: what it takes and calls; imports inside, so it answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalellm.commands import Parser
from scalellm.errors import EXIT_DONE, UserError


def prepare(argv: Sequence[str]) -> int:
    """Makes a dataset and prints what was done."""
    options = _parser().parse_args(argv)
    if options.limit_mb is not None and not 0 < options.limit_mb < 1e12:
        raise UserError(f"--limit-mb={options.limit_mb} MB must be a number above 0")
    from scalellm.data.prepare import PrepareOptions
    from scalellm.data.prepare import prepare as prepare_dataset
    from scalellm.data.refine_options import refine_options

    clean, dedup = refine_options(options.clean, options.dedup, options.set)
    report = prepare_dataset(
        PrepareOptions(
            sources=tuple(options.source),
            validation_sources=tuple(options.validation_source),
            out=options.out,
            tokenizer=options.tokenizer,
            vocab_size=options.vocab_size,
            val_fraction=options.val_fraction,
            min_chars=options.min_chars,
            encoding=options.encoding,
            text_field=options.text_field,
            num_workers=options.workers,
            overwrite=options.overwrite,
            engine=options.engine,
            ray_address=options.ray_address,
            limit_bytes=None if options.limit_mb is None else int(options.limit_mb * 1e6),
            clean=clean,
            dedup=dedup,
            pack=options.pack,
        )
    )
    print(report)
    return EXIT_DONE


def _parser() -> Parser:
    parser = Parser("prepare", "Turn text into a dataset of token shards.")
    parser.add_argument(
        "--source",
        nargs="+",
        default=["stdlib"],
        metavar="SOURCE",
        help="stdlib, files, folders, or hf:NAME (default: stdlib)",
    )
    parser.add_argument("--validation-source", nargs="+", default=[], metavar="SOURCE")
    parser.add_argument("--out", type=Path, required=True, help="dataset folder to write")
    parser.add_argument(
        "--tokenizer",
        default="bpe",
        help="bpe, unigram or char, trained here; or a .model or tokenizer.json file",
    )
    parser.add_argument("--vocab-size", type=int, default=8192, help="tokens, when trained here")
    parser.add_argument("--val-fraction", type=float, default=0.01, help="of the documents")
    parser.add_argument("--min-chars", type=int, default=1, help="shorter documents are left out")
    parser.add_argument("--encoding", default="auto", help="auto, or the encoding of all files")
    parser.add_argument("--text-field", default="text", help="of .jsonl, .parquet and hf: sources")
    parser.add_argument(
        "--clean",
        metavar="none|light|web|code|FILE.yaml",
        help="stages of cleaning: a preset, or a file of the keys that --set takes",
    )
    parser.add_argument(
        "--dedup",
        choices=("none", "exact", "near"),
        default="none",
        help="remove documents that are equal, or also those that share most of their words",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="clean.STAGE.KEY=VALUE or dedup.KEY=VALUE, such as dedup.index=DIR; repeatable",
    )
    parser.add_argument(
        "--pack",
        type=int,
        metavar="SEQ_LEN",
        help="lay whole documents into rows of so many tokens",
    )
    parser.add_argument("--limit-mb", type=float, help="use about so many MB of the source")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    parser.add_argument("--engine", default="local", help="encode here (local) or on a Ray cluster")
    parser.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="of the cluster; auto, or local to start one (default: one that runs, else local)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset at --out")
    return parser
