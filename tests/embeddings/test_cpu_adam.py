"""Adam of the tables on the CPU: the plain loop, the rows it leaves alone, its state under any sharding."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import muonrec
from muonrec.embeddings.sharding import format_plan, shard_model
from muonrec.embeddings.tables import TableConfig, initialize_tables
from muonrec.losses import NextItemLoss
from muonrec.models import SASRec, SASRecConfig
from tests.distributed.ranks import run_on_ranks
from tests.embeddings import plain
from tests.embeddings.plain import FEATURES, NUM_ROWS, ids_of, initial, plain_rows, sharded_rows, share_of, trained_rows
from tests.embeddings.test_sharding import CPU, batches_of, joined, sharded, this_rank, trained, whole

ADAM = {"optimizer": "partial_rowwise_adam", "lr": 0.05}
EVERYTHING = {"betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1, "max_gradient": 1.0}
KINDS = ("partial_rowwise_adam", "adam", "dense_adam")
NONE = torch.empty(0, dtype=torch.int64)
RATES = (1.0, 0.5, 1.0, 0.0, 1.0, 0.3, 1.0)


@pytest.mark.parametrize("optimizer", KINDS)
@pytest.mark.parametrize("settings", [{}, EVERYTHING])
@pytest.mark.parametrize(
    ("num_ranks", "sharding"),
    [(1, "row_wise"), (2, "row_wise"), (3, "row_wise"), (2, "table_wise"), (3, "table_wise"), (2, "column_wise")],
)
def test_adam_equals_a_plain_loop(optimizer, settings, num_ranks, sharding):
    settings = {"optimizer": optimizer, "lr": 0.05, **settings}
    expected, _, _ = plain_rows(settings, RATES)
    for got in run_on_ranks(num_ranks, trained_rows, settings, sharding, RATES):
        for table in expected:
            # float32 against float64: seven steps of at most 0.05 on values of about 1.
            torch.testing.assert_close(got[table].double(), expected[table], rtol=0, atol=1e-6)


SETTINGS_OF_ADAMW = {"betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1}


def by_dense_adam(with_a_step_more):
    """Both tables after six steps of two micro-batches each, and perhaps a step without a backward pass."""
    dmp, optimizer = sharded_rows({"optimizer": "dense_adam", "lr": 0.05, **SETTINGS_OF_ADAMW}, "row_wise")
    for step, factor in enumerate(RATES[:6]):
        optimizer.scale_lr("tables", factor)
        optimizer.zero_grad()
        for micro in (2 * step, 2 * step + 1):
            (dist.get_world_size() * dmp(share_of(micro))).backward()
        optimizer.step()
    if with_a_step_more:
        optimizer.zero_grad()
        optimizer.step()
    return {name: plain.whole(dmp.state_dict()[f"embeddings.embeddings.{name}.weight"]) for name in NUM_ROWS}


def by_torch():
    tables = {name: torch.nn.Parameter(initial(name)) for name in NUM_ROWS}
    optimizer = torch.optim.AdamW(tables.values(), lr=0.05, **SETTINGS_OF_ADAMW)
    for step, factor in enumerate(RATES[:6]):
        optimizer.param_groups[0]["lr"] = 0.05 * factor
        optimizer.zero_grad()
        for micro in (2 * step, 2 * step + 1):
            for feature, bags in ids_of(micro).items():
                name, ids = FEATURES[feature], torch.cat(bags)
                rows = torch.nn.functional.embedding(ids, tables[name])
                ((rows - initial(name, seed=1)[ids]).square().sum() / 2).backward()
        optimizer.step()
    return {name: table.detach() for name, table in tables.items()}


@pytest.mark.parametrize("with_a_step_more", [False, True])
def test_on_every_row_it_is_torchs_adamw(with_a_step_more):
    expected = by_torch()
    for got in run_on_ranks(2, by_dense_adam, with_a_step_more):
        for name, rows in expected.items():
            torch.testing.assert_close(got[name], rows, rtol=0, atol=2e-6)


def rows_of_b_without_ids(optimizer):
    """Table ``b`` after a step on its row 3, and after another whose batch has no id of it."""
    dmp, joined_optimizer = sharded_rows({"optimizer": optimizer, "lr": 0.05}, "row_wise")
    found = []
    for ids in ([NONE, NONE, torch.tensor([3])], [torch.tensor([3]), NONE, NONE]):
        joined_optimizer.zero_grad()
        dmp(features(ids)).backward()
        joined_optimizer.step()
        found.append(plain.whole(dmp.state_dict()["embeddings.embeddings.b.weight"]))
    return found


@pytest.mark.parametrize("optimizer", KINDS)
def test_a_table_no_id_of_which_came_rests_but_under_dense_adam(optimizer):
    after, later = run_on_ranks(1, rows_of_b_without_ids, optimizer)[0]
    moved = (later != after).any(1)
    assert not moved[[0, 1, 2, 4, 5, 6, 7]].any()  # they have no momentum
    assert bool(moved[3]) == (optimizer == "dense_adam")


def moments(optimizer, name="a"):
    """First and second moment of a table and its count of steps, on every rank."""
    states = [
        state for key, state in optimizer.state_dict()["state"].items() if key == f"embeddings.embeddings.{name}.weight"
    ]
    found = {key.removeprefix(f"{name}."): value for state in states for key, value in state.items()}
    assert not found or found.keys() == {"momentum1", "exp_avg_sq", "iter"}  # TorchRec's names
    return plain.whole(found["momentum1"]), plain.whole(found["exp_avg_sq"]), int(found["iter"])


def moments_by_step(num_steps):
    dmp, optimizer = sharded_rows(ADAM, "row_wise")
    found = []
    for step in range(num_steps):
        optimizer.zero_grad()
        (dist.get_world_size() * dmp(share_of(step))).backward()
        optimizer.step()
        found.append(moments(optimizer))
    return found


def test_a_row_absent_from_a_batch_keeps_its_moments_and_one_of_zero_gradient_does_not():
    found = run_on_ranks(2, moments_by_step, 5)[1]
    _, first, second = plain_rows(ADAM, (1.0,) * 5)
    torch.testing.assert_close(found[4][0].double(), first["a"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[4][1].double(), second["a"][:, 0], rtol=1e-6, atol=1e-6)
    assert [count for *_, count in found] == [1, 2, 3, 4, 5]  # of the table: absent rows age as well
    assert not found[4][0][11].any()  # never looked up
    assert torch.equal(found[0][0][12], found[2][0][12])  # looked up in steps 0 and 3
    assert not torch.equal(found[2][0][12], found[3][0][12])


def features(ids):
    """One user's ids of each feature."""
    return KeyedJaggedTensor(
        keys=list(FEATURES), values=torch.cat(ids), lengths=torch.tensor([len(bag) for bag in ids])
    )


