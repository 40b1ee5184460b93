"""Generated lists as ranks: the counts of a full ranking where the list is long enough, and nothing claimed beyond."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.generation import random_ids
from muonrec.generation import rank_generated, rank_held_out
from muonrec.mesh import Ranks
from muonrec.metrics import metrics_per_user
from muonrec.models import ShardedEncoder, scorer_of
from muonrec.retrieval import RankedTargets, rank_targets
from tests.distributed.ranks import run_on_ranks
from tests.generation.decoders import AttentiveDecoder, TableDecoder, plain_beam_search
from tests.test_retrieval import (
    ALONE,
    NUM_ITEMS,
    NUM_USERS,
    assert_same,
    batch_of,
    batches_of,
    made_up_encoder,
    made_up_seen,
    made_up_targets,
)


def made_up_decoder(make: type = TableDecoder, num_beams: int = 10):
    return make(random_ids(NUM_ITEMS, (6, 5, 4)), num_beams)


def plain_twin(decoder, num_beams: int, k: int, seen=None) -> RankedTargets:
    """A user at a time, counted in Python."""
    columns = {"num_greater": [], "num_equal": [], "topk_ids": [], "topk_scores": []}
    for user, target in enumerate(made_up_targets().tolist()):
        left_out = set() if seen is None else set(seen(np.array([user]))[0].tolist()) - {target}
        found = plain_beam_search(decoder, batch_of(np.array([user])), num_beams, left_out)
        own = found.get(target)
        better = num_beams if own is None else sum(score > own for score in found.values())
        columns["num_greater"].append(better)
        columns["num_equal"].append(0 if own is None else sum(score == own for score in found.values()) - 1)
        missing = k - len(list(found)[:k])
        columns["topk_ids"].append([*list(found)[:k], *[-1] * missing])
        columns["topk_scores"].append([*list(found.values())[:k], *[-np.inf] * missing])
    columns = {name: np.array(values) for name, values in columns.items()}
    columns["topk_scores"] = columns["topk_scores"].astype(np.float32)
    user_ids = np.arange(NUM_USERS)
    return RankedTargets(
        user_ids=user_ids,
        targets=made_up_targets(),
        history_lengths=user_ids % 4 + 1,
        list_length=None if num_beams >= NUM_ITEMS else num_beams,
        **columns,
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("num_beams", "k"), [(10, 6), (NUM_ITEMS + 4, NUM_ITEMS + 4)])
def test_ranks_are_the_places_in_the_lists(num_beams, k, masked):
    seen = made_up_seen if masked else None
    ranked = rank_generated(made_up_decoder(), batches_of(ALONE), ranks=ALONE, k=k, num_beams=num_beams, mask_seen=seen)
    expected = plain_twin(made_up_decoder(), num_beams, k, seen)
    assert_same(ranked, expected)
    listed = ranked.num_greater < num_beams
    assert listed.all() if num_beams > NUM_ITEMS else 0 < listed.sum() < NUM_USERS


def test_metrics_of_a_list_are_those_of_the_whole_ranking_up_to_its_length():
    # As many beams as prefixes of any length but the last: the list is the head of the full ranking.
    short, full = (
        rank_generated(made_up_decoder(), batches_of(ALONE), ranks=ALONE, num_beams=num_beams)
        for num_beams in (NUM_ITEMS - 1, NUM_ITEMS)
    )
    assert (short.list_length, full.list_length) == (NUM_ITEMS - 1, None)
    of_short, of_full = (metrics_per_user(ranked, k=[5, NUM_ITEMS - 1]) for ranked in (short, full))
    assert of_full.keys() - of_short.keys() == {"mrr"}
    for name, values in of_short.items():
        np.testing.assert_array_equal(values, of_full[name], err_msg=name)
    with pytest.raises(ValueError, match="but the lists have 52"):
        metrics_per_user(short, k=[NUM_ITEMS])


def ranked_here() -> tuple[list[RankedTargets], int, str]:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    tables, attentive = made_up_decoder(), made_up_decoder(AttentiveDecoder)
    found = [
        rank_generated(tables, batches_of(ranks), ranks=ranks, k=6, mask_seen=made_up_seen),
        rank_generated(attentive, batches_of(ranks), ranks=ranks),
    ]
    broken = made_up_decoder(AttentiveDecoder)
    broken.users_UD[36, 2] = float("nan")
    with pytest.raises(ValueError) as error:
        rank_generated(broken, batches_of(ranks), ranks=ranks)
    return found, tables.num_calls, str(error.value)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_number_of_ranks_gives_the_bits_of_one(num_ranks):
    alone = [
        rank_generated(made_up_decoder(), batches_of(ALONE), ranks=ALONE, k=6, mask_seen=made_up_seen),
        rank_generated(made_up_decoder(AttentiveDecoder), batches_of(ALONE), ranks=ALONE),
    ]
    results = run_on_ranks(num_ranks, ranked_here)
    for found, _, message in results:
        for one, other in zip(found, alone, strict=True):
            assert_same(one, other)
        assert message.startswith("the log-probabilities for 1 users are NaN or +inf (user 36 is one)")
    assert len({num_calls for _, num_calls, _ in results}) == 1


def test_what_cannot_be_ranked_is_refused():
    decoder, batches = made_up_decoder(), batches_of(ALONE)
    with pytest.raises(ValueError, match="k=11 items of each user were asked, but the search keeps num_beams=10"):
        rank_generated(decoder, batches, ranks=ALONE, k=11)
    with pytest.raises(ValueError, match="num_beams=0 was asked; it is at least 1"):
        rank_generated(decoder, batches, ranks=ALONE, num_beams=0)
    with pytest.raises(ValueError, match="user 2 came more than once"):
        rank_generated(decoder, [batch_of(np.array([1, 2])), batch_of(np.array([2]))], ranks=ALONE)
    with pytest.raises(ValueError, match="no batch held a user"):
        rank_generated(made_up_decoder(AttentiveDecoder), [batch_of(np.array([], dtype=np.int64))], ranks=ALONE)
    batch = batch_of(np.array([1]))
    batch.labels[0] = NUM_ITEMS
    with pytest.raises(ValueError, match="held-out item 53 is outside the 53 items"):
        rank_generated(decoder, [batch], ranks=ALONE)


def test_what_a_model_offers_decides_how_it_is_ranked():
    progress = []
    generated = rank_held_out(made_up_decoder(), batches_of(ALONE), ranks=ALONE, progress=progress.append)
    assert_same(generated, rank_generated(made_up_decoder(), batches_of(ALONE), ranks=ALONE))
    assert progress == [*range(5, NUM_USERS, 5), NUM_USERS]
    scored = rank_held_out(made_up_encoder(), batches_of(ALONE), ranks=ALONE)
    assert_same(scored, rank_targets(made_up_encoder(), batches_of(ALONE), ranks=ALONE))
    with pytest.raises(ValueError, match="num_beams=5 was asked, but the model generates nothing"):
        rank_held_out(made_up_encoder(), batches_of(ALONE), ranks=ALONE, num_beams=5)


def test_a_model_that_brings_its_own_scorer_is_ranked_by_it():
    generates = SimpleNamespace(module=SimpleNamespace(scorer=lambda sharded, device: (sharded, device)))
    assert scorer_of(generates, num_items=3, device=ALONE.device) == (generates, ALONE.device)
    assert isinstance(scorer_of(SimpleNamespace(module=None), num_items=3, device=ALONE.device), ShardedEncoder)
