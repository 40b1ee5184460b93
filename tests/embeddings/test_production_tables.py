"""Bags cut by node, float16 rows, quantized comms and host memory: trained where a CPU can, planned for CUDA."""

import contextlib
import dataclasses
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed import comm
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import CommOp
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import muonrec
from muonrec.checkpoint.weights import export_weights, import_weights
from muonrec.embeddings.comms import WIRE_BYTES, CommsConfig, codecs
from muonrec.embeddings.constraints import ask_planner, constrain, make_topology
from muonrec.embeddings.fused import check_tables, fused_tables
from muonrec.embeddings.sharding import make_plan, shard_model
from muonrec.embeddings.tables import TableConfig, cast_tables, initialize_tables
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import this_rank, whole

META = torch.device("meta")
ROWS, WIDTH, USERS = 96, 64, 12


class Collections(nn.Module):
    """One table, of bags or of sequences, and a projection; every row is pulled towards one."""

    def __init__(self, pooled=False, width=WIDTH, data_type=DataType.FP32):
        super().__init__()
        config_class, collection = (
            (EmbeddingBagConfig, EmbeddingBagCollection) if pooled else (EmbeddingConfig, EmbeddingCollection)
        )
        config = config_class(
            name="t", num_embeddings=ROWS, embedding_dim=width, feature_names=["f"], data_type=data_type
        )
        self.pooled = pooled
        self.tables = collection(tables=[config], device=META)
        self.project = nn.Linear(width, width)

    def forward(self, features):
        rows = self.tables(features)["f"]
        rows = rows if self.pooled else rows.values()
        return (rows - 1).square().sum() / USERS + 1e-3 * self.project(rows).square().sum() / USERS


def features_of(step, device="cpu"):
    """This rank's users of a global batch, three ids each."""
    ids = torch.randint(0, ROWS, (USERS, 3), generator=torch.Generator().manual_seed(step))
    mine = ids[dist.get_rank() :: dist.get_world_size()]
    return KeyedJaggedTensor(keys=["f"], values=mine.flatten(), lengths=torch.full((len(mine),), 3)).to(device)


def built(settings, pooled=False, comms=None, device="cpu"):
    torch.manual_seed(0)
    tables = {"t": TableConfig(**{"lr": 0.05, **settings})}
    ranks = dataclasses.replace(this_rank(), device=torch.device(device))
    dmp, plan = shard_model(
        Collections(pooled), tables, dense="ddp", ranks=ranks, batch_size=USERS, comms=CommsConfig(**(comms or {}))
    )
    initialize_tables(dmp, std={"t": 0.1}, seed=0)
    check_tables(dmp, tables)
    return dmp, muonrec.build_optimizer(dmp, muon={"lr": 0.01, "ns_dtype": torch.float32}, adamw={"lr": 1e-3}), plan


def steps(dmp, optimizer, first, last, device="cpu"):
    """Losses of the global batch."""
    dmp.train()
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        loss = dmp(features_of(step, device)) * dist.get_world_size()  # gradients are means over the ranks
        loss.backward()
        optimizer.step()
        total = loss.detach().cpu() / dist.get_world_size()
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


@contextlib.contextmanager
def nodes_of(ranks_per_node):
    """What torchrun would say on machines of so many ranks."""
    before = os.environ["LOCAL_WORLD_SIZE"]
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)
    # TorchRec keeps the groups of a node for the life of the process.
    kept, comm._INTRA_PG, comm._CROSS_PG = (comm._INTRA_PG, comm._CROSS_PG), None, None
    try:
        yield
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = before
        comm._INTRA_PG, comm._CROSS_PG = kept


def trained(settings, pooled=False, comms=None, ranks_per_node=1):
    """Losses, the whole table and its shards after four steps."""
    with nodes_of(ranks_per_node):
        dmp, optimizer, plan = built(settings, pooled, comms)
        losses = steps(dmp, optimizer, 0, 4)
    (found,) = plan.plan["tables"].values()
    parts = found.sharding_spec.shards
    shards = [(part.placement.rank(), *part.shard_offsets, *part.shard_sizes) for part in parts]
    (table,) = (whole(value) for name, value in dmp.state_dict().items() if name.startswith("tables"))
    return losses, table, found.sharding_type, shards


# Sharding types


