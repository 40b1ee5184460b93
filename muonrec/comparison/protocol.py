"""What makes two arms comparable: settings and starts that differ in nothing but what the comparison names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from muonrec.comparison.results import Design, RunResult
from muonrec.config import flat


def matches(path: str, pattern: str) -> bool:
    """Whether ``pattern`` names the setting at ``path`` or a section that holds it; ``*`` stands for any one part."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(want in ("*", part) for want, part in zip(wanted, parts, strict=False))


def differences(control: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two resolved configs differ, by path: the control's value and the arm's, None for none."""
    ours, theirs = flat(control), flat(arm)
    paths = [*ours, *(path for path in theirs if path not in ours)]
    return {path: (ours.get(path), theirs.get(path)) for path in paths if ours.get(path) != theirs.get(path)}


def check_settings(
    name: str, arm: Mapping[str, Any], control: Mapping[str, Any], *, named: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """Refuse an arm that differs from the control in a setting that nobody named.

    Args:
        name: of the arm.
        arm, control: resolved configs, every default spelled out.
        named: patterns of settings that may differ, as in `matches`.

    Returns:
        The named differences.

    Raises:
        ValueError: names every other difference.
    """
    found = differences(control, arm)
    unnamed = [path for path in found if not any(matches(path, pattern) for pattern in named)]
    if unnamed:
        listed = "; ".join(f"{path} ({found[path][0]!r} and {found[path][1]!r})" for path in unnamed)
        raise ValueError(
            f"arm {name!r} differs from the control in {listed}, and so in more than its optimizer; take the override "
            f"out, or name it: arms.{name}.may_differ"
        )
    return found


def check_tuned(name: str, arm: Iterable[str], control: Iterable[str], *, may_differ: Sequence[str]) -> None:
    """Refuse an arm that tunes a setting which the control has fixed, or the other way round, and does not name it.

    Args:
        name: of the arm.
        arm, control: the settings that each tunes.
        may_differ: patterns of settings that may differ, as in `matches`.

    Raises:
        ValueError: names the settings.
    """
    ours, theirs = set(control), set(arm)
    unnamed = [path for path in sorted(ours ^ theirs) if not any(matches(path, pattern) for pattern in may_differ)]
    if unnamed:
        who = [f"{path} ({name if path in theirs else 'the control'} alone)" for path in unnamed]
        raise ValueError(
            f"arm {name!r} and the control do not tune the same settings: {', '.join(who)}; tune them for both, or "
            f"name them in may_differ of {name!r}"
        )


def check_seeds(seeds: Sequence[int], tuning_seeds: Sequence[int]) -> None:
    """Refuse final runs that are no news. Raises ValueError: none, one twice, or the tuning's, which chose rates."""
    for name, own in (("seeds", seeds), ("tuning_seeds", tuning_seeds)):
        if not own:
            raise ValueError(f"{name} is empty; give at least one")
        if len(set(own)) < len(own):
            raise ValueError(f"{name}={list(own)} holds a seed twice, which would count as evidence twice")
    if both := sorted({*seeds} & {*tuning_seeds}):
        raise ValueError(
            f"seeds={list(seeds)} holds {', '.join(map(str, both))} of tuning_seeds, which the rates were chosen to "
            "suit; take others, or change tuning_seeds"
        )


def check_budgets(budgets: Sequence[float]) -> None:
    """Raises ValueError: there is none, one is no fraction of the steps, or one is there twice."""
    if not budgets or not all(0 < budget <= 1 for budget in budgets) or len(set(budgets)) < len(budgets):
        raise ValueError(
            f"budgets={list(budgets)} was asked; give fractions of the steps, each once, such as [1.0, 0.5]"
        )


def check_fingerprints(design: Design, runs: Iterable[RunResult]) -> None:
    """Refuse runs of one seed that did not start alike: initial weights, first batches and order of the data.

    Runs without fingerprints are passed over. What an arm's ``may_differ`` names is not compared.

    Raises:
        ValueError: names what differs, between whom.
    """
    held = [run for run in runs if run.fingerprints]
    controls = {run.seed: run for run in reversed(held) if run.arm == design.control}
    for run in held:
        control = controls.get(run.seed)
        if control is None:
            continue
        may_differ = design.arm(run.arm).may_differ
        unlike = [
            f"{name} ({control.fingerprints.get(name)} and {run.fingerprints.get(name)})"
            for name in sorted(control.fingerprints | run.fingerprints)
            if control.fingerprints.get(name) != run.fingerprints.get(name) and name not in may_differ
        ]
        if unlike:
            raise ValueError(
                f"runs {control.run} ({control.arm}) and {run.run} ({run.arm}) of seed {run.seed} did not start alike: "
                f"they differ in {', '.join(unlike)}; if that is meant, name it in arms.{run.arm}.may_differ"
            )
