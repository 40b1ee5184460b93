"""What every one of MODELS promises: packed as padded, causal, sharded, repeatable, resumed, evaluated; no bad ids.

A new model is a line in SETTINGS. What it shows only of itself, such as a plain twin of its tower, stands beside it.
"""

# T = events of all users, D = width

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import pipeline.eval as eval_stage
from muonrec.batch import HISTORY
from muonrec.config import load_config
from muonrec.data.semantic_ids.build import build_semantic_ids
from muonrec.data.semantic_ids.config import SemanticIdsConfig
from muonrec.data.semantic_ids.stored import load_raw_ids
from muonrec.data.synthetic import SyntheticSource
from muonrec.models import MODELS
from pipeline.data import DataConfig, build_dataset
from pipeline.train import Run, make_loader, train
from pipeline.train_config import TrainConfig
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import this_rank

# Of each model: its settings beside embedding_dim, max_length and dropout.
SETTINGS = {
    "sasrec": {"num_layers": 1, "feedforward_dim": 16},
    "gru4rec": {"hidden_dim": 12, "num_layers": 2},
    "caser": {"window": 3, "num_horizontal": 4, "num_vertical": 2},
    "hstu": {"num_layers": 1, "num_heads": 2, "linear_dim": 4, "attention_dim": 3},
    "tiger": {"num_layers": 1, "num_heads": 2, "head_dim": None, "feedforward_dim": 16, "samples": "users"},
}
TABLE = {"lr": 0.1, "sharding": "row_wise"}
# Of models over codes, of which an item has several.
OVER_CODES = {"tiger": {"loss": "token_softmax", "tables": {"token": TABLE, "user": TABLE}}}
NUM_LEVELS = 3
SOURCE = {"format": "synthetic", "num_users": 33, "num_items": 40}
STEPS, HALF = 6, 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contract") / "data"
    build_dataset(DataConfig(source=SyntheticSource(**SOURCE), output=folder, k_core=1))
    codes = {raw_id: [row % 4, row // 4 % 4, row // 16] for row, raw_id in enumerate(load_raw_ids(folder))}
    (folder.parent / "codes.json").write_text(json.dumps(codes))
    build_semantic_ids(SemanticIdsConfig(source=ids_source(folder)), folder)
    return folder


def ids_source(dataset):
    return {"name": "ready_made", "path": str(dataset.parent / "codes.json")}


def config_of(name, dataset, tmp_path):
    """Two streams, and a second batch of each epoch that leaves the second of two ranks without a user."""
    tree = {
        "output": str(tmp_path / "run"),
        "data": {"source": SOURCE, "output": str(dataset), "k_core": 1},
        "model": {"name": name, "embedding_dim": 8, "max_length": 12, "dropout": 0.0, **SETTINGS[name]},
        "loss": "full_softmax",
        "tables": {"item": TABLE},
        "dense_optimizer": {"name": "adamw", "lr": 0.01},
        "batch_size": 32,
        "num_streams": 2,
        "num_steps": STEPS,
        "log_every_steps": 1,
        "tensorboard": False,
        "validation": {"every_steps": STEPS, "max_users": 8},
        "checkpoints": {"every_steps": HALF, "keep": 2},
        **OVER_CODES.get(name, {}),
    }
    if name in OVER_CODES:
        tree["data"]["semantic_ids"] = {"source": ids_source(dataset)}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def trained(path, *overrides):
    """The losses of a whole run, or of the rest of one that was begun."""
    config = load_config(TrainConfig, path, overrides)
    train(config, this_rank())
    dist.barrier()
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss_nats"] for line in lines if "loss_nats" in line]


def hidden_states(run, batch):
    """What the loss is given: a row per target, in the order of the batch's events; of codes their logits."""
    seen = []
    hook = run.model.module.loss.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    run.model.train()
    run.model(batch)
    hook.remove()
    return (torch.cat(seen[0], dim=1) if isinstance(seen[0], list) else seen[0]).detach()


def on_one_rank(path):
    """Packing, causality and bad ids on an untrained model; then the losses of a run."""
    config, ranks = load_config(TrainConfig, path), this_rank()
    run = Run.start(config, ranks)
    batch = run.loader.share(0)
    per_event = 1 if run.ids is None else NUM_LEVELS
    num_rows = run.sequences.num_items if run.ids is None else sum(run.ids.codebook_sizes)
    lengths = (batch.features[HISTORY].lengths() // per_event).tolist()
    together_TD = hidden_states(run, batch)
    found = {"packed": [], "causal": []}
    for user, together in zip(batch.user_ids.tolist(), together_TD.split(lengths), strict=True):
        # A user with one event of training has nothing to learn from, so this one is alone.
        only = np.where(run.sequences.user_ids == user, run.sequences.num_train, 1).astype(np.int32)
        single = config.model_copy(update={"batch_size": 1, "num_streams": 1})
        alone = make_loader(single, dataclasses.replace(run.sequences, num_train=only), ranks, run.ids).share(0)
        assert alone.user_ids.tolist() == [user]
        found["packed"].append((together, hidden_states(run, alone)))

    for first_changed in (1, lengths[0] - 1):  # of the user with the longest history
        values = batch.features.values().clone()
        ids = slice(first_changed * per_event, lengths[0] * per_event)
        values[ids] = (values[ids] + 1) % num_rows
        features = KeyedJaggedTensor(
            batch.features.keys(), values, lengths=batch.features.lengths(), stride=batch.features.stride()
        )
        changed_TD = hidden_states(run, dataclasses.replace(batch, features=features))
        found["causal"].append((first_changed, (changed_TD != together_TD).any(1).nonzero().flatten().tolist()))

    found["refused"] = []
    for bad in (-1, run.sequences.num_items):
        broken = dataclasses.replace(run.sequences, values=np.full_like(run.sequences.values, bad))
        try:
            make_loader(config, broken, ranks, run.ids).share(0)
        except ValueError as error:
            found["refused"].append(str(error))
    found["losses"] = trained(path, f"output={config.output}-1")
    return found, lengths


def on_two_ranks(path):
    """Runs with both optimizers and dense shardings, one cut in half and begun again, one repeated; an evaluation."""
    config = load_config(TrainConfig, path)
    empty = [Run.start(config, this_rank()).loader.share(1).user_ids.numel()]
    found = {"adamw": trained(path, "dense_sharding=fsdp2")}
    muon = ("dense_optimizer=muon", "model.dropout=0.3")
    whole = config.output.with_name("muon")
    found["muon"] = trained(path, *muon, f"output={whole}")
    found["again"] = trained(path, *muon, f"output={whole}-again")
    if dist.get_rank() == 0:
        shutil.rmtree(whole / "checkpoints" / f"step-{STEPS:08d}")
    dist.barrier()
    found["resumed"] = trained(path, *muon, f"output={whole}")
    found["evaluated"] = eval_stage.evaluate(eval_stage.load_eval_config(whole, ["num_resamples=5"]), this_rank())
    return found, empty[0]


def test_every_model_is_held_to_the_contract():
    assert set(SETTINGS) == set(MODELS)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_model_keeps_its_promises(name, dataset, tmp_path):
    path = config_of(name, dataset, tmp_path)
    [(one, lengths)] = run_on_ranks(1, on_one_rank, path)
    for together, alone in one["packed"]:
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)  # float32, products of other shapes
    for first_changed, changed in one["causal"]:
        assert changed and min(changed) >= first_changed and max(changed) < lengths[0]
    rows = f"but table 'item' has rows 0 to {SOURCE['num_items'] - 1}"
    assert len(one["refused"]) == 2 and all(rows in message for message in one["refused"])

    (two, first_empty), (other, second_empty) = run_on_ranks(2, on_two_ranks, path)
    assert (first_empty, second_empty) == (1, 0)
    assert len(one["losses"]) == STEPS and one["losses"][-1] < one["losses"][0]
    np.testing.assert_allclose(two["adamw"], one["losses"], rtol=1e-4)  # float32 sums in another order, six steps on
    assert two["muon"] == two["again"] == two["resumed"] != two["adamw"]
    assert two["muon"][-1] < two["muon"][0]
    assert other["muon"] == two["muon"]
    assert two["evaluated"]["checkpoint_step"] == STEPS and two["evaluated"]["num_items"] == SOURCE["num_items"]
