"""DistributedMuon against its plain twin on meshes of several axes: HSDP, tensor parallelism, both, and more."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from muonrec.optim import DistributedMuon, Muon
from muonrec.optim.layout import Layout, Mesh, placing_of
from tests.distributed.matrices import (
    CLOSE,
    SHAPES,
    assert_all_close,
    laid_out,
    local_of,
    mesh_of,
    split_of,
    tensor_of,
    train_plainly,
)
from tests.distributed.ranks import run_on_ranks

R, S0, S1, INTERLEAVED = Replicate(), Shard(0), Shard(1), _StridedShard(0, split_factor=2)

LAYOUTS = {
    4: {
        "ddp": None,
        "fsdp": 0,
        "fsdp_by_columns": 1,
        "hsdp": ((2, 2), (R, S0)),
        "hsdp_of_one_shard": ((4, 1), (R, S0)),
        "tp": ((2, 2), (R, S1)),
        "fsdp_and_tp": ((2, 2), (INTERLEAVED, S0)),
        "rows_and_columns": ((2, 2), (S0, S1)),
        "copies": ((2, 2), (R, R)),
    },
    8: {
        "ddp": None,
        "fsdp": 0,
        "fsdp_by_columns": 1,
        "hsdp": ((2, 4), (R, S0)),
        "hsdp_by_columns": ((4, 2), (R, S1)),
        "tp": ((2, 4), (R, S1)),
        "fsdp_and_tp": ((4, 2), (INTERLEAVED, S0)),
        "rows_and_columns": ((2, 4), (S0, S1)),
        "hsdp_and_tp": ((2, 2, 2), (R, INTERLEAVED, S0)),
        "all_axes": ((2, 2, 2), (S0, S1, S0)),
        "interleaved": ((8,), (_StridedShard(0, split_factor=3),)),
    },
}


def _wrong_parts():
    """Where what this rank holds of ``0, 1, 2, ...`` by our account is not what it holds by torch's."""
    wrong = []
    for shape in [*SHAPES.values(), (24, 17), (13, 26)]:
        whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
        for name, layout in LAYOUTS[dist.get_world_size()].items():
            theirs = laid_out(whole, layout)
            if isinstance(theirs, DTensor):
                placements, _, mesh_shape = placing_of(theirs)
                mesh = Mesh(mesh_shape, {0: tuple(theirs.device_mesh.get_coordinate())})
                ours = Layout(shape, placements, mesh).part(0).of(whole.flatten(1))
                if not ours.equal(theirs.to_local().flatten(1)):
                    wrong.append((name, shape))
    return wrong


@pytest.mark.parametrize("num_ranks", [4, 8])
def test_every_rank_holds_what_torch_says(num_ranks):
    assert run_on_ranks(num_ranks, _wrong_parts) == [[]] * num_ranks


# Training -------------------------------------------------------------------------------------------------------------


# Blocks of other shapes have other rates, so that a shard must know where in its matrix it lies.
SECOND_GROUP = {"nesterov": False, "adjust_lr_fn": "spectral_unclamped"}


def _optimizer(layouts, dtype=torch.float32, **settings):
    """Every shape in every layout, in two groups."""
    params = {
        f"{layout}/{shape}": nn.Parameter(laid_out(tensor_of(shape, -1, dtype), layouts[layout]))
        for layout in layouts
        for shape in SHAPES
    }
    named = list(params.items())
    groups = [{"params": named[::2]}, {"params": named[1::2], **SECOND_GROUP}]
    return params, DistributedMuon(groups, splits=split_of(params), **settings)


def _set_gradients(params, layouts, step, dtype=torch.float32, missing=()):
    for name, param in params.items():
        layout, shape = name.split("/")
        is_missing = (layout, dist.get_rank()) in missing
        param.grad = None if is_missing else laid_out(tensor_of(shape, step, dtype), layouts[layout])


def _plain(num_ranks, gradients=tensor_of, num_steps=5):
    names = [f"{layout}/{shape}" for layout in LAYOUTS[num_ranks] for shape in SHAPES]
    params, buffers = {}, {}
    for start, settings in enumerate(({}, SECOND_GROUP)):
        some = train_plainly({"ns_dtype": torch.float32, **settings}, gradients, num_steps, names[start::2])
        params, buffers = params | some[0], buffers | some[1]
    return params, buffers


def _locals(params, optimizer):
    return (
        {name: local_of(param.detach()).clone() for name, param in params.items()},
        {name: local_of(state["momentum_buffer"]).clone() for name, state in optimizer.named_state().items()},
    )