@pytest.mark.parametrize(
    ("sharding", "shards"),
    [
        ("row_wise", [(rank, 24 * rank, 0, 24, 64) for rank in range(4)]),
        ("table_row_wise", [(0, 0, 0, 48, 64), (1, 48, 0, 48, 64)]),
        ("grid_shard", [(0, 0, 0, 48, 32), (1, 48, 0, 48, 32), (2, 0, 32, 48, 32), (3, 48, 32, 48, 32)]),
        ("table_column_wise", [(0, 0, 0, 96, 32), (1, 0, 32, 96, 32)]),
    ],
)
def test_bags_on_two_nodes_of_two_ranks_train_as_on_one_rank(sharding, shards):
    # Rows are whole under none but row-wise: Adagrad's row statistic would be that of a shard's columns.
    settings = {"optimizer": "adagrad"}
    losses, table, _, _ = run_on_ranks(1, trained, {**settings, "sharding": "table_wise"}, True)[0]
    columns = {} if sharding in ("row_wise", "table_row_wise") else {"min_partition": 32}
    for got in run_on_ranks(4, trained, {**settings, **columns, "sharding": sharding}, True, None, 2):
        assert got[0] == pytest.approx(losses, rel=1e-4)  # float32 sums in another order
        torch.testing.assert_close(got[1], table, rtol=1e-4, atol=1e-4)
        assert got[2:] == (sharding, shards)


def resumed(sharding, other, folder):
    """Losses of three steps that follow three others, at once and resumed under ``other``."""
    settings = {
        name: {"sharding": name, **({"min_partition": 32} if name == "grid_shard" else {})}
        for name in (sharding, other)
    }
    with nodes_of(2):
        dmp, optimizer, _ = built(settings[sharding], True)
        steps(dmp, optimizer, 0, 3)
        muonrec.save(folder, dmp, optimizer)
        expected = steps(dmp, optimizer, 3, 6)
        dmp, optimizer, _ = built(settings[other], True)
        muonrec.load(folder, dmp, optimizer)
        return expected, steps(dmp, optimizer, 3, 6)


@pytest.mark.parametrize(
    ("sharding", "other"),
    [
        ("table_row_wise", "table_row_wise"),
        ("grid_shard", "grid_shard"),
        ("table_row_wise", "row_wise"),
        ("row_wise", "table_row_wise"),
    ],
)
def test_bags_cut_by_node_are_resumed(tmp_path, sharding, other):
    for expected, got in run_on_ranks(4, resumed, sharding, other, tmp_path / "step-00000003"):
        if sharding == other:
            assert got == expected
        assert got == pytest.approx(expected, rel=1e-5)  # float32 sums in another order


def cuda_plan(settings, *, pooled=False, ranks=4, ranks_per_node=2, comms=None, width=WIDTH, hbm_bytes=2**30):
    """The plan for GPUs that are not here."""
    model, tables = Collections(pooled, width), {"t": TableConfig(**{"lr": 0.05, **settings})}
    cast_tables(model, tables)
    topology = make_topology(ranks, ranks_per_node, "cuda", hbm_bytes=hbm_bytes, host_bytes=2**30)
    plan = ask_planner(model, tables, topology, batch_size=USERS, comms=CommsConfig(**(comms or {})), stats=False)
    return plan.plan["tables"]["t"]


