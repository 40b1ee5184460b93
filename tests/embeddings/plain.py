"""The plain twin of every table optimizer: two tables updated row by row in float64, and the same by the kernels."""

import math

import torch
import torch.distributed as dist
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from muonrec.embeddings.fused import check_tables
from muonrec.embeddings.joined import build_optimizer
from muonrec.embeddings.sharding import shard_model
from muonrec.embeddings.tables import TableConfig
from muonrec.mesh import Ranks

WIDTH = 8
NUM_ROWS = {"a": 13, "b": 8}
FEATURES = {"early": "a", "late": "a", "other": "b"}  # two features share a table
USERS = 6  # of the global batch; 1, 2 and 3 ranks share them
CPU = torch.device("cpu")


class Rows(nn.Module):
    """Pulls every row looked up towards its goal: ``sum over ids of |row - goal|^2 / 2``; the tower is idle."""

    def __init__(self):
        super().__init__()
        tables = [
            EmbeddingConfig(
                name=name,
                num_embeddings=rows,
                embedding_dim=WIDTH,
                feature_names=[feature for feature, table in FEATURES.items() if table == name],
            )
            for name, rows in NUM_ROWS.items()
        ]
        self.embeddings = EmbeddingCollection(tables=tables, device=torch.device("meta"))
        self.tower = nn.Linear(WIDTH, WIDTH)

    def forward(self, features):
        embedded = self.embeddings(features)
        loss = 0.0 * self.tower(embedded["early"].values()).sum()
        for feature, table in FEATURES.items():
            goals = initial(table, seed=1).to(features.device())[features[feature].values()]
            loss = loss + (embedded[feature].values() - goals).square().sum() / 2
        return loss


def initial(table, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = {name: torch.randn(count, WIDTH, generator=generator) for name, count in NUM_ROWS.items()}
    if seed:
        rows["a"][5] = initial("a")[5]  # this row is at its goal: its gradient is zero, and it is touched all the same
    return rows[table]


def ids_of(step):
    """Ids of the global batch by feature and user; row 12 of ``a`` comes in every third step, row 11 never."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = {
        feature: [torch.randint(0, NUM_ROWS[table] - 2, (user % 4,), generator=generator) for user in range(USERS)]
        for feature, table in FEATURES.items()
    }
    if step % 3 == 0:
        ids["late"][1] = torch.tensor([12, 5, 12])
    return ids


def share_of(step, device=CPU):
    """This rank's users of the global batch."""
    mine = range(dist.get_rank(), USERS, dist.get_world_size())
    bags = [ids[user] for ids in ids_of(step).values() for user in mine]
    return KeyedJaggedTensor(
        keys=list(FEATURES), values=torch.cat(bags), lengths=torch.tensor([len(bag) for bag in bags])
    ).to(device)


def sharded_rows(settings, sharding, device=CPU):
    """The model on this rank, with its optimizer; every table starts at ``initial``."""
    tables = {name: TableConfig(**settings, sharding=sharding) for name in NUM_ROWS}
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device)
    dmp, _ = shard_model(Rows(), tables, dense="ddp", ranks=ranks, batch_size=USERS)
    for name in NUM_ROWS:
        write(dmp.state_dict()[f"embeddings.embeddings.{name}.weight"], initial(name))
    check_tables(dmp, tables)
    return dmp, build_optimizer(dmp, muon=None, matrices={"lr": 1e-3}, adamw={"lr": 1e-3})


def write(sharded, rows):
    for shard in sharded.local_shards():
        (row, column), (num_rows, num_columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        shard.tensor.detach().copy_(rows[row : row + num_rows, column : column + num_columns])


def whole(sharded):
    """The whole tensor of a sharded one, of one or two dimensions, on every rank."""
    full = torch.zeros(sharded.size())
    for shard in sharded.local_shards():
        places = zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes)
        full[tuple(slice(first, first + size) for first, size in places)] = shard.tensor.detach().cpu()
    dist.all_reduce(full)
    return full


def trained_rows(settings, sharding, rates, device=CPU):
    """Each table after one step for each factor of ``rates``, by the kernels; on every rank."""
    dmp, optimizer = sharded_rows(settings, sharding, device)
    dmp.train()
    for step, factor in enumerate(rates):
        optimizer.scale_lr("tables", factor)
        optimizer.zero_grad()
        (dist.get_world_size() * dmp(share_of(step, device))).backward()  # TorchRec takes the mean over ranks
        optimizer.step()
    return {name: whole(dmp.state_dict()[f"embeddings.embeddings.{name}.weight"]) for name in NUM_ROWS}


def plain_rows(settings, rates):
    """The same by a loop over rows in float64, and the moments of each table."""
    config = TableConfig(**settings)
    rows = {name: initial(name).double() for name in NUM_ROWS}
    goals = {name: initial(name, seed=1).double() for name in NUM_ROWS}
    first = {name: torch.zeros_like(table) for name, table in rows.items()}
    second = {name: torch.zeros_like(table) for name, table in rows.items()}
    for step, factor in enumerate(rates):
        ids = ids_of(step)
        for name in NUM_ROWS:
            looked_up = torch.cat([bag for feature, bags in ids.items() if FEATURES[feature] == name for bag in bags])
            touched = range(NUM_ROWS[name]) if config.optimizer == "dense_adam" else looked_up.unique().tolist()
            for row in touched:
                size = math.inf if config.max_gradient is None else config.max_gradient
                gradient = (rows[name][row] - goals[name][row]).clamp(-size, size) * (looked_up == row).sum()
                rows[name][row] -= (
                    factor
                    * config.lr
                    * plain_update(config, rows[name][row], gradient, first[name][row], second[name][row], step + 1)
                )
    return rows, first, second


def plain_update(config, row, gradient, first, second, step):
    """What one row moves by at rate 1; writes its moments, of which the second stands in every element of a row."""
    decay = config.weight_decay if config.weight_decay_mode == "decoupled" else 0.0
    if config.weight_decay_mode == "l2":
        gradient = gradient + config.weight_decay * row
    square = gradient.square()
    if config.optimizer in ("rowwise_adagrad", "partial_rowwise_adam"):
        square = square.mean().expand_as(row)
    if config.optimizer == "sgd":
        return gradient
    if config.is_adam:
        first.copy_(config.betas[0] * first + (1 - config.betas[0]) * gradient)
        second.copy_(config.betas[1] * second + (1 - config.betas[1]) * square)
        mean, variance = first / (1 - config.betas[0] ** step), second / (1 - config.betas[1] ** step)
    else:
        second += square
        mean, variance = gradient, second
    return mean / (variance.sqrt() + config.eps) + decay * row
