"""What every test of this repository shares."""

import sys

from hypothesis import settings

# The same examples in every run: a rare one that fails is then no riddle.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_sessionfinish() -> None:
    """End the processes of ``run_on_ranks``, where a test started any."""
    ranks = sys.modules.get("tests.distributed.ranks")
    if ranks is not None:
        ranks.close_pools()
