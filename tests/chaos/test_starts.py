"""The account of the batches must be able to fail."""

import json

import pytest

from tests.chaos.starts import batches_trained


def seen(folder, *ranks):
    folder.mkdir()
    for rank, lines in enumerate(ranks):
        (folder / f"seen-{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_step_counts_for_the_start_that_brought_it_into_the_model(tmp_path):
    first = seen(
        tmp_path / "1", [[0, [1]], [1, [2]], [2, [7]]], [[0, [3]], [1, [4]]]
    )  # killed; step 2 was lost with it
    idle = seen(tmp_path / "2")
    last = seen(tmp_path / "3", [[2, [5, 6]], [3, [8]]])
    trained, num_starts = batches_trained([first, idle, last], 4)
    assert (trained, num_starts) == ({0: [1, 3], 1: [2, 4], 2: [5, 6], 3: [8]}, 2)


def test_a_step_that_is_lost_or_seen_twice_by_a_rank_is_noticed(tmp_path):
    first = seen(tmp_path / "1", [[0, [1]], [1, [2]]])
    with pytest.raises(KeyError):
        batches_trained([first, seen(tmp_path / "late", [[3, [8]]])], 4)  # nobody had step 2
    with pytest.raises(AssertionError):
        batches_trained([seen(tmp_path / "twice", [[0, [1]], [0, [1]]])], 1)