@pytest.mark.parametrize("sharding", ["row_wise", "table_row_wise", "grid_shard", "table_column_wise", "table_wise"])
def test_bags_are_planned_for_cuda_as_asked(sharding):
    least = {"min_partition": 32} if sharding == "grid_shard" else {}
    found = cuda_plan({"sharding": sharding, **least}, pooled=True)
    assert (found.sharding_type, found.compute_kernel) == (sharding, "fused")
    nodes = {shard.placement.rank() // 2 for shard in found.sharding_spec.shards}
    assert len(nodes) == (1 if sharding.startswith("table") else 2)


def test_the_planner_chooses_among_the_types_it_is_given():
    assert cuda_plan({"sharding": ["table_wise"]}).sharding_type == "table_wise"
    assert cuda_plan({"sharding": ("column_wise", "row_wise")}).sharding_type in ("column_wise", "row_wise")
    # 100 rows of bags over nodes cost more than within one: left to choose, TorchRec stays on a node.
    assert cuda_plan({"sharding": ["row_wise", "table_row_wise"]}, pooled=True).sharding_type == "table_row_wise"


def test_columns_are_not_cut_below_the_least_partition():
    for least in (16, 32):
        found = cuda_plan({"sharding": "column_wise", "min_partition": least})
        assert {shard.shard_sizes[1] for shard in found.sharding_spec.shards} == {least}


# Memory


@pytest.mark.parametrize(
    ("settings", "kernel", "load_factor"),
    [
        ({"memory": "uvm"}, "fused_uvm", None),
        ({"memory": "uvm_caching"}, "fused_uvm_caching", 0.2),
        ({"memory": "uvm_caching", "cache_load_factor": 0.05}, "fused_uvm_caching", 0.05),
    ],
)
@pytest.mark.parametrize("pooled", [False, True])
def test_host_memory_is_in_the_plan_for_cuda(settings, kernel, load_factor, pooled):
    found = cuda_plan({**settings, "sharding": "row_wise"}, pooled=pooled)
    assert found.compute_kernel == kernel
    assert (found.cache_params and found.cache_params.load_factor) == load_factor


def test_a_table_larger_than_a_device_is_placed_in_host_memory():
    settings = {"sharding": "table_wise"}
    with pytest.raises(PlannerError, match="storage"):
        cuda_plan(settings, hbm_bytes=24_000)  # rows of 24 KiB, and 15 % are not for tables
    assert cuda_plan({**settings, "memory": "uvm_caching"}, hbm_bytes=24_000).compute_kernel == "fused_uvm_caching"


# Data types


def test_float16_rows_train_on_two_ranks_near_float32():
    half = {"data_type": "fp16", "stochastic_rounding": False, "sharding": "row_wise"}
    losses, table, _, _ = run_on_ranks(2, trained, {"sharding": "row_wise"})[0]
    for got_losses, got, _, _ in run_on_ranks(2, trained, half):
        assert got_losses == pytest.approx(losses, rel=1e-3)
        # Rows of about 0.3, each rounded four times: spacing 2^-12.
        torch.testing.assert_close(got, table, rtol=0, atol=1e-3)
        assert not torch.equal(got, table)
        assert torch.equal(got, got.half().float())


def half_rows(folder):
    """What of a float16 table is where, and losses after a resume."""
    settings = {"data_type": "fp16", "stochastic_rounding": False, "sharding": "row_wise"}
    dmp, optimizer, _ = built(settings)
    (key,) = (name for name in dmp.state_dict() if name.startswith("tables"))
    (shard,) = dmp.state_dict()[key].local_shards()
    drawn, _, _ = built({"sharding": "row_wise"})
    is_rounded = torch.equal(shard.tensor, drawn.state_dict()[key].local_shards()[0].tensor.half())
    rows = dmp.module.tables(features_of(0))["f"].values()
    steps(dmp, optimizer, 0, 3)
    muonrec.save(folder, dmp, optimizer)
    expected = steps(dmp, optimizer, 3, 6), whole(dmp.state_dict()[key])
    again, optimizer, _ = built(settings)
    muonrec.load(folder, again, optimizer)
    got = steps(again, optimizer, 3, 6), whole(again.state_dict()[key])
    state = {value.dtype for values in optimizer.parts["tables"].state.values() for value in values.values()}
    line = str(fused_tables(again)[0])
    return is_rounded, shard.tensor.dtype, rows.dtype, state, expected, got, line


def test_float16_rows_are_drawn_in_float32_returned_in_float32_and_resumed_to_the_bit(tmp_path):
    folder = tmp_path / "step-00000003"
    for is_rounded, held, returned, state, expected, got, line in run_on_ranks(2, half_rows, folder):
        assert is_rounded
        assert (held, returned, state) == (torch.float16, torch.float32, {torch.float32})
        assert got[0] == expected[0]
        assert torch.equal(got[1], expected[1])
        assert line.endswith("lr 0.05, eps 1e-08, fp16 rows")
    exported = tmp_path / "weights.safetensors"
    export_weights(folder, exported)
    model = Collections(data_type=DataType.FP16).to_empty(device="cpu")
    import_weights(exported, model)
    held = [shard for *_, shard in run_on_ranks(2, saved_rows, folder)]
    assert torch.equal(model.tables.embeddings["t"].weight, torch.cat(held))


def saved_rows(folder):
    dmp, optimizer, _ = built({"data_type": "fp16", "stochastic_rounding": False, "sharding": "row_wise"})
    muonrec.load(folder, dmp, optimizer)
    (key,) = (name for name in dmp.state_dict() if name.startswith("tables"))
    return "rows", dmp.state_dict()[key].local_shards()[0].tensor.detach().clone()


def test_a_data_type_that_is_not_in_the_kernel_is_found_out():
    assert run_on_ranks(1, undetected)[0] == "table 't' asks for data_type fp16, but fp32 is in force"


def undetected():
    dmp, _, _ = built({})
    try:
        check_tables(dmp, {"t": TableConfig(lr=0.05, data_type="fp16")})
    except ValueError as error:
        return str(error)


def test_a_models_own_data_type_stays_unless_the_settings_say_otherwise():
    model = Collections(data_type=DataType.FP16)
    cast_tables(model, {"t": TableConfig(lr=0.1)})
    assert model.tables.embedding_configs()[0].data_type is DataType.FP16
    cast_tables(model, {"t": TableConfig(lr=0.1, data_type="fp32")})
    assert model.tables.embedding_configs()[0].data_type is DataType.FP32
    assert model.tables.embeddings["t"].weight.dtype == torch.float32


@pytest.mark.parametrize("data_type", ["fp16", "bf16"])
def test_short_rows_are_planned_for_cuda_with_stochastic_rounding(data_type):
    found = cuda_plan({"data_type": data_type, "sharding": "row_wise"})
    assert found.stochastic_rounding is True
    assert cuda_plan({"data_type": data_type, "stochastic_rounding": False}).stochastic_rounding is False


# Comms


def sent_rows(comms, sharding, pooled):
    """Losses, and the type and bytes of everything but ids that a rank puts on the wire in three steps."""
    dmp, optimizer, _ = built({"sharding": sharding}, pooled, comms)
    sent = {}
    originals = {name: getattr(dist, name) for name in ("all_to_all_single", "reduce_scatter_tensor", "reduce_scatter")}

    def counting(original):
        def count(output, input, *args, **settings):
            for tensor in input if isinstance(input, list) else [input]:
                if tensor.dtype != torch.int64:
                    sent[tensor.dtype] = sent.get(tensor.dtype, 0) + tensor.numel() * tensor.element_size()
            return original(output, input, *args, **settings)

        return count

    for name, original in originals.items():
        setattr(dist, name, counting(original))
    try:
        dmp.train()
        for step in range(3):
            loss = dmp(features_of(step))
            loss.backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    del optimizer
    return loss.item(), sent


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.uint8}


