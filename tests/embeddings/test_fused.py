"""The joined optimizer: fused tables against a plain loop, schedules by their effect, clipping, state and routing."""

from unittest import mock

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch.distributed.tensor import DTensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from muonrec.batch import CANDIDATES, HISTORY, TARGETS
from muonrec.data.loader import make_batch
from muonrec.embeddings import fused
from muonrec.embeddings.joined import _adamw, explain
from muonrec.models import ShardedEncoder
from tests.devices import DEVICES
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import batches_of, joined, sharded, whole

TABLE = "embeddings.embeddings.item.weight"


def table_of(dmp):
    return whole(dmp.state_dict()[TABLE])


def one_step(dmp, optimizer, step=0, kind="full_softmax"):
    dmp.train()
    optimizer.zero_grad()
    loss, _ = dmp(batches_of(kind).share(step))
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_adamw_with_its_state_from_the_start_steps_as_torchs(settings, device):
    start, *gradients = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).to(device)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = _adamw([("weight", mine)], lr=0.1, **settings), torch.optim.AdamW([theirs], lr=0.1, **settings)
    for gradient in gradients:
        mine.grad = theirs.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(mine, theirs)


def counts_after_loading(step):
    dmp, _ = sharded()
    # FBGEMM's Adam is for GPUs alone, but all of its kernels have the two counts.
    with mock.patch.object(fused, "_ADAM", (EmbOptimType.EXACT_ROWWISE_ADAGRAD,)):
        optimizer = joined(dmp)
    ((_, kernel),) = fused._kernels(dmp.module)
    kernel.emb_module.iter_cpu.fill_(9)  # as after nine steps
    state = optimizer.state_dict()
    state["state"][TABLE]["item.iter"] = torch.full((1,), step)
    optimizer.load_state_dict(state)
    return int(kernel.emb_module.iter), int(kernel.emb_module.iter_cpu)


def test_adam_of_fbgemm_goes_on_from_the_step_that_is_loaded():
    assert run_on_ranks(1, counts_after_loading, 5) == [(5, 5)]


def effect_of_the_schedule(sharding, optimizer_name):
    dmp, _ = sharded(sharding=sharding, optimizer=optimizer_name)
    optimizer = joined(dmp)
    moved = []
    for factor in (0.0, 1.0, 0.0, 0.5):
        before = table_of(dmp)
        optimizer.scale_lr("tables", factor)
        one_step(dmp, optimizer)
        moved.append((table_of(dmp) - before).abs().max().item())
    return moved


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])  # table_wise: one rank has no table
@pytest.mark.parametrize("optimizer_name", ["rowwise_adagrad", "partial_rowwise_adam"])
def test_a_schedule_of_the_tables_reaches_their_kernels(sharding, optimizer_name):
    for moved in run_on_ranks(2, effect_of_the_schedule, sharding, optimizer_name):
        assert moved[0] == 0.0
        assert moved[1] > 0.01
        assert moved[2] == 0.0
        assert 0.0 < moved[3] < moved[1]


SCHEDULE = (0.5, 0.0, 1.0)


def against_a_loop(optimizer_name):
    """Table after three scheduled steps of TorchRec's pipeline, and the same by a plain loop from its gradients."""
    eps = 1e-8
    dmp, _ = sharded(optimizer=optimizer_name, lr=0.05, kind="sampled_softmax")
    optimizer = joined(dmp)
    optimizer.scale_lr("muon", 0.0), optimizer.scale_lr("adamw", 0.0)
    pipeline = TrainPipelineSparseDist(dmp, optimizer, torch.device("cpu"))
    dmp.train()
    batches = batches_of("sampled_softmax").iterate(0, 3)
    plain = table_of(dmp).double()
    state = torch.zeros(plain.shape if optimizer_name == "adagrad" else (len(plain), 1), dtype=torch.float64)
    tower = dmp.module.tower
    for step, factor in enumerate(SCHEDULE):
        lr = 0.05 * factor
        batch = batches_of("sampled_softmax").share(step)
        table = plain.float().requires_grad_()
        features = batch.features
        rows = {key: table[features[key].values()] for key in (HISTORY, TARGETS, CANDIDATES)}
        hidden = tower(rows[HISTORY] * dmp.module.input_scale, features[HISTORY].lengths(), batch.groups)
        dmp.module.loss(hidden, rows[TARGETS], rows[CANDIDATES], batch)[0].backward()
        gradient = table.grad.double()
        if optimizer_name == "sgd":
            plain = plain - lr * gradient
        else:
            square = gradient.square()
            state += square if optimizer_name == "adagrad" else square.mean(1, keepdim=True)
            plain = plain - lr * gradient / (state.sqrt() + eps)
        optimizer.scale_lr("tables", factor)
        pipeline.progress(batches)
    return table_of(dmp), plain.float()


@pytest.mark.parametrize("optimizer_name", ["rowwise_adagrad", "adagrad", "sgd"])
def test_the_fused_table_equals_a_plain_loop(optimizer_name):
    fused, plain = run_on_ranks(1, against_a_loop, optimizer_name)[0]
    # float32 against float64: three steps of at most lr each; elements whose gradient is rounding are Adagrad's worst
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=2e-5 if optimizer_name != "adagrad" else 1e-3)


def norms_and_updates(dense):
    dmp, _ = sharded(dense=dense)
    optimizer = joined(dmp, max_grad_norm=1e-3, adamw={"lr": 1.0, "weight_decay": 0.0, "betas": (0.0, 0.0), "eps": 1.0})
    before = {name: whole(p) for name, p in optimizer.parts["adamw"].params.items()}
    one_step(dmp, optimizer)
    # With these settings AdamW moves by g / (|g| + 1): for gradients of 1e-3 and less, by the clipped gradient.
    moved = [(whole(p) - before[name]).flatten() for name, p in optimizer.parts["adamw"].params.items()]
    return optimizer.grad_norm, torch.cat(moved).norm().item()


