"""A user's model with zero-collision hashing: what of it a CPU can show, and on CUDA that rows change hands."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import (
    LRU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import muonrec
from muonrec.embeddings.comms import CommsConfig
from muonrec.embeddings.constraints import ask_planner, make_sharders, make_topology
from muonrec.embeddings.fused import check_tables, fuse_optimizers
from muonrec.embeddings.sharding import make_plan, shard_model
from muonrec.embeddings.tables import TableConfig, initialize_tables
from muonrec.mesh import Ranks, join_ranks
from tests.distributed.ranks import run_on_ranks

ROWS, WIDTH = 16, 8
CPU = torch.device("cpu")
TABLES = {"t": TableConfig(lr=0.1)}


class Managed(nn.Module):
    """Any ids through a table of 16 rows, four buckets of them, and a matrix."""

    def __init__(self, device=CPU, eviction_interval=1000):
        super().__init__()
        configs = [EmbeddingConfig(name="t", num_embeddings=ROWS, embedding_dim=WIDTH, feature_names=["f"])]
        ids = MCHManagedCollisionModule(
            zch_size=ROWS,
            device=device,
            eviction_interval=eviction_interval,
            eviction_policy=LRU_EvictionPolicy(),
            buckets=4,
        )
        self.tables = ManagedCollisionEmbeddingCollection(
            EmbeddingCollection(tables=configs, device=torch.device("meta")),
            ManagedCollisionCollection({"t": ids}, configs),
            return_remapped_features=True,
        )
        self.tower = nn.Linear(WIDTH, WIDTH)

    def forward(self, features):
        rows, remapped = self.tables(features)
        return self.tower(rows["f"].values()).square().mean(), remapped["f"].values()


def features_of(ids, device=CPU):
    return KeyedJaggedTensor(keys=["f"], values=torch.tensor(ids), lengths=torch.tensor([len(ids)])).to(device)


def stepped(dmp, optimizer, ids, device=CPU):
    optimizer.zero_grad()
    loss, rows = dmp(features_of(ids, device))
    loss.backward()
    optimizer.step()
    return loss.item(), rows.tolist()


def without_our_plan():
    """What our calls make of a model that TorchRec's planner has cut on a CPU, which ours refuses."""
    model = Managed()
    fuse_optimizers(model, TABLES)
    world, sharders = dist.get_world_size(), make_sharders(CommsConfig(), "cpu")
    plan = EmbeddingShardingPlanner(
        topology=make_topology(world, world, "cpu", hbm_bytes=None, host_bytes=None),
        constraints={"t": ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused"])},
    ).plan(model, sharders)
    dmp = DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders)
    initialize_tables(dmp, std={"t": 0.1}, seed=0)
    found = check_tables(dmp, TABLES)
    optimizer = muonrec.build_optimizer(dmp, muon={"lr": 0.01}, adamw={"lr": 1e-3})
    dmp.train()
    routing = {assignment.name: assignment.optimizer for assignment in optimizer.routing}
    return [table.name for table in found], routing, [stepped(dmp, optimizer, [7, 10**12, 7]) for _ in range(3)]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_tables_behind_managed_collisions_are_found_routed_and_trained(num_ranks):
    for names, routing, made in run_on_ranks(num_ranks, without_our_plan):
        assert names == ["t"]
        assert routing == {
            "tables._embedding_module.embeddings.t.weight": "sparse",
            "tower.weight": "muon",
            "tower.bias": "adamw",
        }
        losses, rows = zip(*made, strict=True)
        assert losses[2] < losses[0]
        # Before the first eviction no id has a row of its own: all of them share the last of a bucket.
        assert all(len(set(step)) <= 2 for step in rows)


def test_managed_collisions_are_planned_row_wise_for_cuda():
    topology = make_topology(4, 2, "cuda", hbm_bytes=2**30, host_bytes=2**30)
    plan = ask_planner(Managed(), TABLES, topology, batch_size=4, comms=CommsConfig(), stats=False)
    found = plan.plan["tables"]["t"]
    assert (found.sharding_type, found.compute_kernel) == ("row_wise", "fused")
    for settings, message in (
        ({"sharding": "table_wise"}, "asks for table_wise, but TorchRec shards managed collisions row_wise alone"),
        ({"optimizer": "adam"}, "adam, whose state FBGEMM would leave to a row's next id; use rowwise_adagrad"),
    ):
        with pytest.raises(ValueError, match=message):
            asked = {"t": TableConfig(lr=0.1, **settings)}
            ask_planner(Managed(), asked, topology, batch_size=4, comms=CommsConfig())


def test_managed_collisions_are_refused_on_a_cpu_with_the_operator_that_is_missing():
    with pytest.raises(ValueError, match=r"table 't' is behind managed collisions.*fbgemm::reset_weight_momentum"):
        make_plan(Managed(), TABLES, ranks=Ranks(0, 1, CPU), batch_size=4)
    # When this fails, FBGEMM has it and the refusal can go.
    with pytest.raises(NotImplementedError, match="reset_weight_momentum"):
        run_reset()


def run_reset():
    table = torch.zeros(ROWS * WIDTH)
    none, ids = torch.empty(0), torch.zeros(1, dtype=torch.int64)
    torch.ops.fbgemm.reset_weight_momentum(
        dev_weights=table,
        uvm_weights=none,
        lxu_cache_weights=none,
        weights_placements=ids.int(),
        weights_offsets=ids,
        momentum1_dev=table,
        momentum1_uvm=none,
        momentum1_placements=ids.int(),
        momentum1_offsets=ids,
        D_offsets=torch.tensor([0, WIDTH], dtype=torch.int32),
        pruned_indices=ids,
        pruned_indices_offsets=torch.tensor([0, 1]),
        logical_table_ids=ids.int(),
        buffer_ids=ids.int(),
        cache_hash_size_cumsum=ids,
        lxu_cache_state=ids,
        total_cache_hash_size=0,
    )


@pytest.mark.gpu
def test_ids_get_rows_of_their_own_and_hand_them_on_when_evicted_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with join_ranks() as ranks:
        model = Managed(ranks.device, eviction_interval=2)
        dmp, _ = shard_model(model, TABLES, dense="ddp", ranks=ranks, batch_size=4)
        initialize_tables(dmp, std={"t": 0.1}, seed=0)
        check_tables(dmp, TABLES)
        optimizer = muonrec.build_optimizer(dmp, muon={"lr": 0.01}, adamw={"lr": 1e-3})
        dmp.train()
        for first in (0, 10**9):  # twelve ids, then twelve others, by four rows too many for both
            ids = list(range(first, first + 12))
            rows = [stepped(dmp, optimizer, ids, ranks.device)[1] for _ in range(8)][-1]
            assert len(set(rows)) >= 11
