"""Sharded models: the same tables and gradients for any number of ranks and any sharding; plans that say so."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from muonrec.data.candidates import CandidateSampler
from muonrec.data.loader import TrainingBatches
from muonrec.embeddings.fused import check_tables, fuse_optimizers, fused_tables
from muonrec.embeddings.joined import build_optimizer
from muonrec.embeddings.sharding import format_plan, make_plan, shard_model
from muonrec.embeddings.tables import TableConfig, initialize_tables
from muonrec.losses import NextItemLoss
from muonrec.mesh import Ranks
from muonrec.models import SASRec, SASRecConfig
from tests.distributed.ranks import run_on_ranks
from tests.made_up import made_up_sequences

CPU = torch.device("cpu")
WIDTH = 64
CANDIDATES = {"full_softmax": "all", "sampled_softmax": "uniform", "bce": "per_target", "in_batch_softmax": "in_batch"}


def this_rank():
    return Ranks(dist.get_rank(), dist.get_world_size(), CPU)


def sharded(
    kind="full_softmax", dense="ddp", sharding="row_wise", optimizer="rowwise_adagrad", lr=0.05, std=0.02, seed=0
):
    sequences = made_up_sequences()
    torch.manual_seed(seed)
    config = SASRecConfig(embedding_dim=WIDTH, dropout=0.0, max_length=20)
    model = SASRec(config, num_items=sequences.num_items, loss=NextItemLoss(kind))
    tables = {"item": TableConfig(lr=lr, sharding=sharding, optimizer=optimizer, init_std=std)}
    dmp, plan = shard_model(model, tables, dense=dense, ranks=this_rank(), batch_size=16)
    initialize_tables(dmp, std={"item": std}, seed=3)
    check_tables(dmp, tables)
    return dmp, plan


def joined(dmp, dense="muon", ns_dtype=torch.float32, **settings):
    rates = {"lr": 0.01}
    muon, matrices = ({**rates, "ns_dtype": ns_dtype}, None) if dense == "muon" else (None, rates)
    return build_optimizer(
        dmp, muon=muon, matrices=matrices, adamw={"lr": 1e-3, **settings.pop("adamw", {})}, **settings
    )


def batches_of(kind, num_users=203, batch_size=32, num_streams=8):
    sequences = made_up_sequences(num_users)
    sampler = CandidateSampler(
        CANDIDATES[kind], num_items=sequences.num_items, count=8, item_counts=sequences.item_train_counts
    )
    return TrainingBatches(
        sequences,
        batch_size=batch_size,
        max_length=20,
        sampler=sampler,
        needs_targets=kind != "full_softmax",
        seed=0,
        ranks=this_rank(),
        num_streams=num_streams,
    )


def whole(value):
    """The whole tensor on every rank, of a sharded one too."""
    if isinstance(value, ShardedTensor):
        full = torch.zeros(value.size())
        for shard in value.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            full[row : row + rows, column : column + columns] = shard.tensor.detach()
        dist.all_reduce(full)
        return full
    return value.full_tensor() if hasattr(value, "full_tensor") else value.detach().clone()


def trained(kind, dense, sharding, num_steps=5, *, model=None, optimizer=None, batches=None):
    """Losses and whole parameters after a few steps through TorchRec's train pipeline."""
    dmp, _ = sharded(kind, dense, sharding, **(model or {}))
    pipeline = TrainPipelineSparseDist(dmp, joined(dmp, **(optimizer or {})), CPU)
    dmp.train()
    batches = batches_of(kind, **(batches or {})).iterate(0, num_steps)
    losses = [pipeline.progress(batches)["loss_nats"] for _ in range(num_steps)]
    return losses, {name: whole(value) for name, value in dmp.state_dict().items()}


