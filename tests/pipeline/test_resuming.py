"""Runs on disk: tables that grow with the data, damaged checkpoints passed over, evaluation without an optimizer."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.optim.keyed import KeyedOptimizer

import pipeline.eval as eval_stage
from muonrec import checkpoint
from muonrec.checkpoint.weights import local_pieces
from muonrec.config import load_config
from muonrec.data.shards import load_sequences
from muonrec.data.synthetic import SyntheticSource
from muonrec.embeddings.constraints import constrain
from muonrec.mesh import Ranks
from pipeline.data import DataConfig, build_dataset
from pipeline.export import export
from pipeline.resuming import choose_checkpoints
from pipeline.train import Run, for_evaluation, load_run, make_model, train
from pipeline.train_config import TrainConfig
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import this_rank, whole

WEIGHT = "embeddings.embeddings.item.weight"
NUM_ITEMS = {"old": 120, "new": 150, "newest": 190}


def build(folder, name, *, extends=None):
    source = SyntheticSource(format="synthetic", num_users=300, num_items=NUM_ITEMS[name], seed=NUM_ITEMS[name])
    build_dataset(DataConfig(source=source, output=folder / name, extends=extends))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three data sets, each of which extends the one before."""
    folder = tmp_path_factory.mktemp("runs")
    build(folder, "old")
    build(folder, "new", extends=folder / "old")
    build(folder, "newest", extends=folder / "new")
    return folder


