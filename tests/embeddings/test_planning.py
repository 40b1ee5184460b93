"""Plans of clusters that are not there: against independent arithmetic, against what real ranks send, and mended."""

import dataclasses
import re
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import muonrec
from muonrec.config import load_config
from muonrec.embeddings.comms import CommsConfig
from muonrec.embeddings.planning import Cluster, Workload, describe_job, find_changes, plan_job
from muonrec.embeddings.planning.job import DenseParameter
from muonrec.embeddings.planning.placement import place, place_by_rows
from muonrec.embeddings.sharding import shard_model
from muonrec.embeddings.tables import TableConfig, initialize_tables
from muonrec.losses import sampled_softmax
from muonrec.optim import DistributedMuon, exchange
from muonrec.optim.ownership import newton_schulz_cost
from muonrec.towers.transformer import TransformerTower
from pipeline.plan import estimate_workload, format_report, print_plan
from pipeline.train import main
from pipeline.train_config import TrainConfig
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import this_rank

GIB = 2**30
ROWS, WIDTH = 200_000_000, 128
META = torch.device("meta")


class Production(nn.Module):
    """Four tables, a projection and two blocks; sequences as they are read, or pooled."""

    def __init__(self, rows=ROWS, width=WIDTH, pooled=False, num_tables=4, data_type=DataType.FP32):
        super().__init__()
        config_class = EmbeddingBagConfig if pooled else EmbeddingConfig
        configs = [
            config_class(
                name=f"t{i}",
                num_embeddings=rows,
                embedding_dim=width,
                feature_names=[f"f{i}"],
                data_type=data_type,
            )
            for i in range(num_tables)
        ]
        self.tables = nn.ModuleDict(
            {"all": (EmbeddingBagCollection if pooled else EmbeddingCollection)(tables=configs, device=META)}
        )
        self.project = nn.Linear(num_tables * width, 256, device=META)
        self.blocks = nn.ModuleList(nn.Linear(256, 256, device=META) for _ in range(2))


def job_of(cluster, *, model=None, optimizer="rowwise_adagrad", sharding="row_wise", workload=None, **settings):
    model = model or Production()
    names = [name for name, _ in model.named_parameters() if name.startswith("tables")]
    tables = {
        name.split(".")[-2]: TableConfig(lr=0.1).model_copy(update={"optimizer": optimizer, "sharding": sharding})
        for name in names
    }
    workload = workload or Workload(batch_size=65_536, ids_per_user={f"f{i}": 50.0 for i in range(4)})
    return describe_job(model, tables, cluster, workload=workload, **settings)


LARGE = [16, pytest.param(128, marks=pytest.mark.slow)]  # nodes


