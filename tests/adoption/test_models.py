"""Models that are not ours train, save by their own DCP code, and continue on another number of ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

import muonrec
from tests.adoption.models import CPU, WITH_TABLES, WITHOUT_TABLES, make, shard, share
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import whole

# float32, since other ranks own other matrices and bfloat16 would round their sums differently
MUON = {"lr": 0.02, "ns_dtype": torch.float32}
# eps above the noise of gradients that are zero but for rounding, such as those of the bias of keys
ADAMW = {"lr": 5e-3, "eps": 1e-5}
BATCHES = 2  # that are seen again and again, so that the loss must fall
STEPS, SAVED_AT = 12, 6


def with_tables(name, dense):
    dmp = shard(name, muonrec.FSDP2Wrapper() if dense == "fsdp2" else None)
    optimizer = muonrec.build_optimizer(dmp, muon=MUON, adamw=ADAMW)
    dmp.train()

    def train(first, stop):
        pipeline = TrainPipelineSparseDist(dmp, optimizer, CPU)
        batches = iter([share(step % BATCHES) for step in range(first, stop)])
        for _ in range(first, stop):
            pipeline.progress(batches)
        pipeline.detach()

    return dmp, optimizer, train


def without_tables(name, dense):
    model = make(name)
    if dense == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    optimizer = muonrec.build_optimizer(model, muon=MUON, adamw=ADAMW)
    model.train()

    def train(first, stop):
        for step in range(first, stop):
            optimizer.zero_grad()
            model(share(step % BATCHES))[0].backward()
            optimizer.step()

    return model, optimizer, train


def blocks_of(model):
    kinds = ("TransformerEncoderLayer", "BertLayer", "GPT2Block", "LlamaDecoderLayer")
    return [module for module in model.modules() if type(module).__name__ in kinds]


def loss_of(model):
    """Over the global batches, on every rank."""
    model.eval()
    with torch.no_grad():
        total = sum(model(share(step))[0].detach() for step in range(BATCHES))
    model.train()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size() / BATCHES


def prepared(name, dense):
    return with_tables(name, dense) if name in WITH_TABLES else without_tables(name, dense)


def weights_of(model):
    return {name.removeprefix("module."): whole(value) for name, value in model.state_dict().items()}


def uninterrupted(name, dense, folder):
    """The run of a user, with a checkpoint in the middle by their own code."""
    model, optimizer, train = prepared(name, dense)
    before = loss_of(model)
    train(0, SAVED_AT)
    dcp.save({"model": model.state_dict(), "opt": optimizer.state_dict()}, checkpoint_id=folder)
    train(SAVED_AT, STEPS)
    routing = {a.name: (a.optimizer, a.reason) for a in muonrec.explain(optimizer)}
    placements = {a.placement for a in muonrec.explain(optimizer)}
    return before, loss_of(model), weights_of(model), routing, placements


def continued(name, dense, folder):
    model, optimizer, train = prepared(name, dense)
    state = {"model": model.state_dict(), "opt": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["opt"])
    train(SAVED_AT, STEPS)
    return weights_of(model)


# TorchRec's DLRM_Transformer attends across the users of a batch, so that its gradients depend on the number of ranks.
TRAINED = [name for name in WITH_TABLES if name != "dlrm-transformer"]
CASES = [(name, dense) for name in TRAINED for dense in ("ddp", "fsdp2")]
CASES += [("transformer-encoder", "ddp"), *((name, "fsdp2") for name in WITHOUT_TABLES)]


@pytest.mark.parametrize(("name", "dense"), CASES)
def test_a_model_trains_and_continues_on_half_the_ranks(tmp_path, name, dense):
    folder = str(tmp_path / "checkpoint")
    before, after, weights, routing, placements = run_on_ranks(2, uninterrupted, name, dense, folder)[0]
    assert after < 0.95 * before
    dry = {a.name: (a.optimizer, a.reason) for a in muonrec.explain(make(name))}
    assert routing == dry  # sharding changes no role
    sparse = {"table_wise, fused kernel"} if name in WITH_TABLES else set()
    assert placements == sparse | {"replicated on 2" if dense == "ddp" else "Shard(0) over 2"}
    assert_equal(run_on_ranks(1, continued, name, dense, folder)[0], weights)


@pytest.mark.parametrize(("name", "dense"), [("dlrm-dcn", "ddp"), ("bert4rec", "fsdp2"), ("hf-gpt2", "fsdp2")])
def test_a_model_continues_on_twice_the_ranks(tmp_path, name, dense):
    folder = str(tmp_path / "checkpoint")
    weights = run_on_ranks(1, uninterrupted, name, dense, folder)[0][2]
    assert_equal(run_on_ranks(2, continued, name, dense, folder)[1], weights)


@pytest.mark.parametrize(("before", "after"), [("ddp", "fsdp2"), ("fsdp2", "ddp")])
def test_a_model_continues_under_the_other_wrapper(tmp_path, before, after):
    folder = str(tmp_path / "checkpoint")
    weights = run_on_ranks(2, uninterrupted, "dlrm-dcn", before, folder)[0][2]
    assert_equal(run_on_ranks(2, continued, "dlrm-dcn", after, folder)[0], weights)


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        # float32 sums in another order, through twelve steps of AdamW at 5e-3
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")
