"""FBGEMM's CUDA kernels against the same plain loop as the CPU's: every optimizer, every setting, on one GPU."""

import pytest
import torch

import muonrec
from muonrec.embeddings.fused import fused_tables
from muonrec.mesh import join_ranks
from tests.embeddings.plain import NUM_ROWS, plain_rows, sharded_rows, share_of, trained_rows, whole
from tests.embeddings.test_production_tables import built
from tests.embeddings.test_production_tables import steps as production_steps
from tests.embeddings.test_table_settings import RATES, SETTINGS

pytestmark = pytest.mark.gpu

ADAM = {
    "Adam": {"optimizer": "adam", "lr": 0.05, "eps": 1e-3},
    "Adam with everything": {
        "optimizer": "adam",
        "lr": 0.05,
        "betas": (0.8, 0.99),
        "eps": 1e-3,
        "weight_decay": 0.1,
        "max_gradient": 1.0,
    },
}
ALL = {name: settings for name, (settings, _) in SETTINGS.items()} | ADAM


@pytest.fixture(scope="module")
def device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with join_ranks() as ranks:  # alone: pytest does not run under torchrun
        yield ranks.device


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_cuda_kernels_equal_a_plain_loop(device, name, sharding):
    expected, _, _ = plain_rows(ALL[name], RATES)
    got = trained_rows(ALL[name], sharding, RATES, device)
    for table in expected:
        # float32 with the GPU's order of sums, against float64; the settings keep eps away from rounding.
        torch.testing.assert_close(got[table].double(), expected[table], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "partial_rowwise_adam"])
def test_adam_is_fused_on_cuda(device, optimizer):
    dmp, _ = sharded_rows({"optimizer": optimizer, "lr": 0.05}, "row_wise", device)
    kernel = "ADAM" if optimizer == "adam" else "PARTIAL_ROWWISE_ADAM"
    assert [str(table) for table in fused_tables(dmp)] == [
        f"{name}: {kernel} by FBGEMM, fused into the backward pass; lr 0.05, eps 1e-08, betas 0.9 and 0.999"
        for name in NUM_ROWS
    ]


def steps(dmp, optimizer, first, last, device):
    dmp.train()
    for step in range(first, last):
        optimizer.zero_grad()
        dmp(share_of(step, device)).backward()
        optimizer.step()
    return {name: whole(dmp.state_dict()[f"embeddings.embeddings.{name}.weight"]) for name in NUM_ROWS}


@pytest.mark.parametrize("optimizer", ["adam", "partial_rowwise_adam"])
def test_a_resumed_adam_keeps_its_step_count(device, tmp_path, optimizer):
    settings, folder = {"optimizer": optimizer, "lr": 0.05}, tmp_path / "step-00000003"
    dmp, joined = sharded_rows(settings, "row_wise", device)
    steps(dmp, joined, 0, 3, device)
    muonrec.save(folder, dmp, joined)
    expected = steps(dmp, joined, 3, 6, device)

    dmp, joined = sharded_rows(settings, "row_wise", device)
    muonrec.load(folder, dmp, joined)
    for name, table in steps(dmp, joined, 3, 6, device).items():
        torch.testing.assert_close(table, expected[name], rtol=1e-6, atol=1e-6)  # sums in an order of their own


def test_a_checkpoint_of_the_cpu_kernel_goes_on_by_the_cuda_kernel(device, tmp_path):
    settings, folder = {"optimizer": "partial_rowwise_adam", "lr": 0.05}, tmp_path / "step-00000003"
    cpu = torch.device("cpu")
    dmp, joined = sharded_rows(settings, "row_wise", cpu)
    steps(dmp, joined, 0, 3, cpu)
    muonrec.save(folder, dmp, joined)

    dmp, joined = sharded_rows(settings, "row_wise", device)
    muonrec.load(folder, dmp, joined)
    got, expected = steps(dmp, joined, 3, 6, device), plain_rows(settings, (1.0,) * 6)[0]
    for name in NUM_ROWS:
        torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": "uvm_caching", "cache_load_factor": 0.5},
        {"memory": "uvm"},
        {"data_type": "fp16", "stochastic_rounding": False},
        {"data_type": "bf16", "stochastic_rounding": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "partial_rowwise_adam"])
def test_host_memory_and_short_rows_train_as_float32_on_the_device(device, optimizer, settings):
    # A large eps: what a row at its goal is rounded by must not become a step of Adagrad's.
    common = {"optimizer": optimizer, "lr": 0.05, "eps": 0.5}
    expected = plain_rows(common, RATES)[0]
    got = trained_rows({**common, **settings}, "row_wise", RATES, device)
    # float32 as above; 11 and 8 bits of rows of at most 4, rounded at the start and in each of five steps.
    error = {"fp16": 6 * 2.0**-10, "bf16": 6 * 2.0**-7}.get(settings.get("data_type"), 1e-5)
    for table in expected:
        torch.testing.assert_close(got[table].double(), expected[table], rtol=1e-5, atol=error)


@pytest.mark.parametrize("memory", ["uvm_caching", "uvm"])
def test_a_table_in_host_memory_is_resumed_with_its_cache(device, tmp_path, memory):
    settings, folder = {"optimizer": "adagrad", "lr": 0.05, "memory": memory}, tmp_path / "step-00000003"
    dmp, joined = sharded_rows(settings, "row_wise", device)
    assert {table.memory for table in fused_tables(dmp)} == {memory}
    steps(dmp, joined, 0, 3, device)
    muonrec.save(folder, dmp, joined)  # what the cache holds is newer than the host's memory
    expected = steps(dmp, joined, 3, 6, device)
    muonrec.load(folder, dmp, joined)  # into the same model: its cache holds rows of step 6
    for name, table in steps(dmp, joined, 3, 6, device).items():
        torch.testing.assert_close(table, expected[name], rtol=1e-6, atol=1e-6)


def test_stochastic_rounding_keeps_updates_that_rounding_to_the_nearest_loses(device):
    moved = {}
    for stochastic in (True, False):
        settings = {"optimizer": "sgd", "lr": 3e-5, "data_type": "fp16", "stochastic_rounding": stochastic}
        dmp, joined = sharded_rows(settings, "row_wise", device)
        before = {name: whole(dmp.state_dict()[f"embeddings.embeddings.{name}.weight"]) for name in NUM_ROWS}
        after = steps(dmp, joined, 0, 40, device)
        moved[stochastic] = sum(float((after[name] != before[name]).float().mean()) for name in NUM_ROWS)
    # Updates of 3e-5 on rows of about 1, whose spacing is 5e-4 to 1e-3: lost but for the small elements.
    assert moved[True] > 1.3 * moved[False]


@pytest.mark.parametrize("comms", [{"forward": "bf16", "backward": "bf16"}, {"forward": "int8", "backward": "fp16"}])
@pytest.mark.parametrize("pooled", [False, True])
def test_quantized_comms_start_on_cuda(device, comms, pooled):
    # One GPU sends nothing: that the codecs are used between ranks is shown on a CPU (test_production_tables.py).
    dmp, optimizer, _ = built({"sharding": "table_wise"}, pooled, comms, device)
    losses = production_steps(dmp, optimizer, 0, 4, device)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("sharding", ["row_wise", "table_row_wise", "grid_shard", "table_column_wise"])
def test_bags_train_on_cuda_under_every_sharding(device, sharding):
    dmp, optimizer, plan = built({"sharding": sharding}, True, None, device)
    assert plan.plan["tables"]["t"].sharding_type == sharding
    losses = production_steps(dmp, optimizer, 0, 4, device)
    assert losses[-1] < losses[0]