@pytest.mark.parametrize("nodes", LARGE)
def test_four_tables_of_200_million_rows_are_planned_in_seconds(nodes):
    started = time.monotonic()
    plan = plan_job(job_of(Cluster(nodes, 8, 80 * GIB)))
    assert time.monotonic() - started < 60
    num_ranks = nodes * 8
    assert plan.fits
    assert plan.memory["tables"].shape == (num_ranks,)
    assert plan.memory["tables"].max() == 4 * -(-ROWS // num_ranks) * WIDTH * 4
    assert plan.memory["tables"].sum() == 4 * ROWS * WIDTH * 4
    assert plan.memory["table state"].sum() == 4 * ROWS * 4
    assert [placement.sharding for placement in plan.placements] == ["row_wise"] * 4


@pytest.mark.parametrize("nodes", LARGE)
def test_the_planner_chooses_for_large_clusters_in_seconds(nodes):
    started = time.monotonic()
    plan = plan_job(job_of(Cluster(nodes, 8, 80 * GIB), sharding="auto"))
    assert time.monotonic() - started < 60
    assert plan.fits
    assert plan.table_bytes.max() < 0.85 * 80 * GIB


@pytest.mark.parametrize(
    "optimizer,bytes_per_row",
    [
        ("sgd", 0),
        ("rowwise_adagrad", 4),
        ("adagrad", 4 * WIDTH),
        ("adam", 8 * WIDTH),
        ("partial_rowwise_adam", 4 * WIDTH + 4),
    ],
)
def test_state_has_the_bytes_of_fbgemms_momenta(optimizer, bytes_per_row):
    model = Production(rows=1000, num_tables=1, data_type=DataType.FP16)
    plan = plan_job(job_of(Cluster(1, 4, GIB), model=model, optimizer=optimizer))
    assert plan.memory["tables"].tolist() == [250 * WIDTH * 2] * 4
    assert plan.memory["table state"].tolist() == [250 * bytes_per_row] * 4


def test_an_optimizer_of_cpu_tables_is_refused_for_a_cluster():
    with pytest.raises(ValueError, match="table 't0' asks for dense_adam, which runs on a CPU alone; use adam"):
        plan_job(job_of(Cluster(1, 4, GIB), model=Production(rows=1000, num_tables=1), optimizer="dense_adam"))


def test_row_wise_state_exists_once_for_every_block_of_columns():
    model = Production(rows=1000, width=512, num_tables=1)
    plan = plan_job(job_of(Cluster(1, 4, GIB), model=model, sharding="column_wise"))
    assert plan.placements[0].columns.tolist() == [128] * 4
    assert plan.memory["table state"].sum() == 4 * 1000 * 4


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "column_wise"])
def test_traffic_of_sequences_equals_a_loop_over_pairs_of_ranks(sharding):
    users, ids = 16, 16 * 10.0
    plan = plan_job(
        job_of(
            Cluster(2, 2, GIB),
            model=Production(rows=1000, num_tables=2),
            sharding=sharding,
            workload=Workload(batch_size=4 * users, ids_per_user={"f0": 10.0, "f1": 10.0}),
        )
    )
    asked, answered = np.zeros((4, 4)), np.zeros((4, 4))  # [from, to]
    for placement in plan.placements:
        for owner, rows, columns in zip(placement.ranks, placement.rows, placement.columns, strict=True):
            for rank in range(4):
                mine = ids * rows / 1000
                asked[rank, owner] += 8 * mine + 8 * users
                answered[owner, rank] += 4 * mine * columns
    for moved in (asked, answered):
        np.fill_diagonal(moved, 0)
    by_name = {collective.name: collective for collective in plan.collectives}
    np.testing.assert_allclose(by_name["ids"].sent, asked.sum(1))
    np.testing.assert_allclose(by_name["ids"].received, asked.sum(0))
    np.testing.assert_allclose(by_name[f"embeddings forward, {sharding}"].sent, answered.sum(1))
    np.testing.assert_allclose(by_name[f"embeddings forward, {sharding}"].received, answered.sum(0))
    np.testing.assert_allclose(by_name[f"embeddings backward, {sharding}"].sent, answered.sum(0))


def test_pooled_bags_return_one_sum_for_each_user_whatever_their_ids():
    def plan_of(ids_per_user, sharding):
        workload = Workload(batch_size=64, ids_per_user={"f0": ids_per_user})
        model = Production(rows=1000, num_tables=1, pooled=True)
        return plan_job(job_of(Cluster(2, 2, GIB), model=model, sharding=sharding, workload=workload))

    for ids_per_user in (1.0, 50.0):
        # A reduce-scatter of the sums of 16 users of each rank: to each of three others.
        by_name = {c.name: c for c in plan_of(ids_per_user, "row_wise").collectives}
        assert by_name["embeddings forward, row_wise"].sent.tolist() == [3 * 16 * WIDTH * 4] * 4
        # Within the node half of the sums for 64 users, then those for 16 users to the other node.
        forward = {c.name: c for c in plan_of(ids_per_user, "table_row_wise").collectives}[
            "embeddings forward, table_row_wise"
        ]
        assert sorted(forward.sent.tolist()) == [0, 0, (32 + 16) * WIDTH * 4, (32 + 16) * WIDTH * 4]
        assert forward.sent.sum() == forward.received.sum()


def test_dense_memory_and_traffic_equal_the_arithmetic():
    cluster = Cluster(2, 2, GIB)
    ddp, fsdp2 = (
        plan_job(job_of(cluster, model=Production(rows=1000), dense_sharding=sharding)) for sharding in ("ddp", "fsdp2")
    )
    matrices, biases = [4 * WIDTH * 256, 256 * 256, 256 * 256], [256, 256, 256]
    whole = 4 * (sum(matrices) + sum(biases))
    assert ddp.memory["dense"].tolist() == ddp.memory["gradients"].tolist() == [whole] * 4
    assert fsdp2.memory["dense"].tolist() == [whole / 4] * 4
    # Under DDP a momentum lives on its owner; AdamW keeps two numbers for every bias.
    assert ddp.memory["dense state"].sum() == 4 * sum(matrices) + 4 * 2 * 4 * sum(biases)
    assert fsdp2.memory["dense state"].tolist() == [sum(matrices) + 2 * sum(biases)] * 4
    sent = {collective.name: collective.sent.tolist() for collective in (*ddp.collectives, *fsdp2.collectives)}
    assert sent["dense gradients, all-reduce (DDP)"] == [2 * 3 / 4 * whole] * 4
    assert sent["dense gradients, reduce-scatter (FSDP2)"] == [3 / 4 * whole] * 4
    blocks = 2 * 4 * (256 * 256 + 256)
    assert sent["dense weights, all-gather (FSDP2)"] == [3 / 4 * (whole + blocks)] * 4