def zero_gradient_after_one_that_was_not():
    dmp, optimizer = sharded_rows({**ADAM, "weight_decay": 0.0}, "row_wise")
    batch = features([torch.tensor([3]), NONE, NONE])
    dmp(batch).backward()
    optimizer.step()
    before = moments(optimizer)
    plain.write(dmp.state_dict()["embeddings.embeddings.a.weight"], initial("a", seed=1))  # every row at its goal
    optimizer.zero_grad()
    dmp(batch).backward()
    optimizer.step()
    return before, moments(optimizer)


def test_a_zero_gradient_lets_the_moments_of_its_row_decay():
    before, after = run_on_ranks(1, zero_gradient_after_one_that_was_not)[0]
    assert before[0][3].abs().max() > 0
    torch.testing.assert_close(after[0], 0.9 * before[0])
    torch.testing.assert_close(after[1], 0.999 * before[1])


def rows_after_two_backward_passes():
    dmp, optimizer = sharded_rows(ADAM, "row_wise")
    for step in (0, 1):
        dmp(share_of(step)).backward()
    with torch.no_grad():
        dmp(share_of(2))  # a look without a gradient touches nothing
    optimizer.step()
    twice = moments(optimizer)
    other, optimizer = sharded_rows(ADAM, "row_wise")
    other(features([torch.cat([*ids_of(0)[feature], *ids_of(1)[feature]]) for feature in FEATURES])).backward()
    optimizer.step()
    return twice, moments(optimizer)


