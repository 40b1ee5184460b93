"""Benchmarks run, and show at a small size what they are there to show."""

import argparse
import statistics

from benchmarks import generation
from benchmarks.table_rows import make_up, plain_step, timed, training_steps
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import this_rank


def processor_s(rows):
    """Median seconds of a training step and of the plain twin's, 16 users, width 16."""
    options = argparse.Namespace(batch_size=16, negatives=64)
    batches = [make_up(rows, options, seed) for seed in range(4)]
    steps = (training_steps(rows, 16, batches, this_rank())[0], plain_step(rows, 16, batches))
    return [statistics.median(timed(step)[0] for _ in range(7)) for step in steps]


def test_the_step_does_not_grow_with_the_table_and_that_of_a_dense_one_does():
    (few, plain_few), (many, plain_many) = (run_on_ranks(1, processor_s, rows)[0] for rows in (10_000, 1_000_000))
    assert many < 5 * few  # seen: 0.9 to 1.4 by the processor's time, which other work reaches through the caches
    assert plain_many > 10 * plain_few


def test_the_beam_search_finds_what_dicts_and_loops_find(capsys):
    rates = generation.main("--items 200 --levels 3 --codebook 8 --beams 6 --users 5 --width 8 --rounds 1".split())
    assert len(rates) == 4 and all(rate > 0 for rates in rates.values() for rate in rates)
