"""Tests of the iteration: against the singular value decomposition, against torch, and of its invariances."""

import math

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from muonrec.optim.newton_schulz import (
    JORDAN_COEFFICIENT,
    JORDAN_COEFFICIENTS,
    coefficients_per_step,
    orthogonalize,
)

SHAPES = [(16, 16), (8, 24), (24, 8), (1, 9), (9, 1), (1, 1), (33, 20)]


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _orthogonalize_exactly(update_RC, **options):
    return orthogonalize(update_RC, dtype=torch.float64, eps=0.0, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_is_the_polynomial_of_the_singular_values(shape):
    update_RC = _random(*shape)
    left, values, right = torch.linalg.svd(update_RC, full_matrices=False)
    values = values / values.norm()
    for a, b, c in JORDAN_COEFFICIENTS:
        values = a * values + b * values**3 + c * values**5
    # Rounding of float64, amplified by at most 485.
    torch.testing.assert_close(
        _orthogonalize_exactly(update_RC), left @ torch.diag(values) @ right, atol=1e-11, rtol=1e-11
    )


@pytest.mark.parametrize("shape", [(16, 16), (8, 64), (64, 8)])
def test_singular_values_end_near_one(shape):
    left, _, right = torch.linalg.svd(_random(*shape), full_matrices=False)
    update_RC = left @ torch.diag(torch.linspace(0.1, 1.0, min(shape), dtype=torch.float64)) @ right
    values = torch.linalg.svdvals(_orthogonalize_exactly(update_RC))
    assert values.min() > 0.65 and values.max() < 1.25


def _spectrum(rows, columns, smallest, seed=0):
    """A matrix whose singular values fall evenly in logarithm from 1 to ``smallest``."""
    left, _, right = torch.linalg.svd(_random(rows, columns, seed=seed), full_matrices=False)
    count = min(rows, columns)
    values = torch.logspace(0, math.log10(smallest), count, dtype=torch.float64)
    return left @ torch.diag(values) @ right, left @ right


def _final(name, steps, smallest):
    """Least and largest singular value that a set of coefficients makes of those from ``smallest`` to 1."""
    values = torch.logspace(0, math.log10(smallest), 10_001, dtype=torch.float64)
    for a, b, c in coefficients_per_step(name, steps):
        values = a * values + b * values**3 + c * values**5
    return values.min().item(), values.max().item()


def test_polar_express_ends_nearer_to_one_than_jordan():
    assert _final("jordan", 5, 1e-2) == pytest.approx((0.68, 1.13), abs=0.01)
    assert _final("jordan", 5, 1e-3) == pytest.approx((0.47, 1.20), abs=0.01)
    assert _final("polar_express", 5, 1e-3) == pytest.approx((0.84, 1.12), abs=0.01)
    assert _final("polar_express", 6, 1e-3) == pytest.approx((1.0, 1.0), abs=0.01)
    assert _final("polar_express", 8, 1e-3) == pytest.approx((1.0, 1.0), abs=1e-12)


@pytest.mark.parametrize(("shape", "smallest"), [((16, 16), 1e-2), ((12, 40), 1e-2), ((40, 12), 1e-3)])
def test_polar_express_reaches_the_polar_factor(shape, smallest):
    update_RC, polar_RC = _spectrum(*shape, smallest)
    found = _orthogonalize_exactly(update_RC, coefficients=coefficients_per_step("polar_express", 12))
    torch.testing.assert_close(found, polar_RC, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["jordan", "polar_express"])
@pytest.mark.parametrize("steps", [1, 2, 5, 6])
@pytest.mark.parametrize("shape", [(6, 30), (30, 6), (2, 3, 4, 20)])
def test_the_gram_form_is_the_same_polynomial(shape, steps, name):
    update = _random(*shape)
    coefficients = coefficients_per_step(name, steps)
    found = _orthogonalize_exactly(update, coefficients=coefficients, gram=True)
    expected = _orthogonalize_exactly(update, coefficients=coefficients)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert steps == 1 or not torch.equal(found, expected)


@pytest.mark.parametrize("name", ["jordan", "polar_express"])
@pytest.mark.parametrize("shape", [(64, 256), (32, 320)])
def test_the_gram_form_rounds_no_worse_in_bfloat16_where_it_matters(shape, name):
    coefficients = coefficients_per_step(name, 5)

    def error(update_RC, gram):
        exact_RC = _orthogonalize_exactly(update_RC, coefficients=coefficients)
        found_RC = orthogonalize(update_RC, coefficients, gram=gram)
        return ((found_RC - exact_RC).norm() / exact_RC.norm()).item()

    for smallest in (1e-3, 1e-6):
        update_RC, _ = _spectrum(*shape, smallest)
        assert error(update_RC, True) <= error(update_RC, False)
    # With singular values that are more alike it is worse, but small.
    for update_RC in (_spectrum(*shape, 1e-2)[0], _random(*shape)):
        assert error(update_RC, True) < 0.05


def test_a_square_matrix_is_the_same_with_the_gram_form():
    update_RC = _random(16, 32)
    assert torch.equal(orthogonalize(update_RC, gram=True), orthogonalize(update_RC))


def test_convergent_coefficients_reach_the_polar_factor():
    # Newton-Schulz of the fifth order, which converges: 15/8, -10/8, 3/8.
    update_RC = _random(6, 9)
    left, _, right = torch.linalg.svd(update_RC, full_matrices=False)
    found = _orthogonalize_exactly(update_RC, coefficients=[(1.875, -1.25, 0.375)] * 20)
    torch.testing.assert_close(found, left @ right, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_equals_torch_to_the_bit(shape, dtype):
    update_RC = _random(*shape).to(dtype)
    expected = _zeropower_via_newtonschulz(update_RC.clone(), JORDAN_COEFFICIENT, 5, 1e-7)
    assert torch.equal(orthogonalize(update_RC), expected.to(dtype))


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_a_batch_is_its_matrices_one_by_one(shape):
    update = _random(2, 3, *shape)
    found = _orthogonalize_exactly(update)
    assert found.shape == update.shape
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(found[i, j], _orthogonalize_exactly(update[i, j]), atol=1e-12, rtol=1e-12)


def test_orthogonalize_of_a_transpose_is_the_transpose():
    update_RC = _random(6, 11)
    torch.testing.assert_close(
        _orthogonalize_exactly(update_RC.T), _orthogonalize_exactly(update_RC).T, atol=1e-13, rtol=0
    )


def test_zero_padding_changes_nothing():
    update_RC = _random(6, 9)
    padded = _orthogonalize_exactly(torch.nn.functional.pad(update_RC, (0, 4, 0, 2)))
    torch.testing.assert_close(padded[:6, :9], _orthogonalize_exactly(update_RC), atol=1e-12, rtol=0)
    assert padded[6:].abs().max() == 0 and padded[:, 9:].abs().max() == 0


def test_a_rotation_passes_through():
    update_RC = _random(6, 9)
    rotation_RR, _ = torch.linalg.qr(_random(6, 6, seed=1))
    found = _orthogonalize_exactly(rotation_RR @ update_RC)
    torch.testing.assert_close(found, rotation_RR @ _orthogonalize_exactly(update_RC), atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6, 1e12])
def test_scale_does_not_matter(scale):
    update_RC = _random(6, 9, dtype=torch.float32)
    found = orthogonalize(update_RC * scale, dtype=torch.float32, eps=1e-30)
    # Rounding of float32, amplified by at most 485.
    torch.testing.assert_close(found, orthogonalize(update_RC, dtype=torch.float32), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [1e-10, 1e-8, 1e-7])
def test_below_eps_it_is_what_torch_makes_of_it(scale):
    update_RC = scale * _random(6, 9, dtype=torch.float32) / 9
    expected = _zeropower_via_newtonschulz(update_RC.clone(), JORDAN_COEFFICIENT, 5, 1e-7)
    found = orthogonalize(update_RC)
    assert torch.equal(found, expected.float())
    assert scale > 1e-10 or found.norm() < 0.9 * orthogonalize(update_RC * 1e6).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_zero_stays_zero(dtype):
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 3), dtype=dtype), torch.zeros(2, 4, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_spreads_over_its_own_matrix_alone(bad):
    update = _random(2, 4, 6)
    update[0, 1, 2] = bad
    found = _orthogonalize_exactly(update)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_input_is_not_written_to(shape, dtype):
    # The dtype of the input and of the iteration agree, where torch 2.13 normalizes its argument in place.
    update_RC = _random(*shape).to(dtype)
    before = update_RC.clone()
    found = orthogonalize(update_RC, dtype=dtype)
    assert torch.equal(update_RC, before)
    assert found.dtype == dtype and found.data_ptr() != update_RC.data_ptr()


def test_an_empty_matrix_is_returned_empty():
    assert orthogonalize(torch.zeros(0, 5)).shape == (0, 5)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"needs matrices .* but got shape \(3,\); give vectors and scalars to AdamW"):
        orthogonalize(torch.ones(3))


