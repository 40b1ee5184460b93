"""How the figures of a comparison show its arms, an arm in the same colour and with the same marker in each."""

from __future__ import annotations

import dataclasses

from muonrec.comparison.results import Comparison, Design
from muonrec.figures import COLOURS, DASHES, MARKERS


@dataclasses.dataclass(frozen=True)
class Look:
    """How an arm is drawn: one that shares the colour of another has a dash and a marker of its own."""

    colour: str
    marker: str
    dash: str


def looks(design: Design) -> dict[str, Look]:
    """By place: the control, the arms that differ in the dense optimizer alone, and the others.

    So Muon looks the same in a comparison that has one-rate and in one that does not.
    """
    others = [arm for arm in design.arms if arm.name != design.control]
    names = [design.control, *(arm.name for arm in sorted(others, key=lambda arm: bool(arm.also_differs)))]
    found = {}
    for place, name in enumerate(names):
        turn, index = divmod(place, len(COLOURS))
        found[name] = Look(COLOURS[index], MARKERS[(index + turn) % len(MARKERS)], DASHES[turn % len(DASHES)])
    return found


def budget_name(comparison: Comparison, budget: float) -> str:
    """``full budget (2,000 steps)``."""
    share = "full budget" if budget == 1 else f"{100 * budget:.3g} % of the budget"
    steps = max((run.num_steps for arm in comparison.arms for run in comparison.finals(arm, budget)), default=0)
    return f"{share} ({steps:,} steps)" if steps else share


def in_thousands(number: float, _: int) -> str:
    """``12,000``, as a formatter of an axis."""
    return f"{number:,.10g}"
