"""Ranks killed at random moments: the run goes on as if nothing had happened. The counts are printed."""

from collections import Counter

import pytest

from tests.chaos.starts import (
    ENDS_WITHIN_S,
    SEED,
    Start,
    TorchrunStart,
    batches_trained,
    generator_of,
    kill_at_random,
    run_to_the_end,
)
from tests.pipeline import test_train
from tests.pipeline.test_train import config_file, losses, validations

pytestmark = pytest.mark.chaos
dataset = test_train.dataset  # the fixture

NUM_KILLS = 25
NUM_STEPS = 240  # more than so many starts of at most eight steps beyond a checkpoint come to
SETTINGS = {
    "num_steps": NUM_STEPS,
    "validation": {"every_steps": 60, "max_users": 50},
}


def killed_again_and_again(config, run, folder, generator, num_ranks_of, torchrun=()):
    """Start and kill ``NUM_KILLS`` times, then let it end; moments, seconds and the starts' folders."""
    moments, seconds, folders = Counter(), [], []
    for kill in range(NUM_KILLS):
        folders.append(folder / f"start-{kill}")
        start = (TorchrunStart if kill in torchrun else Start)(num_ranks_of(generator), config, folders[-1])
        moment, passed_s = kill_at_random(start, run, generator)
        moments[moment] += 1
        seconds.append(passed_s)
    folders.append(folder / "end")
    run_to_the_end(num_ranks_of(generator), config, folders[-1])
    return moments, seconds, folders


def say(capsys, what, moments, seconds, more=""):
    kinds = ", ".join(f"{count} in a {moment}" for moment, count in moments.items())
    killed = f"{what}, seed {SEED}: {moments.total()} SIGKILLs ({kinds})"
    with capsys.disabled():
        print(f"\n{killed}; the other ranks ended after at most {max(seconds):.1f} s{more}")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_however_often_a_rank_is_killed_the_losses_are_those_of_the_run_with_no_kills(
    dataset, tmp_path, capsys, asynchronous
):
    checkpoints = {"every_steps": 3, "keep": 2, "asynchronous": asynchronous}
    config = config_file(dataset, tmp_path, **SETTINGS, checkpoints=checkpoints, output=str(tmp_path / "whole"))
    run_to_the_end(2, config, tmp_path / "starts")
    config = config_file(dataset, tmp_path, **SETTINGS, checkpoints=checkpoints)
    moments, seconds, _ = killed_again_and_again(
        config,
        tmp_path / "run",
        tmp_path / "killed",
        generator_of(f"fixed {asynchronous}"),
        lambda _: 2,
        torchrun=() if asynchronous else (7, 17),
    )
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert validations(tmp_path / "run") == validations(tmp_path / "whole")
    assert moments["checkpoint"] and max(seconds) < ENDS_WITHIN_S
    say(capsys, f"2 ranks, asynchronous={asynchronous}", moments, seconds, "; losses bit for bit")


def test_killed_and_started_on_other_numbers_of_ranks_no_batch_is_lost_or_seen_twice(dataset, tmp_path, capsys):
    # Dropout is drawn by each rank for its own users, so losses can be compared without it alone.
    model = {"name": "sasrec", "embedding_dim": 32, "dropout": 0.0, "max_length": 30}
    settings = {**SETTINGS, "model": model, "checkpoints": {"every_steps": 3, "keep": 2}}
    run_to_the_end(1, config_file(dataset, tmp_path, **settings, output=str(tmp_path / "whole")), tmp_path / "starts")
    expected, _ = batches_trained([tmp_path / "starts"], NUM_STEPS)
    moments, seconds, folders = killed_again_and_again(
        config_file(dataset, tmp_path, **settings),
        tmp_path / "run",
        tmp_path / "killed",
        generator_of("changing"),
        lambda generator: generator.randint(1, 4),
    )
    trained, num_starts = batches_trained(folders, NUM_STEPS)
    assert sorted(trained) == list(range(NUM_STEPS))
    assert trained == expected  # none lost, none twice
    want, got = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert [step for step, _ in got] == [step for step, _ in want] == list(range(1, NUM_STEPS + 1))
    worst = max(abs(a / b - 1) for (_, a), (_, b) in zip(got, want, strict=True))
    more = f"; {num_starts} starts trained, {len(trained)} batches as of one rank, losses within {worst:.1e}"
    say(capsys, "1 to 4 ranks", moments, seconds, more)
    # Sums over ranks are taken in another order, which Muon's bfloat16 iteration magnifies.
    assert worst < 1e-3