def test_float16_is_refused():
    with pytest.raises(ValueError, match=r"asked to run in torch.float16; use one of torch.bfloat16"):
        orthogonalize(torch.ones(3, 3), dtype=torch.float16)


def test_one_triple_serves_all_steps():
    assert coefficients_per_step(JORDAN_COEFFICIENT, 5) == JORDAN_COEFFICIENTS
    assert coefficients_per_step([(1, 2, 3), [4, 5, 6]], 2) == ((1, 2, 3), (4, 5, 6))
    assert coefficients_per_step([(1, 2, 3), (4, 5, 6), (7, 8, 9)], 3) == ((1, 2, 3), (4, 5, 6), (7, 8, 9))


@pytest.mark.parametrize("coefficients", [(1.0, 2.0), [(1, 2, 3)] * 4, [(1, 2)] * 5])
def test_coefficients_that_do_not_fit_the_steps_are_refused(coefficients):
    with pytest.raises(ValueError, match=r"with ns_steps=5; give one triple .* a sequence of 5 triples, or a name"):
        coefficients_per_step(coefficients, 5)


@pytest.mark.parametrize("ns_steps", [0, 100])
def test_a_senseless_number_of_steps_is_refused(ns_steps):
    with pytest.raises(ValueError, match=f"ns_steps is {ns_steps}; use 1 to 99"):
        coefficients_per_step(JORDAN_COEFFICIENT, ns_steps)
