"""Tests of the pool of ranks itself."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import RankError, RankTimeout, run_on_ranks


def _sum_of_ranks(offset):
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return total.item(), dist.get_rank(), os.getpid()


def _random_number_and_threads():
    return torch.rand(()).item(), torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def _raise_on_rank_1():
    if dist.get_rank() == 1:
        raise LookupError("no shard of 'proj.weight' here")
    dist.barrier()


def _hang_on_rank_0():
    if dist.get_rank() == 0:
        time.sleep(3600)
    dist.barrier()


def _die_on_rank_1():
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def test_results_come_back_by_rank_and_processes_are_reused():
    first = run_on_ranks(2, _sum_of_ranks, 10)
    second = run_on_ranks(2, _sum_of_ranks, 10)
    assert [result[:2] for result in first] == [(21.0, 0), (21.0, 1)]
    assert first == second
    assert os.getpid() not in {pid for _, _, pid in first}


def test_every_call_starts_from_the_same_seed_on_one_thread():
    assert run_on_ranks(2, _random_number_and_threads) == run_on_ranks(2, _random_number_and_threads)
    assert [threads for _, *threads in run_on_ranks(2, _random_number_and_threads)] == [[1, "1"], [1, "1"]]


def test_an_exception_of_one_rank_fails_the_call_with_its_traceback():
    with pytest.raises(RankError, match=r"rank 1 of 2 failed in _raise_on_rank_1(.|\n)*_raise_on_rank_1\n(.|\n)*proj"):
        run_on_ranks(2, _raise_on_rank_1)
    assert [result[0] for result in run_on_ranks(2, _sum_of_ranks, 0)] == [1.0, 1.0]


def test_a_hang_is_killed_and_says_where_it_hangs():
    started_s = time.monotonic()
    with pytest.raises(RankTimeout, match=r"ranks \[\] answered, ranks \[0, 1\] did not(.|\n)*in _hang_on_rank_0"):
        run_on_ranks(2, _hang_on_rank_0, timeout_s=5)
    assert time.monotonic() - started_s < 60


def test_a_dead_rank_is_reported_with_its_exit_code():
    with pytest.raises(RankError, match=r"(died in _die_on_rank_1 with exit code 7|rank 0 of 2 failed)"):
        run_on_ranks(2, _die_on_rank_1)
