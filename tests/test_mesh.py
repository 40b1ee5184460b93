"""Joining the ranks."""

import pytest
import torch

from muonrec.mesh import join_ranks


def test_a_rank_without_a_gpu_of_its_own_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="local rank 1 has no GPU of its own, since this machine shows 1; start as"):
        join_ranks().__enter__()
