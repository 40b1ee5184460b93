"""A comparison of any model: the arms of a function that trains one, under the protocol of `pipeline.compare`."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from muonrec.comparison.kept import Kept
from muonrec.comparison.protocol import check_budgets, check_fingerprints, check_seeds, check_settings, check_tuned
from muonrec.comparison.results import RESULTS, Arm, Comparison, Design, RunResult, read_comparison, write_results
from muonrec.comparison.tuning import Asked, carry_out

logger = logging.getLogger(__name__)

# What ``train_arm`` may return, with the meaning that `RunResult` gives it.
RETURNED = (
    "valid", "test", "per_unit", "curve_step", "curve_seconds", "curve_value", "num_steps", "best_step", "seconds",
    "events_per_s", "optimizer_share", "peak_memory_bytes", "device", "fingerprints",
)  # fmt: skip
# Of a trial, which the test set must not touch.
_OF_TEST = ("test", "per_unit")
_TOLERANCE = 1e-4  # between a metric and the mean of its values by test example, relative
_CURVE = ("curve_step", "curve_seconds", "curve_value")


def compare(
    train_arm: Callable[..., Mapping[str, Any]],
    arms: Mapping[str, Mapping[str, Any]],
    metric: str,
    *,
    higher_is_better: bool = True,
    control: str = "control",
    may_differ: Sequence[str] = ("optimizer",),
    trials: int = 12,
    tuning_seeds: Sequence[int] = (0, 101, 102),
    leaders: int = 3,
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    budgets: Sequence[float] = (1.0,),
    max_extensions: int = 2,
    output: str | Path | None = None,
    version: str | None = None,
    name: str = "comparison",
) -> Comparison:
    """Tune every arm of ``train_arm`` alike on validation, run the seeds at the tuned rates, keep what came out.

    ``train_arm(settings, seed=, budget=, is_final=)`` trains a new model and returns some of `RETURNED`: ``valid`` with
    ``metric`` always, ``test`` when ``is_final``; ``per_unit``, values of metrics by test example, lets the intervals
    resample these beside the seeds; ``curve_*`` gives steps to target; ``fingerprints``, such as of the initial weights
    and of the first batches, must be equal between arms. It draws weights and order of the data from ``seed`` alone and
    trains ``budget`` times its full steps with a full schedule. One that raises FloatingPointError has diverged.

    Under torchrun every rank calls this, and ``train_arm`` returns the same numbers on each. Not for runs that must
    survive the process: those are a queue of `pipeline.compare`; with ``output`` at least what has ended is kept.

    Args:
        train_arm: as above.
        arms: settings by arm; a list or an array of numbers is the grid of a tuned rate, from which ``train_arm`` gets
            one value.
        metric: the main one, such as ``auc``.
        higher_is_better: of ``metric``.
        control: the arm that the others are held against.
        may_differ: settings, beside the tuned rates, in which an arm may differ from the control.
        trials: of each arm's search, at each budget.
        tuning_seeds: of the trials: the first searches, and the leaders' means over all decide.
        leaders: best points of each arm that run with every tuning seed.
        seeds: of the final runs.
        budgets: fractions of the full steps; each is tuned by itself.
        max_extensions: how often a grid whose end is best is extended by a value, for every arm.
        output: folder of ``results.parquet``; runs that it holds are not repeated.
        version: of the code; a new one repeats every run. None: a hash of the file that ``train_arm`` is written in.
        name: for people.

    Returns:
        All runs; `Comparison.answer` says what they show.

    Raises:
        ValueError: arms differ in what ``may_differ`` does not name, or did not start alike; or ``train_arm`` returned
            what it must not; or there is an ``output``, no ``version``, and no file of ``train_arm``.
        ImportError: optuna is missing.
    """
    if control not in arms:
        raise ValueError(f"control {control!r} is none of the arms: {', '.join(arms)}")
    grids = {arm: {key: _numbers(value) for key, value in own.items() if _is_grid(value)} for arm, own in arms.items()}
    fixed = {arm: {key: value for key, value in own.items() if key not in grids[arm]} for arm, own in arms.items()}
    for arm in arms:
        named = [*may_differ, *grids[arm], *grids[control]]
        check_settings(arm, {**fixed[arm], **grids[arm]}, {**fixed[control], **grids[control]}, named=named)
        check_tuned(arm, grids[arm], grids[control], may_differ=may_differ)
    check_seeds(seeds, tuning_seeds)
    check_budgets(budgets)
    if trials < 1 or leaders < 1:
        raise ValueError(f"trials={trials} and leaders={leaders} were asked; every arm needs at least one of each")
    design = Design(
        name,
        tuple(
            Arm(arm, fixed[arm], tuple(may_differ), (), grids[arm], {key: (key,) for key in grids[arm]}) for arm in arms
        ),
        control,
        metric=metric,
        higher_is_better=higher_is_better,
        trials=trials,
        tuning_seeds=tuple(tuning_seeds),
        leaders=leaders,
        seeds=tuple(seeds),
        budgets=tuple(sorted(budgets, reverse=True)),
    )
    if version is None:
        version = "" if output is None else _version_of(train_arm)
    calls = _Calls(train_arm, design, fixed, Path(output) if output is not None else None, version)
    carry_out(design, calls.execute, max_extensions=max_extensions)
    return calls.finish()


class _Calls:
    """Calls the function for what is not known yet."""

    def __init__(
        self,
        train_arm: Callable[..., Mapping[str, Any]],
        design: Design,
        settings: Mapping[str, Mapping[str, Any]],
        output: Path | None,
        version: str,
    ) -> None:
        self._train_arm, self._design, self._settings = train_arm, design, settings
        self._output, self._version = output, version
        earlier = read_comparison(output).runs if output is not None and (output / RESULTS).is_file() else ()
        self._kept = Kept(earlier, design, key=lambda run: run.run, stands=lambda run: run.sources_hash == version)

    def execute(self, asked: Sequence[Asked]) -> list[RunResult]:
        found = []
        for ask in asked:
            settings = {**self._settings[ask.arm], **ask.rates}
            identity = RunResult(self._key(ask, settings), **vars(ask), sources_hash=self._version)
            known = self._kept.like(identity)
            if known is not None:
                logger.info("%s, %s, seed %d: known from %s", ask.arm, ask.rates, ask.seed, self._output)
            # Known perhaps as another trial: the search may have been asked otherwise then.
            result = self._call(identity, settings) if known is None else dataclasses.replace(known, **vars(ask))
            self._kept.add(result)
            self._check(result)
            self._write()
            found.append(result)
        return found

    def finish(self) -> Comparison:
        """The comparison, once nothing more is asked."""
        self._kept.let_go()
        self._write()
        return Comparison(self._design, tuple(self._kept))

    def _write(self) -> None:
        if self._output is not None and _is_first():
            write_results(self._output, self._design, self._kept)

    def _check(self, result: RunResult) -> None:
        others = [run for run in self._kept if not run.superseded]
        check_fingerprints(self._design, others)
        for metric, values in result.per_unit.items():
            for other in others:
                if metric in other.per_unit and np.shape(values) != np.shape(other.per_unit[metric]):
                    raise ValueError(
                        f"train_arm returned per_unit {metric} of shape {np.shape(values)} for {result.arm}, and "
                        f"{np.shape(other.per_unit[metric])} for {other.arm}; return one value for each test example, "
                        "in the same order for every arm"
                    )

    def _key(self, ask: Asked, settings: Mapping[str, Any]) -> str:
        # The arm counts, too: arms with equal settings are runs of their own here.
        told = [ask.arm, ask.stage, settings, ask.seed, ask.budget, self._version]
        text = json.dumps(told, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _call(self, run: RunResult, settings: Mapping[str, Any]) -> RunResult:
        is_final = run.stage == "final"
        try:
            returned = self._train_arm(dict(settings), seed=run.seed, budget=run.budget, is_final=is_final)
        except FloatingPointError as error:
            return dataclasses.replace(run, status="diverged", fault=str(error))
        if unknown := sorted(set(returned) - set(RETURNED)):
            raise ValueError(f"train_arm returned {', '.join(unknown)}; it may return {', '.join(RETURNED)}")
        returned = {key: _AS[key](value) for key, value in returned.items()}
        for part in ("valid", "test") if is_final else ("valid",):
            if self._design.metric not in returned.get(part, {}):
                raise ValueError(
                    f"train_arm returned no {part} {self._design.metric}; return {{{part!r}: {{...}}, ...}}"
                )
            if not math.isfinite(value := returned[part][self._design.metric]):
                return dataclasses.replace(run, status="diverged", fault=f"{part} {self._design.metric} is {value}")
        lengths = {key: len(returned.get(key, ())) for key in _CURVE}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{length} of {key}" for key, length in lengths.items())
            raise ValueError(f"train_arm returned {listed}; return one of each for every validation")
        for name, values in returned.get("per_unit", {}).items():
            told = returned.get("test", {}).get(name, math.nan)
            if abs(np.mean(values) - told) > _TOLERANCE * max(abs(told), _TOLERANCE):
                raise ValueError(
                    f"train_arm returned test {name} {told:g}, and per_unit values of it whose mean is "
                    f"{np.mean(values):g}; leave a metric that is no mean over the test examples out of per_unit"
                )
        kept = {key: value for key, value in returned.items() if is_final or key not in _OF_TEST}
        logger.info("%s, %s, seed %d: %s", run.arm, run.rates, run.seed, kept["valid"])
        return dataclasses.replace(run, **kept)


def _version_of(train_arm: Callable[..., Any]) -> str:
    """Hash of the file that the function, or the class of the object, is written in."""
    written = inspect.unwrap(getattr(train_arm, "func", train_arm))
    try:
        path = inspect.getsourcefile(written if inspect.isroutine(written) else type(written))
        return hashlib.sha256(Path(path or "").read_bytes()).hexdigest()[:12]
    except (OSError, TypeError):
        raise ValueError(
            f"{train_arm!r} has no file to tell one version of it from another; give version=, and another one "
            "whenever what it does has changed, or leave out output"
        ) from None


def _is_grid(value: Any) -> bool:
    """Whether a setting is a list or an array of numbers, NumPy's or Python's."""
    numbers = value if isinstance(value, list) else value.tolist() if isinstance(value, np.ndarray) else []
    return (
        isinstance(numbers, list)
        and bool(numbers)
        and all(isinstance(number, Real) and not isinstance(number, bool | np.bool_) for number in numbers)
    )


def _numbers(values: Any) -> tuple[float, ...]:
    """As Python's own numbers, which hash and print alike wherever they come from."""
    return tuple(value.item() if isinstance(value, np.generic) else value for value in list(values))


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


# How to keep what is returned, be it of Python, NumPy or torch.
_AS: dict[str, Callable[[Any], Any]] = {
    "valid": _floats,
    "test": _floats,
    "per_unit": lambda found: {name: np.asarray(values, dtype=np.float64) for name, values in found.items()},
    "curve_step": lambda values: tuple(map(int, values)),
    "curve_seconds": lambda values: tuple(map(float, values)),
    "curve_value": lambda values: tuple(map(float, values)),
    "num_steps": int,
    "best_step": int,
    "seconds": float,
    "events_per_s": float,
    "optimizer_share": float,
    "peak_memory_bytes": int,
    "device": str,
    "fingerprints": dict,
}


def _is_first() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is None or not dist.is_initialized() or dist.get_rank() == 0