def test_gradients_of_several_backward_passes_add_up():
    twice, at_once = run_on_ranks(1, rows_after_two_backward_passes)[0]
    torch.testing.assert_close(twice[0], at_once[0], rtol=0, atol=1e-6)  # another order of the same sums
    torch.testing.assert_close(twice[1], at_once[1], rtol=0, atol=1e-6)
    assert twice[2] == at_once[2] == 1


def by_the_pipeline(kind, dense, sharding):
    return trained(kind, dense, sharding, model={"optimizer": "partial_rowwise_adam", "lr": 0.01})


@pytest.mark.parametrize(
    ("kind", "dense", "sharding", "num_ranks"),
    [
        ("full_softmax", "ddp", "row_wise", 2),
        ("sampled_softmax", "fsdp2", "table_wise", 2),
        ("bce", "fsdp2", "row_wise", 3),
    ],
)
def test_sasrec_trains_alike_on_any_number_of_ranks(kind, dense, sharding, num_ranks):
    losses, parameters = run_on_ranks(1, by_the_pipeline, kind, "ddp", "table_wise")[0]
    assert losses[-1] != losses[0]
    for got_losses, got in run_on_ranks(num_ranks, by_the_pipeline, kind, dense, sharding):
        assert got_losses == pytest.approx(losses, rel=2e-5)  # sums over ranks are taken in another order
        table = "embeddings.embeddings.item.weight"
        torch.testing.assert_close(got[table], parameters[table], rtol=1e-3, atol=2e-4)


def steps(dmp, optimizer, first, last):
    pipeline = TrainPipelineSparseDist(dmp, optimizer, CPU)
    dmp.train()
    batches = batches_of("sampled_softmax").iterate(first, last)
    return [pipeline.progress(batches)["loss_nats"] for _ in range(first, last)]


def saved(folder, sharding, settings):
    dmp, _ = sharded("sampled_softmax", sharding=sharding, **settings)
    optimizer = joined(dmp)
    steps(dmp, optimizer, 0, 3)
    muonrec.save(folder, dmp, optimizer, progress={"step": 3})
    return steps(dmp, optimizer, 3, 6), whole(dmp.state_dict()["embeddings.embeddings.item.weight"])


def loaded(folder, sharding, settings):
    dmp, _ = sharded("sampled_softmax", sharding=sharding, **settings, seed=9)
    optimizer = joined(dmp)
    muonrec.load(folder, dmp, optimizer)
    return steps(dmp, optimizer, 3, 6), whole(dmp.state_dict()["embeddings.embeddings.item.weight"])


@pytest.mark.parametrize(
    ("optimizer", "num_ranks"),
    [*((KINDS[0], count) for count in (1, 2, 3)), (KINDS[1], 1), (KINDS[2], 2), (KINDS[2], 3)],
)
def test_a_checkpoint_goes_on_under_any_sharding_with_moments_and_step_count(tmp_path, optimizer, num_ranks):
    settings, folder = {"optimizer": optimizer, "lr": 0.01}, str(tmp_path / "step-00000003")
    losses, table = run_on_ranks(2, saved, folder, "row_wise", settings)[0]
    sharding = "row_wise" if num_ranks == 2 else "table_wise"
    for got_losses, got in run_on_ranks(num_ranks, loaded, folder, sharding, settings):
        if num_ranks == 2:
            assert got_losses == losses
            assert torch.equal(got, table)
        assert got_losses == pytest.approx(losses, rel=2e-5)  # sums over ranks are taken in another order
        torch.testing.assert_close(got, table, rtol=1e-3, atol=2e-4)


