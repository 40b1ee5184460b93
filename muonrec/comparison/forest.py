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
        note: below the label.
        panels: what is drawn in each panel.
        colour: of the marks.
        is_header: a line of words alone, above the rows that it is about.
        is_total: drawn apart, as the sum of the rows above.
    """

    label: str
    panels: Sequence[Sequence[Mark]] = ()
    colour: str = GREY
    note: str = ""
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
                mfc = "white" if mark.is_bound else row.colour
                axis.plot([interval.mean], [y], mark.marker, ms=7, color=row.colour, mfc=mfc)
                if mark.is_bound:
                    axis.annotate(
                        "", (interval.mean, y), (-22, 0), "data", "offset points", _ARROW | {"color": row.colour}
                    )
                beside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
                axis.annotate(text, (1.0, y), (4, 0), fontsize=8.5, **beside)
        axis.margins(x=0.15 if _has_bound(rows) else 0.08)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.xaxis.set_major_locator(max_ticks(5 if len(labels) < 3 else 3))
        axis.xaxis.set_major_formatter(share_tick)
        axis.set_xlabel(label)


def label_rows(axes: Sequence[Any], rows: Sequence[Row]) -> None:
    """Name the rows of panels that share them: headers within the first panel, since they are long."""
    names = ["" if row.is_header else f"{short_name(row.label)}\n{row.note}".strip() for row in rows]
    axes[0].set_yticks(range(len(rows)), names)
    for place, (text, row) in enumerate(zip(axes[0].get_yticklabels(), rows, strict=True)):
        if row.is_header:
            at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontweight": "bold"}
            axes[0].annotate(short_name(row.label, 40), (0.015, place), **at)
        elif row.is_total:
            text.set_fontweight("bold")
    for axis in axes:
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=False, axis="y")


def share_tick(share: float, _: int) -> str:
    """``+2.5 %``, in as many digits as it takes: the label of a share on an axis."""
    digits = next((digits for digits in range(3) if math.isclose(100 * share, round(100 * share, digits))), 3)
    return percent(share, digits) if round(share, 9) else "0"


def level_marker(level: float) -> str:
    """Round for less than the control's best."""
    return "o" if level < 1 else "D"


def level_handles(axis: Any, levels: Sequence[float], rows: Sequence[Row]) -> tuple[list[Any], list[str]]:
    """Markers and words of the legend that tells the targets apart, and bounds from what is known."""
    handles = [axis.plot([], [], level_marker(level), color=GREY)[0] for level in levels]
    names = [f"to {100 * level:.0f} % of the control's best" for level in levels]
    if _has_bound(rows):
        handles.append(axis.plot([], [], level_marker(levels[-1]), color=GREY, mfc="white")[0])
        names.append("at most so much: some seeds never get there")
    return handles, names


def _has_bound(rows: Sequence[Row]) -> bool:
    return any(mark.is_bound for row in rows for marks in row.panels for mark in marks)


def known(interval: Interval | None) -> Interval | None:
    return interval if interval is not None and math.isfinite(interval.mean) else None