def test_newton_schulz_is_counted_on_the_owner_of_each_matrix():
    plan = plan_job(job_of(Cluster(2, 2, GIB), model=Production(rows=1000), ns_steps=5))
    costs = sorted([newton_schulz_cost((256, 512), 5), *[newton_schulz_cost((256, 256), 5)] * 2])
    assert sorted(plan.newton_schulz.tolist()) == [0, *costs]
    assert sorted(plan.owned.tolist()) == [0, 1, 1, 1]
    adamw = plan_job(job_of(Cluster(2, 2, GIB), model=Production(rows=1000), muon=False))
    assert adamw.newton_schulz.sum() == 0
    assert not any("Muon" in collective.name for collective in adamw.collectives)


def test_sums_by_rows_are_those_of_the_planner_to_the_byte():
    for optimizer in ("sgd", "rowwise_adagrad", "adagrad", "adam", "partial_rowwise_adam"):
        for data_type in (DataType.FP32, DataType.FP16):
            model = Production(rows=1_000_003, num_tables=3, data_type=data_type)
            job = job_of(Cluster(2, 4, GIB), model=model, optimizer=optimizer)
            # The least memory in which the sums take them: there, and a byte below, the planner must agree.
            taken, refused = GIB, 0
            while taken - refused > 1:
                middle = (taken + refused) // 2
                tight = dataclasses.replace(job, cluster=Cluster(2, 4, middle))
                taken, refused = (middle, refused) if place_by_rows(tight)[1] is None else (taken, middle)
            for hbm_bytes, fits in ((taken, True), (refused, False)):
                tight = dataclasses.replace(job, cluster=Cluster(2, 4, hbm_bytes))
                placements, refusal = place(tight)
                assert (refusal is None) == fits
                for planned, summed in zip(placements, place_by_rows(tight)[0], strict=True):
                    assert planned.table == summed.table
                    np.testing.assert_array_equal(planned.rows, summed.rows)
                    np.testing.assert_array_equal(planned.ranks, summed.ranks)


# Against what two real ranks send


class Small(nn.Module):
    """One table under two features and a tower of two matrices."""

    def __init__(self):
        super().__init__()
        config = EmbeddingConfig(name="t0", num_embeddings=64, embedding_dim=128, feature_names=["a", "b"])
        self.tables = EmbeddingCollection(tables=[config], device=META)
        self.project = nn.Linear(128, 96)
        self.blocks = nn.ModuleList([nn.Linear(96, 80)])

    def forward(self, features):
        rows = self.tables(features)
        return self.blocks[0](self.project(rows["a"].values() + rows["b"].values())).square().mean()


def local_bytes(value):
    """Bytes of what this rank has of a tensor."""
    if isinstance(value, ShardedTensor):
        return sum(shard.tensor.numel() * shard.tensor.element_size() for shard in value.local_shards())
    value = value.to_local() if isinstance(value, DTensor) else value
    return value.numel() * value.element_size() if value.ndim else 0  # a count of steps is no memory to speak of


