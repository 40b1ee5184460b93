"""What goes wrong in silence with TorchRec's parts around a dense optimizer: prevented, or refused with a message."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.gradient_accumulation import (
    GradientAccumulationConfig,
    GradientAccumulationWrapper,
)
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

import muonrec
from tests.adoption.models import CPU, make, shard, share
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import whole

MUON, ADAMW = {"lr": 0.02, "ns_dtype": torch.float32}, {"lr": 1e-3}


def built(dense="ddp", name="dlrm", **settings):
    dmp = shard(name, muonrec.FSDP2Wrapper() if dense == "fsdp2" else None)
    dmp.train()
    return dmp, muonrec.build_optimizer(dmp, muon=MUON, adamw=ADAMW, **settings)


def step(dmp, optimizer, number=0):
    optimizer.zero_grad()
    dmp(share(number))[0].backward()
    optimizer.step()


def weights_of(dmp):
    return {name: whole(value) for name, value in dmp.state_dict().items()}


def message_of(function, *args, **settings):
    try:
        function(*args, **settings)
    except ValueError as error:
        return str(error)
    return None


def clipped(dense):
    clip = {"clipping": GradientClipping.NORM, "max_gradient": 1e-4}
    dmp, optimizer = built(dense)
    around_all = message_of(step, dmp, GradientClippingOptimizer(optimizer, **clip))
    dmp, optimizer = built(dense)
    parts = [("", optimizer.parts["tables"]), ("muon", optimizer.parts["muon"])]
    wrapped = GradientClippingOptimizer(optimizer.parts["adamw"], **clip)
    around_one = message_of(step, dmp, CombinedOptimizer([*parts, ("adamw", wrapped)]))
    dmp, optimizer = built(dense)
    groups = {p: [dist.group.WORLD] for p in optimizer.parts["adamw"].params.values()}
    right = GradientClippingOptimizer(
        optimizer.parts["adamw"], **clip, enable_global_grad_clip=True, param_to_pgs=groups
    )
    globally = message_of(step, dmp, CombinedOptimizer([*parts[:0], ("adamw", right)]))
    dmp, optimizer = built(dense)
    unclipped = GradientClippingOptimizer(optimizer, clipping=GradientClipping.NONE)
    return around_all, around_one, globally, message_of(step, dmp, unclipped)


def test_clipping_that_does_nothing_is_refused():
    for around_all, around_one, globally, unclipped in run_on_ranks(2, clipped, "fsdp2"):
        assert "GradientClippingOptimizer clips nothing under FSDP2" in around_all
        assert around_one == around_all and "max_grad_norm" in around_one
        assert globally is None and unclipped is None
    assert run_on_ranks(2, clipped, "ddp")[0] == (None,) * 4


def warmed_up():
    stages = [WarmupStage(WarmupPolicy.LINEAR, max_iters=10, value=0.1)]
    _, optimizer = built()
    message = message_of(WarmupOptimizer, optimizer, stages, lr=0.05)
    untouched = [group["lr"] for group in optimizer.param_groups]
    parts = [
        (name, WarmupOptimizer(part, stages, lr=part.param_groups[0]["lr"], param_name=f"warmup_{name}"))
        for name, part in optimizer.parts.items()
        if name != "tables"
    ]
    each = [group["lr"] for group in CombinedOptimizer(parts).param_groups]
    dmp, optimizer = built()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    step(dmp, optimizer)
    schedule.step()
    return message, untouched, each, [group["lr"] for group in optimizer.param_groups]


def test_a_warm_up_that_gives_every_group_one_rate_is_refused():
    for message, untouched, each, scheduled in run_on_ranks(2, warmed_up):
        assert "WarmupOptimizer sets every group to one rate" in message and "LambdaLR" in message
        assert {round(lr, 6) for lr in untouched} == {0.05, 0.02, 1e-3}
        assert each == pytest.approx([0.002, 1e-4])
        assert scheduled == pytest.approx([lr / 2 for lr in untouched])


def initialized(dense):
    dmp, optimizer = built(dense)
    before = weights_of(dmp)
    optimizer.init_state()
    for name in ("muon", "adamw"):
        optimizer.parts[name].init_state()
    same = all(torch.equal(before[name], value) for name, value in weights_of(dmp).items())
    return same, all(p.grad is None for p in optimizer.parts["muon"].params.values())


@pytest.mark.parametrize("dense", ["ddp", "fsdp2"])
def test_making_the_state_moves_no_weight_and_leaves_no_gradient(dense):
    assert run_on_ranks(2, initialized, dense) == [(True, True)] * 2


def initial_weights():
    """Every rank makes the model from a seed of its own; before and after sharding."""
    from tests.adoption import models

    torch.manual_seed(100 + dist.get_rank())
    seeded = torch.random.get_rng_state()
    alone = {n: p.detach().clone() for n, p in models.MODELS["dlrm"]().named_parameters() if not p.is_meta}
    original, models.make = models.make, lambda name: (torch.random.set_rng_state(seeded), models.MODELS[name]())[1]
    try:
        dmp = shard("dlrm", muonrec.FSDP2Wrapper())
    finally:
        models.make = original
    return alone, {name: value for name, value in weights_of(dmp).items() if name in alone}


def test_ranks_with_seeds_of_their_own_start_from_the_weights_of_the_first():
    (first, sharded), (second, _) = run_on_ranks(2, initial_weights)
    assert not any(torch.equal(first[name], second[name]) for name in first if name.endswith("weight"))
    assert sharded.keys() == first.keys()
    for name, value in sharded.items():
        assert torch.equal(value, first[name]), name


def replicated_tables(folder):
    """Tables that the planner replicates, trained by their own optimizer; and the same tables fused."""
    dmp = shard("dlrm", sharding="data_parallel", optimizer=None, kernel="dense")
    refused = message_of(muonrec.build_optimizer, dmp, muon=MUON, adamw=ADAMW)
    tables = {name for name in weights_of(dmp) if "embedding_bags" in name}
    dense_tables = {"lr": 0.05, "eps": 1e-8}
    optimizer = muonrec.build_optimizer(dmp, muon=MUON, adamw=ADAMW, dense_tables=dense_tables)
    fused, fused_optimizer = built()
    start = {name: whole(value) for name, value in dmp.state_dict().items()}
    for name, value in fused.state_dict().items():
        if name in tables:
            for piece in value.local_shards():
                piece.tensor.detach().copy_(start[name])
    dmp.train()
    for number in range(3):
        step(dmp, optimizer, number)
        step(fused, fused_optimizer, number)
    routing = {a.name: (a.optimizer, a.placement) for a in muonrec.explain(optimizer) if a.name in tables}
    trained, twin = weights_of(dmp), weights_of(fused)

    dcp.save({"model": dmp.state_dict(), "opt": optimizer.state_dict()}, checkpoint_id=folder)
    step(dmp, optimizer, 3)
    other = shard("dlrm", sharding="data_parallel", optimizer=None, kernel="dense")
    other_optimizer = muonrec.build_optimizer(other, muon=MUON, adamw=ADAMW, dense_tables=dense_tables)
    state = {"model": other.state_dict(), "opt": other_optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state["model"]), other_optimizer.load_state_dict(state["opt"])
    other.train()
    step(other, other_optimizer, 3)
    return refused, routing, tables, trained, twin, weights_of(dmp), weights_of(other)


def test_replicated_tables_are_no_matrices_and_train_as_the_fused_ones(tmp_path):
    results = run_on_ranks(2, replicated_tables, str(tmp_path / "checkpoint"))
    for refused, routing, tables, trained, twin, after, resumed in results:
        assert "dense kernel" in refused and "dense_tables=dict(lr=...)" in refused
        assert routing == dict.fromkeys(tables, ("sparse", "data_parallel, dense kernel")) and len(tables) == 3
        for name in trained:
            torch.testing.assert_close(trained[name], twin[name], rtol=1e-4, atol=1e-5)
            assert torch.equal(trained[name], results[0][3][name])
            assert torch.equal(after[name], resumed[name]), name


def keys_of_an_optimizer():
    dmp, optimizer = built()
    keys = list(optimizer.params)
    routed = [a.name for a in muonrec.explain(optimizer)]
    forgotten = message_of(
        lambda: CombinedOptimizer(
            [dmp.fused_optimizer, KeyedOptimizerWrapper(dict(dmp.named_parameters()), torch.optim.SGD)]
        )
    )
    return keys, routed, forgotten, message_of(CombinedOptimizer, [dmp.fused_optimizer, optimizer])


def test_every_parameter_has_one_key():
    results = run_on_ranks(2, keys_of_an_optimizer)
    keys = [key.removeprefix("muon.").removeprefix("adamw.") for result in results for key in result[0]]
    dense = [name for name in results[0][1] if "embedding_bags" not in name]
    for name in dense:
        assert keys.count(name) == 2, name  # once on each rank
    for _, _, forgotten, twice in results:
        assert "Duplicate param key" in twice  # TorchRec's own message: tables are in the optimizer already
        assert forgotten is None or "Duplicate param key" in forgotten


def test_tables_that_nobody_sharded_are_refused():
    message = message_of(muonrec.build_optimizer, make("two-tower"), muon=MUON, adamw=ADAMW)
    assert "user_tables.embedding_bags.t0.weight" in message and "DistributedModelParallel first" in message


def test_a_dense_parameter_that_an_override_calls_a_table_is_refused():
    message = message_of(
        muonrec.build_optimizer, make("transformer-encoder"), muon=MUON, adamw=ADAMW, overrides=[("items", "sparse")]
    )
    assert "['items.weight'] would be trained by nothing" in message


def refused_settings():
    dmp = shard("dlrm")

    def message(**settings):
        return message_of(muonrec.build_optimizer, dmp, **{"muon": MUON, "adamw": ADAMW} | settings)

    return [
        message(muon=0.02),
        message(adamw=None),
        message(muon={"lr": 0.02, "betas": (0.9, 0.95)}),
        message(muon={"lr": 0.02, "splits": {}}),
        message(adamw={"lr": 1e-3, "momentum": 0.9}),
        message(dense_tables={"lr": 0.05}),
        message(max_grad_norm=-1.0),
        message(overrides={"over_arch": "adamw"}),
        message(overrides=[("over_arch[", "adamw")]),
    ]


def test_settings_that_mean_nothing_are_refused_by_name():
    messages = run_on_ranks(1, refused_settings)[0]
    expected = [
        "muon=dict(lr=...)",
        "adamw=dict(lr=...)",
        "muon has 'betas'",
        "give blocks by overrides",
        "adamw has 'momentum'",
        "no table is data_parallel",
        "max_grad_norm is -1.0",
        "list of pairs such as ('heads', 'adamw')",
        "is not a regular expression",
    ]
    for message, words in zip(messages, expected, strict=True):
        assert message is not None and words in message, (message, words)


def accumulated(dense):
    """Dense weights after each of six micro-batches, three to a step, by TorchRec's wrapper."""
    dmp, optimizer = built(dense, "two-tower")
    pipeline = GradientAccumulationWrapper(
        TrainPipelineSparseDist(dmp, optimizer, CPU), optimizer, dmp, GradientAccumulationConfig(num_steps=3)
    )
    batches, seen = iter([share(number) for number in range(6)]), []
    for _ in range(6):
        pipeline.progress(batches)
        seen.append({name: value.clone() for name, value in weights_of(dmp).items() if "tower" in name})
    return seen


@pytest.mark.parametrize("dense", ["ddp", "fsdp2"])
def test_torchrec_s_gradient_accumulation_steps_once_and_keeps_replicas_equal(dense):
    first, second = run_on_ranks(2, accumulated, dense)
    name = "user_tower._mlp.0._linear.weight"
    assert [torch.equal(a[name], b[name]) for a, b in itertools.pairwise(first)] == [True, False, True, True, False]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, second) for key in a)
