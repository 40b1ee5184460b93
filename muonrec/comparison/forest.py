"""Forest plots: intervals of shares below each other, such as what each arm gains over the control."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from muonrec.figures import GREY, max_ticks, short_name
from muonrec.metrics import Interval
from muonrec.page import percent

_ARROW = {"arrowstyle": "<|-", "linewidth": 1.8, "shrinkA": 0, "shrinkB": 4}


@dataclasses.dataclass(frozen=True)
class Mark:
    """One interval of a forest plot.

    Args:
        interval: of a share; None where there is none.
        marker: of its mean.
        is_bound: the share is at most this, so that its interval says nothing of where it is.
    """

    interval: Interval | None
    marker: str = "D"
    is_bound: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a forest plot.

    Args:
        label: at its left.
        panels: what is drawn in each panel.
        colour: of the marks.
        is_header: a line of words alone, above the rows that it is about.
        is_total: drawn apart, as the sum of the rows above.
    """

    label: str
    panels: Sequence[Sequence[Mark]] = ()
    colour: str = GREY
    is_header: bool = False
    is_total: bool = False


def draw_forest(axes: Sequence[Any], rows: Sequence[Row], *, labels: Sequence[str], with_ends: bool = False) -> None:
    """Draw intervals of shares, a panel for each label; the panels share the rows.

    Args:
        axes: as many as ``labels``.
        rows: from the top.
        labels: of the x axes.
        with_ends: also write the ends of the intervals beside their means.
    """
    for panel, (axis, label) in enumerate(zip(axes, labels, strict=True)):
        axis.axvline(0, color=GREY, linewidth=1)
        for place, row in enumerate(rows):
            marks = [] if row.is_header else row.panels[panel]
            for index, mark in enumerate(marks):
                if (interval := known(mark.interval)) is None:
                    continue
                y = place + 0.36 * (index - (len(marks) - 1) / 2)
                ends = [end for end in (interval.low, interval.high) if math.isfinite(end)]
                text = f"{'≤ ' * mark.is_bound}{percent(interval.mean)}"
                if len(ends) == 2 and not mark.is_bound:  # a single seed has no interval
                    axis.plot(ends, [y, y], color=row.colour, linewidth=3.5 if row.is_total else 1.8)
                    if with_ends:
                        text += f" ({' to '.join(percent(end).removesuffix(' %') for end in ends)})"
                hollow = mark.marker == "o" or mark.is_bound
                axis.plot(
                    [interval.mean], [y], mark.marker, ms=7, color=row.colour, mfc="white" if hollow else row.colour
                )
                if mark.is_bound:
                    axis.annotate(
                        "", (interval.mean, y), (-22, 0), "data", "offset points", _ARROW | {"color": row.colour}
                    )
                beside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
                axis.annotate(text, (1.0, y), (4, 0), fontsize=8.5, **beside)
        axis.margins(x=0.15 if any(mark.is_bound for row in rows for marks in row.panels for mark in marks) else 0.08)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.xaxis.set_major_locator(max_ticks(5))
        axis.xaxis.set_major_formatter(lambda share, _: percent(share, 0) if round(share, 9) else "0")
        axis.set_xlabel(label)


def label_rows(axes: Sequence[Any], rows: Sequence[Row]) -> None:
    """Name the rows of panels that share them: headers within the first panel, since they are long."""
    axes[0].set_yticks(range(len(rows)), ["" if row.is_header else short_name(row.label) for row in rows])
    for place, (text, row) in enumerate(zip(axes[0].get_yticklabels(), rows, strict=True)):
        if row.is_header:
            at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontweight": "bold"}
            axes[0].annotate(short_name(row.label, 40), (0.015, place), **at)
        elif row.is_total:
            text.set_fontweight("bold")
    for axis in axes:
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=False, axis="y")


def level_marker(level: float) -> str:
    """A ring for less than the control's best."""
    return "o" if level < 1 else "D"


def level_handles(axis: Any, levels: Sequence[float]) -> tuple[list[Any], list[str]]:
    """Markers and words of the legend that tells the targets apart."""
    handles = [
        axis.plot([], [], level_marker(level), color=GREY, mfc="white" if level < 1 else GREY)[0] for level in levels
    ]
    return handles, [f"to {100 * level:.0f} % of the control's best" for level in levels]


def known(interval: Interval | None) -> Interval | None:
    return interval if interval is not None and math.isfinite(interval.mean) else None