def _train(dtype, missing=(), num_steps=5, **settings):
    """This rank's part of parameters and momentum, and the collectives of the last step."""
    layouts = LAYOUTS[dist.get_world_size()]
    params, optimizer = _optimizer(layouts, dtype, **settings)
    for step in range(num_steps):
        _set_gradients(params, layouts, step, dtype, missing)
        before = {name: local_of(p.grad).clone() for name, p in params.items() if p.grad is not None}
        with CommDebugMode() as communication:
            optimizer.step()
        assert all(local_of(params[name].grad).equal(gradient) for name, gradient in before.items())
    return *_locals(params, optimizer), communication.get_total_counts()


def _train_and_compare(expected_params, expected_buffers, missing=(), **settings):
    """As ``_train`` in float32; raises where this rank's parts are not those of the expected wholes."""
    layouts = LAYOUTS[dist.get_world_size()]
    params, buffers, num_collectives = _train(torch.float32, missing, ns_dtype=torch.float32, **settings)
    for found, expected in ((params, expected_params), (buffers, expected_buffers)):
        parts = {name: local_of(laid_out(whole, layouts[name.split("/")[0]])) for name, whole in expected.items()}
        assert_all_close(found, parts, **CLOSE)
    return params, buffers, num_collectives


@pytest.mark.parametrize("num_ranks", [4, 8])
def test_every_layout_equals_muon_after_five_steps(num_ranks):
    results = run_on_ranks(num_ranks, _train_and_compare, *_plain(num_ranks))
    for name in [f"{layout}/{shape}" for layout in LAYOUTS[num_ranks] for shape in SHAPES]:
        # Who holds the same holds the same bits, and every momentum is on some rank, a replicated one on one alone.
        parts = [params[name] for params, *_ in results]
        momenta = [buffers[name] for _, buffers, _ in results if name in buffers]
        layout = LAYOUTS[num_ranks][name.split("/")[0]]
        copies = num_ranks if layout is None else _num_copies(*layout) if isinstance(layout, tuple) else 1
        assert len({part.numpy().tobytes() for part in parts}) <= num_ranks // copies
        assert len(momenta) == (1 if name.startswith(("ddp/", "copies/")) else num_ranks)
    # Two buckets of replicated matrices and two of sharded ones, at most two collectives each, and one for presence.
    assert all(num_collectives <= 1 + 2 * 4 for *_, num_collectives in results)


def _num_copies(mesh_shape, placements):
    copies = 1
    for size, placement in zip(mesh_shape, placements, strict=True):
        copies *= size if placement == R else 1
    return copies


def _train_twice_in_bfloat16():
    first, second = (_train(torch.bfloat16, num_steps=3) for _ in range(2))
    for one, other in zip(first[:2], second[:2], strict=True):
        assert_all_close(one, other, atol=0, rtol=0)
    return first[0]


def test_bfloat16_parameters_train_alike_in_every_layout_and_twice_to_the_bit():
    results = run_on_ranks(4, _train_twice_in_bfloat16)
    expected, _ = _plain(4, num_steps=3)
    for params in results:
        for shape in SHAPES:
            # Parameters of about 1 to 4 are rounded to 2^-8 of themselves when they are made and at each step.
            torch.testing.assert_close(params[f"ddp/{shape}"].float(), expected[f"ddp/{shape}"], atol=0.05, rtol=0.02)
            assert params[f"copies/{shape}"].isfinite().all()


# What travels ---------------------------------------------------------------------------------------------------------


def _bytes_of_one_step(layout, num_matrices):
    """What this rank packs for others and itself in a step, by collective, of 64 x 64 matrices."""
    gradient = torch.ones(64, 64)
    params = {f"layer{i}": nn.Parameter(laid_out(gradient, layout)) for i in range(num_matrices)}
    optimizer = DistributedMuon(params.items())
    for param in params.values():
        param.grad = laid_out(gradient, layout)
    sent = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.name().removeprefix("c10d::")
            if name in ("alltoall_base_", "_allgather_base_"):
                sent.append((name, args[1].numel() * args[1].element_size()))
            return function(*args, **(kwargs or {}))

    with Counting():
        optimizer.step()
    return sent, [m.owner for m in optimizer._matrices]


WHOLE = 64 * 64 * 2  # bytes in bfloat16


