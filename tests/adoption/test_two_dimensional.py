"""Two-dimensional layouts: HSDP above the tables, and TorchRec's 2D parallelism of the tables themselves."""

import inspect
import textwrap

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.distributed.tensor import DTensor
from torchrec.distributed import model_parallel
from torchrec.distributed.model_parallel import DMPCollection, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

import muonrec
from tests.adoption import models
from tests.adoption.models import CPU, make, shard, share
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import whole

MUON, ADAMW = {"lr": 0.02, "ns_dtype": torch.float32}, {"lr": 5e-3, "eps": 1e-5}
STEPS = 3


def train(dmp, optimizer):
    dmp.train()
    for step in range(STEPS):
        optimizer.zero_grad()
        dmp(share(step))[0].backward()
        optimizer.step()


def hybrid(shape, matrices):
    """Initial and trained weights under HSDP of this shape, from a seed per rank."""
    rank = dist.get_rank()
    names = ("dp_replicate", "dp_shard")[-len(shape) :]
    wrapper = muonrec.FSDP2Wrapper(mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    original = models.make
    models.make = lambda name: (torch.manual_seed(rank), models.MODELS[name]())[1]
    try:
        dmp = shard("dlrm-dcn", wrapper)
    finally:
        models.make = original
    for name, value in dmp.state_dict().items():
        if "embedding_bags" in name:
            for piece in value.local_shards():
                piece.tensor.detach().fill_(0.01)
    # The whole of a tensor that lies on one rank alone may be that tensor itself.
    initial = {name: whole(value).clone() for name, value in dmp.state_dict().items()}
    settings = {"muon": MUON} if matrices == "muon" else {"muon": None, "matrices": ADAMW}
    optimizer = muonrec.build_optimizer(dmp, **settings, adamw=ADAMW)
    assert list(optimizer.parts) == ["tables", "muon" if matrices == "muon" else "matrices", "adamw"]
    placements = {a.placement for a in muonrec.explain(optimizer) if a.optimizer != "sparse"}
    train(dmp, optimizer)
    replicas = [
        value.to_local() if isinstance(value, DTensor) else None for _, value in sorted(dmp.state_dict().items())
    ]
    return initial, {name: whole(value) for name, value in dmp.state_dict().items()}, placements, replicas


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("num_ranks", "shape"),
    [(2, (2, 1)), (2, (1, 2)), pytest.param(4, (2, 2), marks=pytest.mark.slow)],
)
def test_hsdp_starts_from_the_first_rank_and_trains_as_one_dim(num_ranks, shape, matrices):
    plain = run_on_ranks(num_ranks, hybrid, (num_ranks,), matrices)
    results = run_on_ranks(num_ranks, hybrid, shape, matrices)
    for initial, trained, placements, _ in results:
        assert placements == {f"Replicate over {shape[0]}, Shard(0) over {shape[1]}"}
        for name, value in initial.items():
            assert torch.equal(value, plain[0][0][name]), name
            # float32 sums in another order
            torch.testing.assert_close(trained[name], plain[0][1][name], rtol=1e-3, atol=1e-5)
    for rank in range(shape[1], num_ranks):  # each replica of a shard
        for ours, theirs in zip(results[rank][3], results[rank - shape[1]][3]):
            assert ours is None or torch.equal(ours, theirs)


def collection(model, plan, **settings):
    """A `DMPCollection` on the CPU: TorchRec's, without the assertion that there is CUDA, nor numbers of CPUs."""
    source = textwrap.dedent(inspect.getsource(DMPCollection.__init__))
    allowed = source.replace('device.type == "cuda"', "True").replace("super().", "super(DMPCollection, self).")
    assert allowed != source
    scope = dict(vars(model_parallel))
    exec(allowed, scope)

    def remap(self, plan, **settings):
        DMPCollection._remap_sharding_plan(self, plan, **settings)
        for module_plan in plan.plan.values():
            for piece in (piece for parameter in module_plan.values() for piece in parameter.sharding_spec.shards):
                piece.placement = model_parallel._remote_device(f"rank:{piece.placement.rank()}/cpu")

    kind = type("OnCPU", (DMPCollection,), {"__init__": scope["__init__"], "_remap_sharding_plan": remap})
    world = {"world_size": dist.get_world_size(), "global_pg": dist.group.WORLD}
    return kind(model, device=CPU, plan=plan, sharders=get_default_sharders(), **world, **settings)


def two_dimensional(dense):
    """Tables on one rank each, in two replicas that are averaged after every step."""
    model = make("two-tower")
    tables = [p for p in model.parameters() if p.is_meta]
    _apply_optimizer_in_backward(RowWiseAdagrad, tables, {"lr": 0.05})
    constraints = {
        name: ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"]) for name in ("t0", "it0")
    }
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=1, local_world_size=1, compute_device="cpu"), constraints=constraints
    )
    plan = planner.plan(model, get_default_sharders())
    settings = {"data_parallel_wrapper": muonrec.FSDP2Wrapper()} if dense == "fsdp2" else {}
    dmp = collection(model, plan, sharding_group_size=1, **settings)
    optimizer = muonrec.build_optimizer(dmp, muon=MUON, adamw=ADAMW)
    placements = {a.name: a.placement for a in muonrec.explain(optimizer)}
    before = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for n, p in dmp.named_parameters()}
    train(dmp, optimizer)
    after = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for n, p in dmp.named_parameters()}
    return placements, before, after


@pytest.mark.parametrize("dense", ["ddp", "fsdp2"])
def test_a_collection_of_replicas_takes_the_optimizer(dense):
    (placements, before, after), (_, _, other) = run_on_ranks(2, two_dimensional, dense)
    tower = {name: place for name, place in placements.items() if "tower" in name}
    assert set(tower.values()) == {"replicated on 2" if dense == "ddp" else "Shard(0) over 2"}
    assert placements["user_tables.embedding_bags.t0.weight"] == "table_wise, fused kernel"
    for name in tower:
        assert torch.equal(after[name], other[name]) and not torch.equal(after[name], before[name]), name
