"""Settings of the tables, each by its effect: the kernels against a loop over rows, and refused where ignored."""

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from muonrec.embeddings.fused import check_tables, fuse_optimizers, fused_tables
from muonrec.embeddings.tables import TableConfig
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.plain import plain_rows, sharded_rows, trained_rows

RATES = (1.0, 0.5, 0.0, 1.0, 0.7)

# What is asked for, and what the table would look like had it been ignored.
SETTINGS = {
    "decoupled weight decay of row-wise Adagrad": (
        {"optimizer": "rowwise_adagrad", "lr": 0.1, "weight_decay": 0.3},
        {"weight_decay": 0.0},
    ),
    "L2 of row-wise Adagrad": (
        {"optimizer": "rowwise_adagrad", "lr": 0.1, "weight_decay": 0.3, "weight_decay_mode": "l2"},
        {"weight_decay_mode": "decoupled"},
    ),
    "eps of row-wise Adagrad": ({"optimizer": "rowwise_adagrad", "lr": 0.1, "eps": 0.5}, {"eps": 1e-8}),
    "eps of Adagrad": ({"optimizer": "adagrad", "lr": 0.1, "eps": 0.5}, {"eps": 1e-8}),
    "clamped row-wise Adagrad": (
        {"optimizer": "rowwise_adagrad", "lr": 0.1, "max_gradient": 0.3},
        {"max_gradient": None},
    ),
    "clamped Adagrad": ({"optimizer": "adagrad", "lr": 0.1, "max_gradient": 0.3, "eps": 0.1}, {"max_gradient": None}),
    "clamped SGD": ({"optimizer": "sgd", "lr": 0.1, "max_gradient": 0.3}, {"max_gradient": None}),
    "row-wise Adam": ({"optimizer": "partial_rowwise_adam", "lr": 0.05}, {"optimizer": "rowwise_adagrad"}),
    "betas of row-wise Adam": (
        {"optimizer": "partial_rowwise_adam", "lr": 0.05, "betas": (0.5, 0.8)},
        {"betas": (0.9, 0.999)},
    ),
    "eps of row-wise Adam": ({"optimizer": "partial_rowwise_adam", "lr": 0.05, "eps": 0.5}, {"eps": 1e-8}),
    "weight decay of row-wise Adam": (
        {"optimizer": "partial_rowwise_adam", "lr": 0.05, "weight_decay": 0.3},
        {"weight_decay": 0.0},
    ),
    "clamped row-wise Adam": (
        {"optimizer": "partial_rowwise_adam", "lr": 0.05, "max_gradient": 0.3},
        {"max_gradient": None},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_the_effect_that_a_plain_loop_gives_it(name):
    settings, ignored = SETTINGS[name]
    expected, _, _ = plain_rows(settings, RATES)
    otherwise, _, _ = plain_rows(settings | ignored, RATES)
    for got in run_on_ranks(2, trained_rows, settings, "row_wise", RATES):
        for table in expected:
            # float32 against float64: five steps of at most 0.1 on values of about 1.
            torch.testing.assert_close(got[table].double(), expected[table], rtol=0, atol=1e-6)
            assert (expected[table] - otherwise[table]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd", "weight_decay": 0.1}, "FBGEMM's sgd has none; use optimizer rowwise_adagrad"),
        ({"optimizer": "adagrad", "weight_decay": 0.1}, "FBGEMM's adagrad has none"),
        (
            {"optimizer": "partial_rowwise_adam", "weight_decay": 0.1, "weight_decay_mode": "l2"},
            "knows decoupled decay only",
        ),
        ({"optimizer": "rowwise_adagrad", "betas": (0.5, 0.9)}, "would be ignored by rowwise_adagrad"),
        ({"optimizer": "partial_rowwise_adam", "betas": (0.9, 1.0)}, "less than 1"),
        ({"max_gradient": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_a_kernel_would_ignore_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TableConfig(lr=0.1, **settings)


def start_up_lines(settings):
    dmp, _ = sharded_rows(settings, "row_wise")
    return [str(table) for table in fused_tables(dmp)]


def test_the_start_up_line_says_which_kernel_runs_with_which_settings():
    adagrad = {"lr": 0.1, "weight_decay": 0.25, "weight_decay_mode": "l2", "max_gradient": 0.5}
    assert run_on_ranks(2, start_up_lines, adagrad)[1] == [
        f"{name}: EXACT_ROWWISE_ADAGRAD by FBGEMM, fused into the backward pass; "
        "lr 0.1, eps 1e-08, l2 weight decay 0.25, gradients clamped to 0.5"
        for name in "ab"
    ]
    adam = {"optimizer": "partial_rowwise_adam", "lr": 0.1, "weight_decay": 0.25}
    assert run_on_ranks(2, start_up_lines, adam)[1] == [
        f"{name}: PARTIAL_ROWWISE_ADAM by muonrec, on a dense kernel, after the backward pass; "
        "lr 0.1, eps 1e-08, betas 0.9 and 0.999, decoupled weight decay 0.25"
        for name in "ab"
    ]


def decay_of_pooled_rows():
    """A table of bags by its owner's sharder, with our settings."""
    bags = EmbeddingBagCollection(
        tables=[EmbeddingBagConfig(name="t", num_embeddings=20, embedding_dim=8, feature_names=["f"])],
        device=torch.device("meta"),
    )
    asked = {"t": TableConfig(lr=0.1, weight_decay=0.3)}
    fuse_optimizers(bags, asked)
    plan = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"),
        constraints={"t": ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])},
    ).plan(bags, [EmbeddingBagCollectionSharder()])
    dmp = DistributedModelParallel(
        bags, device=torch.device("cpu"), plan=plan, sharders=[EmbeddingBagCollectionSharder()]
    )
    try:
        check_tables(dmp, asked)
    except ValueError as error:
        return str(error)


def test_weight_decay_that_the_pooling_cpu_kernel_ignores_is_refused():
    for message in run_on_ranks(2, decay_of_pooled_rows):
        assert message == "table 't' asks for weight_decay 0.3, but 0.0 is in force"
