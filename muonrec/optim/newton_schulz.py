"""Orthogonalizes matrices by Newton-Schulz iteration, the step that makes Muon Muon (Jordan, 2024)."""

from collections.abc import Sequence

import torch
from torch import Tensor

# R = rows, C = columns

Coefficients = tuple[float, float, float]

# Jordan 2024, https://kellerjordan.github.io/posts/muon/: the quintic with the steepest slope at zero, so singular
# values end anywhere in about [0.7, 1.2]. Do not "correct" these towards convergence.
JORDAN_COEFFICIENT: Coefficients = (3.4445, -4.7750, 2.0315)
JORDAN_COEFFICIENTS: tuple[Coefficients, ...] = (JORDAN_COEFFICIENT,) * 5

# Amsel, Persson, Musco and Gower 2025, arXiv 2505.16932, implementation 1: each quintic is the best one for what those
# before it make of the interval [1e-3, 1]. The last is Newton-Schulz' own, and repeats.
_POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


def _shrink(coefficients: Coefficients, factor: float) -> Coefficients:
    """The polynomial of ``x / factor``."""
    a, b, c = coefficients
    return a / factor, b / factor**3, c / factor**5


# Their safety against rounding: all but the last take their argument divided by 1.01, the first once more, where their
# code divides the matrix by 1.01 times its norm.
POLAR_EXPRESS_COEFFICIENTS: tuple[Coefficients, ...] = (
    _shrink(_POLAR_EXPRESS[0], 1.01**2),
    *(_shrink(triple, 1.01) for triple in _POLAR_EXPRESS[1:-1]),
    _POLAR_EXPRESS[-1],
)

# By name, for `ns_coefficients`; the last triple repeats.
COEFFICIENT_SETS: dict[str, tuple[Coefficients, ...]] = {
    "jordan": (JORDAN_COEFFICIENT,),
    "polar_express": POLAR_EXPRESS_COEFFICIENTS,
}
NsCoefficients = str | Sequence[float] | Sequence[Coefficients]

# Not float16: it is cast before the norm is divided out, and there squares overflow above 256.
NS_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def orthogonalize(
    update_RC: Tensor,
    coefficients: Sequence[Coefficients] = JORDAN_COEFFICIENTS,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
    gram: bool = False,
) -> Tensor:
    """Replace each matrix ``U S V^T`` by ``U S' V^T`` with ``S'`` near 1 (Jordan, 2024).

    The operations and their order are those of ``torch.optim.Muon``, so that a single matrix gives the same bits.

    Args:
        update_RC: ``[..., R, C]``, floating point. Not modified.
        coefficients: one ``(a, b, c)`` per iteration of ``aX + (bA + cA^2)X``, ``A = X X^T``.
        eps: floor of the Frobenius norm, in the units of ``update_RC``. Above it the scale of the input has no effect.
        dtype: what the iteration runs in, one of ``NS_DTYPES``.
        gram: take two iterations at a time on ``X X^T`` where that needs fewer operations (after Zhang, Amsel, Chen and
            Dao, 2026, tridao.me/blog/2026/gram-newton-schulz). No more than two: in bfloat16 it has lost the small
            singular values, and what rounding puts there, negative too, grows twelve times a step until it diverges.

    Returns:
        ``[..., R, C]``, dtype of ``update_RC``. Zero stays zero; a NaN or an infinity makes its whole matrix NaN.

    Raises:
        ValueError: ``update_RC`` has fewer than two dimensions, or ``dtype`` is not one of ``NS_DTYPES``.
    """
    if update_RC.ndim < 2:
        raise ValueError(
            f"orthogonalize needs matrices [..., R, C] but got shape {tuple(update_RC.shape)}; "
            "give vectors and scalars to AdamW"
        )
    if dtype not in NS_DTYPES:
        raise ValueError(f"Newton-Schulz was asked to run in {dtype}; use one of {', '.join(map(str, NS_DTYPES))}")
    if update_RC.numel() == 0:
        return torch.zeros_like(update_RC)

    # The Gram matrix is taken on the short side: fewer operations, and never rank deficient by shape alone.
    is_tall = update_RC.shape[-2] > update_RC.shape[-1]
    x_RC = update_RC.to(dtype, copy=True)
    x_RC = iterate_(x_RC.mT if is_tall else x_RC, coefficients, eps, gram=gram)
    return (x_RC.mT if is_tall else x_RC).to(update_RC.dtype)


