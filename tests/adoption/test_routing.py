"""The routing of models that are not ours, as golden files.

After a deliberate change: ``python -m tests.adoption.test_routing`` writes them anew; read the difference.
"""

from pathlib import Path

import pytest

import muonrec
from tests.adoption.models import MODELS, make

GOLDEN = Path(__file__).parents[1] / "golden" / "routing"


def table(name):
    return f"{muonrec.explain(make(name))}\n"


@pytest.mark.parametrize("name", MODELS)
def test_the_routing_is_that_of_the_golden_file(name):
    assert table(name) == (GOLDEN / f"{name}.txt").read_text()


def test_every_golden_file_is_of_a_model():
    assert sorted(path.stem for path in GOLDEN.iterdir()) == sorted(MODELS)


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        (GOLDEN / f"{name}.txt").write_text(table(name))
