"""A document's files: `report.md` with `plots/*.png`, and `report.html`, which needs neither."""

from __future__ import annotations

from pathlib import Path

from scalellm.errors import UserError
from scalellm.report.document import Chart, Document
from scalellm.report.figures import write_png
from scalellm.report.html import to_html
from scalellm.report.markdown import PLOTS_NAME, to_markdown


def write_document(document: Document, folder: Path) -> list[Path]:
    """Writes the page in both forms into `folder`, which is made if need be.

    Returns:
        report.html, report.md and the plots.

    Raises:
        UserError: the folder cannot be written.
    """
    charts = [block for block in document.blocks if isinstance(block, Chart)]
    names = [chart.name for chart in charts]
    assert len(set(names)) == len(names), f"two charts of one name: {names}"
    page, text = folder / "report.html", folder / "report.md"
    plots = [folder / PLOTS_NAME / f"{name}.png" for name in names]
    try:
        (folder / PLOTS_NAME).mkdir(parents=True, exist_ok=True)
        for chart, path in zip(charts, plots, strict=True):
            write_png(chart.figure, path)
        _write(text, to_markdown(document))
        _write(page, to_html(document))
    except OSError as error:
        if not isinstance(error, PermissionError | FileExistsError | NotADirectoryError):
            raise
        raise UserError(
            f"the report cannot be written into {folder}: {error.strerror}; choose another folder"
        ) from None
    return [page, text, *plots]


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    # What is no Unicode text, as half a pair of a surrogate in a file's name, becomes "?".
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)
