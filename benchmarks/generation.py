"""Users per second of the beam search, beside plain twins: dicts and Python loops, and the score of every item.

python -m benchmarks.generation [--items 12000] [--beams 50] [--users 64]
"""

# B = users, K = beams, V = codes of a level, D = width, H = codes so far

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from muonrec.batch import SequenceBatch
from muonrec.data.loader import make_batch
from muonrec.data.semantic_ids.ids import SemanticIds
from muonrec.generation import CodeTrie, beam_search


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Time all in turns; print the median users per second, and of the rounds' ratios to the search the median."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=12_000)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--codebook", type=int, default=256)
    parser.add_argument("--beams", type=int, default=50)
    parser.add_argument("--users", type=int, default=64, help="of a batch")
    parser.add_argument("--width", type=int, default=64, help="of the decoder, one attention over the codes so far")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    semantic_ids = random_ids(options.items, (options.codebook,) * options.levels)
    decoder = Attention(semantic_ids, options.users, options.width, options.beams)
    trie = CodeTrie.of(semantic_ids)
    below = prefixes_of(semantic_ids)
    everyone, few = range(options.users), range(min(options.users, 4))
    candidates: dict[str, tuple[Callable[[range], list[list[int]]], range]] = {
        "beam search, all users at once": (lambda users: lists_of(decoder, trie, users), everyone),
        "beam search, a user at a time": (
            lambda users: [lists_of(decoder, trie, range(user, user + 1))[0] for user in users],
            few,
        ),
        "dicts, a Python loop over users and beams": (
            lambda users: [loop_per_beam(decoder, below, user) for user in users],
            few,
        ),
        "every item scored": (lambda users: [best_of_all(decoder, user) for user in users], few[:2]),
    }
    found = {name: run(users) for name, (run, users) in candidates.items()}  # also warms up
    searched, alone, looped, _ = found.values()
    assert searched[: len(alone)] == alone == looped, "the search and its twin differ"

    users_per_s: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(options.rounds):
        for name, (run, users) in candidates.items():
            started = time.perf_counter()
            run(users)
            users_per_s[name].append(len(users) / (time.perf_counter() - started))

    title = (
        f"{options.items:,} items of {options.levels} codes, {options.beams} beams, batches of {options.users} users"
    )
    table = Table(title=title)
    for column in ("", "users/s", "the search is faster by"):
        table.add_column(column, justify="left" if not column else "right")
    first = next(iter(users_per_s.values()))
    for name, rates in users_per_s.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(first, rates, strict=True))
        table.add_row(name, f"{statistics.median(rates):,.1f}", f"{ratio:.1f}")
    Console().print(table)
    return users_per_s


def random_ids(num_items: int, sizes: tuple[int, ...], *, seed: int = 0) -> SemanticIds:
    """Different items of different codes, evenly drawn."""
    drawn = np.random.default_rng(seed).choice(np.prod(sizes), num_items, replace=False)
    return SemanticIds(np.stack(np.unravel_index(drawn, sizes), axis=1).astype(np.int64), sizes)


class Attention:
    """A decoder of one attention over the codes so far, with a cache; little beside a model's, so the search shows."""

    device = torch.device("cpu")

    def __init__(self, semantic_ids: SemanticIds, num_users: int, width: int, num_beams: int) -> None:
        self.semantic_ids, self.num_beams = semantic_ids, num_beams
        generator = torch.Generator().manual_seed(0)
        sizes = semantic_ids.codebook_sizes
        self.users_UD = torch.randn(num_users, width, generator=generator)
        self.codes = [torch.randn(size, width, generator=generator) for size in sizes]
        self.heads = [torch.randn(width, size, generator=generator) for size in sizes]

    def history_lengths(self, batch: SequenceBatch) -> torch.Tensor:
        return torch.ones_like(batch.labels)

    def begin(self, batch: SequenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        users_BD = self.users_UD[batch.user_ids]
        return users_BD, users_BD.new_empty(len(users_BD), 1, 0, users_BD.shape[1])

    def log_probs(self, state: Any, codes_BK: torch.Tensor | None, level: int) -> tuple[torch.Tensor, Any]:
        users_BD, cache_BKHD = state
        x_BKD = users_BD.unsqueeze(1) if codes_BK is None else self.codes[level - 1][codes_BK]
        cache_BKHD = torch.cat([cache_BKHD, x_BKD.unsqueeze(2)], 2)
        weights = (cache_BKHD @ x_BKD.unsqueeze(3) / x_BKD.shape[2]).softmax(2)
        logits_BKV = (weights * cache_BKHD).sum(2) @ self.heads[level]
        return (logits_BKV / x_BKD.shape[2] ** 0.5).log_softmax(2), (users_BD, cache_BKHD)

    def select(self, state: Any, beams_BK: torch.Tensor) -> Any:
        users_BD, cache_BKHD = state
        return users_BD, cache_BKHD.gather(1, beams_BK[:, :, None, None].expand(-1, -1, *cache_BKHD.shape[2:]))


def batch_of(users: range) -> SequenceBatch:
    """Only who they are matters here."""
    ones, none = np.ones(len(users), dtype=np.int64), np.empty(0, dtype=np.int64)
    return make_batch(
        history=0 * ones,
        lengths=ones,
        labels=0 * ones,
        targets=none,
        candidates=none,
        log_q=none.astype(np.float32),
        user_ids=np.array(users),
        num_items=1,
        step=0,
    )


def lists_of(decoder: Attention, trie: CodeTrie, users: range) -> list[list[int]]:
    """The lists of a batch of users."""
    return beam_search(decoder, trie, batch_of(users), num_beams=decoder.num_beams).items.tolist()


Prefixes = dict[tuple[int, ...], dict[int, int]]


def prefixes_of(semantic_ids: SemanticIds) -> Prefixes:
    """The codes after each prefix, and an item below each."""
    below: Prefixes = {}
    for item, row in enumerate(semantic_ids.codes.tolist()):
        for level, code in enumerate(row):
            below.setdefault(tuple(row[:level]), {})[code] = item
    return below


@torch.no_grad()
def loop_per_beam(decoder: Attention, below: Prefixes, user: int) -> list[int]:
    """The plain twin: the decoder's calls are the same, for one user; the rest is dicts, loops and a sort."""
    log_probs_BKV, state = decoder.log_probs(decoder.begin(batch_of(range(user, user + 1))), None, 0)
    beams: list[tuple[np.float32, tuple[int, ...], int]] = [(np.float32(0), (), -1)]
    for level in range(decoder.semantic_ids.codes.shape[1]):
        reached = []
        for beam, (score, prefix, _) in enumerate(beams):
            row_V = log_probs_BKV[0, beam].numpy()
            reached += [(score + row_V[code], (*prefix, code), item, beam) for code, item in below[prefix].items()]
        reached.sort(key=lambda entry: -entry[0])
        del reached[decoder.num_beams :]
        beams = [entry[:3] for entry in reached]
        if level + 1 < decoder.semantic_ids.codes.shape[1]:
            state = decoder.select(state, torch.tensor([[entry[3] for entry in reached]]))
            codes_BK = torch.tensor([[prefix[-1] for _, prefix, _ in beams]])
            log_probs_BKV, state = decoder.log_probs(state, codes_BK, level + 1)
    return [item for _, _, item in beams]


@torch.no_grad()
def best_of_all(decoder: Attention, user: int) -> list[int]:
    """The list that misses nothing: every item a beam."""
    codes_NL = torch.from_numpy(decoder.semantic_ids.codes)
    log_probs_BKV, state = decoder.log_probs(decoder.begin(batch_of(range(user, user + 1))), None, 0)
    state = decoder.select(state, torch.zeros(1, len(codes_NL), dtype=torch.int64))
    log_probs_BKV = log_probs_BKV.expand(-1, len(codes_NL), -1)
    scores_BK = torch.zeros(1, len(codes_NL))
    for level in range(codes_NL.shape[1]):
        if level > 0:
            log_probs_BKV, state = decoder.log_probs(state, codes_NL[None, :, level - 1], level)
        scores_BK = scores_BK + log_probs_BKV.gather(2, codes_NL[None, :, level, None]).squeeze(2)
    return scores_BK[0].topk(min(decoder.num_beams, len(codes_NL))).indices.tolist()


if __name__ == "__main__":
    main()