@pytest.mark.parametrize(
    ("forward", "backward", "sharding"),
    [("fp16", "fp32", "row_wise"), ("fp16", "fp16", "table_wise"), ("int8", "fp16", "column_wise")],
)
def test_codecs_carry_rows_and_gradients_in_the_bytes_that_are_planned(forward, backward, sharding):
    comms = {"forward": forward, "backward": backward}
    exact = run_on_ranks(2, sent_rows, {}, sharding, False)
    for (loss, sent), (exact_loss, exact_sent) in zip(run_on_ranks(2, sent_rows, comms, sharding, False), exact):
        # Forward and backward move the same elements; the exact run sends each of them in four bytes.
        elements = exact_sent[torch.float32] / 8
        expected = {}
        for precision in (forward, backward):
            dtype = DTYPES[precision]
            expected[dtype] = expected.get(dtype, 0) + elements * WIRE_BYTES[precision]
        if sharding == "row_wise":  # each rank has as many rows to send as it asks for only on average
            assert sent.keys() == expected.keys()
            assert sum(sent.values()) < 0.8 * sum(exact_sent.values())
        elif forward == backward:
            assert sent == expected
        assert loss != exact_loss
        assert loss == pytest.approx(exact_loss, rel=1e-2 if "int8" in comms.values() else 1e-3)


def test_sums_of_bags_are_reduced_in_float16():
    for loss, sent in run_on_ranks(2, sent_rows, {"forward": "fp16", "backward": "fp16"}, "row_wise", True):
        assert torch.float32 not in sent and sent[torch.float16] > 0
        assert np.isfinite(loss)


