"""A document as Markdown, its plots as pictures in a folder beside it."""

from __future__ import annotations

import re

from scalellm.report.document import (
    Block,
    Chart,
    Document,
    Heading,
    Link,
    Listing,
    Paragraph,
    Table,
)

PLOTS_NAME = "plots"


def to_markdown(document: Document) -> str:
    parts = [f"# {_escaped(document.title)}"]
    parts += [_markdown(block) for block in document.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"## {_escaped(block.text)}"
    if isinstance(block, Paragraph):
        return "".join(_inline(part) for part in block.parts)
    if isinstance(block, Listing):
        return "\n".join(f"- **{_escaped(a)}**: {_escaped(b)}" for a, b in block.items)
    if isinstance(block, Chart):
        title = _escaped(block.title)
        picture = f"![{title}]({PLOTS_NAME}/{block.name}.png)"
        return f"### {title}\n\n{picture}\n\n{_escaped(block.caption)}"
    if isinstance(block, Table):
        lines = [[_escaped(column) for column in block.columns], ["---"] * len(block.columns)]
        lines += [[_escaped(cell.text) for cell in row] for row in block.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
    return f"{_escaped(block.title)}:\n\n{fence}\n{block.text.rstrip()}\n{fence}"


def _inline(part: str | Link) -> str:
    if isinstance(part, str):
        return _escaped(part)
    return f"[{_escaped(part.text)}]({part.target})"


def _escaped(text: str) -> str:
    """Returns text that Markdown shows as it is, on one line."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore inside a word means nothing to GitHub's Markdown and is easier to read bare.
    return re.sub(r"([\\`*\[\]|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)