def config_file(data, tmp_path, name="old", **settings):
    size = NUM_ITEMS[name]
    tree = {
        "output": str(tmp_path / name),
        "data": {
            "source": {"format": "synthetic", "num_users": 300, "num_items": size, "seed": size},
            "output": str(data / name),
            "extends": None if name == "old" else str(data),  # any: what was extended stands in the manifest
        },
        "model": {"name": "sasrec", "embedding_dim": 32, "dropout": 0.0, "max_length": 30},
        "loss": {"name": "sampled_softmax", "num_negatives": 32},
        "tables": {"item": {"lr": 0.1, "sharding": "row_wise"}},
        "batch_size": 64,
        "num_steps": 6,
        "tensorboard": False,
        "validation": {"every_steps": 3, "max_users": 100},
        "checkpoints": {"every_steps": 2, "keep": 3},
        **settings,
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train_from(path, *overrides):
    train(load_config(TrainConfig, path, overrides), this_rank())


def listening(work, *arguments):
    """What ``work`` returns or why it refuses, and what was said and warned of on this rank."""
    said, warned, levels = [], [], {name: logging.getLogger(name).level for name in ("muonrec", "pipeline")}
    handler = logging.Handler()
    handler.emit = lambda r: (said if r.levelno < logging.WARNING else warned).append(r.getMessage())
    for name in levels:
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        return work(*arguments), said, warned
    except ValueError as error:
        return str(error), said, warned
    finally:
        for name, level in levels.items():
            logging.getLogger(name).removeHandler(handler)
            logging.getLogger(name).setLevel(level)


def at_start(path, *overrides):
    """Weights that a run starts from, the rows a new model has, and this rank's statistics of rows by first row."""
    config = load_config(TrainConfig, path, overrides)
    run = Run.start(config, this_rank())
    fresh = whole(run.model.state_dict()[WEIGHT])
    step, _ = run.resume(config.output / "checkpoints")
    assert step == 0
    state = run.optimizer.state_dict()["state"].get(WEIGHT, {})
    statistics = {at: piece.clone() for v in state.values() for piece, (at, *_) in local_pieces(v)}
    return {name: whole(value) for name, value in run.model.state_dict().items()}, fresh, statistics


def trained(path):
    """Weights and statistics at the end of a run."""
    config = load_config(TrainConfig, path)
    run = Run.start(config, this_rank())
    step, _ = run.resume(config.output / "checkpoints")
    assert step == config.num_steps
    state = run.optimizer.state_dict()["state"][WEIGHT]
    (statistics,) = [piece.clone() for value in state.values() for piece, _ in local_pieces(value)]
    return {name: whole(value) for name, value in run.model.state_dict().items()}, statistics


def evaluate(run, *overrides):
    return eval_stage.evaluate(eval_stage.load_eval_config(run, ["num_resamples=20", *overrides]), this_rank())


# New data for an old model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_ranks", "dense", "sharding"), [(1, "ddp", "table_wise"), (3, "fsdp2", "row_wise")])
def test_day_after_day_the_table_grows_and_known_rows_go_on(data, tmp_path, num_ranks, dense, sharding):
    old, new, newest = (config_file(data, tmp_path, name) for name in NUM_ITEMS)
    run_on_ranks(2, train_from, old)
    weights, statistics = run_on_ranks(1, trained, old)[0]
    sizes = [load_sequences(data / name).num_items for name in NUM_ITEMS]
    assert sizes[0] < sizes[1] < sizes[2]

    # The middle day may have been left out: its ancestor's ancestor is known to the manifest.
    for path, size in ((new, sizes[1]), (newest, sizes[2])):
        settings = (f"init_from={tmp_path / 'old'}", f"dense_sharding={dense}", f"tables.item.sharding={sharding}")
        found = run_on_ranks(num_ranks, listening, at_start, path, *settings)
        for (got, fresh, _), _, _ in found:
            assert torch.equal(got[WEIGHT][: sizes[0]], weights[WEIGHT])
            assert torch.equal(got[WEIGHT][sizes[0] :], fresh[sizes[0] :]) and len(fresh) == size
            assert all(torch.equal(got[name], weights[name]) for name in weights.keys() - {WEIGHT})
        pieces = {at: piece for (_, _, mine), _, _ in found for at, piece in mine.items()}
        joined = torch.cat([pieces[at] for at in sorted(pieces)])
        assert torch.equal(joined[: sizes[0]], statistics) and statistics.any()
        assert len(joined) == size and not joined[sizes[0] :].any()
        said = f"table item grows from {sizes[0]} to {size} rows; {size - sizes[0]} new rows start fresh"
        assert said in found[0][1]

    run_on_ranks(num_ranks, train_from, new, f"init_from={tmp_path / 'old'}")
    run_on_ranks(num_ranks, train_from, newest, f"init_from={tmp_path / 'new'}")
    found = run_on_ranks(num_ranks, evaluate, tmp_path / "newest")[0]
    assert found["num_items"] == sizes[2] and found["checkpoint_step"] in (3, 6)
    assert json.loads((tmp_path / "newest" / "metrics.json").read_text()) == found
    # A run of its own from here on, which resumes from itself.
    run_on_ranks(2, train_from, newest, f"init_from={tmp_path / 'new'}", "dense_sharding=fsdp2")


def test_weights_from_a_file_grow_too(data, tmp_path):
    run_on_ranks(1, train_from, config_file(data, tmp_path))
    file = tmp_path / "weights.safetensors"
    export(tmp_path / "old", file, which="last")
    weights, _ = run_on_ranks(1, trained, tmp_path / "old.yaml")[0]
    path, before = config_file(data, tmp_path, "new"), len(weights[WEIGHT])
    for (got, fresh, statistics), _, _ in run_on_ranks(2, listening, at_start, path, f"init_from={file}"):
        assert torch.equal(got[WEIGHT][:before], weights[WEIGHT])
        assert torch.equal(got[WEIGHT][before:], fresh[before:])
        assert not any(piece.any() for piece in statistics.values())
    # A file that does not say of which data it is has to have all rows.
    checkpoint.export_weights(checkpoint.newest_first(tmp_path / "old" / "checkpoints")[0], file)
    message, _, _ = run_on_ranks(2, listening, at_start, path, f"init_from={file}")[1]
    assert f"{WEIGHT} is [{before}, 32] there and [{len(fresh)}, 32] here" in message


def test_data_that_do_not_descend_are_refused_and_a_resumed_run_keeps_its_data(data, tmp_path):
    old, new = config_file(data, tmp_path), config_file(data, tmp_path, "new")
    run_on_ranks(1, train_from, old)
    run_on_ranks(1, train_from, new)

    # A smaller data set, which knows nothing of the one the run was trained on.
    for source in (tmp_path / "new", tmp_path / "new" / "checkpoints" / "step-00000006"):
        overrides = (f"output={tmp_path / 'x'}", f"init_from={source}")
        message, _, _ = run_on_ranks(2, listening, train_from, old, *overrides)[1]
        fingerprints = [load_sequences(data / name).manifest.fingerprint[:12] for name in ("new", "old")]
        assert f"was trained on other data than {data / 'old'} holds now" in message
        assert f"on {fingerprints[0]}..., found {fingerprints[1]}..., which extends none" in message
        assert "build this one with data.extends=its/folder" in message

    # The old run's folder asked to go on with the new data: by another config, and by data changed under the same one.
    message, _, _ = run_on_ranks(1, listening, train_from, new, f"output={tmp_path / 'old'}")[0]
    assert "holds a run whose data differ from this config" in message
    assert f"to go on from its weights on data that extend its own, add init_from={tmp_path / 'old'}" in message
    tree = yaml.safe_load((tmp_path / "new" / "resolved.yaml").read_text())
    (tmp_path / "old" / "resolved.yaml").write_text(yaml.safe_dump({**tree, "output": str(tmp_path / "old")}))
    message, _, _ = run_on_ranks(2, listening, train_from, new, f"output={tmp_path / 'old'}")[1]
    assert f"was trained on data that {data / 'new'} extends" in message
    assert f"pass output=another/folder init_from={tmp_path / 'old'}" in message
    message, _, _ = run_on_ranks(2, listening, evaluate, tmp_path / "old")[1]
    assert f"was trained on data that {data / 'new'} extends" in message


def test_another_optimizer_of_the_tables_starts_from_the_weights_alone(data, tmp_path):
    path = config_file(data, tmp_path)
    run_on_ranks(2, train_from, path)
    file, run = tmp_path / "weights.safetensors", tmp_path / "old"
    adagrad = (f"output={tmp_path / 'onwards'}", "tables.item.optimizer=adagrad")
    message, _, _ = run_on_ranks(2, listening, train_from, path, f"init_from={run}", *adagrad)[1]
    assert "momentum1 is [" in message and "or its weights alone, from what python -m pipeline.export makes" in message
    export(run, file)
    _, said, _ = run_on_ranks(2, listening, train_from, path, f"init_from={file}", *adagrad)[0]
    assert f"started from the weights in {file}; every optimizer starts afresh, tables too" in said
    # With another model there is no such way.
    wider = (f"output={tmp_path / 'wider'}", "model.embedding_dim=64")
    message, _, _ = run_on_ranks(2, listening, train_from, path, f"init_from={run}", *wider)[1]
    assert "is of another model" in message and "weights alone" not in message


def test_a_run_goes_on_where_settings_differ_that_leave_the_data_as_they_are(data, tmp_path):
    path = config_file(data, tmp_path)
    run_on_ranks(1, train_from, path)
    items = "data.items={format: csv, path: items.csv}"
    _, said, _ = run_on_ranks(1, listening, train_from, path, items, "data.memory_limit=1GiB")[0]
    assert f"resumed from {tmp_path / 'old' / 'checkpoints' / 'step-00000006'}" in said
    message, _, _ = run_on_ranks(1, listening, train_from, path, "data.k_core=2")[0]
    assert "holds a run whose data differ" in message


# Damaged checkpoints -------------------------------------------------------------------------------------------------


def truncate(folder):
    shard = folder / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-7])