def held_and_sent(sharding, dense):
    """Bytes this rank holds, by part, and sends to the other in a step, by when and by the type of what is sent."""
    tables = {"t0": TableConfig(lr=0.1, sharding=sharding)}
    dmp, _ = shard_model(Small(), tables, dense=dense, ranks=this_rank(), batch_size=8)
    initialize_tables(dmp, std={"t0": 0.1}, seed=0)
    optimizer = muonrec.build_optimizer(dmp, muon={"lr": 0.01}, adamw={"lr": 0.01})
    sent = {}
    real = dist.all_to_all_single

    def counting(output, input, output_split_sizes=None, input_split_sizes=None, *args, **settings):
        own = 1 / dist.get_world_size()
        if input_split_sizes is not None and len(input):
            own = input_split_sizes[dist.get_rank()] / len(input)
        key = (phase, input.dtype)
        sent[key] = sent.get(key, 0) + round(input.numel() * (1 - own)) * input.element_size()
        return real(output, input, output_split_sizes, input_split_sizes, *args, **settings)

    dist.all_to_all_single = counting
    try:
        # Every row once under each feature, dealt to 8 users: half of the ids belong to either rank.
        ids = torch.arange(64).repeat(2)
        features = KeyedJaggedTensor(keys=["a", "b"], values=ids, lengths=torch.full((16,), 8))
        dmp.train()
        optimizer.zero_grad()
        phase = "forward"
        loss = dmp(features)
        phase = "backward"
        loss.backward()
        phase = "step"
        optimizer.step()
    finally:
        dist.all_to_all_single = real
    weights = {"tables": 0, "dense": 0}
    for name, value in dmp.state_dict().items():
        weights["tables" if name.startswith("tables") else "dense"] += local_bytes(value)
    state = {
        part: sum(local_bytes(value) for values in optimizer.parts[part].state.values() for value in values.values())
        for part in optimizer.parts
    }
    held = {**weights, "table state": state["tables"], "dense state": state["muon"] + state["adamw"]}
    return held, sent


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
@pytest.mark.parametrize("dense", ["ddp", "fsdp2"])
def test_planned_bytes_are_those_that_two_ranks_hold_and_send(sharding, dense):
    workload = Workload(batch_size=16, ids_per_user={"a": 8.0, "b": 8.0})
    tables = {"t0": TableConfig(lr=0.1, sharding=sharding)}
    job = describe_job(Small(), tables, Cluster(1, 2, GIB), workload=workload, dense_sharding=dense)
    plan = plan_job(job)
    planned = {collective.name: collective.sent for collective in plan.collectives}
    muon = sum(sent for name, sent in planned.items() if "Muon" in name and "all-to-all" in name)
    for rank, (held, sent) in enumerate(run_on_ranks(2, held_and_sent, sharding, dense)):
        assert held == {part: plan.memory[part][rank] for part in held}
        # Beside ids and lengths travel their counts, 8 bytes each: known sizes that the plan leaves out.
        assert 0 <= sent["forward", torch.int64] - planned["ids"][rank] <= 8 * 8
        assert sent["forward", torch.float32] == planned[f"embeddings forward, {sharding}"][rank]
        assert sent["backward", torch.float32] == planned[f"embeddings backward, {sharding}"][rank]
        assert sent["step", torch.uint8] == muon[rank]


TOWERS = {
    "one matrix": [(24, 40)],
    "fewer matrices than ranks": [(24, 40), (7, 5)],
    "many": [(16, 16)] * 9 + [(40, 24)] * 3 + [(5, 7)],
}


def sent_by_muon(shapes):
    """Bytes that this rank sends to others in a step of Muon on replicated matrices, by collective."""
    params = [(f"{i}.weight", nn.Parameter(torch.ones(shape))) for i, shape in enumerate(shapes)]
    optimizer = DistributedMuon(params)
    for _, param in params:
        param.grad = torch.ones_like(param)
    sent = {"all-to-all": 0, "all-gather": 0}
    real = dist.all_to_all_single, exchange.all_gather_single

    def all_to_all(output, input, output_split_sizes, input_split_sizes, **settings):
        sent["all-to-all"] += sum(input_split_sizes) - input_split_sizes[dist.get_rank()]
        return real[0](output, input, output_split_sizes, input_split_sizes, **settings)

    def all_gather(output, input, **settings):
        sent["all-gather"] += (dist.get_world_size() - 1) * input.numel()
        return real[1](output, input, **settings)

    dist.all_to_all_single, exchange.all_gather_single = all_to_all, all_gather
    try:
        optimizer.step()
    finally:
        dist.all_to_all_single, exchange.all_gather_single = real
    return sent


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("tower", TOWERS)
def test_planned_updates_of_muon_are_those_that_ranks_send(tower, num_ranks):
    tables = {"t0": TableConfig(lr=0.1, sharding="row_wise")}
    workload = Workload(batch_size=16, ids_per_user={"a": 8.0, "b": 8.0})
    job = describe_job(Small(), tables, Cluster(1, num_ranks, GIB), workload=workload)
    dense = [DenseParameter(f"{i}.weight", shape, 4, "muon", (shape,), "") for i, shape in enumerate(TOWERS[tower])]
    plan = plan_job(dataclasses.replace(job, dense=tuple(dense)))
    planned = {collective.name: collective.sent for collective in plan.collectives}
    for rank, sent in enumerate(run_on_ranks(num_ranks, sent_by_muon, TOWERS[tower])):
        for kind, num_bytes in sent.items():
            assert num_bytes == planned.get(f"Muon updates, {kind}", np.zeros(num_ranks))[rank]


# What does not fit, and what would make it fit


def overfull(**settings):
    plan = plan_job(job_of(**settings))
    assert not plan.fits
    changes = find_changes(plan)
    for change in changes:  # planned again by itself, it must come out the same
        again = plan_job(change.plan.job)
        assert again.fits == change.plan.fits
        np.testing.assert_array_equal(again.total, change.plan.total)
    return plan, changes


