"""Tests of what goes through the iteration together: the plan, and that a batch gives what its matrices give alone."""

import pytest
import torch

from muonrec.optim.batching import CostModel, cost_model, orthogonalize_batched, plan_batches
from muonrec.optim.newton_schulz import JORDAN_COEFFICIENTS, orthogonalize
from muonrec.optim.update import Split, orthogonalize_blocks, whole

EXACT = {"coefficients": JORDAN_COEFFICIENTS, "eps": 1e-7, "dtype": torch.float64}
# One launch costs as much as 30 kFLOP; 64 KiB hold four 16 x 16 matrices in four float64 buffers of theirs.
MODEL = CostModel(launch_s=1e-6, flops_per_s=3e10, batch_bytes=4 * 4 * 16 * 16 * 8)


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _plan(*shapes, model=MODEL):
    return plan_batches(shapes, model, 8, 5)


def test_every_matrix_is_in_exactly_one_batch_that_it_fits():
    shapes = tuple((4 + i % 5, 9 + i % 7) for i in range(40)) + ((16, 16),) * 9 + ((1, 1), (64, 512))
    batches = _plan(*shapes)
    assert sorted(i for batch in batches for i in batch.members) == list(range(len(shapes)))
    for batch in batches:
        for i in batch.members:
            assert shapes[i][0] <= batch.shape[0] and shapes[i][1] <= batch.shape[1]


def test_equal_shapes_share_batches_that_fit_the_cache_and_are_of_like_size():
    sizes = sorted(len(batch.members) for batch in _plan(*[(16, 16)] * 10))
    assert sizes == [3, 3, 4]


def test_a_matrix_larger_than_the_cache_goes_alone():
    assert [batch.members for batch in _plan((64, 64), (64, 64))] == [(0,), (1,)]


def test_near_shapes_are_padded_together_and_far_ones_are_not():
    near = _plan((15, 16), (16, 16))
    assert len(near) == 1 and near[0].shape == (16, 16)
    far = _plan((2, 4), (64, 64))
    assert sorted(batch.shape for batch in far) == [(2, 4), (64, 64)]


def test_padding_follows_the_price_of_a_launch():
    shapes = ((8, 16), (14, 16))
    assert len(_plan(*shapes)) == 1
    free_launches = CostModel(launch_s=0.0, flops_per_s=3e10, batch_bytes=1 << 20)
    assert len(_plan(*shapes, model=free_launches)) == 2


def test_the_measured_models_batch_the_small_and_leave_the_large_alone():
    model = cost_model("cpu", torch.bfloat16)
    assert len(plan_batches(((64, 64),) * 48, model, 2, 5)) == 1
    assert [len(batch.members) for batch in plan_batches(((1024, 1024),) * 2, model, 2, 5)] == [1, 1]


def _batch(shapes, splits=None, **settings):
    splits = {name: whole(shape) for name, shape in shapes.items()} | (splits or {})
    updates = {name: _random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    settings = dict.fromkeys(shapes, EXACT | settings)
    return updates, splits, settings


def test_a_padded_batch_equals_its_matrices_one_by_one():
    shapes = {
        f"{rows}x{columns}": (rows, columns) for rows, columns in [(60, 64), (64, 64), (64, 61), (62, 63), (1, 64)]
    }
    updates, splits, settings = _batch(shapes)
    wide = tuple((min(shape), max(shape)) for shape in shapes.values())
    assert any(
        wide[i] != batch.shape
        for batch in plan_batches(wide, cost_model("cpu", torch.float64), 8, 5)
        for i in batch.members
    )
    found = orthogonalize_batched(updates, splits, settings)
    for name in shapes:
        torch.testing.assert_close(found[name], orthogonalize(updates[name], **EXACT), atol=1e-12, rtol=0)


@pytest.mark.parametrize("gram", [False, True])
def test_a_batch_of_many_shapes_equals_one_by_one(gram):
    shapes = {"a": (4, 6), "b": (6, 4), "c": (4, 6), "d": (5, 5), "rows": (12, 6), "columns": (4, 12), "long": (3, 40)}
    splits = {"rows": Split(0, (4, 5, 3)), "columns": Split(1, (6, 6))}
    updates, splits, settings = _batch(shapes, splits, gram=gram)
    settings["c"] = settings["c"] | {"coefficients": JORDAN_COEFFICIENTS[:3]}
    found = orthogonalize_batched(updates, splits, settings)
    for name in shapes:
        expected = orthogonalize_blocks(updates[name], splits[name], **settings[name])
        # Rounding of float64, amplified by at most 485.
        torch.testing.assert_close(found[name], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shapes", [((8, 8), (8, 8), (8, 8)), ((8, 8), (7, 8), (8, 6))])
def test_a_bad_value_does_not_poison_its_neighbours(shapes, bad):
    updates, splits, settings = _batch({str(i): shape for i, shape in enumerate(shapes)})
    updates["1"][2, 3] = bad
    found = orthogonalize_batched(updates, splits, settings)
    assert found["1"].isnan().all()
    for name in ("0", "2"):
        torch.testing.assert_close(found[name], orthogonalize(updates[name], **EXACT), atol=1e-12, rtol=0)


def test_zero_stays_zero_beside_others():
    updates, splits, settings = _batch({"zero": (8, 8), "other": (7, 8)})
    updates["zero"].zero_()
    found = orthogonalize_batched(updates, splits, settings)
    assert torch.equal(found["zero"], torch.zeros(8, 8, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_input_is_neither_written_to_nor_returned(dtype):
    shapes = {"a": (8, 8), "b": (8, 8), "alone": (3, 90)}
    updates, splits, _ = _batch(shapes)
    updates = {name: update.to(dtype) for name, update in updates.items()}
    before = {name: update.clone() for name, update in updates.items()}
    settings = {name: EXACT | {"dtype": dtype} for name in shapes}
    found = orthogonalize_batched(updates, splits, settings)
    for name in shapes:
        assert torch.equal(updates[name], before[name])
        assert found[name].untyped_storage().data_ptr() != updates[name].untyped_storage().data_ptr()


def test_results_come_in_the_dtype_asked_for():
    updates, splits, settings = _batch({"a": (8, 8), "b": (8, 8), "alone": (3, 90)})
    dtypes = {"a": torch.bfloat16, "b": torch.float32, "alone": torch.bfloat16}
    found = orthogonalize_batched(updates, splits, settings, dtypes)
    assert {name: update.dtype for name, update in found.items()} == dtypes