def vectors(run, which):
    encoder, _, _, step = load_run(run, which, this_rank())
    return step, encoder.item_vectors(torch.arange(50))


def test_eval_export_and_init_from_pass_over_a_damaged_checkpoint_as_resuming_does(data, tmp_path):
    path = config_file(data, tmp_path, validation={"every_steps": 6, "max_users": 100})
    run_on_ranks(2, train_from, path)
    run, file = tmp_path / "old", tmp_path / "weights.safetensors"
    newest, before, oldest = checkpoint.newest_first(run / "checkpoints")
    assert checkpoint.read_progress(newest)["best"]["step"] == 6
    truncate(newest)

    def is_named(warned):
        (warning,) = warned
        return warning.startswith(f"{newest} is damaged: __0_0.distcp has ") and warning.endswith(
            f"; {before.name} is used instead"
        )

    for which in ("last", "best"):
        first, second = run_on_ranks(2, listening, vectors, run, which)
        assert first[0][0] == second[0][0] == 4 and is_named(first[2]) and second[2] == []
        _, said, warned = listening(lambda which=which: export(run, file, which=which))
        assert said[-1] == f"wrote the weights of {before} to {file}" and is_named(warned)
        assert checkpoint.read_notes(file)["step"] == "4"
    onwards = (f"output={tmp_path / 'onwards'}", f"init_from={run}")
    _, said, warned = run_on_ranks(2, listening, train_from, path, *onwards)[0]
    assert is_named(warned) and any(line.startswith(f"started from {before}, step 4: ") for line in said)
    assert newest.is_dir()  # those who only read rename nothing

    for folder in (before, oldest):
        truncate(folder)
    shutil.rmtree(tmp_path / "onwards")
    for work in (
        lambda: run_on_ranks(2, listening, vectors, run, "best")[1],
        lambda: run_on_ranks(2, listening, train_from, path, *onwards)[1],
        lambda: listening(lambda: export(run, file)),
    ):
        message, _, warned = work()
        assert message.startswith(f"no checkpoint in {run / 'checkpoints'} can be used: ") and warned == []
        assert all(f"{folder} is damaged" in message for folder in (newest, before, oldest))