def smallest(changes):
    return next(change for change in changes if change.plan.fits)


@pytest.mark.parametrize("nodes", LARGE)
def test_changes_of_large_clusters_are_found_in_seconds(nodes):
    started = time.monotonic()
    plan = plan_job(job_of(Cluster(nodes, 8, 128 // nodes * GIB), optimizer="adam"))
    found = smallest(find_changes(plan))
    assert time.monotonic() - started < 60
    assert not plan.fits
    assert found.what == "optimizer=partial_rowwise_adam for t0, t1, t2"
    assert plan_job(found.plan.job).fits


def test_a_table_too_large_for_a_rank_is_to_be_cut_by_rows():
    plan, changes = overfull(cluster=Cluster(2, 8, 80 * GIB), sharding="table_wise", model=Production(num_tables=1))
    assert plan.refusal is not None
    assert plan.table_bytes.max() == ROWS * (WIDTH * 4 + 4)  # 96 GiB on one rank
    assert smallest(changes).what == "sharding=row_wise for t0"
    assert smallest(changes).plan.table_bytes.max() == ROWS / 16 * (WIDTH * 4 + 4)


def test_state_too_large_for_the_ranks_asks_for_a_row_wise_optimizer_for_as_few_tables_as_suffice():
    # Weights 48 GiB a rank; with Adagrad's state 96: over 68 = 85 % of 80 by two tables' worth.
    plan, changes = overfull(cluster=Cluster(1, 8, 80 * GIB), optimizer="adagrad")
    assert plan.table_bytes.max() == 4 * 2 * ROWS / 8 * WIDTH * 4
    assert smallest(changes).what == "optimizer=rowwise_adagrad for t0, t1, t2"
    assert smallest(changes).plan.table_bytes.max() <= 0.85 * 80 * GIB


def test_weights_too_large_for_the_ranks_ask_for_float16():
    plan, changes = overfull(cluster=Cluster(1, 4, 80 * GIB))
    assert plan.table_bytes.max() == 4 * ROWS / 4 * (WIDTH * 4 + 4)
    found = smallest(changes)
    assert found.what == "data_type=fp16 for t0, t1, t2"
    assert sum(table.element_bytes == 2 for table in found.plan.job.tables) == 3


def test_the_fewest_nodes_that_would_do_are_named_and_one_less_does_not_do():
    _, changes = overfull(cluster=Cluster(1, 4, 80 * GIB))
    more = next(change for change in changes if "nodes" in change.what)
    assert more.what == "2 nodes (8 ranks)"
    _, changes = overfull(cluster=Cluster(1, 8, 16 * GIB), optimizer="adam")
    more = next(change for change in changes if "nodes" in change.what).plan.job
    assert plan_job(more).fits
    fewer = dataclasses.replace(more, cluster=dataclasses.replace(more.cluster, nodes=more.cluster.nodes - 1))
    assert not plan_job(fewer).fits


def test_where_no_settings_suffice_the_slimmest_tables_are_offered_with_fewer_nodes():
    _, changes = overfull(cluster=Cluster(2, 8, 16 * GIB), optimizer="adam")
    assert [change.what for change in changes if change.plan.fits] == [
        "11 nodes (88 ranks)",
        "optimizer=partial_rowwise_adam, data_type=fp16 for every table; 5 nodes (40 ranks)",
    ]


def test_activations_too_large_for_a_rank_ask_for_more_nodes_or_else_a_smaller_batch(monkeypatch):
    workload = Workload(batch_size=8 * 1024, activation_bytes_per_user=GIB / 8, activation_formula="made up")
    plan, changes = overfull(cluster=Cluster(1, 8, 80 * GIB), model=Production(rows=1000), workload=workload)
    assert plan.refusal is None
    assert plan.memory["activations"].tolist() == [128 * GIB] * 8
    assert [change.what for change in changes if change.plan.fits] == ["2 nodes (16 ranks)"]
    monkeypatch.setattr("muonrec.embeddings.planning.changes.MOST_RANKS", 8)
    # 80 GiB hold 639 users of 128 MiB beside the rest, 640 without.
    batches = [change.plan.job.workload.batch_size for change in find_changes(plan) if change.plan.fits]
    assert batches == [639 * 8]


def test_dense_weights_too_large_for_a_rank_ask_for_fsdp2():
    model = Production(rows=1000)
    model.blocks = nn.ModuleList(nn.Linear(32_768, 32_768, device=META) for _ in range(6))  # 24 GiB
    plan, changes = overfull(cluster=Cluster(1, 8, 40 * GIB), model=model)
    assert plan.memory["dense"].max() > 24 * GIB
    assert smallest(changes).what == "dense_sharding=fsdp2"


def test_what_cannot_be_planned_is_refused_by_name():
    cluster = Cluster(1, 2, GIB)
    with pytest.raises(ValueError, match="table 't0' asks for data_parallel"):
        plan_job(job_of(cluster, sharding="data_parallel"))
    with pytest.raises(ValueError, match="asks for optimizer 'lamb'"):
        job_of(cluster, optimizer="lamb")
    with pytest.raises(ValueError, match="table 't0' has no settings"):
        describe_job(Production(), {}, cluster, workload=Workload(batch_size=1))
    with pytest.raises(ValueError, match="0 x 8 ranks"):
        Cluster(0, 8, GIB)


# The report of the stage, and its command line


def config_of(*overrides):
    return load_config(TrainConfig, "configs/amazon-beauty/sasrec.yaml", overrides)


def test_the_report_says_what_fits_and_names_every_number(capsys):
    plan = print_plan(config_of("model.embedding_dim=128"), 2, 8, 80, rows={"item": 200_000_000})
    text = capsys.readouterr().out
    assert plan.fits
    assert "2 x 8 = 16 ranks of 80 GiB; 256 users a step, 16 a rank; dense side: ddp" in text
    assert "FITS: the fullest rank, 0, needs" in text
    # 200 M rows of 128 float32 and a float32 of state each, over 16 ranks
    assert "95.4 GiB  763 MiB" in text and "5.96 GiB     47.7 MiB" in text
    for words in ("embeddings backward, row_wise", "Muon updates, all-to-all", "Newton-Schulz in a step: 12 matrices"):
        assert words in text
    assert max(map(len, text.splitlines())) < 180


def test_the_report_of_an_overfull_plan_names_the_table_and_the_smallest_change(capsys):
    overrides = ("model.embedding_dim=128", "tables.item.sharding=table_wise")
    plan = print_plan(config_of(*overrides), 1, 4, 80, rows={"item": 200_000_000})
    text = capsys.readouterr().out
    assert not plan.fits
    assert "DOES NOT FIT" in text
    assert "table item alone puts 96.1 GiB on rank 0 (table_wise)" in text
    assert "SMALLEST CHANGE THAT FITS: sharding=row_wise for item" in text
    assert "Storage(" not in text
    changed = print_plan(config_of(overrides[0], "tables.item.sharding=row_wise"), 1, 4, 80, rows={"item": 200_000_000})
    assert changed.fits


def test_a_full_softmax_over_too_many_items_is_to_be_sampled(capsys):
    config = config_of("loss.name=full_softmax")
    assert not print_plan(config, 1, 4, 80, rows={"item": 200_000_000}).fits
    assert "SMALLEST CHANGE THAT FITS: loss.name=sampled_softmax" in capsys.readouterr().out
    assert print_plan(config_of(), 1, 4, 80, rows={"item": 200_000_000}).fits


def test_estimated_activations_are_within_a_third_of_what_autograd_keeps():
    # Dropout as usual, histories full; what is kept is counted where autograd packs it.
    config = config_of("batch_size=8")
    model = config.model
    tower = TransformerTower(
        **{
            key: getattr(model, key)
            for key in ("embedding_dim", "num_layers", "num_heads", "feedforward_dim", "dropout", "max_length")
        }
    )
    users, length = 8, model.max_length
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    alive = []
    parameters = {p.untyped_storage().data_ptr() for p in tower.parameters()}
    lengths = torch.full((users,), length)
    x = torch.randn(users * length, model.embedding_dim, requires_grad=True)
    candidates = torch.randn(config.loss.num_negatives, model.embedding_dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = tower(x, lengths, [(users, users * length, length)])
        ids = torch.arange(config.loss.num_negatives)
        sampled_softmax(hidden, x, candidates, torch.zeros(users * length, dtype=int), ids, torch.empty(0)).sum()
    measured = sum(size for pointer, size in kept.items() if pointer not in parameters)
    estimated = users * estimate_workload(config, 1000).activation_bytes_per_user
    assert 0.67 < estimated / measured < 1.5


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--plan", "16", "--hbm", "80"], "--plan '16' is not NODESxRANKS; write 16x8"),
        (["--plan", "1x2", "--hbm", "80", "--rows", "item"], "--rows 'item' is not TABLE=COUNT"),
        (["--plan", "1x2", "--hbm", "80", "--rows", "item=1__0"], "--rows 'item=1__0' is not TABLE=COUNT"),
        (["--plan", "1x2", "--hbm", "80", "--rows", "user=5"], "--rows names tables ['user']"),
        (["--plan", "1x2", "--hbm", "80", "data.output=nowhere"], "pass --rows item=COUNT"),
        (["--plan", "1x2", "--hbm", "0", "--rows", "item=5"], "1 x 2 ranks with 0 bytes"),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_message(monkeypatch, capfd, arguments, message):
    monkeypatch.setattr("sys.argv", ["train", "configs/amazon-beauty/sasrec.yaml", *arguments])
    assert main() == 1
    said = " ".join(capfd.readouterr().err.split())
    assert message in said and "Traceback" not in said


# What the settings of production tables do to a plan


def settings_of(**settings):
    return {f"t{i}": TableConfig(lr=0.1, **settings) for i in range(4)}


def planned(*, rows=1_000_000, pooled=False, comms=None, hbm_bytes=GIB, **settings):
    return plan_job(
        describe_job(
            Production(rows=rows, pooled=pooled),
            settings_of(**settings),
            Cluster(2, 4, hbm_bytes, 64 * GIB),
            workload=Workload(batch_size=64, ids_per_user={f"f{i}": 50.0 for i in range(4)}),
            comms=comms,
        )
    )


def test_float16_rows_take_half_the_memory_and_state_stays_float32():
    full, half = (planned(sharding="row_wise", data_type=data_type) for data_type in ("fp32", "fp16"))
    np.testing.assert_array_equal(half.memory["tables"], full.memory["tables"] / 2)
    np.testing.assert_array_equal(half.memory["table state"], full.memory["table state"])


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
def test_cached_tables_take_their_cache_on_the_device_and_the_rest_on_the_host(optimizer):
    weights, elements = 4 * 125_000 * WIDTH * 4, 4 * 125_000 * WIDTH * 4 * (optimizer == "adagrad")
    rows = 4 * 125_000
    for memory, on_device in (("uvm_caching", 0.1 * weights + rows * (4 + 16 * 0.1)), ("uvm", 0)):
        share = {"cache_load_factor": 0.1} if memory == "uvm_caching" else {}
        plan = planned(sharding="row_wise", memory=memory, optimizer=optimizer, **share)
        assert {placement.kernel for placement in plan.placements} == {f"fused_{memory}"}
        np.testing.assert_allclose(plan.memory["tables"], on_device)
        assert plan.memory["table state"].tolist() == [rows * 4 * (optimizer != "adagrad")] * 8
        assert plan.host.tolist() == [weights + elements] * 8


@pytest.mark.parametrize("memory", ["uvm_caching", "uvm"])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "adam"])
def test_sums_by_rows_of_host_memory_are_those_of_the_planner_to_the_byte(memory, optimizer):
    tables = {f"t{i}": TableConfig(lr=0.1, sharding="row_wise", memory=memory, pooling_factor=3.0) for i in range(3)}
    tables = {name: table.model_copy(update={"optimizer": optimizer}) for name, table in tables.items()}
    model, workload = Production(rows=1_000_003, num_tables=3), Workload(batch_size=64)
    job = describe_job(model, tables, Cluster(2, 4, GIB, GIB), workload=workload)
    for kind in ("hbm_bytes", "host_bytes"):
        taken, refused = GIB, 0
        while taken - refused > 1:
            middle = (taken + refused) // 2
            tight = dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, **{kind: middle}))
            taken, refused = (middle, refused) if place_by_rows(tight)[1] is None else (taken, middle)
        for num_bytes, fits in ((taken, True), (refused, False)):
            tight = dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, **{kind: num_bytes}))
            assert (place(tight)[1] is None) == fits, kind


