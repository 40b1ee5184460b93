"""Models that are not ours: DLRM on embedding bags, and tables with an optimizer each."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import muonrec
from muonrec.embeddings.fused import check_tables, fused_tables
from muonrec.embeddings.sharding import shard_model
from muonrec.embeddings.tables import TableConfig, initialize_tables
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import CPU, this_rank, whole


def dlrm(sharding="table_wise", wrapper=None, *, with_optimizer=True, seed=0):
    """A user's own model and sharding, as in TorchRec's examples; nothing of muonrec but the wrapper."""
    torch.manual_seed(seed)
    tables = [
        EmbeddingBagConfig(name=f"t{i}", num_embeddings=50 + i, embedding_dim=16, feature_names=[f"f{i}"])
        for i in range(3)
    ]
    bags = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    model = DLRMTrain(DLRM(bags, dense_in_features=8, dense_arch_layer_sizes=[32, 16], over_arch_layer_sizes=[32, 1]))
    if with_optimizer:
        _apply_optimizer_in_backward(RowWiseAdagrad, model.model.sparse_arch.parameters(), {"lr": 0.05})
    sharders = [EmbeddingBagCollectionSharder()]
    kernel = "dense" if sharding == "data_parallel" else "fused"
    constraints = {t.name: ParameterConstraints(sharding_types=[sharding], compute_kernels=[kernel]) for t in tables}
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    plan = EmbeddingShardingPlanner(topology=topology, constraints=constraints).plan(model, sharders)
    settings = {} if wrapper is None else {"data_parallel_wrapper": wrapper}
    return DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders, **settings)


def dlrm_batch(step):
    generator = torch.Generator().manual_seed(step * 10 + dist.get_rank())
    lengths = torch.randint(0, 4, (3 * 8,), generator=generator)
    values = torch.randint(0, 50, (int(lengths.sum()),), generator=generator)
    features = KeyedJaggedTensor(keys=["f0", "f1", "f2"], values=values, lengths=lengths)
    dense = torch.randn(8, 8, generator=generator)
    return Batch(dense_features=dense, sparse_features=features, labels=(dense[:, 0] > 0).float())


def trained_dlrm(folder, dense):
    """DLRM through the two lines of the README and TorchRec's pipeline; then saved, and loaded into another."""
    wrapper = muonrec.FSDP2Wrapper() if dense == "fsdp2" else None
    dmp = dlrm(wrapper=wrapper, seed=dist.get_rank())  # seeds differ on purpose
    optimizer = muonrec.build_optimizer(dmp, muon={"lr": 0.02}, adamw={"lr": 1e-3})
    initial = {name: whole(value) for name, value in dmp.state_dict().items()}
    pipeline = TrainPipelineSparseDist(dmp, optimizer, CPU)
    batches = iter([dlrm_batch(step) for step in range(6)])
    dmp.train()
    for _ in range(6):
        pipeline.progress(batches)
    weights = {name: whole(value) for name, value in dmp.state_dict().items()}
    muonrec.save(folder, dmp, optimizer, progress={"step": 6})

    other = dlrm("column_wise", seed=7)
    muonrec.load(folder, other)
    loaded = {name: whole(value) for name, value in other.state_dict().items()}
    return initial, weights, loaded, {a.name: a.optimizer for a in muonrec.explain(optimizer)}


@pytest.mark.parametrize("dense", ["ddp", "fsdp2"])
def test_a_dlrm_trains_in_two_lines(tmp_path, dense):
    results = run_on_ranks(2, trained_dlrm, str(tmp_path / "step-6"), dense)
    for initial, weights, loaded, routing in results:
        for name, weight in weights.items():
            assert torch.equal(initial[name], results[0][0][name]), name
            assert torch.equal(weight, results[0][1][name]), name
            assert torch.equal(loaded[name], weight), name
            assert not torch.equal(weight, initial[name]), name
        assert {routing[name] for name in routing if ".embedding_bags." in name} == {"sparse"}
        assert [name for name in routing if routing[name] == "muon"] == [
            "model.dense_arch.model._mlp.0._linear.weight",
            "model.dense_arch.model._mlp.1._linear.weight",
            "model.over_arch.model.0._mlp.0._linear.weight",
        ]


