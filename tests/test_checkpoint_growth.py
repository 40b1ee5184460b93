"""Tables that have more rows than were saved: the first ones go on exactly, the others start as in a new model."""

import json
from pathlib import Path

import pytest
import torch

from muonrec import checkpoint
from muonrec.checkpoint.weights import local_pieces
from muonrec.embeddings.sharding import shard_model
from muonrec.embeddings.tables import TableConfig, initialize_tables
from muonrec.losses import NextItemLoss
from muonrec.models import SASRec, SASRecConfig
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import joined, this_rank, whole
from tests.made_up import made_up_sequences
from tests.test_checkpoint import trained_to

WEIGHT = "embeddings.embeddings.item.weight"
OLD = made_up_sequences().num_items


def sharded(sharding, num_items=OLD, dense="ddp", optimizer="rowwise_adagrad"):
    """As wide as TorchRec's planner needs to cut columns: into two."""
    torch.manual_seed(0)
    config = SASRecConfig(embedding_dim=256, num_layers=1, dropout=0.0, max_length=20)
    model = SASRec(config, num_items=num_items, loss=NextItemLoss("full_softmax"))
    tables = {"item": TableConfig(lr=0.05, sharding=sharding, optimizer=optimizer)}
    dmp, _ = shard_model(model, tables, dense=dense, ranks=this_rank(), batch_size=16)
    initialize_tables(dmp, std={"item": 0.02}, seed=3)
    return dmp


def table_state(optimizer):
    """The whole state of the table by its key, from whichever ranks hold it."""
    found = {}
    for key, value in optimizer.state_dict()["state"].get(WEIGHT, {}).items():
        pieces = local_pieces(value)
        found[key] = (list(value.size()), [(list(offsets), piece.clone()) for piece, offsets in pieces])
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, found)
    state = {}
    for mine in everyone:
        for key, (size, pieces) in mine.items():
            full = state.setdefault(key, torch.zeros(size, dtype=pieces[0][1].dtype if pieces else torch.float32))
            for offsets, piece in pieces:
                full[tuple(slice(at, at + n) for at, n in zip(offsets, piece.shape, strict=True))] = piece
    return state


def save_trained(folder, settings):
    dmp = sharded(**settings)
    optimizer = joined(dmp)
    trained_to(0, 3, dmp, optimizer)
    checkpoint.save(folder, dmp, optimizer)
    return {name: whole(value) for name, value in dmp.state_dict().items()}, table_state(optimizer)


def load_grown(folder, settings, grows=(WEIGHT,)):
    """The error, if it is refused; the weights before and after, the table's state, and that it can be trained on."""
    dmp = sharded(**settings)
    optimizer = joined(dmp)
    fresh = whole(dmp.state_dict()[WEIGHT])
    try:
        checkpoint.load(folder, dmp, optimizer.parts["tables"], grows=grows)
    except checkpoint.UnusableCheckpoint as error:
        return str(error)
    weights, state = {name: whole(value) for name, value in dmp.state_dict().items()}, table_state(optimizer)
    losses = trained_to(3, 4, dmp, optimizer)
    return fresh, weights, state, torch.isfinite(torch.tensor(losses)).all()


def check_first_rows_go_on(got, old_weights, new):
    """Everything but the row statistics, which the tests look at by themselves."""
    fresh, weights, _, is_finite = got
    assert is_finite
    assert torch.equal(weights[WEIGHT][:OLD], old_weights[WEIGHT]) and weights[WEIGHT].size(0) == new
    assert torch.equal(weights[WEIGHT][OLD:], fresh[OLD:])
    assert not torch.equal(fresh[:OLD], old_weights[WEIGHT])
    for name in old_weights.keys() - {WEIGHT}:
        assert torch.equal(weights[name], old_weights[name]), name


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "partial_rowwise_adam", "dense_adam"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "row_wise", "ddp"), (3, "row_wise", "fsdp2")),
        ((2, "row_wise", "fsdp2"), (1, "table_wise", "ddp")),
        ((1, "table_wise", "ddp"), (2, "row_wise", "fsdp2")),
    ],
)
def test_the_first_rows_and_their_state_go_on_and_new_ones_start_afresh(tmp_path, optimizer, before, after):
    folder, new = tmp_path / "step-1", OLD + 40
    settings = {"sharding": before[1], "dense": before[2], "optimizer": optimizer}
    old_weights, old_state = run_on_ranks(before[0], save_trained, folder, settings)[0]
    settings = {"sharding": after[1], "dense": after[2], "optimizer": optimizer, "num_items": new}
    for got in run_on_ranks(after[0], load_grown, folder, settings):
        check_first_rows_go_on(got, old_weights, new)
        state = got[2]
        assert state.keys() == old_state.keys() and state
        for key, value in old_state.items():
            if key.endswith(".iter"):
                assert torch.equal(state[key], value) and int(value) == 3
                continue
            assert torch.equal(state[key][:OLD], value) and value.any(), key
            assert state[key].size(0) == new and not state[key][OLD:].any(), key