def test_the_best_is_tried_first_and_named_when_it_is_gone(tmp_path):
    root = tmp_path / "checkpoints"
    three, two, one = (checkpoint.step_folder(root, step) for step in (3, 2, 1))
    for folder, best in ((three, 1), (two, 2), (one, 0)):
        checkpoint.save(folder, torch.nn.Module(), progress={"best": {"step": best}})
    assert choose_checkpoints(tmp_path, "last") == [three, two, one]
    assert choose_checkpoints(tmp_path, "best") == [one, three, two]
    shutil.rmtree(one)
    assert choose_checkpoints(tmp_path, "best") == [one, three, two]
    used, _, warned = listening(lambda: checkpoint.use_first([one, three], checkpoint.read_progress))
    assert used.folder == three and warned == [
        f"{one} is not a finished checkpoint (no COMMITTED in it); step-00000003 is used instead"
    ]
    (three / "progress.json").write_text("{}")
    assert choose_checkpoints(tmp_path, "best") == [two, three]  # as the one before says
    with pytest.raises(ValueError, match="has no finished checkpoint; train it first"):
        choose_checkpoints(tmp_path / "nothing", "best")


# Evaluation without the optimizer of the tables -----------------------------------------------------------------------


def with_adam(run):
    """Write the run's checkpoint as CUDA would have, with the state of Adam, and its config."""
    config = load_config(TrainConfig, run / "resolved.yaml")
    model, _ = make_model(config, load_sequences(config.data.output), this_rank())
    (folder,) = checkpoint.newest_first(run / "checkpoints")
    progress = checkpoint.load(folder, model)
    weight = model.state_dict()[WEIGHT].local_shards()[0].tensor
    state = {"item.momentum1": torch.ones_like(weight), "item.exp_avg_sq": torch.ones_like(weight)}
    optimizer = KeyedOptimizer({WEIGHT: weight}, {weight: {**state, "item.iter": torch.tensor([6])}}, [])
    shutil.rmtree(folder)
    checkpoint.save(folder, model, optimizer, progress=progress)
    tree = yaml.safe_load((run / "resolved.yaml").read_text())
    tree["tables"]["item"] |= {"optimizer": "adam", "betas": [0.9, 0.99], "weight_decay": 0.01}
    (run / "resolved.yaml").write_text(yaml.safe_dump(tree))
    return sorted(json.loads((folder / "COMMITTED").read_text())["files"])