@pytest.mark.parametrize("sharding", ["row_wise", "column_wise"])
def test_comms_change_the_bytes_of_rows_and_gradients_and_of_nothing_else(sharding):
    exact = {c.name: c for c in planned(sharding=sharding).collectives}
    for collective in planned(sharding=sharding, comms=CommsConfig(forward="fp16", backward="int8")).collectives:
        share = 1.0
        if "embeddings forward" in collective.name:
            share = 0.5
        elif "embeddings backward" in collective.name:
            share = 40 / 32 / 4  # a scale and an offset for every 32 bytes
        np.testing.assert_allclose(collective.sent, share * exact[collective.name].sent)
        np.testing.assert_allclose(collective.received, share * exact[collective.name].received)


@pytest.mark.parametrize("sharding", ["table_row_wise", "grid_shard", "table_column_wise"])
def test_bags_are_planned_under_the_types_that_need_a_node(sharding):
    plan = planned(pooled=True, sharding=sharding)
    assert [placement.sharding for placement in plan.placements] == [sharding] * 4
    assert plan.memory["tables"].sum() == 4 * 1_000_000 * WIDTH * 4
    with pytest.raises(ValueError, match=f"asks for {sharding}, which TorchRec has for an EmbeddingBagCollection"):
        planned(sharding=sharding)


