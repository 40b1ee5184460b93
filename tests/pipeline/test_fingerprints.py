"""Fingerprints: equal for what starts alike on any number of ranks, and different for what does not."""

import json

import torch

from muonrec.checkpoint.checksum import state_checksum
from muonrec.config import parse_config
from muonrec.data.shards import load_sequences
from muonrec.data.synthetic import SyntheticSource
from muonrec.mesh import Ranks
from muonrec.runs import FINGERPRINTS
from pipeline.data import DataConfig, build_dataset
from pipeline.fingerprints import record_fingerprints
from pipeline.train import make_loader, make_model
from pipeline.train_config import TrainConfig
from tests.distributed.ranks import run_on_ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def record(data, folder, *changes):
    """Record the fingerprints of a run per change, each in a folder of its number."""
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.device("cpu"))
    source = {"format": "synthetic", "num_users": 60, "num_items": 40}
    for number, change in enumerate(changes):
        tree = {
            "output": str(folder),
            "data": {"source": source, "output": str(data)},
            "model": {"name": "sasrec", "embedding_dim": 8, "max_length": 10},
            "tables": {"item": {"lr": 0.1, "sharding": "row_wise"}},
            "batch_size": 32,
            "num_steps": 4,
        }
        config = parse_config(TrainConfig, {**tree, **change}, source="the test")
        sequences = load_sequences(config.data.output)
        (folder / str(number)).mkdir(parents=True, exist_ok=True)
        loader = make_loader(config, sequences, ALONE)
        record_fingerprints(folder / str(number), make_model(config, sequences, ranks)[0], loader, ranks)


def test_they_depend_on_what_a_run_starts_from_and_not_on_the_ranks(tmp_path):
    source = SyntheticSource(format="synthetic", num_users=60, num_items=40)
    build_dataset(DataConfig(source=source, output=tmp_path / "data"))
    tables = {"item": {"optimizer": "partial_rowwise_adam", "lr": 0.001}}
    other_loss = {"loss": {"name": "sampled_softmax", "num_negatives": 7}}
    run_on_ranks(2, record, tmp_path / "data", tmp_path / "two", {}, {"seed": 1}, {"tables": tables}, other_loss)
    run_on_ranks(1, record, tmp_path / "data", tmp_path / "one", {})

    base, seeded, sparse, candidates = (written(tmp_path / "two" / str(number)) for number in range(4))
    assert set(base) == {"initial_state", "first_batches", "epoch_order"}
    assert written(tmp_path / "one" / "0") == base
    assert all(seeded[name] != base[name] for name in base)
    assert sparse == base  # another kernel holds the table, the weights are the same
    assert candidates == {**base, "first_batches": candidates["first_batches"]} != base


def written(folder):
    return json.loads((folder / FINGERPRINTS).read_text())


def test_the_checksum_sees_every_bit_every_place_and_every_name():
    generator = torch.Generator().manual_seed(0)
    state = {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(4, generator=generator).to(torch.bfloat16)}
    base = state_checksum(state, ALONE)
    assert base == state_checksum({name: state[name].clone() for name in reversed(state)}, ALONE)
    flipped = state["a"].clone()
    flipped.view(torch.int32)[2, 4] ^= 1
    others = [
        {**state, "a": flipped},
        {**state, "a": state["a"].flip(0)},
        {**state, "a": state["a"].reshape(5, 3)},
        {"c": state["a"], "b": state["b"]},
    ]
    assert len({base, *(state_checksum(other, ALONE) for other in others)}) == 5