def refusals():
    messages = []
    dmp, plan = sharded(optimizer="partial_rowwise_adam")
    beyond = features([torch.tensor([3]), torch.tensor([13]), NONE])
    attempts = (
        lambda: joined(dmp, overrides=[("item", "adamw")]),
        lambda: muonrec.embeddings.fused.check_tables(dmp, {"item": TableConfig(lr=0.05)}),
        lambda: muonrec.embeddings.fused.check_tables(
            sharded(optimizer="dense_adam", lr=0.05)[0], {"item": TableConfig(optimizer="adam", lr=0.05)}
        ),
        lambda: sharded_rows(ADAM, "row_wise")[0](beyond),
    )
    for attempt in attempts:
        try:
            attempt()
        except (ValueError, IndexError) as error:
            messages.append(str(error))
    return messages, format_plan(plan)


def test_what_cannot_be_trained_on_a_cpu_is_refused_and_the_plan_shows_the_dense_kernel():
    messages, plan = run_on_ranks(1, refusals)[0]
    assert "trains them already" in messages[0]
    assert "asks for EXACT_ROWWISE_ADAGRAD, but PARTIAL_ROWWISE_ADAM runs" in messages[1]
    assert "asks for ADAM, but DENSE_ADAM runs" in messages[2]
    assert f"feature 'late' asks for row 13 of table 'a', which has {NUM_ROWS['a']} rows" in messages[3]
    assert "item   row_wise  dense   0     0..57  0..64" in plan


def wide(sharding):
    """As wide as TorchRec's planner needs to cut columns."""
    torch.manual_seed(0)
    config = SASRecConfig(embedding_dim=256, num_layers=1, dropout=0.0, max_length=20)
    model = SASRec(config, num_items=57, loss=NextItemLoss("sampled_softmax"))
    tables = {"item": TableConfig(**ADAM | {"lr": 0.01}, sharding=sharding)}
    dmp, plan = shard_model(model, tables, dense="ddp", ranks=this_rank(), batch_size=16)
    initialize_tables(dmp, std={"item": 0.02}, seed=3)
    return dmp, joined(dmp), plan


def saved_by_column(folder):
    dmp, optimizer, plan = wide("column_wise")
    steps(dmp, optimizer, 0, 3)
    muonrec.save(folder, dmp, optimizer)
    return format_plan(plan), moments(optimizer, "item"), steps(dmp, optimizer, 3, 6)


def loaded_by_row(folder):
    dmp, optimizer, _ = wide("row_wise")
    muonrec.load(folder, dmp, optimizer)
    return moments(optimizer, "item"), steps(dmp, optimizer, 3, 6)


def test_column_shards_become_rows_with_the_mean_of_their_second_moments(tmp_path):
    folder = str(tmp_path / "step-00000003")
    plan, (first, second, count), losses = run_on_ranks(2, saved_by_column, folder)[0]
    assert "0..128" in plan and "128..256" in plan
    for moments_of_rows, losses_of_rows in run_on_ranks(2, loaded_by_row, folder):
        assert torch.equal(moments_of_rows[0], first)
        torch.testing.assert_close(moments_of_rows[1], second.view(2, -1).mean(0))
        assert moments_of_rows[2] == count == 3
        assert losses_of_rows == pytest.approx(losses, rel=1e-2)  # one second moment a row, where each half had its own


def too_few_rows():
    with mock.patch.dict(NUM_ROWS, {"b": 7}), pytest.raises(ValueError) as refused:
        sharded_rows(ADAM, "row_wise")
    return str(refused.value)


def test_a_second_moment_of_one_row_which_torchrec_cannot_save_is_refused():
    for message in run_on_ranks(3, too_few_rows):
        assert "table 'b' asks for partial_rowwise_adam, and row_wise gives the ranks 3, 3, 1 rows" in message
