"""TIGER on prefixes, as the paper trains it: ranks, generated evaluations, and codes that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import yaml

import pipeline.eval as eval_stage
from muonrec.config import load_config, parse_config
from muonrec.data.semantic_ids import SemanticIds
from muonrec.data.semantic_ids.build import build_semantic_ids
from muonrec.data.semantic_ids.stored import load_raw_ids
from pipeline.data import DataConfig, build_dataset
from pipeline.plan import print_plan
from pipeline.resuming import check_same_codes
from pipeline.train import Run, train
from pipeline.train_config import TrainConfig
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import this_rank

SOURCE = {"format": "synthetic", "num_users": 20, "num_items": 24}
STEPS = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A config whose data set and codes are there."""
    folder = tmp_path_factory.mktemp("tiger")
    data = {"source": SOURCE, "output": str(folder / "data"), "k_core": 1}
    build_dataset(DataConfig.model_validate(data))
    data["semantic_ids"] = {"source": {"name": "ready_made", "path": str(folder / "codes.json")}}
    tree = {
        "output": str(folder / "run"),
        "data": data,
        "model": {"name": "tiger", "embedding_dim": 8, "num_layers": 1, "num_heads": 2, "head_dim": 3}
        | {"feedforward_dim": 16, "dropout": 0.0, "max_length": 6, "num_user_tokens": 5, "num_beams": 24},
        "loss": "token_softmax",
        "tables": {table: {"lr": 0.1, "sharding": "row_wise"} for table in ("token", "user")},
        "batch_size": 48,
        "num_streams": 2,
        "num_steps": STEPS,
        "log_every_steps": 1,
        "tensorboard": False,
        "validation": {"every_steps": STEPS},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    write_codes(folder / "config.yaml", lambda row: [row % 3, row // 3])
    return folder / "config.yaml"


def write_codes(path, codes_of_row):
    """Make the semantic IDs of a config's data set anew."""
    config = load_config(TrainConfig, path)
    codes = {raw_id: codes_of_row(row) for row, raw_id in enumerate(load_raw_ids(config.data.output))}
    (path.parent / "codes.json").write_text(json.dumps(codes))
    build_semantic_ids(config.data.semantic_ids, config.data.output)


def trained(path, *overrides):
    """The losses and the validation of a run, and its evaluation."""
    config = load_config(TrainConfig, path, overrides)
    train(config, this_rank())
    dist.barrier()
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    numbers = [line[key] for line in lines for key in ("loss_nats", "valid_ndcg@10") if key in line]
    asked = ["num_resamples=5", "mask_seen=true"]
    found = eval_stage.evaluate(eval_stage.load_eval_config(config.output, asked), this_rank())
    return numbers, found and found["metrics"]["ndcg@10"]["mean"]


def refusal(path, *overrides):
    try:
        run = Run.start(load_config(TrainConfig, path, overrides), this_rank())
        run.resume(run.config.output / "checkpoints")
    except ValueError as error:
        return str(error)


def test_weights_of_other_codes_are_refused():
    ids, others = (SemanticIds(np.array([[0, 1], [1, code]]), (2, 3)) for code in (1, 2))
    progress = {"semantic_ids": ids.fingerprint}
    check_same_codes(Path("step-3"), progress, ids)
    check_same_codes(Path("step-3"), {}, None)  # a model over items
    for found in (progress, {}):
        with pytest.raises(ValueError, match="step-3 was trained with other semantic IDs"):
            check_same_codes(Path("step-3"), found, others)


@pytest.mark.slow  # six starts of ranks; the contract shows as much of the causal encoder
def test_two_ranks_follow_one_under_ddp_and_fsdp2_and_refuse_other_codes(path):
    [(alone, ndcg)] = run_on_ranks(1, trained, path, f"output={path.parent / 'alone'}")
    assert len(alone) == STEPS + 1
    for dense in ("ddp", "fsdp2"):
        output = f"output={path.parent / dense}"
        (both, both_ndcg), _ = run_on_ranks(2, trained, path, output, f"dense_sharding={dense}")
        np.testing.assert_allclose([*both, both_ndcg], [*alone, ndcg], rtol=1e-4)  # float32 sums in another order

    write_codes(path, lambda row: [row // 8, row % 8])
    [message] = run_on_ranks(1, refusal, path, f"output={path.parent / 'alone'}")
    assert "was trained with other semantic IDs" in message
    write_codes(path, lambda row: [row % 3, row // 3])


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        ("tiger", "full_softmax", "model tiger learns by token_softmax, found loss full_softmax; set loss.name"),
        ("sasrec", "token_softmax", "model sasrec learns by full_softmax or .*, found loss token_softmax"),
    ],
)
def test_a_loss_that_the_model_does_not_have_is_refused(path, model, loss, message):
    tree = yaml.safe_load(path.read_text()) | {"model": model, "loss": loss}
    with pytest.raises(ValueError, match=message):
        parse_config(TrainConfig, tree, source="test")


def test_codes_that_nobody_named_are_asked_for(path):
    config = load_config(TrainConfig, path, ["data.semantic_ids=null"])
    with pytest.raises(ValueError, match=r"add data\.semantic_ids, as configs/amazon-beauty/tiger\.yaml does"):
        print_plan(config, 1, 2, 1.0)


def test_the_plan_names_the_tables_of_the_codes_and_how_many_rows_they_have(path, capsys):
    config = load_config(TrainConfig, path)
    print_plan(config, 1, 2, 1.0)
    tables = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines() if "row_wise" in line}
    assert (tables["token"], tables["user"]) == ("11", "5")
    with pytest.raises(ValueError, match="those of tiger follow from data"):
        print_plan(config, 1, 2, 1.0, rows={"item": 5})
