"""The hash of what a program reads changes with that, and with nothing else."""

import pytest

from muonrec.comparison.sources import sources_hash

FILES = {
    "app/__init__.py": "",
    "app/train.py": '''"""Trains."""
from typing import TYPE_CHECKING

from lib import loss
from lib.data.loader import batches

if TYPE_CHECKING:
    from lib.unused import Nothing


def train():
    """Train."""
    from lib.late import later  # only when called

    return loss, batches, later
''',
    "lib/__init__.py": "",
    "lib/loss.py": "from . import helper\n",
    "lib/helper.py": "X = 1\n",
    "lib/data/__init__.py": "",
    "lib/data/loader.py": "from ..helper import X\n\nbatches = X\n",
    "lib/late.py": "later = 2\n",
    "lib/unused.py": "class Nothing: ...\n",
    "lib/data/report.py": "import lib.unused\n",
}


@pytest.mark.parametrize(
    ("changed", "text", "counts"),
    [
        ("lib/helper.py", "X = 2\n", True),
        ("lib/late.py", "later = 3\n", True),
        ("lib/data/__init__.py", "import os\n", True),
        ("lib/helper.py", "# said otherwise\nX  =  1\n", False),
        ("app/train.py", FILES["app/train.py"].replace("Train.", "Train well."), False),
        ("lib/unused.py", "class Nothing: x = 1\n", False),
        ("lib/data/report.py", "", False),
    ],
)
def test_what_counts(tmp_path, changed, text, counts):
    for path, source in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
    before = sources_hash(tmp_path, ["app.train"], ("app", "lib"))
    (tmp_path / changed).write_text(text)
    assert (sources_hash(tmp_path, ["app.train"], ("app", "lib")) != before) is counts


def test_a_module_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no module pipeline\.train below"):
        sources_hash(tmp_path, ["pipeline.train"], ("pipeline",))
