"""What the figures of every report share: colours, style, and the way into a page or a file."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

# Okabe & Ito 2008: told apart by colour-blind readers, and legible on white and on near-black alike.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":")  # of what comes beyond the colours
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#888888"
_INK = "#010203"  # stands for the reader's text colour, see `svg`
_DOTS_PER_INCH = 200  # of a PNG: twice what a page shows


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw and save within it, so that all figures look alike.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("matplotlib is not installed; pip install 'muonrec[report]'", name="matplotlib") from error
    settings = {
        "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
        "svg.hashsalt": "muonrec",  # the same runs give the same bytes
        "text.parse_math": False,  # a name may hold a dollar
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.formatter.useoffset": False,
        "axes.formatter.limits": (-4, 6),
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "figure.constrained_layout.use": True,
    }
    with matplotlib.rc_context(settings):
        yield


def line_styles(count: int) -> list[dict[str, Any]]:
    """Arguments of ``plot`` that tell ``count`` lines apart."""
    return [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]} for i in range(count)
    ]


def subplots(columns: int, *, height: float, rows: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure as wide as the page and its axes as an array ``[rows, columns]``; ``height`` in inches."""
    # No pyplot: it keeps every figure alive and picks a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def max_ticks(count: int, *, whole: bool = False) -> Any:
    """A locator of at most so many ticks, at whole numbers if asked."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, integer=whole)


def reach(value: Mapping[str, float]) -> np.ndarray:
    """``[2, 1]``: how far an interval of ``mean``, ``low`` and ``high`` reaches below and above the mean."""
    return np.maximum([[value["mean"] - value["low"]], [value["high"] - value["mean"]]], 0.0)


def svg(figure: Any) -> str:
    """The figure as SVG to be put into HTML; its ink becomes the page's text colour, light or dark."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # Inline figures share one name space; matplotlib numbers its groups anew in each.
    text = re.sub(
        r' id="(?:figure|axes|line2d|text|patch|matplotlib\.axis|xtick|ytick|legend|LineCollection)_\d+"', "", text
    )
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )


def write_png(figure: Any, path: Path) -> None:
    """Write the figure on white, at twice the resolution of a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=_DOTS_PER_INCH, facecolor="white", metadata={"Software": None})


def save_figures(draws: Mapping[str, Callable[[], Any]], folder: Path) -> dict[str, str]:
    """What each draws as a PNG in ``folder`` and as SVG text, by name; one that draws None is left out."""
    texts = {}
    with figure_style():
        for name, draw in draws.items():
            path = folder / f"{name}.png"
            path.unlink(missing_ok=True)
            figure = draw()
            if figure is not None:
                texts[name] = svg(figure)
                figure.set_layout_engine("none")  # it is laid out, which takes as long as drawing
                write_png(figure, path)
    return texts


def short_name(name: str, length: int = 28) -> str:
    """A name that does not push the figure off its page; the tables have the whole."""
    # A leading underscore would keep it out of the legend.
    name = name if len(name) <= length else name[: length - 1] + "…"
    return f"\u200b{name}" if name.startswith("_") else name
