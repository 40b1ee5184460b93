"""Quantized comms: in which precision rows and their gradients travel between the ranks."""

from __future__ import annotations

from typing import Literal

import torch
from torchrec.distributed.embedding_types import ShardingType
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.types import EnumerableShardingSpec, QuantizedCommCodecs, ShardingPlan

from muonrec.config import Config

Precision = Literal["fp32", "fp16", "bf16", "int8"]

# Bytes of an element on the wire. FBGEMM's int8 codec cuts what it is given into rows of 32 with a float32 scale and
# offset each (fbgemm_gpu/quantize_comm.py, ROW_DIM_DEFAULT).
_INT8_ROW = 32
WIRE_BYTES: dict[Precision, float] = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": (_INT8_ROW + 8) / _INT8_ROW}

# Their sums are reduced on the way, which no codec of integers can do.
_REDUCED = {ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value}


class CommsConfig(Config):
    """In what precision the all-to-alls and reduce-scatters of the tables carry their numbers.

    TorchRec's fp8 and mx4 are not offered: in TorchRec 1.8 the first wants two dimensions where sequences have one, and
    the second miscounts shards of columns. ``bf16`` needs CUDA, since gloo has none. ``int8``
    is for all-to-alls alone and for shards whose columns are a multiple of 32.

    Attributes:
        forward: of the rows, or sums of rows, that go back to those who asked.
        backward: of their gradients. ``fp16`` clamps them to 65,504; there is no loss scale, since the loss is a mean
            over the global batch's targets.
    """

    forward: Precision = "fp32"
    backward: Precision = "fp32"


def codecs(comms: CommsConfig, device_type: str) -> dict[str, QuantizedCommCodecs] | None:
    """TorchRec's registry for its sharders; None where nothing is to be rounded.

    Raises:
        ValueError: bf16 on a CPU, for which TorchRec would take fp16.
    """
    if device_type == "cpu" and "bf16" in (comms.forward, comms.backward):
        raise ValueError(
            f"comms ask for bf16 (forward {comms.forward}, backward {comms.backward}), which gloo does not carry; use "
            "fp16 on a CPU"
        )
    precisions = (CommType(comms.forward), CommType(comms.backward))
    return get_qcomm_codecs_registry(QCommsConfig(*precisions), device=torch.device(device_type))


def can_reduce(comms: CommsConfig) -> bool:
    """Whether sums of bags that are cut by rows can be reduced on the way."""
    return "int8" not in (comms.forward, comms.backward)


def check_comms(comms: CommsConfig, plan: ShardingPlan, pooled: set[str]) -> None:
    """Refuse, by ValueError, a plan with a table that the codecs cannot carry; ``pooled`` are the tables of bags."""
    if can_reduce(comms):
        return  # nor has another precision a least width
    for module_plan in plan.plan.values():
        for name, parameter in module_plan.items():  # type: ignore[attr-defined]
            spec = parameter.sharding_spec
            assert isinstance(spec, EnumerableShardingSpec)
            if name in pooled and parameter.sharding_type in _REDUCED:
                raise ValueError(
                    f"comms ask for int8, but table {name!r} is {parameter.sharding_type}, whose sums are reduced on "
                    "the way; use fp16 or bf16, or shard it table_wise or column_wise"
                )
            widths = {shard.shard_sizes[1] for shard in spec.shards}
            if any(width % _INT8_ROW for width in widths):
                raise ValueError(
                    f"comms ask for int8, but table {name!r} has shards of {min(widths)} columns, no multiple of "
                    f"{_INT8_ROW}; use fp16 or bf16, or another embedding_dim"
                )