def test_tables_too_large_for_any_setting_go_to_host_memory():
    # One rank, 95 GiB of float32: no sharding helps, and half of it is still too much.
    workload, model = Workload(batch_size=64), Production(num_tables=1)
    cluster = Cluster(1, 1, 40 * GIB, 128 * GIB)
    job = describe_job(model, {"t0": TableConfig(lr=0.1)}, cluster, workload=workload)
    assert smallest(find_changes(plan_job(job))).what == "memory=uvm_caching for t0"
    short = dataclasses.replace(job, cluster=dataclasses.replace(cluster, host_bytes=64 * GIB))
    assert "memory" not in smallest(find_changes(plan_job(short))).what


def test_tables_too_large_for_the_host_come_back_to_the_device_and_the_report_says_where_room_is_missing():
    model, cluster = Production(), Cluster(1, 8, 80 * GIB, 8 * GIB)
    tables = settings_of(sharding="row_wise", memory="uvm_caching")
    plan = plan_job(describe_job(model, tables, cluster, workload=Workload(batch_size=64)))
    changes = find_changes(plan)
    assert smallest(changes).what == "memory=hbm for every table"
    assert not any("fsdp2" in change.what for change in changes)
    text = format_report(plan, changes)
    # 4 x 25 M rows x 128 x 4 bytes of 8 GiB.
    assert "; of its host's a rank needs 47.7 GiB, 596% of its share\n" in text
    assert "which may fill 68 GiB of a rank and 8 GiB of its host, finds no room" in text
    assert re.search(r"Shard of size \S+ GiB and 12.0 GiB of the host does not fit", text)
    assert re.search(r"data_type=fp16 for every table +8 .* 298% +refuses +does not fit", text)


