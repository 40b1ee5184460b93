"""FBGEMM's CUDA kernels against the same plain loop as the CPU's: every optimizer, every setting, on one GPU."""

import pytest
import torch

import muonrec
from muonrec.embeddings.fused import fused_tables
from muonrec.mesh import join_ranks
from tests.embeddings.plain import NUM_ROWS, plain_rows, sharded_rows, share_of, trained_rows, whole
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
