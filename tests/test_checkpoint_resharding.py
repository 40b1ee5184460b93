"""Row statistics of tables between column-wise and other shardings, in numbers."""

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from muonrec import checkpoint
from muonrec.checkpoint import row_statistics
from muonrec.embeddings.sharding import shard_model
from muonrec.embeddings.tables import TableConfig, initialize_tables
from muonrec.losses import NextItemLoss
from muonrec.models import SASRec, SASRecConfig
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import joined, this_rank, whole
from tests.made_up import made_up_sequences
from tests.test_checkpoint import trained_to

WEIGHT = "embeddings.embeddings.item.weight"


def sharded(sharding, std=0.02):
    """As wide as TorchRec's planner needs to cut columns: into two."""
    torch.manual_seed(0)
    config = SASRecConfig(embedding_dim=256, num_layers=1, dropout=0.0, max_length=20)
    model = SASRec(config, num_items=made_up_sequences().num_items, loss=NextItemLoss("full_softmax"))
    dmp, _ = shard_model(
        model, {"item": TableConfig(lr=0.05, sharding=sharding)}, dense="ddp", ranks=this_rank(), batch_size=16
    )
    initialize_tables(dmp, std={"item": std}, seed=3)
    return dmp


def statistics(optimizer):
    """The whole vector of row statistics, from whichever ranks hold it."""
    found = [
        shard
        for state in optimizer.state_dict()["state"].get(WEIGHT, {}).values()
        for shard in [(s.metadata.shard_offsets[0], s.tensor.clone()) for s in state.local_shards()]
    ]
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, found)
    return torch.cat([part for _, part in sorted((p for mine in everyone for p in mine), key=lambda p: p[0])])


def save_trained(folder, sharding):
    dmp = sharded(sharding=sharding)
    optimizer = joined(dmp)
    trained_to(0, 3, dmp, optimizer)
    checkpoint.save(folder, dmp, optimizer)
    return whole(dmp.state_dict()[WEIGHT]), statistics(optimizer)


def load_into(folder, sharding):
    dmp = sharded(sharding=sharding, std=0.5)
    optimizer = joined(dmp)
    checkpoint.load(folder, dmp, optimizer)
    return whole(dmp.state_dict()[WEIGHT]), statistics(optimizer), trained_to(3, 6, dmp, optimizer)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_one_statistic_a_row_is_the_mean_over_its_column_shards(tmp_path, sharding, num_ranks):
    weight, per_shard = run_on_ranks(2, save_trained, tmp_path / "step-1", "column_wise")[0]
    rows = weight.size(0)
    assert per_shard.size(0) > rows and not torch.equal(per_shard[:rows], per_shard[rows : 2 * rows])
    for got_weight, got, _ in run_on_ranks(num_ranks, load_into, tmp_path / "step-1", sharding):
        assert torch.equal(got_weight, weight)
        # The shards are of equal width here.
        torch.testing.assert_close(got, per_shard.view(-1, rows).mean(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_every_column_shard_starts_from_the_statistic_of_the_whole_row(tmp_path, sharding):
    weight, per_row = run_on_ranks(2, save_trained, tmp_path / "step-1", sharding)[0]
    for got_weight, got, _ in run_on_ranks(2, load_into, tmp_path / "step-1", "column_wise"):
        assert torch.equal(got_weight, weight)
        assert got.size(0) > weight.size(0)
        assert torch.equal(got, per_row.repeat(got.size(0) // weight.size(0)))


def test_there_and_back_nothing_is_lost(tmp_path):
    _, per_row = run_on_ranks(2, save_trained, tmp_path / "step-1", "row_wise")[0]
    run_on_ranks(2, resave, tmp_path / "step-1", tmp_path / "step-2")
    expected = run_on_ranks(2, load_into, tmp_path / "step-1", "row_wise")[0][2]
    for _, got, losses in run_on_ranks(1, load_into, tmp_path / "step-2", "table_wise"):
        torch.testing.assert_close(got, per_row, rtol=1e-6, atol=0)
        assert losses == pytest.approx(expected, rel=1e-5)  # float32 sums in another order
    # On column shards each row has two statistics from here on: near, and not the same.
    for _, _, losses in run_on_ranks(2, load_into, tmp_path / "step-1", "column_wise"):
        assert losses == pytest.approx(expected, rel=1e-2)


def resave(source, folder):
    dmp = sharded(sharding="column_wise")
    optimizer = joined(dmp)
    checkpoint.load(source, dmp, optimizer)
    checkpoint.save(folder, dmp, optimizer)


def test_shards_of_unequal_width_count_by_their_width():
    def entry(*chunks, size):
        chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks]
        return TensorStorageMetadata(TensorProperties(), torch.Size(size), chunks)

    key = "optimizer.state.item.weight.item.momentum1"
    there = {"model.item.weight": entry(((0, 4), (2, 12)), ((0, 0), (2, 4)), size=(2, 16)), key: entry(size=(4,))}
    state = {"model.item.weight": torch.zeros(2, 16), key: torch.zeros(2)}
    assert row_statistics.is_convertible(key, state, there)
    got = row_statistics.convert(torch.tensor([1.0, 2.0, 5.0, 6.0]), key, state, there)
    assert got.tolist() == [1 * 4 / 16 + 5 * 12 / 16, 2 * 4 / 16 + 6 * 12 / 16]
    # Not whole columns, as in a grid: which statistic belongs to which columns is not known.
    grid = {**there, "model.item.weight": entry(((0, 0), (1, 16)), ((1, 0), (1, 16)), size=(2, 16))}
    assert not row_statistics.is_convertible(key, state, grid)
