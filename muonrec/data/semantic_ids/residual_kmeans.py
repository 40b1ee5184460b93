"""Residual k-means: centres, centres of what they leave, and so on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# N = items, D = width, K = codes of a level, B = items at a time

# Distances to 256 centres of this many rows take 64 MiB.
_BLOCK_ROWS = 2**16
# k-means++ walks over its rows once a centre; it looks at this many at most.
_MAX_ROWS_TO_START = 2**16


def nearest(x_ND: Tensor, centres_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row, int64 ``[N]``, and the squared distance to it, ``[N]``."""
    codes, distances = [], []
    for x_BD in x_ND.split(_BLOCK_ROWS):
        # Squared distances but for what those of a row have in common.
        code_B = torch.addmm(centres_KD.square().sum(1), x_BD, centres_KD.T, alpha=-2).min(1).indices
        codes.append(code_B)
        distances.append((x_BD - centres_KD[code_B]).square().sum(1))
    return torch.cat(codes), torch.cat(distances)


def quantise(x_ND: Tensor, codebooks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The codes of each row, level by level, int64 ``[N, num_levels]``, and what they leave of it, ``[N, D]``."""
    codes = []
    for centres_KD in codebooks:
        code_N, _ = nearest(x_ND, centres_KD)
        x_ND = x_ND - centres_KD[code_N]
        codes.append(code_N)
    return torch.stack(codes, 1), x_ND


def fit_residual_kmeans(
    x_ND: Tensor,
    num_levels: int,
    num_codes: int,
    *,
    max_rounds: int,
    generator: torch.Generator,
    on_round: Callable[[int, int], None] = lambda level, rounds: None,
) -> list[Tensor]:
    """Centres of each level, ``[K, D]``; ``on_round`` is told the level and how many rounds of it are done."""
    codebooks = []
    for level in range(num_levels):
        centres_KD = fit_kmeans(
            x_ND,
            num_codes,
            max_rounds=max_rounds,
            generator=generator,
            on_round=lambda rounds, level=level: on_round(level, rounds),  # type: ignore[misc]
        )
        x_ND = x_ND - centres_KD[nearest(x_ND, centres_KD)[0]]
        codebooks.append(centres_KD)
    return codebooks


def fit_kmeans(
    x_ND: Tensor,
    num_codes: int,
    *,
    max_rounds: int,
    generator: torch.Generator,
    on_round: Callable[[int], None] = lambda rounds: None,
) -> Tensor:
    """Centres ``[K, D]`` by Lloyd's rounds over all rows, distances a block at a time, from k-means++.

    A centre without rows moves to the row that is farthest from its own centre. Where there are fewer different rows
    than centres, some stay without.

    Args:
        x_ND: floating point, on the device of ``generator``.
        num_codes: centres.
        max_rounds: it ends before where no row changes its centre.
        generator: of the start.
        on_round: told how many rounds are done.
    """
    centres_KD = _spread(x_ND, num_codes, generator)
    before_N = torch.full((len(x_ND),), -1, device=x_ND.device)
    for number in range(max_rounds):
        code_N, distance_N = nearest(x_ND, centres_KD)
        if torch.equal(code_N, before_N):
            break
        before_N = code_N
        count_K = code_N.bincount(minlength=num_codes)
        sum_KD = torch.zeros_like(centres_KD).index_add_(0, code_N, x_ND)
        centres_KD = torch.where(count_K[:, None] > 0, sum_KD / count_K.clamp(min=1)[:, None], centres_KD)
        empty = (count_K == 0).nonzero()[:, 0]
        farthest, rows = distance_N.topk(min(len(empty), len(x_ND)))
        rows = rows[farthest > 0]
        centres_KD[empty[: len(rows)]] = x_ND[rows]
        on_round(number + 1)
    return centres_KD


def _spread(x_ND: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Rows drawn one after the other, by their squared distance to those before (Arthur & Vassilvitskii 2007)."""
    if len(x_ND) > _MAX_ROWS_TO_START:
        chosen = torch.randperm(len(x_ND), generator=generator, device=x_ND.device)[:_MAX_ROWS_TO_START]
        x_ND = x_ND[chosen]
    length_N = x_ND.square().sum(1)
    distance_N = torch.full_like(length_N, torch.inf)
    rows = [torch.randint(len(x_ND), (1,), generator=generator, device=x_ND.device)]
    while len(rows) < num_codes:
        x_D = x_ND[rows[-1][0]]
        distance_N = torch.minimum(distance_N, length_N - 2 * x_ND @ x_D + x_D.square().sum()).clamp_(min=0)
        distance_N[rows[-1]] = 0  # rounding may leave more
        weight_N = distance_N if distance_N.any() else torch.ones_like(distance_N)
        rows.append(torch.multinomial(weight_N, 1, generator=generator))
    return x_ND[torch.cat(rows)]
