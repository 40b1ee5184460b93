"""Tables: the item table every sequence model shares, and weights that do not depend on how it is sharded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, data_type_to_dtype
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from muonrec.batch import CANDIDATES, HISTORY, TARGETS, USER
from muonrec.config import Config

SparseOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd", "partial_rowwise_adam", "adam", "dense_adam"]
WeightDecayMode = Literal["decoupled", "l2"]
Beta = Annotated[float, Field(ge=0, lt=1)]
SHARDINGS = (
    "auto",
    "row_wise",
    "table_wise",
    "column_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
    "data_parallel",
)
Memory = Literal["hbm", "uvm_caching", "uvm"]
TableDataType = Literal["fp32", "fp16", "bf16"]

# Rows are drawn in blocks of this many, each from a generator of its own, so that a shard draws only what it needs.
_ROWS_PER_BLOCK = 4096


def _known_sharding(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    # A union of literals would report each of its branches.
    if not names or not set(names) <= set(SHARDINGS) or (len(names) > 1 and "auto" in names):
        raise ValueError(f"give one of {', '.join(SHARDINGS)}, or a list of some but auto")
    return value


class TableConfig(Config):
    """How one table is initialised, sharded and updated.

    Attributes:
        optimizer: by FBGEMM inside the backward pass: ``rowwise_adagrad``, ``adagrad``, ``sgd``, and on CUDA
            ``partial_rowwise_adam`` (one second moment per row) and ``adam``, which on a CPU, where FBGEMM has neither,
            are ours, see `muonrec.embeddings.cpu_adam`. ``dense_adam``, on a CPU alone, updates every row at every
            step, as `torch.optim.AdamW` does an `nn.Embedding`: what papers compare with, at the cost of a pass over
            the whole table.
        lr: its learning rate; there is no default, since none fits every table.
        eps: added to the root of Adagrad's sum, or of Adam's second moment.
        betas: Adam's; for the first and the second moment.
        weight_decay: of the rows a batch touches, which is all that FBGEMM knows, and by ``dense_adam`` of all; by
            row-wise Adagrad and Adam.
        weight_decay_mode: ``decoupled`` shrinks the row by lr x weight_decay; ``l2`` adds weight_decay x row to the
            gradient, by row-wise Adagrad alone.
        max_gradient: each element of the gradient of a looked-up row is clamped to this size, before those of one row
            are added up; null: it is left alone.
        sharding: one type, or a list of those that TorchRec's planner may choose from; ``auto`` is [row_wise,
            table_wise, column_wise]. ``table_row_wise`` (the rows over one node's ranks), ``grid_shard`` (columns over
            nodes, their rows over a node's ranks) and ``table_column_wise`` are for an `EmbeddingBagCollection`.
            ``data_parallel`` is refused: FBGEMM fuses no optimizer into a replicated table, its gradient is as large as
            the table, and a table small enough to be copied is as well held by one rank.
        min_partition: least columns of a shard, by ``column_wise``, ``table_column_wise`` and ``grid_shard``; null:
            TorchRec's choice.
        memory: ``hbm`` keeps the rows on the device. On CUDA alone, ``uvm_caching`` keeps them in host memory behind a
            cache on the device, and ``uvm`` without one. Row-wise state stays on the device; state per element follows
            the rows.
        cache_load_factor: rows of the cache, as a share of the table's; tables of one kernel share one cache, of their
            mean share.
        data_type: of the rows; null: as the model's own `EmbeddingConfig` says, fp32 in the models here. They come back
            as float32, and the state is float32, whatever they are. ``bf16`` needs CUDA.
        stochastic_rounding: of fp16 and bf16 rows when they are updated, on CUDA. A CPU rounds fp16 to the nearest, so
            that it must be turned off for them there.
        pooling_factor: ids of a user, for the planner's estimates of traffic and memory.
        init_std: standard deviation of the normal the rows are drawn from.
    """

    optimizer: SparseOptimizer = "rowwise_adagrad"
    lr: float = Field(gt=0)
    eps: float = Field(default=1e-8, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    weight_decay_mode: WeightDecayMode = "decoupled"
    max_gradient: float | None = Field(default=None, gt=0)
    sharding: Annotated[str | tuple[str, ...], AfterValidator(_known_sharding)] = "auto"
    min_partition: int | None = Field(default=None, ge=4, multiple_of=4)
    memory: Memory = "hbm"
    cache_load_factor: float = Field(default=0.2, gt=0, lt=1)
    data_type: TableDataType | None = None
    stochastic_rounding: bool = True
    pooling_factor: float = Field(default=1.0, gt=0)
    init_std: float = Field(default=0.02, ge=0)

    @property
    def is_adam(self) -> bool:
        """Whether the rows have two moments."""
        return self.optimizer in ("partial_rowwise_adam", "adam", "dense_adam")

    @property
    def sharding_types(self) -> tuple[str, ...]:
        """The types the planner may choose from."""
        return (self.sharding,) if isinstance(self.sharding, str) else self.sharding

    @model_validator(mode="after")
    def _nothing_ignored(self) -> TableConfig:
        if self.weight_decay and self.optimizer in ("adagrad", "sgd"):
            raise ValueError(
                f"weight_decay {self.weight_decay:g} would be ignored: FBGEMM's {self.optimizer} has none; use "
                "optimizer rowwise_adagrad or partial_rowwise_adam, or leave weight_decay at 0"
            )
        if self.weight_decay and self.weight_decay_mode == "l2" and self.is_adam:
            raise ValueError(f"{self.optimizer} knows decoupled decay only; use weight_decay_mode decoupled")
        if self.betas != type(self).model_fields["betas"].default and not self.is_adam:
            raise ValueError(f"betas {self.betas} would be ignored by {self.optimizer}; they are for Adam")
        if self.cache_load_factor != type(self).model_fields["cache_load_factor"].default and (
            self.memory != "uvm_caching"
        ):
            raise ValueError(
                f"cache_load_factor {self.cache_load_factor:g} would be ignored with memory {self.memory}; "
                "use memory uvm_caching"
            )
        by_columns = {"column_wise", "table_column_wise", "grid_shard", "auto"}
        if self.min_partition is not None and not by_columns & set(self.sharding_types):
            raise ValueError(
                f"min_partition {self.min_partition} would be ignored by {', '.join(self.sharding_types)}; it is for "
                "column_wise, table_column_wise and grid_shard"
            )
        return self


def item_table(num_items: int, embedding_dim: int) -> EmbeddingCollection:
    """The table ``item`` with its three features, on the meta device: `DistributedModelParallel` makes the shards."""
    return _collection({"item": (num_items, [HISTORY, TARGETS, CANDIDATES])}, embedding_dim)


def token_tables(num_tokens: int, num_user_tokens: int, embedding_dim: int) -> EmbeddingCollection:
    """The tables ``token``, with the same three features, and ``user``, with one; on the meta device."""
    tables = {"token": (num_tokens, [HISTORY, TARGETS, CANDIDATES]), "user": (num_user_tokens, [USER])}
    return _collection(tables, embedding_dim)


def _collection(tables: Mapping[str, tuple[int, list[str]]], embedding_dim: int) -> EmbeddingCollection:
    configs = [
        EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=embedding_dim, feature_names=features)
        for name, (rows, features) in tables.items()
    ]
    # A device given as a string breaks materialisation: torchrec compares it with a torch.device.
    return EmbeddingCollection(tables=configs, device=torch.device("meta"))


def table_configs(model: nn.Module) -> Iterator[tuple[str, EmbeddingConfig | EmbeddingBagConfig]]:
    """Where each table of an unsharded model is, the path of its collection, and TorchRec's description of it."""
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingCollection):
            yield from ((path, config) for config in module.embedding_configs())
        elif isinstance(module, EmbeddingBagCollection):
            yield from ((path, config) for config in module.embedding_bag_configs())