@pytest.mark.parametrize("num_matrices", [1, 2])
def test_a_replicated_update_is_packed_once_however_many_ranks_there_are(num_matrices):
    for rank, (sent, owners) in enumerate(run_on_ranks(8, _bytes_of_one_step, None, num_matrices)):
        own = WHOLE if rank in owners else 0
        assert sent == [("alltoall_base_", own), ("_allgather_base_", num_matrices * WHOLE // 8)]


@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "fsdp_and_tp"])
def test_each_part_travels_to_its_owner_once_and_back_to_every_copy(layout):
    copies = 2 if layout == "hsdp" else 1
    results = run_on_ranks(8, _bytes_of_one_step, LAYOUTS[8][layout], 8)
    for sent, owners in results:
        assert sorted(owners) == list(range(8))
        # All are in one bucket. A rank keeps what it has of its own matrix.
        (to_owners, num_bytes), (from_owners, num_bytes_back) = sent
        assert to_owners == from_owners == "alltoall_base_"
        assert num_bytes_back == copies * WHOLE - WHOLE * copies // 8
        assert num_bytes <= WHOLE
    # Of 8 matrices all but the part that the owner holds has to come to it, from one copy.
    assert sum(sent[0][1] for sent, _ in results) == 8 * (WHOLE - WHOLE * copies // 8)


# Missing gradients ----------------------------------------------------------------------------------------------------


def test_where_one_copy_lacks_a_gradient_that_of_another_counts():
    # Ranks 0 and 2 hold the same under hsdp and tp; of ddp and copies any rank will do.
    missing = [("hsdp", 0), ("tp", 2), ("ddp", 0), ("ddp", 1), ("copies", 2), ("copies", 3)]
    results = run_on_ranks(4, _train_and_compare, *_plain(4), missing)
    for *_, num_collectives in results:
        assert num_collectives <= 2 + 2 * 4


def _without_halves(name, step):
    gradient = tensor_of(name, step)
    layout = name.split("/")[0]
    if layout == "tp":
        gradient[:, : -(-gradient.shape[1] // 2)] = 0
    elif layout == "hsdp":
        gradient[: -(-gradient.shape[0] // 2)] = 0
    elif layout == "rows_and_columns":
        gradient[-(-gradient.shape[0] // 2) :, : -(-gradient.shape[1] // 2)] = 0
    return gradient


def test_where_every_copy_of_a_part_lacks_its_gradient_it_is_zero_there():
    missing = [("hsdp", 0), ("hsdp", 2), ("tp", 0), ("tp", 2), ("rows_and_columns", 2)]
    run_on_ranks(4, _train_and_compare, *_plain(4, _without_halves), missing)


def test_what_no_rank_has_a_gradient_of_is_left_alone():
    gone = ("hsdp", "fsdp_and_tp", "copies")
    missing = [(layout, rank) for layout in gone for rank in range(4)]
    expected = _plain(4, lambda name, step: None if name.split("/")[0] in gone else tensor_of(name, step))
    run_on_ranks(4, _train_and_compare, *expected, missing)


# Real wrappers --------------------------------------------------------------------------------------------------------


def _model():
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(
        nn.Linear(6, 12, bias=False), nn.ReLU(), nn.Linear(12, 5, bias=False), nn.ReLU(), nn.Linear(5, 7, bias=False)
    )
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(generator=generator)
    return model


def _train_model(wrapper, num_steps=4):
    """Two micro-batches a step, dealt out over the axis of data."""
    model = _model()
    share, num_shares = (dist.get_rank(), dist.get_world_size()) if wrapper else (0, 1)
    wrapped = model
    mesh = mesh_of(2, 2) if wrapper else None
    if wrapper == "hsdp":
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    elif wrapper is not None:
        share, num_shares = dist.get_rank() // 2, 2
        # The last layer is on the axis of data alone: its shards have copies that no placement tells of.
        parallelize_module(model, mesh["axis1"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if wrapper == "fsdp_and_tp":
            fully_shard(model[0], mesh=mesh["axis0"])
            fully_shard(model, mesh=mesh["axis0"])
    named = list(model.named_parameters())
    groups = [{"params": named[:1]}, {"params": named[1:], "lr": 0.02}]
    optimizer = (DistributedMuon if wrapper else Muon)(groups, lr=0.01, ns_dtype=torch.float32)
    for step in range(num_steps):
        optimizer.zero_grad()
        for micro_step in range(2):
            x_BD = torch.randn(8, 6, generator=torch.Generator().manual_seed(2 * step + micro_step))
            wrapped(x_BD[share::num_shares]).square().mean().backward()
        if wrapper == "tp":
            for param in model.parameters():
                dist.all_reduce(local_of(param.grad), group=mesh.get_group("axis0"))
                local_of(param.grad).div_(2)
        optimizer.step()
    return {name: local_of(p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()) for name, p in named}


@pytest.mark.parametrize("wrapper", ["ddp", "hsdp", "tp", "fsdp_and_tp"])
def test_a_wrapped_model_trains_as_on_one_device(wrapper):
    expected = _train_model(None)
    for params in run_on_ranks(4, _train_model, wrapper):
        # Here gradients follow from the parameters, which feeds differences back.
        assert_all_close(params, expected, atol=1e-5, rtol=1e-5)


# Checkpoints ----------------------------------------------------------------------------------------------------------

SAVED = {"ddp": None, "fsdp": 0, "hsdp": ((2, 2), (R, S0)), "fsdp_and_tp": ((2, 2), (INTERLEAVED, S0))}
# Even along the rows: torch's checkpoints know no part of several ranges.
SAVED_SHAPES = ["square", "tall", "fewer_columns_than_ranks", "kernel_2d", "qkv", "uvqk"]


def _named(layout, value):
    return {
        shape: nn.Parameter(laid_out(value(shape), layout))
        for shape in SAVED_SHAPES
        if layout is None or isinstance(layout, int) or INTERLEAVED not in layout[1] or SHAPES[shape][0] % 4 == 0
    }


def _save(folder):
    for name, layout in SAVED.items():
        params = _named(layout, lambda shape: tensor_of(shape, -1))
        optimizer = DistributedMuon(params.items(), splits=split_of(params), ns_dtype=torch.float32)
        for step in range(3):
            for shape, param in params.items():
                param.grad = laid_out(tensor_of(shape, step), layout)
            optimizer.step()
        dcp.save({"model": params, "optimizer": optimizer.named_state()}, checkpoint_id=f"{folder}/{name}")


def _load_and_step(folder, saved, layout, expected):
    params = _named(layout, lambda shape: torch.zeros(SHAPES[shape]))
    if saved == "fsdp_and_tp":
        params = {shape: param for shape, param in params.items() if SHAPES[shape][0] % 4 == 0}
    optimizer = DistributedMuon(params.items(), splits=split_of(params), ns_dtype=torch.float32)
    dcp.load({"model": params, "optimizer": optimizer.named_state()}, checkpoint_id=f"{folder}/{saved}")
    for shape, param in params.items():
        param.grad = laid_out(tensor_of(shape, 3), layout)
    optimizer.step()
    for found, wholes in zip(_locals(params, optimizer), expected, strict=True):
        assert_all_close(found, {shape: local_of(laid_out(wholes[shape], layout)) for shape in params}, **CLOSE)


def _load_all(folder, cases, expected):
    for saved, layout in cases:
        _load_and_step(folder, saved, layout, expected)


def test_saved_on_four_ranks_in_any_layout_goes_on_with_two_three_and_four_in_another(tmp_path):
    run_on_ranks(4, _save, str(tmp_path))
    expected = train_plainly({"ns_dtype": torch.float32}, num_steps=4, names=SAVED_SHAPES)
    for num_ranks, cases in {
        2: [("ddp", 0), ("fsdp", None), ("hsdp", 1), ("fsdp_and_tp", 0)],
        3: [("ddp", 1), ("fsdp", 0), ("hsdp", None), ("fsdp_and_tp", None)],
        4: [("ddp", SAVED["hsdp"]), ("hsdp", SAVED["fsdp_and_tp"]), ("fsdp_and_tp", SAVED["hsdp"]), ("fsdp", None)],
    }.items():
        run_on_ranks(num_ranks, _load_all, str(tmp_path), cases, expected)


# Groups and promises --------------------------------------------------------------------------------------------------


def _message_for_a_slice():
    # Both in one mesh of two of the four ranks: nothing says what the other two hold.
    mesh = mesh_of(2, 2)["axis1"]
    group = dist.new_group([0, 1, 2])
    if dist.get_rank() == 3:
        return None
    param = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)], src_data_rank=None))
    with pytest.raises(ValueError) as error:
        DistributedMuon([("proj", param)], process_group=group)
    return str(error.value)


def test_a_mesh_that_reaches_out_of_the_group_is_refused_on_every_rank():
    *messages, _ = run_on_ranks(4, _message_for_a_slice)
    for message in messages:
        assert "over ranks [2, 3], but process_group is of ranks [0, 1, 2]" in message


def _steps_on_a_promise():
    layouts = LAYOUTS[4]
    params, optimizer = _optimizer(layouts, assume_all_gradients=True)
    _set_gradients(params, layouts, 0)
    with CommDebugMode() as communication:
        optimizer.step()
    next(iter(params.values())).grad = None
    with pytest.raises(ValueError, match=r"\['ddp/square'\] have no gradient on rank \d, but assume_all_gradients"):
        optimizer.step()
    return communication.get_total_counts()


def test_with_all_gradients_promised_nothing_is_asked_and_a_missing_one_is_refused():
    asked = run_on_ranks(4, _train, torch.float32, (), 1)
    for num_collectives, (*_, num_with_the_question) in zip(run_on_ranks(4, _steps_on_a_promise), asked, strict=True):
        assert num_collectives == num_with_the_question - 1
