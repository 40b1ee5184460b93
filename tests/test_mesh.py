"""Joining the ranks."""

import socket

import pytest
import torch
import torch.distributed as dist

from muonrec.mesh import join_ranks


def test_a_rank_without_a_gpu_of_its_own_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="local rank 1 has no GPU of its own, since this machine shows 1; start as"):
        join_ranks().__enter__()


def test_ranks_that_cannot_meet_say_where(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        here = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in here.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConnectionError, match=f"could not meet the others at 127.0.0.1:{port}: .*EADDRINUSE"):
            join_ranks().__enter__()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_group_outlives_an_error_of_one_of_several_ranks(monkeypatch, num_ranks):
    monkeypatch.setattr(dist, "get_world_size", lambda *_: num_ranks)
    with pytest.raises(ValueError, match="of this rank"), join_ranks():
        raise ValueError("of this rank")
    assert dist.is_initialized() == (num_ranks > 1)
    if num_ranks > 1:
        dist.destroy_process_group()


def test_a_group_ends_with_its_ranks_work():
    with join_ranks() as ranks:
        assert (ranks.num_ranks, dist.is_initialized()) == (1, True)
    assert not dist.is_initialized()
