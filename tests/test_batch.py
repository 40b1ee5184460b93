"""SequenceBatch as TorchRec's train pipelines want it."""

import torch
from torchrec.streamable import Pipelineable

from muonrec.batch import CANDIDATES, HISTORY, TARGETS
from tests.data.test_loader import loader


def test_a_batch_moves_with_every_part_and_keeps_what_belongs_on_the_host():
    batch = loader(kind="popularity").share(3)
    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert isinstance(moved, Pipelineable)
    parts = [moved.labels, moved.log_q, moved.user_ids, moved.features.values(), moved.features.lengths()]
    assert all(part.device.type == "meta" for part in parts)
    assert moved.groups == batch.groups and moved.step == batch.step == 3
    assert moved.labels.shape == batch.labels.shape
    assert batch.labels.device.type == "cpu"


def test_the_three_features_are_of_one_batch():
    batch = loader().share(0)
    assert batch.features.keys() == [HISTORY, TARGETS, CANDIDATES]
    assert batch.features[HISTORY].lengths().tolist() == batch.features[TARGETS].lengths().tolist()
    assert batch.features[CANDIDATES].lengths().tolist() == [8] + [0] * (batch.features.stride() - 1)
    assert sum(events for _, events, _ in batch.groups) == batch.labels.numel()