# Twice the rows: then two column shards of the old table have the size of one of the new.
@pytest.mark.parametrize(
    ("optimizer", "new"),
    [("rowwise_adagrad", 2 * OLD), ("partial_rowwise_adam", OLD + 40), ("dense_adam", OLD + 40)],
)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        *(("column_wise", after) for after in ("row_wise", "table_wise", "column_wise")),
        *((before, "column_wise") for before in ("row_wise", "table_wise")),
    ],
)
def test_row_statistics_go_on_between_column_wise_and_others(tmp_path, before, after, optimizer, new):
    folder = tmp_path / "step-1"
    settings = {"sharding": before, "optimizer": optimizer}
    old_weights, old_state = run_on_ranks(2, save_trained, folder, settings)[0]
    settings = {"sharding": after, "optimizer": optimizer, "num_items": new}
    for got in run_on_ranks(2, load_grown, folder, settings):
        check_first_rows_go_on(got, old_weights, new)
        assert got[2].keys() == old_state.keys()
        for key, state in got[2].items():
            if state.dim() > 1 or key.endswith(".iter"):  # of each element; of the table
                assert torch.equal(state[:OLD], old_state[key]) and not state[OLD:].any()
                continue
            old_nQ, state_mR = old_state[key].view(-1, OLD), state.view(-1, new)
            assert [len(old_nQ), len(state_mR)] == [2 if way == "column_wise" else 1 for way in (before, after)]
            if before == "column_wise" and after != "column_wise":
                # Shards of equal width: their mean, in another order of sums.
                torch.testing.assert_close(state_mR[0, :OLD], old_nQ.mean(0), rtol=1e-6, atol=0)
            else:
                assert torch.equal(state_mR[:, :OLD], old_nQ.expand(len(state_mR), -1))
            assert old_nQ.any() and not state_mR[:, OLD:].any()


def test_what_is_not_named_does_not_grow_and_nothing_shrinks(tmp_path):
    folder = tmp_path / "step-1"
    run_on_ranks(2, save_trained, folder, {"sharding": "row_wise"})
    for num_items, grows in ((OLD + 1, ()), (OLD - 1, (WEIGHT,)), (OLD + 1, ("embeddings.embeddings.it",))):
        settings = {"sharding": "row_wise", "num_items": num_items}
        for message in run_on_ranks(2, load_grown, folder, settings, grows):
            assert f"{WEIGHT} is [{OLD}, 256] there and [{num_items}, 256] here" in message


def exported_and_imported(folder, file, new):
    """Rows of a file in a larger model, on this rank's shards."""
    if this_rank().is_first:
        checkpoint.export_weights(folder, file, notes={"data": "abc"})
    torch.distributed.barrier()
    dmp = sharded("row_wise", num_items=new)
    fresh = whole(dmp.state_dict()[WEIGHT])
    refused = ""
    try:
        checkpoint.import_weights(file, dmp)
    except ValueError as error:
        refused = str(error)
    notes = checkpoint.import_weights(file, dmp, grows=[WEIGHT])
    return refused, fresh, {name: whole(value) for name, value in dmp.state_dict().items()}, notes


def test_a_file_of_weights_fills_the_first_rows(tmp_path):
    folder, file, new = tmp_path / "step-1", tmp_path / "weights.safetensors", 3 * OLD
    old_weights, _ = run_on_ranks(2, save_trained, folder, {"sharding": "row_wise"})[0]
    for refused, fresh, weights, notes in run_on_ranks(3, exported_and_imported, folder, file, new):
        assert f"{WEIGHT} is [{OLD}, 256] there and [{new}, 256] here" in refused
        check_first_rows_go_on((fresh, weights, None, True), old_weights, new)
        assert notes == checkpoint.read_notes(file) and notes["data"] == "abc"


def used(folders):
    return checkpoint.use_first(folders, lambda folder: checkpoint.read_progress(folder)["step"])


def test_the_first_checkpoint_that_can_be_used_is_used(tmp_path, caplog):
    class Nothing(torch.nn.Module):
        pass

    folders = [checkpoint.step_folder(tmp_path, step) for step in (3, 2, 1)]
    for step, folder in zip((3, 2, 1), folders, strict=True):
        checkpoint.save(folder, Nothing(), progress={"step": step})
    assert used([]) is None
    assert used(checkpoint.newest_first(tmp_path)) == (folders[0], 3, [])
    (Path(folders[0]) / "progress.json").write_text(json.dumps({"step": 4}))
    assert used(folders) == (folders[1], 2, [folders[0]])
    (warned,) = [record.getMessage() for record in caplog.records if record.name.startswith("muonrec")]
    assert warned.startswith(f"{folders[0]} is damaged: progress.json") and warned.endswith("is used instead")
    for folder in folders[1:]:
        (folder / "COMMITTED").unlink()
    with pytest.raises(checkpoint.UnusableCheckpoint, match=rf"no checkpoint in {tmp_path} can be used") as error:
        used(folders)
    assert all(f"{folder} is" in str(error.value) for folder in folders)