def iterate_(x_RC: Tensor, coefficients: Sequence[Coefficients], eps: float, *, gram: bool = False) -> Tensor:
    """Normalize and iterate in the dtype of ``x_RC``, which is used up: its memory may or may not hold the result.

    Args:
        x_RC: ``[..., R, C]`` with ``R <= C``, of one or more elements.
        coefficients: see ``orthogonalize``.
        eps: see ``orthogonalize``.
        gram: see ``orthogonalize``.
    """
    # The Frobenius norm bounds the spectral norm, and the iteration needs singular values of at most 1.
    norm = x_RC.norm() if x_RC.ndim == 2 else torch.linalg.vector_norm(x_RC, dim=(-2, -1), keepdim=True)
    x_RC.div_(norm.clamp_(min=eps))

    batch_shape = x_RC.shape[:-2]
    multiply, multiply_add = (torch.mm, torch.addmm) if x_RC.ndim == 2 else (torch.bmm, torch.baddbmm)
    x_RC = x_RC if x_RC.ndim <= 3 else x_RC.flatten(0, -3)
    # The same buffers for all iterations: fresh memory for each product costs a third more (CPU, batch of 128 x 128).
    # A square X takes the place of its Gram matrix, so that more of a batch stays in the cache.
    is_square = x_RC.shape[-2] == x_RC.shape[-1]
    next_RC = x_RC.new_empty(x_RC.shape)
    gram_RR = next_RC if is_square else x_RC.new_empty(*x_RC.shape[:-1], x_RC.shape[-2])
    polynomial_RR = torch.empty_like(gram_RR)
    in_pairs = gram and needs_fewer_operations_as_gram((x_RC.shape[-2], x_RC.shape[-1]))
    left = list(coefficients)
    while left:
        (a, b, c), *left = left
        multiply(x_RC, x_RC.mT, out=gram_RR)
        multiply_add(gram_RR, gram_RR, gram_RR, beta=b, alpha=c, out=polynomial_RR)
        if in_pairs and left:
            (a2, b2, c2), *left = left
            # (a + P) G (a + P) is the Gram matrix of the next X, which is not needed itself.
            product_RR = multiply_add(gram_RR, polynomial_RR, gram_RR, beta=a)
            multiply_add(product_RR, product_RR, polynomial_RR, beta=a, out=gram_RR)
            polynomial_RR.diagonal(dim1=-2, dim2=-1).add_(a)
            multiply_add(gram_RR, gram_RR, gram_RR, beta=b2, alpha=c2, out=product_RR)
            multiply_add(polynomial_RR, product_RR, polynomial_RR, beta=a2, out=gram_RR)
            multiply(gram_RR, x_RC, out=next_RC)
        else:
            multiply_add(x_RC, polynomial_RR, x_RC, beta=a, out=next_RC)
        # A tall matrix on its side is no buffer to write to: products into columns round otherwise than torch's.
        spare_RC = x_RC if x_RC.is_contiguous() else torch.empty_like(next_RC)
        x_RC, next_RC = next_RC, spare_RC
        gram_RR = next_RC if is_square else gram_RR
    return x_RC.reshape(*batch_shape, *x_RC.shape[-2:])


def needs_fewer_operations_as_gram(shape: tuple[int, int]) -> bool:
    """Whether two iterations on the Gram matrix of ``(R, C)`` cost less than two on the matrix.

    With ``s`` the short side and ``l`` the long one that is ``10 s^3 + 4 s^2 l`` against ``4 s^3 + 8 s^2 l``: from
    ``l = 1.5 s`` on, but with a kernel more, so that it pays from ``2 s`` (1.2 times at ``4 s``, 1.4 at ``8 s``; CPU).
    """
    return max(shape) > 2 * min(shape)


def coefficients_per_step(ns_coefficients: NsCoefficients, ns_steps: int) -> tuple[Coefficients, ...]:
    """Spell out what ``torch.optim.Muon`` abbreviates: one triple for all steps, or one triple for each, or a name.

    Raises:
        ValueError: neither a name of ``COEFFICIENT_SETS``, nor a triple, nor ``ns_steps`` triples, or ``ns_steps`` is
            outside 1 to 99 (torch's limit).
    """
    if not 0 < ns_steps < 100:
        raise ValueError(f"ns_steps is {ns_steps}; use 1 to 99 (5 is Jordan's)")
    if isinstance(ns_coefficients, str):
        if ns_coefficients not in COEFFICIENT_SETS:
            raise ValueError(
                f"ns_coefficients is {ns_coefficients!r}; use {' or '.join(COEFFICIENT_SETS)}, or numbers (a, b, c)"
            )
        named = COEFFICIENT_SETS[ns_coefficients]
        return (named + named[-1:] * ns_steps)[:ns_steps]
    if len(ns_coefficients) == 3 and all(isinstance(number, int | float) for number in ns_coefficients):
        return (tuple(ns_coefficients),) * ns_steps  # type: ignore[return-value]
    if len(ns_coefficients) == ns_steps and all(
        isinstance(triple, Sequence) and len(triple) == 3 for triple in ns_coefficients
    ):
        return tuple(tuple(triple) for triple in ns_coefficients)  # type: ignore[arg-type, misc]
    raise ValueError(
        f"ns_coefficients is {ns_coefficients!r} with ns_steps={ns_steps}; "
        f"give one triple (a, b, c) for all steps, a sequence of {ns_steps} triples, or a name"
    )
