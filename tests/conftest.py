"""What every test of this repository shares."""

import sys


def pytest_sessionfinish() -> None:
    """End the processes of ``run_on_ranks``, where a test started any."""
    ranks = sys.modules.get("tests.distributed.ranks")
    if ranks is not None:
        ranks.close_pools()
