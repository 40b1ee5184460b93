"""Tests of what happens around the orthogonalization."""

import math

import pytest
import torch

from muonrec.optim.newton_schulz import JORDAN_COEFFICIENTS, orthogonalize
from muonrec.optim.update import (
    Split,
    adjust_lr,
    apply_update_,
    as_matrix,
    look_ahead,
    matrix_shape,
    orthogonalize_blocks,
    update_momentum_,
    whole,
)


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_momentum_is_an_average():
    buffer = torch.full((2, 2), 4.0)
    assert update_momentum_(buffer, torch.full((2, 2), 8.0), 0.75) is buffer
    assert torch.equal(buffer, torch.full((2, 2), 5.0))


def test_nesterov_looks_ahead_by_one_gradient():
    buffer, grad = torch.full((2, 2), 4.0), torch.full((2, 2), 8.0)
    assert torch.equal(look_ahead(buffer, grad, momentum=0.75, nesterov=True), torch.full((2, 2), 5.0))
    assert look_ahead(buffer, grad, momentum=0.75, nesterov=False) is buffer
    assert torch.equal(grad, torch.full((2, 2), 8.0))


@pytest.mark.parametrize(
    ("adjust_lr_fn", "tall", "wide"),
    [
        (None, 2.0, 1.0),
        ("original", 2.0, 1.0),
        ("match_rms_adamw", 0.2 * math.sqrt(12), 0.2 * math.sqrt(12)),
        ("spectral_unclamped", 2.0, 0.5),
    ],
)
def test_adjust_lr_by_shape(adjust_lr_fn, tall, wide):
    assert adjust_lr(10.0, adjust_lr_fn, (12, 3)) == pytest.approx(10 * tall, rel=1e-15)
    assert adjust_lr(10.0, adjust_lr_fn, (3, 12)) == pytest.approx(10 * wide, rel=1e-15)


def test_adjust_lr_names_what_it_knows():
    with pytest.raises(
        ValueError, match="adjust_lr_fn is 'rms'; use one of original, match_rms_adamw, spectral_unclamped"
    ):
        adjust_lr(1.0, "rms", (2, 2))


@pytest.mark.parametrize(("dim", "sizes"), [(0, (2, 3, 4)), (1, (5, 1)), (0, (9,))])
def test_blocks_are_orthogonalized_by_themselves(dim, sizes):
    update_RC = _random(9, 6)
    options = {"coefficients": JORDAN_COEFFICIENTS, "eps": 1e-7, "dtype": torch.float64}
    found = orthogonalize_blocks(update_RC, Split(dim, sizes), **options)
    expected = [orthogonalize(block, **options) for block in update_RC.split(sizes, dim)]
    assert torch.equal(found, torch.cat(expected, dim))


def test_each_block_moves_by_the_rate_of_its_own_shape():
    split, shape = Split(0, (8, 2)), (10, 2)
    param = torch.ones(10, 2, dtype=torch.float64)
    apply_update_(
        param, torch.ones_like(param), lr=0.1, weight_decay=0.5, adjust_lr_fn="original", split=split, shape=shape
    )
    # 1 - 0.1 * 0.5 of the parameter is left, minus 0.1 * sqrt(8 / 2) and 0.1 * sqrt(2 / 2).
    torch.testing.assert_close(param[:8], torch.full((8, 2), 0.95 - 0.2, dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(param[8:], torch.full((2, 2), 0.95 - 0.1, dtype=torch.float64), atol=1e-15, rtol=0)


def test_a_transposed_split_moves_by_the_rate_of_the_transposed_block():
    param = torch.zeros(2, 10, dtype=torch.float64)
    split = Split(1, (8, 2), transposed=True)
    apply_update_(
        param, torch.ones_like(param), lr=0.1, weight_decay=0.0, adjust_lr_fn="original", split=split, shape=(2, 10)
    )
    torch.testing.assert_close(param[0], torch.tensor([-0.2] * 8 + [-0.1] * 2, dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("split", [Split(0, (2, 5, 3)), Split(1, (4, 2))])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_are_updated_as_the_whole(split, dim):
    settings = {
        "lr": 0.1,
        "weight_decay": 0.1,
        "adjust_lr_fn": "spectral_unclamped",
        "split": split,
        "shape": (10, 6),
    }
    expected, update_RC = _random(10, 6), _random(10, 6, seed=1)
    shards = [shard.clone() for shard in expected.chunk(4, dim)]
    apply_update_(expected, update_RC, **settings)
    start = 0
    for shard, update in zip(shards, update_RC.chunk(4, dim), strict=True):
        apply_update_(shard, update, **settings, start=start if dim == split.dim else 0)
        start += shard.shape[dim]
    assert torch.equal(torch.cat(shards, dim), expected)


def test_a_kernel_in_channels_last_is_updated_as_any_other():
    expected, update_RC = _random(4, 3, 2, 2), _random(4, 12, seed=1)
    kernel = expected.clone().to(memory_format=torch.channels_last)
    settings = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": None, "split": whole((4, 12)), "shape": (4, 12)}
    apply_update_(expected, update_RC, **settings)
    apply_update_(kernel, update_RC, **settings)
    assert torch.equal(kernel, expected)
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_a_kernel_becomes_a_matrix_with_a_row_per_output():
    assert matrix_shape("conv", (4, 3, 2, 2)) == (4, 12)
    kernel = _random(4, 3, 2, 2)
    assert torch.equal(as_matrix(kernel)[1], kernel[1].flatten())


@pytest.mark.parametrize("shape", [(), (3,), (0, 4)])
def test_what_is_not_a_matrix_is_named(shape):
    with pytest.raises(ValueError, match=r"Muon was given 'norm.gain' of shape .* give biases, gains and scalars"):
        matrix_shape("norm.gain", shape)


def test_even_split():
    assert Split.even(3, (12, 5)) == Split(0, (4, 4, 4))
    assert Split(1, [2, 3]).ranges() == [(0, 2), (2, 5)]


def test_a_block_per_head():
    assert Split.heads(3, (12, 5)) == Split(0, (4, 4, 4))
    assert Split.heads(2, (5, 12), dim=1, transposed=True) == Split(1, (6, 6), transposed=True)
    with pytest.raises(ValueError, match="5 heads do not divide dim 0 of a matrix 12 x 5; give the sizes of uneven"):
        Split.heads(5, (12, 5))


def test_a_split_that_does_not_add_up_is_named():
    message = r"the split of 'qkv' has sizes \(4, 4\), together 8, but the matrix is 12 x 4; .* must add up to 12"
    with pytest.raises(ValueError, match=message):
        Split(0, (4, 4)).check("qkv", (12, 4))
    with pytest.raises(ValueError, match="along dim 2; use 0 for blocks of rows or 1"):
        Split(2, (4,))
    with pytest.raises(ValueError, match=r"sizes \(4, 0\); give at least one size, each of 1 or more"):
        Split(0, (4, 0))