def test_bags_whose_comms_cannot_reduce_sums_are_not_to_be_cut_by_rows():
    tables, cluster = settings_of(sharding="table_wise"), Cluster(1, 8, 64 * GIB)
    comms, workload = CommsConfig(forward="int8"), Workload(batch_size=64)
    plan = plan_job(describe_job(Production(pooled=True), tables, cluster, workload=workload, comms=comms))
    changes = find_changes(plan)
    assert [placement.sharding for placement in plan.placements] == ["table_wise"] * 4
    assert smallest(changes).what == "data_type=fp16 for every table"
    assert not any("row_wise" in change.what for change in changes)


def test_what_the_planner_counts_too_short_does_not_fit():
    # It takes Adam's state to be as short as the rows: 6 bytes where there are 10.
    model, rows = Production(rows=1_000_000, num_tables=1, data_type=DataType.FP16), 500_000
    tables = {"t0": TableConfig(lr=0.1, sharding="row_wise", optimizer="adam", memory="uvm")}
    for num_bytes, fits in ((9, False), (10, True)):
        cluster = Cluster(1, 2, GIB, rows * WIDTH * num_bytes)
        plan = plan_job(describe_job(model, tables, cluster, workload=Workload(batch_size=64)))
        assert plan.refusal is None and plan.fits == fits
        assert plan.host.tolist() == [rows * WIDTH * 10] * 2


def test_a_planner_that_finds_no_node_is_quoted_without_its_objects():
    tables = settings_of(sharding="table_row_wise")
    cluster, workload = Cluster(1, 8, 16 * GIB), Workload(batch_size=64)
    text = format_report(plan_job(describe_job(Production(pooled=True), tables, cluster, workload=workload)))
    assert re.search(r"can't find a host for tables of \S+ GiB\n", text)


def test_the_report_follows_data_type_memory_and_comms(capsys):
    overrides = ("model.embedding_dim=128", "tables.item.memory=uvm_caching", "tables.item.data_type=fp16")
    # The ranks of a node share its memory.
    plan = print_plan(config_of(*overrides, "comms.forward=fp16"), 1, 4, 80, host_gib=256, rows={"item": 200_000_000})
    text = capsys.readouterr().out
    assert plan.fits
    assert "fp16  rowwise_adagrad  uvm_caching" in text
    assert "of the host's memory a rank takes at most 11.9 GiB, 18.6% of its 64 GiB" in text
    assert max(map(len, text.splitlines())) < 180
