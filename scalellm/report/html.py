"""A document as one HTML file that loads nothing: style, script and plots are inside.

All text is escaped, and the page's own policy lets no script run but the one below, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape

from scalellm.report.document import (
    Block,
    Cell,
    Chart,
    Details,
    Document,
    Heading,
    Link,
    Listing,
    Paragraph,
    Table,
)
from scalellm.report.figures import WIDTH_IN, to_svg

_STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1a202c; --soft: #5a6577; --page: #fff;
  --panel: #f6f7f9; --edge: #dbe0e7; --bad: #b42318; --link: #1d5fa8; --shade: #0004; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e8ee; --soft: #9aa5b5; --page: #14171c;
  --panel: #1c2027; --edge: #333a45; --bad: #ff8a7d; --link: #7db7f0; --shade: #000c; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
main {{ max-width: 1340px; margin: 0 auto; padding: 24px clamp(14px, 3vw, 32px) 64px; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6em; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 2em 0 .6em; padding-bottom: .25em;
  border-bottom: 1px solid var(--edge); }}
p, dl {{ max-width: 75ch; overflow-wrap: anywhere; }}
a {{ color: var(--link); }}
dt {{ font-weight: 600; }} dd {{ margin: 0 0 .6em; color: var(--soft); }}
.charts {{ display: grid; gap: 20px; margin: 20px 0; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 540px), 1fr)); }}
figure {{ margin: 0; padding: 14px; background: var(--panel); border: 1px solid var(--edge);
  border-radius: 8px; min-width: 0; }}
figure h3 {{ margin: 0 0 .5em; font-size: 1rem; overflow-wrap: anywhere; }}
figcaption {{ margin-top: .5em; color: var(--soft); font-size: .875rem; }}
/* Shade at an edge behind which there is more to scroll to: covers travel with the content. */
.wide {{ --under: var(--page); overflow-x: auto; background:
  linear-gradient(90deg, var(--under) 40%, transparent) left / 32px 100% no-repeat local,
  linear-gradient(270deg, var(--under) 40%, transparent) right / 32px 100% no-repeat local,
  linear-gradient(90deg, var(--shade), transparent) left / 14px 100% no-repeat scroll,
  linear-gradient(270deg, var(--shade), transparent) right / 14px 100% no-repeat scroll; }}
figure .wide {{ --under: var(--panel); }}
.wide:focus-visible {{ outline: 2px solid var(--link); }}
svg {{ display: block; width: 100%; height: auto; min-width: 480px;
  max-width: {WIDTH_IN * 120:.0f}px; }}
table {{ border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 5px 12px 5px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--edge); }}
th {{ vertical-align: bottom; max-width: 7rem; }} thead th:first-child {{ max-width: none; }}
td {{ max-width: 26rem; overflow-wrap: break-word; }}
td:first-child {{ white-space: nowrap; padding-right: 18px; }}
.n {{ text-align: right; }} td.n {{ white-space: nowrap; }}
.bad {{ color: var(--bad); }} .muted {{ color: var(--soft); }}
.bad, .muted:not(.n) {{ min-width: 15rem; }}
th button {{ font: inherit; font-weight: 600; color: inherit; background: none; border: 0;
  padding: 0; text-align: inherit; cursor: pointer; }}
th[aria-sort=ascending] button::after {{ content: " \\25b2"; }}
th[aria-sort=descending] button::after {{ content: " \\25bc"; }}
pre {{ overflow-x: auto; padding: 12px; background: var(--panel); font-size: .8125rem; }}
summary {{ cursor: pointer; }}
@media (max-width: 600px) {{ figure {{ padding: 8px; }}
  td:first-child {{ white-space: normal; min-width: 9rem; }} }}
"""

# Sorts a table by the column whose heading is pressed; what has no figure stays at the end.
_SCRIPT = """
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const rows = [...body.rows];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const isNumeric = head.classList.contains("n");
    const before = head.getAttribute("aria-sort") || (isNumeric ? "ascending" : "descending");
    const sign = before === "ascending" ? -1 : 1;
    const number = row => row.cells[column].dataset.v;
    const text = row => row.cells[column].textContent;
    const compare = (a, b) => {
      if (!isNumeric) return sign * text(a).localeCompare(text(b), "en", {numeric: true});
      const [x, y] = [number(a), number(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return sign * (x - y);
    };
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    body.append(...rows.slice().sort(compare));
  }));
}
"""


def to_html(document: Document) -> str:
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_escaped(document.title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{_escaped(document.title)}</h1>",
            *_body(document.blocks),
            "</main>",
            f"<script>{_SCRIPT}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _body(blocks: list[Block]) -> list[str]:
    """Charts that follow each other share a grid, two abreast where there is room."""
    parts: list[str] = []
    for index, block in enumerate(blocks):
        is_chart = isinstance(block, Chart)
        if is_chart and not (index and isinstance(blocks[index - 1], Chart)):
            parts.append('<div class="charts">')
        parts.append(_html(block))
        if is_chart and not (index + 1 < len(blocks) and isinstance(blocks[index + 1], Chart)):
            parts.append("</div>")
    return parts


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{_escaped(block.text)}</h2>"
    if isinstance(block, Paragraph):
        return f"<p>{''.join(_inline(part) for part in block.parts)}</p>"
    if isinstance(block, Listing):
        items = (f"<dt>{_escaped(a)}</dt><dd>{_escaped(b)}</dd>" for a, b in block.items)
        return f"<dl>{''.join(items)}</dl>"
    if isinstance(block, Chart):
        return _chart(block)
    if isinstance(block, Details):
        title, text = _escaped(block.title), _escaped(block.text)
        return f"<details><summary>{title}</summary><pre>{text}</pre></details>"
    return _table(block)


def _chart(chart: Chart) -> str:
    svg = to_svg(chart.figure, chart.name)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{_escaped(chart.title)}"', 1)
    return (
        f"<figure><h3>{_escaped(chart.title)}</h3>"
        f'<div class="wide" tabindex="0">{svg}</div>'
        f"<figcaption>{_escaped(chart.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    if not any(table.columns):
        rows = "".join(_row(row, set()) for row in table.rows)
        return f'<div class="wide" tabindex="0"><table><tbody>{rows}</tbody></table></div>'
    numeric = {
        index
        for index in range(len(table.columns))
        if any(row[index].value is not None for row in table.rows)
    }
    head = "".join(
        f'<th scope="col"{_class("n" if index in numeric else "")}>'
        f'<button type="button">{_escaped(name)}</button></th>'
        for index, name in enumerate(table.columns)
    )
    rows = "\n".join(_row(row, numeric) for row in table.rows)
    return (
        f'<div class="wide" tabindex="0"><table class="sorts"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(cells: Sequence[Cell], numeric: set[int]) -> str:
    parts = []
    for index, cell in enumerate(cells):
        names = " ".join(filter(None, ["n" if index in numeric else "", cell.tone]))
        value = "" if cell.value is None else f' data-v="{cell.value!r}"'
        parts.append(f"<td{_class(names)}{value}>{_escaped(cell.text)}</td>")
    return f"<tr>{''.join(parts)}</tr>"


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _inline(part: str | Link) -> str:
    if isinstance(part, str):
        return _escaped(part)
    return f'<a href="{_escaped(part.target)}">{_escaped(part.text)}</a>'


def _escaped(text: str) -> str:
    """Returns text that a page shows and never obeys; control characters have no place in it."""
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text))
