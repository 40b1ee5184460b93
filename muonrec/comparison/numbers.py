"""The numbers of an answer: what each arm of a comparison reaches, how surely, when, and at what cost."""

from __future__ import annotations

import dataclasses

from muonrec.metrics import Interval


@dataclasses.dataclass(frozen=True)
class Measured:
    """One number of an arm over its seeds.

    Args:
        values: of each seed, in the order of `ArmAnswer.seeds`.
        mean, sd: over the seeds; ``sd`` with one degree of freedom less, 0 for a single seed.
        difference: relative to the control over the seeds that both have (0.05 is 5 % more); None for the control
            itself, or where the control's is not positive. The 95 % interval of test metrics is over users and seeds,
            see `Paired`; where the runs kept no values by target, and of other numbers, it is a t interval over seeds,
            infinite for one.
        both: means of the arm and of the control over the seeds that both have; None where there are none.
    """

    values: tuple[float, ...]
    mean: float
    sd: float
    difference: Interval | None = None
    both: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """A part of the test targets, such as the tail items.

    Args:
        label: such as ``tail (<= 5)``.
        num_targets, num_users: in it.
        metric: the main one over these targets; None where there are none.
    """

    label: str
    num_targets: int
    num_users: int
    metric: Measured | None


@dataclasses.dataclass(frozen=True)
class Reached:
    """When a run first reached a target.

    Args:
        steps, seconds: of the first evaluation whose median of three is at the target; where it is never, all steps of
            the budget, and the seconds that they would take.
        is_censored: never within the budget, so that both are lower bounds.
    """

    steps: float
    seconds: float
    is_censored: bool


@dataclasses.dataclass(frozen=True)
class Target:
    """When an arm reaches a share of the best that the control of the same seed and budget ever reaches on validation.

    Args:
        level: the share, 0.99 or 1.0, of the control's best median of three successive validations.
        reached: by seed, in the order of `ArmAnswer.seeds`.
        num_censored: seeds that never reach it.
        steps_saved, seconds_saved: mean over seeds of ``1 - arm / control``, where the control reaches its own best at
            the same level, with its 95 % t interval over seeds, which is infinite for one seed; None for the control. A
            seed that never reaches counts with its whole budget, which makes the saving an upper bound. Seconds are of
            the seeds whose two runs were on one machine; None without any.
    """

    level: float
    reached: tuple[Reached, ...]
    num_censored: int
    steps_saved: Interval | None
    seconds_saved: Interval | None

    @property
    def is_bound(self) -> bool:
        """Whether a seed never reaches it, so that the savings are upper bounds."""
        return self.num_censored > 0


@dataclasses.dataclass(frozen=True)
class Chance:
    """What a `Target` says of an arm that is as good as the control: of the control's runs held against each other.

    A seed of the control always reaches its own best, and another one may never, so that an arm which is as good seems
    slower: this is by how much.

    Args:
        level: of the target.
        num_pairs: ordered pairs of the control's runs.
        num_censored: of those in which the first never reaches ``level`` of the best of the second.
        steps_saved: mean over the pairs, as of `Target`; NaN without any.
    """

    level: float
    num_pairs: int
    num_censored: int
    steps_saved: float


@dataclasses.dataclass(frozen=True)
class ArmAnswer:
    """One arm at one budget.

    Args:
        arm: its name.
        budget: fraction of the full steps.
        seeds: of its finished runs.
        paired_seeds: those of them of which the control has a finished run, too.
        rates: tuned, by name.
        test: metrics on the test targets, by name.
        valid: the main metric at each run's best validation.
        area: area under the validation curve, as its mean height from the first evaluation to the end of the budget.
        groups: the main metric on parts of the test targets: ``popularity`` (tail, middle, head) and ``length``.
        targets: steps and seconds to each level.
        by_chance: of the control, at each level what equal arms would show; empty for the others.
        steps_to_own_best: step of each seed's own best validation, which is what the paper prints.
        steps_to_own_best_saved: mean over seeds of ``1 - arm / control`` of those, with its interval; None for the
            control. A worse arm can have it too, by stopping to improve early.
        events_per_s, optimizer_share, peak_memory_bytes, seconds: means over the seeds.
    """

    arm: str
    budget: float
    seeds: tuple[int, ...]
    paired_seeds: tuple[int, ...]
    rates: dict[str, float]
    test: dict[str, Measured]
    valid: Measured
    area: Measured
    groups: dict[str, list[Group]]
    targets: tuple[Target, ...]
    by_chance: tuple[Chance, ...]
    steps_to_own_best: tuple[int, ...]
    steps_to_own_best_saved: Interval | None
    events_per_s: float
    optimizer_share: float
    peak_memory_bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """All of a comparison's numbers and its verdict.

    Args:
        control: name of the control.
        metric: the main metric.
        arms: by budget, in falling order, then by name in the order of the design; arms without a finished final run
            are left out.
        flags: what a reader must know: a best value at the edge of a grid, failed runs, few seeds, runs that ended
            early, unequal numbers of trials; a sentence each.
        verdict: one paragraph, written from the numbers.
    """

    control: str
    metric: str
    arms: dict[float, dict[str, ArmAnswer]]
    flags: list[str]
    verdict: str