def test_codecs_are_those_of_torchrec():
    assert codecs(CommsConfig(), "cuda") is None
    registry = codecs(CommsConfig(forward="fp16", backward="bf16"), "cuda")
    codec = registry[CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name]
    assert (codec.forward.quantized_dtype, codec.backward.quantized_dtype) == (torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("comms", "settings", "pooled", "width", "message"),
    [
        ({"forward": "int8"}, {"sharding": "row_wise"}, True, 64, "is row_wise, whose sums are reduced on the way"),
        ({"backward": "int8"}, {"sharding": "row_wise"}, False, 48, "shards of 48 columns, no multiple of 32"),
    ],
)
def test_comms_that_a_plan_cannot_carry_are_refused(comms, settings, pooled, width, message):
    with pytest.raises(ValueError, match=message):
        cuda_plan(settings, pooled=pooled, comms=comms, width=width)


def test_bfloat16_comms_are_refused_on_a_cpu_where_torchrec_would_take_float16():
    with pytest.raises(ValueError, match="gloo does not carry; use fp16"):
        codecs(CommsConfig(backward="bf16"), "cpu")


# What is refused


@pytest.mark.parametrize(
    ("settings", "pooled", "message"),
    [
        ({"sharding": "data_parallel"}, True, "data_parallel, whose dense kernel .* use row_wise or table_wise"),
        (
            {"sharding": ["row_wise", "grid_shard"]},
            False,
            "grid_shard, which TorchRec has for an EmbeddingBag",
        ),
        ({"sharding": "table_row_wise"}, False, "use row_wise, table_wise, column_wise"),
        ({"memory": "uvm_caching"}, False, "memory uvm_caching, .* use memory hbm"),
        ({"memory": "uvm"}, True, "asks for memory uvm, .* use memory hbm"),
        ({"optimizer": "adam"}, True, "ours is for an EmbeddingCollection; use rowwise_adagrad"),
        ({"optimizer": "partial_rowwise_adam"}, True, "is for an EmbeddingCollection; use rowwise_adagrad"),
        ({"optimizer": "partial_rowwise_adam", "data_type": "fp16"}, False, "use rowwise_adagrad or fp32"),
        ({"data_type": "bf16"}, False, "FBGEMM 1.8 has no CPU kernel; use fp16 or fp32"),
        ({"data_type": "fp16"}, False, "accept that by stochastic_rounding: false"),
    ],
)
def test_what_no_cpu_kernel_does_is_refused_with_what_to_do(settings, pooled, message):
    table, model = TableConfig(lr=0.1, **settings), Collections(pooled)
    cast_tables(model, {"t": table})
    collection = model.tables
    (config,) = collection.embedding_bag_configs() if pooled else collection.embedding_configs()
    with pytest.raises(ValueError, match=f"table 't' asks for .*{message}|table 't' {message}"):
        constrain(table, config, "cpu")
    if "sharding" not in settings:
        constrain(table, config, "cuda")


def test_adam_of_every_row_is_refused_on_cuda():
    table, collection = TableConfig(lr=0.1, optimizer="dense_adam"), Collections(pooled=False).tables
    with pytest.raises(ValueError, match="table 't' asks for dense_adam, which runs on a CPU alone; use adam"):
        constrain(table, collection.embedding_configs()[0], "cuda")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_load_factor": 0.5}, "cache_load_factor 0.5 would be ignored with memory hbm; use memory uvm_caching"),
        ({"memory": "uvm_caching", "cache_load_factor": 1.0}, "less than 1"),
        ({"sharding": "row_wise", "min_partition": 8}, "min_partition 8 would be ignored by row_wise"),
        ({"min_partition": 6}, "multiple of 4"),
        ({"sharding": []}, "give one of auto, row_wise"),
        ({"sharding": ["auto", "row_wise"]}, "or a list of some but auto"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TableConfig(lr=0.1, **settings)


def test_a_plan_for_rows_that_the_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match="asks for fp16 rows, but is fp32 in the model; call cast_tables"):
        run_plan({"data_type": "fp16"})


def run_plan(settings):
    ranks = muonrec.mesh.Ranks(0, 1, torch.device("cpu"))
    return make_plan(Collections(), {"t": TableConfig(lr=0.1, **settings)}, ranks=ranks, batch_size=4)
