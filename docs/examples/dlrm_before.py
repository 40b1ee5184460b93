"""Train a DLRM with TorchRec alone: AdamW above tables of row-wise Adagrad.

torchrun --standalone --nproc-per-node 2 docs/examples/dlrm_before.py
"""

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.datasets.random import RandomRecDataset
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM_DCN, DLRMTrain
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

FEATURES = [f"cat_{i}" for i in range(8)]
NUM_DENSE = 13


def train(device, folder, num_steps=40, batch_size=64):
    tables = [
        EmbeddingBagConfig(name=f"t_{f}", num_embeddings=1000, embedding_dim=16, feature_names=[f]) for f in FEATURES
    ]
    dlrm = DLRM_DCN(
        EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
        dense_in_features=NUM_DENSE,
        dense_arch_layer_sizes=[64, 32, 16],
        over_arch_layer_sizes=[64, 32, 1],
        dcn_num_layers=2,
        dcn_low_rank_dim=8,
    )
    model = DLRMTrain(dlrm)
    apply_optimizer_in_backward(RowWiseAdagrad, dlrm.sparse_arch.parameters(), {"lr": 0.05})

    constraints = {
        t.name: ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"]) for t in tables
    }
    topology = Topology(world_size=dist.get_world_size(), compute_device=device.type)
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(model, get_default_sharders(), dist.group.WORLD)
    dmp = DistributedModelParallel(model, device=device, plan=plan)

    dense = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    adamw = KeyedOptimizerWrapper(dense, lambda params: torch.optim.AdamW(params, lr=1e-3))
    optimizer = CombinedOptimizer([dmp.fused_optimizer, ("dense", adamw)])

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    pipeline = TrainPipelineSparseDist(dmp, optimizer, device)
    data = RandomRecDataset(
        FEATURES, batch_size, hash_size=1000, ids_per_feature=2, num_dense=NUM_DENSE,
        manual_seed=dist.get_rank(), num_generated_batches=4, num_batches=num_steps,
    )  # fmt: skip
    batches, losses = iter(data), []
    dmp.train()
    for _ in range(num_steps):
        loss, _, _ = pipeline.progress(batches)
        schedule.step()
        losses.append(loss.item())
    dcp.save({"model": dmp.state_dict(), "opt": optimizer.state_dict()}, checkpoint_id=folder)
    return losses


if __name__ == "__main__":
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    losses = train(device, folder="dlrm-checkpoint")
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")
    dist.destroy_process_group()