def test_a_run_with_adam_tables_of_cuda_is_evaluated_and_exported_on_a_cpu(data, tmp_path):
    path = config_file(data, tmp_path, checkpoints={"every_steps": 100, "keep": 1}, validation={"every_steps": 6})
    run_on_ranks(1, train_from, path)
    run = Path(tmp_path / "old")
    expected = run_on_ranks(1, evaluate, run)[0]
    run_on_ranks(1, with_adam, run)
    found = run_on_ranks(2, evaluate, run)[0]
    assert found["metrics"] == expected["metrics"] and found["checkpoint_step"] == 6
    export(run, tmp_path / "weights.safetensors")


def test_tables_by_an_optimizer_of_the_cpu_are_evaluated_on_cuda(data, tmp_path):
    tables = {"item": {"optimizer": "dense_adam", "lr": 0.01}}
    config = load_config(TrainConfig, config_file(data, tmp_path, tables=tables))
    items = EmbeddingConfig(name="item", num_embeddings=120, embedding_dim=32)
    with pytest.raises(ValueError, match="dense_adam, which runs on a CPU alone"):
        constrain(config.tables["item"], items, "cuda")
    evaluated = for_evaluation(config, Ranks(0, 1, torch.device("cuda")))
    assert constrain(evaluated.tables["item"], items, "cuda").compute_kernels == ["fused"]


def with_short_rows(run):
    """Write the run's checkpoint as CUDA would have, with rows in bf16 behind a cache; gives what they were."""
    config = load_config(TrainConfig, run / "resolved.yaml")
    model, _ = make_model(config, load_sequences(config.data.output), this_rank())
    (folder,) = checkpoint.newest_first(run / "checkpoints")
    progress = checkpoint.load(folder, model)
    weights = {name: value for name, value in model.state_dict().items() if name != WEIGHT}
    rows = model.state_dict()[WEIGHT].local_shards()[0].tensor.bfloat16()
    shutil.rmtree(folder)
    checkpoint.save(folder, Stated({**weights, WEIGHT: rows}), Stated({}), progress=progress)
    tree = yaml.safe_load((run / "resolved.yaml").read_text())
    tree["tables"]["item"] |= {"data_type": "bf16", "memory": "uvm_caching", "cache_load_factor": 0.1}
    tree["comms"] = {"forward": "bf16", "backward": "bf16"}
    (run / "resolved.yaml").write_text(yaml.safe_dump(tree))
    return rows.float()


def loaded_rows(run):
    encoder, *_ = load_run(run, "last", this_rank())
    return encoder.model.state_dict()[WEIGHT].local_shards()[0].tensor.clone()


class Stated:
    """What has a state dict of its own making."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state


def test_a_run_with_short_rows_in_host_memory_is_evaluated_on_a_cpu(data, tmp_path):
    path = config_file(data, tmp_path, checkpoints={"every_steps": 100, "keep": 1}, validation={"every_steps": 6})
    run_on_ranks(1, train_from, path)
    run = Path(tmp_path / "old")
    rows = run_on_ranks(1, with_short_rows, run)[0]
    assert torch.equal(run_on_ranks(1, loaded_rows, run)[0], rows)
    assert run_on_ranks(2, evaluate, run)[0]["checkpoint_step"] == 6
