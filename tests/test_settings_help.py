"""What a command's help says of its settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import pydantic
import pytest

from muonrec.config import Config, choices_of, sections_in
from muonrec.settings_help import meanings, settings_help
from pipeline.compare import ArmConfig, CompareConfig
from pipeline.data import DataConfig
from pipeline.eval import EvalConfig
from pipeline.train_config import TrainConfig


class Rates(Config):
    """Of learning.

    Attributes:
        low, high: ``low`` is
            the lower one.
    """

    low: float = 0.1
    high: float = 1.0


class Slow(Config):
    """Slow.

    And sure.
    """

    name: Literal["slow"] = "slow"
    rates: Rates = Rates(high=2.0)


class Fast(Config):
    """Fast."""

    name: Literal["fast"] = "fast"
    steps: int = 3


class Whole(Config):
    """Not shown.

    Attributes:
        pace: of it all.
    """

    output: str
    pace: Annotated[Slow | Fast, pydantic.Field(discriminator="name")] = Slow()
    rates: dict[Literal["a", "b"], Rates] = {}
    mode: Literal["x", "y"] | None = None
    is_on: bool = False


HELP = """\
  all.output  required
  all.pace    slow (or fast)
      of it all.
  all.mode    null (or x, y)
  all.is_on   false (or true)

all.pace: slow
    Slow.
    And sure.
  all.pace.rates  see below

all.pace.rates of slow
    Of learning.
  all.pace.rates.low   0.1
  all.pace.rates.high  2.0
      low, high: low is the lower one.

all.pace: fast
    Fast.
  all.pace.steps  3"""


def test_settings_stand_with_default_choices_and_meaning():
    assert settings_help(Whole, prefix="all.", leave_out=("rates",)) == HELP


def test_settings_that_stand_twice_are_listed_once():
    shown = settings_help(Whole)
    assert shown.endswith("\n\nrates.{a,b}: as under 'pace.rates of slow', but for high: 1.0")

    class Other(Whole):
        other: Rates = Rates(low=0.2, high=2.0)

    assert settings_help(Other).endswith("\n\nother: as under 'pace.rates of slow', but for low: 0.2")


def sections(cls: type[Config]) -> Iterator[type[Config]]:
    yield cls
    for field in cls.model_fields.values():
        for section in sections_in(field.annotation):
            yield from sections(section)


@pytest.mark.parametrize("cls", [DataConfig, TrainConfig, EvalConfig, CompareConfig, ArmConfig])
def test_every_setting_of_a_stage_means_something(cls):
    for section in dict.fromkeys(sections(cls)):
        told = [name for names in meanings(section)[1] for name in names]
        key, choices = choices_of(section)
        told += [key] * (len(choices) > 0 and key not in told)
        assert sorted(told) == sorted(section.model_fields), section.__name__
