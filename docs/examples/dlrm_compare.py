"""Does Muon pay for this DLRM? The model of dlrm_after.py, two arms under one protocol, AUC and normalised entropy.

python docs/examples/dlrm_compare.py         # made-up clicks; put your own model and batches in their place
"""

import time

import torch
import torch.distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchmetrics.functional.classification import binary_auroc
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.models.dlrm import DLRM_DCN, DLRMTrain
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

import muonrec

FEATURES = [f"cat_{i}" for i in range(8)]
NUM_DENSE, NUM_IDS, BATCH_SIZE, NUM_STEPS = 13, 1000, 256, 200

# Both arms get the same grids, the tables' rate among them: for the control it matters most.
GRIDS = {"dense_lr": [3e-4, 1e-3, 3e-3, 1e-2], "rest_lr": [3e-4, 1e-3, 3e-3], "tables_lr": [0.02, 0.05, 0.1]}
ARMS = {"control": {"optimizer": "adamw", **GRIDS}, "muon": {"optimizer": "muon", **GRIDS}}


def clicks(seed, num_batches):
    """Batches of made-up clicks: their law is the same for every seed."""
    law = torch.Generator().manual_seed(0)
    effects = torch.randn(len(FEATURES), NUM_IDS, 2, generator=law)
    slopes = torch.randn(NUM_DENSE, generator=law) / NUM_DENSE**0.5
    draw = torch.Generator().manual_seed(seed)
    for _ in range(num_batches):
        dense = torch.randn(BATCH_SIZE, NUM_DENSE, generator=draw)
        ids = (torch.rand(len(FEATURES), BATCH_SIZE, generator=draw) ** 3 * NUM_IDS).long()
        hidden = torch.stack([effects[f, ids[f]] for f in range(len(FEATURES))]).sum(0) / len(FEATURES) ** 0.5
        logits = 2 * hidden[:, 0] * hidden[:, 1] + dense @ slopes - 1
        labels = (torch.rand(BATCH_SIZE, generator=draw) < logits.sigmoid()).float()
        lengths = torch.ones(len(FEATURES) * BATCH_SIZE, dtype=torch.int32)
        yield Batch(dense, KeyedJaggedTensor(FEATURES, ids.flatten(), lengths=lengths), labels)


def build(tables_lr):
    """The sharded model with its tables' optimizer."""
    tables = [
        EmbeddingBagConfig(name=f"t_{f}", num_embeddings=NUM_IDS, embedding_dim=16, feature_names=[f]) for f in FEATURES
    ]
    dlrm = DLRM_DCN(
        EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
        dense_in_features=NUM_DENSE,
        dense_arch_layer_sizes=[64, 32, 16],
        over_arch_layer_sizes=[64, 32, 1],
        dcn_num_layers=2,
        dcn_low_rank_dim=8,
    )
    apply_optimizer_in_backward(RowWiseAdagrad, dlrm.sparse_arch.parameters(), {"lr": tables_lr})
    fused = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"),
        constraints={table.name: fused for table in tables},
    )
    model = DLRMTrain(dlrm)
    plan = planner.collective_plan(model, get_default_sharders(), dist.group.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan)


def train_arm(settings, *, seed, budget, is_final, num_steps=NUM_STEPS):
    """Train one model; everything but what ``settings`` says follows from ``seed``."""
    torch.manual_seed(seed)  # the initial weights
    model = build(settings["tables_lr"])
    rates = {"lr": settings["dense_lr"], "weight_decay": 0.01}
    muon = {**rates, "adjust_lr_fn": "match_rms_adamw"} if settings["optimizer"] == "muon" else None
    optimizer = muonrec.build_optimizer(
        model, muon=muon, matrices=rates if muon is None else None, adamw={"lr": settings["rest_lr"]}
    )
    num_steps = round(budget * num_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / num_steps, 0.01))
    first = next(clicks(10 + seed, 1))
    weights = sum(parameter.detach().double().sum().item() for parameter in model.parameters())

    curve, optimizer_s, started, paused = [], 0.0, time.monotonic(), 0.0
    for step, batch in enumerate(clicks(10 + seed, num_steps), start=1):
        model.train()
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        before = time.monotonic()
        optimizer.step()
        optimizer_s += time.monotonic() - before
        schedule.step()
        if step % max(num_steps // 50, 1) == 0:  # every 2 % of the budget
            before = time.monotonic()
            curve.append((step, before - started - paused, evaluate(model, 1)[0]["auc"]))
            paused += time.monotonic() - before
    seconds = time.monotonic() - started - paused
    steps, times, values = zip(*curve)
    found = {
        "valid": evaluate(model, 1)[0],
        "curve_step": steps, "curve_seconds": times, "curve_value": values,
        "num_steps": num_steps, "best_step": steps[values.index(max(values))],
        "seconds": seconds, "events_per_s": num_steps * BATCH_SIZE / seconds, "optimizer_share": optimizer_s / seconds,
        "fingerprints": {"initial_state": f"{weights:.12g}", "first_batches": str(first.labels[:32])},
    }  # fmt: skip
    if is_final:
        found["test"], found["per_unit"] = evaluate(model, 2)
    return found


@torch.no_grad()
def evaluate(model, seed, num_batches=8):
    """AUC, normalised entropy (log loss over that of the base rate; He et al. 2014), and the latter by example."""
    model.eval()
    logits, labels = map(torch.cat, zip(*(model(batch)[1][1:] for batch in clicks(seed, num_batches))))
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    rate = labels.mean()
    entropy = torch.nn.functional.binary_cross_entropy(rate.expand_as(labels), labels)
    by_example = {"normalized_entropy": (losses / entropy).double().numpy()}
    return {
        "auc": float(binary_auroc(logits, labels.int())),
        "normalized_entropy": float(losses.mean() / entropy),
    }, by_example


if __name__ == "__main__":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    comparison = muonrec.compare(train_arm, ARMS, "auc", name="dlrm", output="out/compare/dlrm")
    answer = comparison.answer()
    for name, arm in answer.arms[1.0].items():
        auc, entropy = arm.test["auc"], arm.test["normalized_entropy"]
        print(f"{name}: AUC {auc.mean:.4f}, normalised entropy {entropy.mean:.4f} {entropy.difference or ''}")
    print(answer.verdict, *answer.flags, sep="\n")
    dist.destroy_process_group()