def initial_table(sharding):
    dmp, _ = sharded(sharding=sharding)
    return {name: whole(value) for name, value in dmp.state_dict().items()}


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "column_wise"])
def test_initial_weights_do_not_depend_on_ranks_or_sharding(sharding):
    expected = run_on_ranks(1, initial_table, "table_wise")[0]
    for got in run_on_ranks(2, initial_table, sharding):
        assert got.keys() == expected.keys()
        for name in expected:
            assert torch.equal(got[name], expected[name]), name


def gradients(dense, sharding):
    """The gradient of one global batch: dense ones as they are, the table's as the step SGD takes at rate 1."""
    dmp, _ = sharded("full_softmax", dense, sharding, optimizer="sgd", lr=1.0)
    table = "embeddings.embeddings.item.weight"
    before = whole(dmp.state_dict()[table])
    dmp.train()
    loss, _ = dmp(batches_of("full_softmax").share(1))
    loss.backward()
    found = {name: whole(p.grad) for name, p in dmp.named_parameters() if name != table}
    return {**found, table: before - whole(dmp.state_dict()[table])}


@pytest.mark.parametrize(
    ("num_ranks", "dense", "sharding"), [(2, "ddp", "row_wise"), (2, "fsdp2", "table_wise"), (3, "ddp", "column_wise")]
)
def test_one_rank_and_several_give_equal_gradients(num_ranks, dense, sharding):
    alone = run_on_ranks(1, gradients, "ddp", "table_wise")[0]
    assert all(gradient.abs().max() > 0 for gradient in alone.values())
    for got in run_on_ranks(num_ranks, gradients, dense, sharding):
        assert got.keys() == alone.keys()
        for name in alone:
            # float32 sums in another order
            torch.testing.assert_close(got[name], alone[name], rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("kind", "dense", "sharding", "num_ranks"),
    [
        ("full_softmax", "ddp", "row_wise", 2),
        ("full_softmax", "fsdp2", "table_wise", 2),
        ("full_softmax", "ddp", "column_wise", 2),
        ("sampled_softmax", "fsdp2", "row_wise", 3),
        ("bce", "ddp", "row_wise", 2),
    ],
)
def test_any_number_of_ranks_follows_the_gradient_of_one(kind, dense, sharding, num_ranks):
    losses, parameters = run_on_ranks(1, trained, kind, "ddp", "table_wise")[0]
    for got_losses, got in run_on_ranks(num_ranks, trained, kind, dense, sharding):
        # Sums over ranks are taken in another order; Adagrad's first steps and Muon magnify that float32 rounding.
        assert got_losses == pytest.approx(losses, rel=2e-5)
        for name in parameters:
            if name.endswith("key.bias"):
                continue  # softmax does not depend on it: its gradient is rounding alone, which AdamW scales up
            torch.testing.assert_close(
                got[name], parameters[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


# Four users in two batches of three streams: the second batch has a user for the first rank alone.
FEW = {"num_users": 4, "batch_size": 3, "num_streams": 3}


def trained_on_few(kind, dense, sharding):
    return trained(kind, dense, sharding, batches=FEW)


@pytest.mark.parametrize(
    ("kind", "dense", "sharding"),
    [("sampled_softmax", "ddp", "row_wise"), ("full_softmax", "fsdp2", "table_wise"), ("bce", "fsdp2", "row_wise")],
)
def test_ranks_without_a_user_take_part(kind, dense, sharding):
    losses, _ = run_on_ranks(1, trained_on_few, kind, "ddp", "table_wise")[0]
    for got, _ in run_on_ranks(3, trained_on_few, kind, dense, sharding):
        assert got == pytest.approx(losses, rel=2e-5)  # as above


def fifty_steps(dense):
    """In Muon's default bfloat16; ranks start from other weights, which the first one's replace."""
    model, optimizer = {"seed": dist.get_rank()}, {"ns_dtype": torch.bfloat16}
    return trained("sampled_softmax", dense, "row_wise", 50, model=model, optimizer=optimizer)


@pytest.mark.parametrize("dense", ["ddp", "fsdp2"])
def test_fifty_steps_repeat_to_the_bit_on_every_replica_and_stay_near_those_of_one_rank(dense):
    alone, _ = run_on_ranks(1, fifty_steps, dense)[0]
    first, second = (run_on_ranks(2, fifty_steps, dense) for _ in range(2))
    assert first[0][0] == pytest.approx(alone, rel=1e-2)  # float32 sums in another order, magnified by bfloat16
    for losses, parameters in [*first, *second]:
        assert losses == first[0][0]
        for name in parameters:
            assert torch.equal(parameters[name], first[0][1][name]), name


def test_the_in_batch_loss_trains_on_any_number_of_ranks():
    for losses, _ in run_on_ranks(3, trained, "in_batch_softmax", "fsdp2", "row_wise"):
        assert all(0 < loss < 20 for loss in losses)


def plans():
    _, plan = sharded(sharding="row_wise")
    try:
        make_plan(
            SASRec(SASRecConfig(), num_items=10, loss=NextItemLoss("bce")),
            {"item": TableConfig(lr=1.0, sharding="data_parallel")},
            ranks=this_rank(),
            batch_size=4,
        )
    except ValueError as error:
        return format_plan(plan), str(error)


def test_the_plan_names_rows_and_ranks_and_refuses_what_the_cpu_gets_wrong():
    text, refusal = run_on_ranks(2, plans)[0]
    assert "item   row_wise  fused   1     29..57  0..64" in text
    assert "data_parallel" in refusal and "use row_wise" in refusal


def what_runs(optimizer):
    dmp, _ = sharded(optimizer=optimizer, lr=0.125)
    return [(table.name, table.optimizer, table.lr) for table in fused_tables(dmp)]


@pytest.mark.parametrize(
    ("asked", "kernel"),
    [("rowwise_adagrad", "EXACT_ROWWISE_ADAGRAD"), ("adagrad", "EXACT_ADAGRAD"), ("sgd", "EXACT_SGD")],
)
def test_fbgemm_runs_the_optimizer_that_was_asked_for(asked, kernel):
    for found in run_on_ranks(2, what_runs, asked):
        assert found == [("item", kernel, 0.125)]


def faults():
    messages = []
    model = SASRec(SASRecConfig(), num_items=10, loss=NextItemLoss("bce"))
    dmp, _ = sharded()
    attempts = (
        lambda: fuse_optimizers(model, {}),
        lambda: fuse_optimizers(model, {"item": TableConfig(lr=1.0), "brand": TableConfig(lr=1.0)}),
        lambda: (
            fuse_optimizers(model, {"item": TableConfig(lr=1.0)}),
            fuse_optimizers(model, {"item": TableConfig(lr=1.0)}),
        ),
        lambda: check_tables(dmp, {"item": TableConfig(lr=0.07)}),
        lambda: check_tables(dmp, {"item": TableConfig(lr=0.05, optimizer="sgd")}),
        lambda: check_tables(dmp, {"item": TableConfig(lr=0.05, eps=1e-3)}),
        lambda: initialize_tables(dmp, std={}, seed=0),
        lambda: build_optimizer(dmp, muon=None, adamw={}),
    )
    for attempt in attempts:
        try:
            attempt()
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_no_table_is_trained_by_default_or_twice_or_otherwise_than_asked():
    got = run_on_ranks(1, faults)[0]
    assert "without settings: ['item']" in got[0]
    assert "settings for no table: ['brand']" in got[1]
    assert "has an optimizer in its backward pass already" in got[2]
    assert "asks for lr 0.07, but 0.05" in got[3]
    assert "asks for EXACT_SGD, but EXACT_ROWWISE_ADAGRAD runs" in got[4]
    assert "asks for eps 0.001" in got[5]
    assert "table 'item' has no init_std" in got[6]
    assert "give the matrices one optimizer" in got[7]