@pytest.mark.parametrize("dense", ["ddp", "fsdp2"])
def test_clipping_takes_the_global_norm_of_what_adamw_updates(dense):
    alone, _ = run_on_ranks(1, norms_and_updates, "ddp")[0]
    for norm, moved in run_on_ranks(2, norms_and_updates, dense):
        assert norm == pytest.approx(alone, rel=1e-4)
        assert norm > 1e-3
        assert moved == pytest.approx(1e-3, rel=1e-2)


def initial_state(dense):
    dmp, _ = sharded(dense=dense)
    optimizer = joined(dmp)
    before = {name: whole(value) for name, value in dmp.state_dict().items()}
    for part in optimizer.parts.values():
        if part is not optimizer.parts["tables"]:
            part.init_state()
    unchanged = all(torch.equal(before[name], whole(value)) for name, value in dmp.state_dict().items())
    names = sorted(optimizer.state_dict()["state"])
    states = {
        key: sorted(state)
        for key, state in optimizer.state_dict()["state"].items()
        if key.startswith(("muon", "adamw"))
    }
    sharded_state = [isinstance(v, DTensor) for s in optimizer.parts["muon"].state.values() for v in s.values()]
    return unchanged, names, states, sharded_state


@pytest.mark.parametrize("dense", ["ddp", "fsdp2"])
def test_state_exists_from_construction_and_making_it_moves_no_weight(dense):
    results = run_on_ranks(2, initial_state, dense)
    assert all(unchanged for unchanged, *_ in results)
    momentum = {key for _, _, states, _ in results for key in states if key.startswith("muon.")}
    assert len(momentum) == 12  # q, k, v, output and two feed-forward layers of two blocks
    assert all("adamw.tower.position.weight" in names for _, names, *_ in results)
    if dense == "ddp":
        owned = [{key for key in states if key.startswith("muon.")} for _, _, states, _ in results]
        assert not owned[0] & owned[1]  # each momentum lives on one rank
    else:
        assert all(all(flags) and len(flags) == 12 for *_, flags in results)


def routing():
    dmp, _ = sharded()
    return explain(dmp), explain(joined(dmp, overrides=[(r"query", "adamw")]))


def test_every_parameter_is_routed_once_by_its_role():
    before, after = run_on_ranks(2, routing)[0]
    by_name = {a.name: a for a in before}
    assert by_name[TABLE].optimizer == "sparse"
    assert by_name[TABLE].shape == (57, 64)
    assert by_name["tower.position.weight"].optimizer == "adamw"
    assert by_name["tower.blocks.1.attention.query.weight"].optimizer == "muon"
    assert len(by_name) == len(before)
    assert {a.name for a in after if a.optimizer == "muon"} == {
        a.name for a in before if a.optimizer == "muon" and "query" not in a.name
    }


def routing_of_adamw():
    optimizer = joined(sharded()[0], dense="adamw")
    return optimizer.routing, list(optimizer.parts["matrices"].params)


def test_the_routing_of_an_adamw_arm_says_adamw():
    assignments, matrices = run_on_ranks(1, routing_of_adamw)[0]
    assert {a.optimizer for a in assignments} == {"sparse", "adamw"}
    assert [a.name for a in assignments if a.reason.endswith("in the group of matrices")] == matrices
    assert len(matrices) == 12


def encoded(num_items):
    dmp, _ = sharded()
    encoder = ShardedEncoder(dmp, num_items=num_items, device=torch.device("cpu"))
    table = table_of(dmp)
    none = torch.empty(0, dtype=torch.int64).numpy()
    batch = make_batch(
        history=torch.tensor([5, 6, 7, 1]).numpy(),
        lengths=torch.tensor([3, 1]).numpy(),
        labels=torch.tensor([1, 2]).numpy(),
        targets=none,
        candidates=none,
        log_q=none.astype("float32"),
        user_ids=torch.tensor([0, 1]).numpy(),
        num_items=num_items,
        step=0,
    )
    ids = torch.tensor([56, 0, 30, 29])
    return encoder.item_vectors(ids), table[ids], encoder.user_vectors(batch)


def test_the_encoder_gives_rows_of_the_table_and_the_same_users_on_any_number_of_ranks():
    alone = run_on_ranks(1, encoded, 57)[0]
    for items, rows, users in run_on_ranks(2, encoded, 57):
        assert torch.equal(items, rows)
        assert torch.equal(users, alone[2])
        assert users.shape == (2, 64)


def scaled_step():
    """One step under a GradScaler; the error, and whether the tower stayed as it was."""
    dmp, _ = sharded()
    optimizer, scaler = joined(dmp), torch.amp.GradScaler("cpu")
    before = {name: whole(value) for name, value in dmp.state_dict().items() if name != TABLE}
    dmp.train()
    loss, _ = dmp(batches_of("full_softmax").share(0))
    scaler.scale(loss).backward()
    try:
        scaler.step(optimizer)
    except ValueError as error:
        after = dmp.state_dict()
        return str(error), all(torch.equal(value, whole(after[name])) for name, value in before.items())
    return "", False


def test_a_grad_scaler_is_refused_with_what_to_use_instead():
    for message, unchanged in run_on_ranks(2, scaled_step):
        assert "the fused tables have taken the scaled gradients" in message and "bf16 without a scaler" in message
        assert unchanged
