"""`scalellm data`: what its words take and call; imports inside, so it answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalellm.commands import Command, Parser, check_output_file
from scalellm.errors import EXIT_DONE, EXIT_FAILURE, UserError, did_you_mean


def data(argv: Sequence[str]) -> int:
    """Runs `scalellm data WORD ...`; without a word it lists them."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return EXIT_DONE
    word, *rest = argv
    if word not in _WORDS:
        near = did_you_mean(word, _WORDS)
        raise UserError(f"unknown word {word!r} after data{near}; there are: {', '.join(_WORDS)}")
    return _WORDS[word][0](rest)


def _usage() -> str:
    lines = ["usage: scalellm data WORD ...", "", "Look after datasets of token ids.", ""]
    lines += [f"  {word:<10} {meaning}" for word, (_, meaning) in _WORDS.items()]
    return "\n".join([*lines, "", "`scalellm data WORD --help` says more."])


def _inspect(argv: Sequence[str]) -> int:
    parser = Parser("data inspect", "Show what is in a dataset.")
    parser.add_argument("path", help="dataset folder or URL")
    parser.add_argument("--split", help="only this split (default: all)")
    parser.add_argument(
        "--sample", type=int, default=1, metavar="N", help="documents to show of each split"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="read about so many tokens of each split, in frames spread evenly (default: all)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_intermixed_args(argv)
    check_output_file("--json", options.json)
    from scalellm.data.tools.inspect import InspectOptions, inspect_dataset

    inspection = inspect_dataset(
        InspectOptions(options.path, options.split, options.sample, options.max_tokens)
    )
    print(inspection)
    if options.json:
        options.json.write_text(inspection.to_json() + "\n", encoding="utf-8")
    return EXIT_DONE


def _verify(argv: Sequence[str]) -> int:
    parser = Parser(
        "data verify",
        "Check every byte of a dataset and list all damage.",
        "Exit code: 0 sound, 2 damaged.",
    )
    parser.add_argument("path", help="dataset folder")
    parser.add_argument("--workers", type=int, default=0, help="threads; 0: one per core")
    options = parser.parse_intermixed_args(argv)
    from scalellm.data.tools.verify import verify_dataset

    if "://" in options.path:
        raise UserError(f"{options.path} is a URL: verify a copy of it in a folder")
    verification = verify_dataset(Path(options.path), options.workers)
    for line in verification.lines():
        print(line)
    verification.raise_damage()
    return EXIT_DONE


def _diff(argv: Sequence[str]) -> int:
    parser = Parser(
        "data diff",
        "Tell whether two datasets hold the same documents, and how they differ.",
        "Exit code: 0 the same tokenizer, vocabulary, splits and documents in the same order, "
        "1 different,\n2 a mistake or damage. Other options and frame sizes are noted and do not "
        "count.\nMemory: 16 bytes a document of each, about 100 while they are compared.",
    )
    parser.add_argument("a", metavar="A", help="dataset folder or URL")
    parser.add_argument("b", metavar="B", help="dataset folder or URL")
    options = parser.parse_intermixed_args(argv)
    from scalellm.data.tools.diff import diff_datasets

    difference = diff_datasets(options.a, options.b)
    for line in difference.lines():
        print(line)
    return EXIT_DONE if difference.same else EXIT_FAILURE


def _convert(argv: Sequence[str]) -> int:
    parser = Parser("data convert", "Make a dataset of token ids that another tool made.")
    parser.add_argument(
        "source", nargs="+", type=Path, metavar="SOURCE", help="file, folder or Megatron prefix"
    )
    parser.add_argument(
        "--from",
        dest="kind",
        default="auto",
        metavar="KIND",
        help="megatron, nanogpt (also llm.c), mds, hf (saved, Arrow or Parquet) or auto",
    )
    parser.add_argument("--out", type=Path, required=True, help="dataset folder to write")
    parser.add_argument("--tokenizer", type=Path, help="the tokenizer that made the ids")
    parser.add_argument("--vocab-size", type=int, help="number of ids")
    parser.add_argument("--eos-id", type=int, help="the id that ends a document")
    parser.add_argument(
        "--split-name", nargs="+", default=[], metavar="NAME", help="the split of each SOURCE"
    )
    parser.add_argument(
        "--val-fraction", type=float, default=0.0, help="of the documents, for validation"
    )
    parser.add_argument("--column", metavar="NAME", help="of the ids (default: input_ids, tokens)")
    parser.add_argument("--dtype", help="integer type of ids in files that do not say it")
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset at --out")
    options = parser.parse_intermixed_args(argv)
    from scalellm.data.tools._foreign import ReadForeign
    from scalellm.data.tools.convert import ConvertOptions, convert

    report = convert(
        ConvertOptions(
            sources=tuple(options.source),
            out=options.out,
            kind=options.kind,
            split_names=tuple(options.split_name),
            tokenizer=options.tokenizer,
            vocab_size=options.vocab_size,
            eos_id=options.eos_id,
            val_fraction=options.val_fraction,
            read=ReadForeign(options.column, options.dtype),
            overwrite=options.overwrite,
        )
    )
    print(report)
    return EXIT_DONE


_WORDS: dict[str, tuple[Command, str]] = {
    "inspect": (_inspect, "show what is in a dataset"),
    "verify": (_verify, "check every byte, list all damage"),
    "diff": (_diff, "tell whether two datasets are the same, and how they differ"),
    "convert": (_convert, "make a dataset of another tool's token ids"),
}
