"""Which of the known runs count."""

import dataclasses

from muonrec.comparison.kept import Kept
from muonrec.comparison.results import Arm, Design, RunResult

DESIGN = Design(
    "kept", tuple(Arm(name, grids={"lr": (0.1, 1.0)}) for name in ("control", "muon")), "control", seeds=(1, 2, 3, 4)
)


def run(name, *, seed=1, arm="muon", sources="new"):
    return RunResult(name, arm, "final", 1.0, seed, None, {"lr": 0.1}, sources_hash=sources)


def counted(kept):
    return [run.run for run in kept if not run.superseded]


def test_an_earlier_run_counts_until_another_is_asked_for_in_its_place():
    gone = dataclasses.replace(run("gone", seed=4), superseded=True)
    earlier = [run("a"), run("b", seed=2), run("stale", seed=3, sources="old"), gone]
    earlier += [run("another arm", arm="adam"), run("another seed", seed=7)]
    kept = Kept(earlier, DESIGN, key=lambda run: run.run, stands=lambda run: run.sources_hash == "new")
    assert counted(kept) == ["a", "b"]
    assert kept.like(run("a")) == earlier[0]
    assert kept.like(run("c")) is None

    kept.add(run("c"))  # other rates, same arm and seed
    assert counted(kept) == ["b", "c"]
    kept.add(run("gone", seed=4))  # asked for again
    assert counted(kept) == ["b", "gone", "c"]
    kept.add(run("d", arm="control"))
    kept.let_go()
    assert counted(kept) == ["gone", "c", "d"]
    assert [run.run for run in kept] == ["a", "b", "stale", "gone", "another arm", "another seed", "c", "d"]
