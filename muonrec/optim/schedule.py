"""Learning rates over time: functions of the step alone that return a multiplier in [0, 1]."""

import math
from collections.abc import Callable
from dataclasses import dataclass


def constant(progress: float, *, final_fraction: float, decay_fraction: float) -> float:
    """Stay at 1; the other arguments have no effect."""
    return 1.0


def cosine(progress: float, *, final_fraction: float, decay_fraction: float) -> float:
    """Half a cosine from 1 to ``final_fraction`` (Loshchilov & Hutter, arXiv 1608.03983), without restarts."""
    return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_stable_decay(progress: float, *, final_fraction: float, decay_fraction: float) -> float:
    """Stay at 1, then fall in a straight line to ``final_fraction`` over the last ``decay_fraction`` of the steps after
    warm-up (Hu et al., arXiv 2404.06395).
    """
    if progress <= 1.0 - decay_fraction:
        return 1.0
    return 1.0 - (1.0 - final_fraction) * (progress - (1.0 - decay_fraction)) / decay_fraction


# By name, functions of the progress after warm-up: 0 at its end, 1 at num_steps.
SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "cosine": cosine,
    "warmup_stable_decay": warmup_stable_decay,
}


@dataclass(frozen=True)
class Schedule:
    """A multiplier of the learning rate as a function of the step, behind a linear warm-up.

    The first step (0) trains with ``1 / warmup_steps``, step ``warmup_steps - 1`` with 1. From ``num_steps`` on the
    multiplier stays at its last value.

    Attributes:
        name: one of ``SCHEDULES``.
        warmup_steps: how many steps the rise takes; 0 for none.
        num_steps: how many steps the run has, warm-up included.
        final_fraction: where cosine and warmup_stable_decay end.
        decay_fraction: how much of the steps after warm-up is decay, in warmup_stable_decay.
    """

    name: str = "constant"
    warmup_steps: int = 0
    num_steps: int = 1
    final_fraction: float = 0.0
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(f"schedule is {self.name!r}; use one of {', '.join(SCHEDULES)}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; a run has at least 1 step")
        if not 0 <= self.warmup_steps <= self.num_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} of num_steps {self.num_steps}; use 0 to {self.num_steps}"
            )
        if not 0.0 <= self.final_fraction <= 1.0:
            raise ValueError(f"final_fraction is {self.final_fraction}; use 0 to 1, a fraction of the peak")
        if not 0.0 < self.decay_fraction <= 1.0:
            raise ValueError(
                f"decay_fraction is {self.decay_fraction}; use more than 0 and at most 1, a fraction of the steps"
            )

    def __call__(self, step: int) -> float:
        """The multiplier for a step, counted from 0."""
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps))
        return SCHEDULES[self.name](progress, final_fraction=self.final_fraction, decay_fraction=self.decay_fraction)