def refusals():
    messages = []
    for dmp, overrides in (
        (dlrm("data_parallel"), ()),
        (dlrm(with_optimizer=False), ()),
        (dlrm(), [("embedding_bags", "adamw")]),
    ):
        try:
            muonrec.build_optimizer(dmp, muon={"lr": 0.02}, adamw={"lr": 1e-3}, overrides=overrides)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_tables_that_would_be_trained_wrongly_or_not_at_all_are_refused_on_every_rank():
    for dense_kernel, by_default, overridden in run_on_ranks(2, refusals):
        assert "table 't0' has a dense kernel, which the backward pass does not train" in dense_kernel
        assert "table 't0' was sharded without an optimizer" in by_default and "SGD at 0.01" in by_default
        assert "embedding_bags.t0.weight" in overridden and "trains them already" in overridden


class Mixed(nn.Module):
    """Three tables in two collections; the loss is the sum of what is looked up, so every gradient is 1."""

    def __init__(self):
        super().__init__()
        configs = [
            EmbeddingConfig(name=name, num_embeddings=20, embedding_dim=8, feature_names=[name]) for name in "abc"
        ]
        self.first = EmbeddingCollection(tables=configs[:2], device=torch.device("meta"))
        self.second = EmbeddingCollection(tables=configs[2:], device=torch.device("meta"))
        self.tower = nn.Linear(8, 8)

    def forward(self, features):
        rows = {**self.first(features), **self.second(features)}
        return sum(row.values().sum() for row in rows.values()) + self.tower(rows["a"].values()).sum() * 0


MIXED = {
    "a": TableConfig(optimizer="sgd", lr=0.5, sharding="table_wise"),
    "b": TableConfig(optimizer="rowwise_adagrad", lr=0.25, sharding="row_wise"),
    "c": TableConfig(optimizer="sgd", lr=0.125, sharding="table_wise"),
}


def mixed_settings():
    """What each table runs, and how far its row 3 moves at half the rates."""
    dmp, _ = shard_model(Mixed(), MIXED, dense="ddp", ranks=this_rank(), batch_size=4)
    initialize_tables(dmp, std=dict.fromkeys("abc", 0.1), seed=0)
    found = check_tables(dmp, MIXED)
    assert found == fused_tables(dmp)
    optimizer = muonrec.build_optimizer(dmp, muon={"lr": 0.0}, adamw={"lr": 0.0})
    optimizer.scale_lr("tables", 0.5)
    before = {name: whole(value) for name, value in dmp.state_dict().items()}
    optimizer.zero_grad()
    dmp(KeyedJaggedTensor(keys=["a", "b", "c"], values=torch.tensor([3, 3, 3]), lengths=torch.tensor([1, 1, 1])))
    dmp.train()
    features = KeyedJaggedTensor(keys=["a", "b", "c"], values=torch.tensor([3, 3, 3]), lengths=torch.tensor([1, 1, 1]))
    dmp(features).backward()
    optimizer.step()
    moved = {
        name.split(".")[-2]: (before[name] - whole(value))[3].mean().item()
        for name, value in dmp.state_dict().items()
        if "embeddings" in name
    }
    try:
        check_tables(dmp, MIXED | {"d": TableConfig(lr=1.0)})
    except ValueError as error:
        return [(table.name, table.optimizer, table.lr) for table in found], moved, str(error)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_table_keeps_its_own_optimizer_and_rate(num_ranks):
    for found, moved, message in run_on_ranks(num_ranks, mixed_settings):
        assert found == [("a", "EXACT_SGD", 0.5), ("b", "EXACT_ROWWISE_ADAGRAD", 0.25), ("c", "EXACT_SGD", 0.125)]
        # SGD moves by lr times the gradient, 1 in the mean over ranks; Adagrad's first step by lr.
        assert moved == pytest.approx({"a": 0.25, "b": 0.125, "c": 0.0625}, rel=1e-5)
        assert "settings are for tables ['a', 'b', 'c', 'd'], but the ranks hold ['a', 'b', 'c']" in message