def cast_tables(model: nn.Module, tables: Mapping[str, TableConfig]) -> None:
    """Give the tables of an unsharded model the data types that their settings ask for, in place."""
    for path, config in table_configs(model):
        asked = tables[config.name].data_type if config.name in tables else None
        if asked is not None:
            config.data_type = DataType(asked.upper())
            collection = model.get_submodule(path)
            holder = collection.embedding_bags if isinstance(config, EmbeddingBagConfig) else collection.embeddings
            weight = holder[config.name].weight  # type: ignore[index,union-attr]
            weight.data = weight.data.to(data_type_to_dtype(config.data_type))


def initialize_tables(model: DistributedModelParallel, *, std: dict[str, float], seed: int) -> None:
    """Draw every table's rows from a normal, as a function of seed, table and row alone, whatever the sharding.

    Args:
        model: sharded; written in place, each rank its own shards.
        std: standard deviation by table name.
        seed: of the draws.

    Raises:
        ValueError: a table of the model has no entry in ``std``.
    """
    for key, value in model.state_dict().items():
        table = table_of(key)
        if table is None:
            continue
        if table not in std:
            raise ValueError(f"table {table!r} has no init_std; known tables: {sorted(std)}")
        if isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                _draw(shard.tensor, row, column, rows, columns, width=value.size(1), std=std[table], seed=(seed, table))
        else:
            _draw(value, 0, 0, *value.shape, width=value.size(1), std=std[table], seed=(seed, table))


def table_of(key: str) -> str | None:
    """Name of the table whose weight stands under ``key`` of a model's state dict, or None for other parameters."""
    parts = key.split(".")
    if len(parts) >= 3 and parts[-1] == "weight" and parts[-3] in ("embeddings", "embedding_bags"):
        return parts[-2]
    return None


def _draw(
    out: torch.Tensor, row: int, column: int, rows: int, columns: int, *, width: int, std: float, seed: tuple[int, str]
) -> None:
    first_block, last_block = row // _ROWS_PER_BLOCK, (row + rows - 1) // _ROWS_PER_BLOCK
    for block in range(first_block, last_block + 1 if rows else first_block):
        generator = torch.Generator().manual_seed(_mix(seed[0], seed[1], block))
        drawn = torch.randn(_ROWS_PER_BLOCK, width, generator=generator) * std
        first, last = max(row, block * _ROWS_PER_BLOCK), min(row + rows, (block + 1) * _ROWS_PER_BLOCK)
        kept = drawn[first - block * _ROWS_PER_BLOCK : last - block * _ROWS_PER_BLOCK, column : column + columns]
        out.detach()[first - row : last - row].copy_(kept)


def _mix(seed: int, table: str, block: int) -> int:
    digest = hashlib.md5(f"{seed}/{table}/{block}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
