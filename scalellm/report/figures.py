"""How all plots look, and their two forms: PNG for Markdown, SVG that follows the page it is in.

One figure serves light and dark: everything but the data is drawn in INK, which the SVG leaves to
the page (`currentColor`), and the colours of the data are mid-tones that stand out on both.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

INK = "#1a202c"
WIDTH_IN = 6.4
_STYLE: dict[str, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "font.size": 9,
    "grid.alpha": 0.2,
    "grid.color": INK,
    "hatch.color": INK,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "path",  # the same shapes in every browser, whatever fonts it has
    "svg.hashsalt": "scalellm",  # the same file for the same figures
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a folder's name is a dollar
    "xtick.color": INK,
    "ytick.color": INK,
}


_Draw = TypeVar("_Draw", bound=Callable[..., Any])


@contextmanager
def style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(cast(Any, _STYLE)), warnings.catch_warnings():
        # A name in letters that the font lacks is drawn as boxes; the tables have it right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def styled(draw: _Draw) -> _Draw:
    @wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with style():
            return draw(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


def write_png(figure: Any, path: Path) -> None:
    """Writes a figure on white; the file is whole or not there."""
    with style():
        temporary = path.with_name(f".{path.stem}.writing.png")
        figure.savefig(temporary, dpi=130, facecolor="white")
        figure.set_layout_engine("none")  # it stays as it was laid out: that takes most of the time
        temporary.replace(path)


def to_svg(figure: Any, name: str) -> str:
    """Returns an `<svg>` element to stand inside a page, in the page's own text colour.

    Args:
        name: makes the ids its own among the charts of one page: letters, digits and hyphens.
    """
    with style():
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
    # The page decides on the size; the viewBox keeps the proportions.
    head, _, rest = text.partition(">")
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest
