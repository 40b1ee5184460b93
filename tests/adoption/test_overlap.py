"""The dense step within the backward pass gives the losses of the step after it, or is refused."""

import warnings

import pytest
import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.experimental_pipelines import TrainPipelineSparseDistBwdOpt

import muonrec
from tests.adoption.models import CPU, shard, share
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import whole

MUON, ADAMW = {"lr": 0.02, "ns_dtype": torch.float32}, {"lr": 5e-3}
STEPS = 5


def trained(name, overlapped, blocks=None, sharding="table_wise"):
    dmp = shard(name, muonrec.FSDP2Wrapper(blocks=blocks), sharding=sharding)
    optimizer = muonrec.build_optimizer(dmp, muon=MUON, adamw=ADAMW)
    kind = muonrec.OverlappedPipeline if overlapped else TrainPipelineSparseDist
    pipeline = kind(dmp, optimizer, CPU)
    stepped_within = []
    if overlapped:
        for part, keyed in pipeline._parts.items():
            keyed.step = noting(keyed.step, part, stepped_within)
    dmp.train()
    batches = iter([share(step) for step in range(STEPS)])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    scores = []
    for _ in range(STEPS):
        scores.append(pipeline.progress(batches))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            schedule.step()
    scores = [score[1] if isinstance(score, tuple) else score for score in scores]
    early = pipeline.early if overlapped else None
    return scores, {n: whole(value) for n, value in dmp.state_dict().items()}, early, stepped_within


def noting(step, part, notes):
    def noted(*args):
        notes.append((part, torch._C._current_graph_task_id() >= 0))  # within a backward pass
        return step(*args)

    return noted


@pytest.mark.parametrize(
    ("name", "blocks", "sharding", "early"),
    [
        ("bert4rec", ["blocks.layers.0", "blocks.layers.1", "out"], "row_wise", ["muon"]),
        ("two-tower", ["user_tower", "item_tower"], "table_wise", ["muon", "adamw"]),
        ("dlrm", None, "table_wise", []),  # the dense features' layers are behind the tables
    ],
)
def test_the_overlapped_step_equals_the_sequential_one(name, blocks, sharding, early):
    plain = run_on_ranks(2, trained, name, False, blocks, sharding)
    overlapped = run_on_ranks(2, trained, name, True, blocks, sharding)
    for (scores, weights, *_), (scores_o, weights_o, early_o, notes) in zip(plain, overlapped):
        assert early_o == early
        # The first step sees which parts are early; later ones step these within the backward pass.
        assert {(part, within) for part, within in notes[-2:]} == {(p, p in early) for p in ("muon", "adamw")}
        assert all(torch.equal(a, b) for a, b in zip(scores, scores_o))
        for key in weights:
            assert torch.equal(weights[key], weights_o[key]), key


def refused():
    dmp = shard("two-tower")
    optimizer = muonrec.build_optimizer(dmp, muon=MUON, adamw=ADAMW)
    try:
        muonrec.OverlappedPipeline(dmp, optimizer, CPU)
    except ValueError as error:
        return str(error)


def test_ddp_is_refused():
    for message in run_on_ranks(2, refused):
        assert "are replicated, as under DDP" in message and "muonrec.FSDP2Wrapper()" in message


def stepped_by_torchrec(dense):
    dmp = shard("two-tower", muonrec.FSDP2Wrapper() if dense == "fsdp2" else None)
    optimizer = muonrec.build_optimizer(dmp, muon=MUON, adamw=ADAMW)
    pipeline = TrainPipelineSparseDistBwdOpt(dmp, optimizer, CPU, site_fqn="user_tables")
    dmp.train()
    try:
        pipeline.progress(iter([share(0)]))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("dense", ["ddp", "fsdp2"])
def test_torchrec_s_own_pipeline_is_refused_where_it_steps(dense):
    for message in run_on_ranks(2, stepped_by_torchrec, dense):
        assert "stepped within the backward pass" in message and "muonrec.OverlappedPipeline" in message
