"""HSTU as a model: its blocks in the routing, times from the data set to the bias, cosine scores; on two ranks."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from muonrec.config import load_config
from muonrec.data.loader import evaluation_batches
from muonrec.data.synthetic import SyntheticSource
from muonrec.models import HSTUConfig, ShardedEncoder
from muonrec.optim.update import Split
from muonrec.towers import hstu
from pipeline.data import DataConfig, build_dataset
from pipeline.train import Run, load_run
from pipeline.train_config import TrainConfig
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import whole
from tests.pipeline.test_train import config_file, losses, this_rank, train_from

TINY = {
    "name": "hstu",
    "embedding_dim": 8,
    "num_layers": 2,
    "num_heads": 2,
    "linear_dim": 6,
    "attention_dim": 4,
    "dropout": 0.0,
    "max_length": 12,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hstu") / "data"
    build_dataset(DataConfig(source=SyntheticSource(format="synthetic", num_users=33, num_items=30), output=folder))
    return folder


def settings(dataset, tmp_path, **model):
    return config_file(
        dataset,
        tmp_path,
        data={"source": {"format": "synthetic", "num_users": 33, "num_items": 30}, "output": str(dataset)},
        model={**TINY, **model},
        loss={"name": "full_softmax"},
        batch_size=32,
        num_streams=2,
        num_steps=3,
        validation={"every_steps": 3, "max_users": 20},
        checkpoints={"every_steps": 3},
    )


def gradients(path):
    """Of a step on a full batch and on one that leaves the second rank without users; and the routing."""
    run = Run.start(load_config(TrainConfig, path), this_rank())
    run.model.train()
    found = []
    for step in (0, run.steps_per_epoch - 1):
        run.model.zero_grad()
        batch = run.loader.share(step)
        run.model(batch)[0].backward()
        dense = {name: p.grad for name, p in run.model.named_parameters() if "embeddings." not in name}
        found.append(
            (batch.user_ids.numel(), {n: None if g is None else g.abs().max().item() for n, g in dense.items()})
        )
    return found, list(run.optimizer.routing)


def test_every_parameter_learns_and_uvqk_is_four_matrices(dataset, tmp_path):
    path = settings(dataset, tmp_path)
    (full, last), routing = run_on_ranks(2, gradients, path)[1]
    assert full[0] > 0 and last[0] == 0
    assert all(size is not None and size > 0 for size in full[1].values()), full[1]
    assert all(size is not None for size in last[1].values())
    assert {name for name in full[1] if "time_bias" in name} == {f"tower.blocks.{i}.time_bias" for i in (0, 1)}
    by_muon = {a.name.removeprefix("tower.blocks."): a.split for a in routing if a.optimizer == "muon"}
    uvqk = Split(1, (12, 12, 8, 8), transposed=True)
    assert by_muon == {"0._uvqk": uvqk, "1._uvqk": uvqk, "0.output.weight": None, "1.output.weight": None}
    assert all(a.optimizer == "adamw" for a in routing if "bias" in a.name or "position" in a.name)


def trained(path, *overrides):
    train_from(path, *overrides)
    return losses(load_config(TrainConfig, path, overrides).output)


def test_fsdp2_on_two_ranks_follows_one_rank_in_blocks_that_are_computed_again(dataset, tmp_path):
    path = settings(dataset, tmp_path, normalize=True)
    alone = run_on_ranks(1, trained, path, "loss.temperature=0.1", f"output={tmp_path / 'one'}")[0]
    both = run_on_ranks(2, trained_in_small_blocks, path, "loss.temperature=0.1", "dense_sharding=fsdp2")[0]
    np.testing.assert_allclose(both, alone, rtol=2e-4)  # float32 sums in another order, three steps on
    assert alone[-1][1] < alone[0][1]
    run_on_ranks(1, cosine_scores, tmp_path / "run")


def trained_in_small_blocks(path, *overrides):
    hstu.QUERY_BLOCK, before = 4, hstu.QUERY_BLOCK
    try:
        return trained(path, *overrides)
    finally:
        hstu.QUERY_BLOCK = before


def cosine_scores(folder):
    """What ranks the items is what the loss scored: vectors of length 1, of users and of items."""
    encoder, _, sequences, _ = load_run(folder, "last", this_rank())
    assert isinstance(encoder, ShardedEncoder) and sequences.timestamps_s is not None
    ids = torch.arange(sequences.num_items)
    items = encoder.item_vectors(ids)
    rows = whole(encoder.model.state_dict()["embeddings.embeddings.item.weight"])
    torch.testing.assert_close(items, F.normalize(rows, dim=-1))
    batch = next(evaluation_batches(sequences, "test", max_length=12, batch_size=8, ranks=this_rank()))
    users = encoder.user_vectors(batch)
    torch.testing.assert_close(users.norm(dim=-1), torch.ones(8))
    later = dataclasses.replace(batch, timestamps_s=batch.timestamps_s * 3)
    assert not torch.equal(encoder.user_vectors(later), users)


def test_the_time_bias_is_what_the_data_set_allows(caplog):
    assert HSTUConfig().on_data(has_times=True).time_bias is True
    assert HSTUConfig(time_bias=False).on_data(has_times=True).time_bias is False
    with caplog.at_level(logging.INFO):
        assert HSTUConfig().on_data(has_times=False).time_bias is False
    assert "no times: the relative bias of HSTU is of positions alone" in caplog.text
    with pytest.raises(ValueError, match=r"model\.time_bias=true was asked but the data set has no times"):
        HSTUConfig(time_bias=True).on_data(has_times=False)
