"""Batches in tokens: what each item becomes, whose token a user has, and which items are refused."""

import numpy as np
import pytest
import torch

from muonrec.batch import CANDIDATES, HISTORY, TARGETS, USER
from muonrec.data.candidates import CandidateSampler
from muonrec.data.loader import TrainingBatches, evaluation_batches
from muonrec.data.semantic_ids import SemanticIds, Tokenizer
from muonrec.mesh import Ranks
from tests.made_up import made_up_sequences

SEQUENCES = made_up_sequences(num_users=20, num_items=12)
IDS = SemanticIds(np.array([[item % 3, item // 3] for item in range(12)]), (3, 4))
TOKENIZER = Tokenizer(IDS, num_user_tokens=7)
ALONE = Ranks(0, 1, torch.device("cpu"))


def batch_of(samples, finish=None):
    sampler = CandidateSampler("none", num_items=12)
    batches = TrainingBatches(
        SEQUENCES,
        batch_size=16,
        max_length=5,
        sampler=sampler,
        needs_targets=False,
        seed=0,
        ranks=ALONE,
        num_streams=4,
        samples=samples,
        finish=finish,
    )
    return batches.share(0)


def tokens_of(items):
    return [token for item in items.tolist() for token in (item % 3, 3 + item // 3)]


@pytest.mark.parametrize("samples", ["users", "prefixes"])
def test_a_training_batch_holds_the_tokens_of_its_items(samples):
    items, tokens = batch_of(samples), batch_of(samples, TOKENIZER.for_training)
    assert tokens.features[HISTORY].values().tolist() == tokens_of(items.features[HISTORY].values())
    assert torch.equal(tokens.features[HISTORY].lengths(), 2 * items.features[HISTORY].lengths())
    assert tokens.features[TARGETS].values().tolist() == tokens_of(items.labels)
    targets = items.features[HISTORY].lengths() if samples == "users" else torch.ones(16, dtype=torch.int64)
    assert torch.equal(tokens.features[TARGETS].lengths(), 2 * targets)
    assert torch.equal(tokens.features[USER].values(), items.user_ids % 7)
    assert tokens.features[CANDIDATES].values().numel() == 0
    assert torch.equal(tokens.labels, items.labels) and tokens.groups == items.groups


def test_an_evaluation_batch_holds_every_token_and_the_users_own():
    for items in evaluation_batches(SEQUENCES, "test", max_length=5, batch_size=16, ranks=ALONE):
        users = items.user_ids.numpy() + 100
        tokens = TOKENIZER.for_decoding(items, users)
        assert tokens.features[HISTORY].values().tolist() == tokens_of(items.features[HISTORY].values())
        assert tokens.features[CANDIDATES].values().tolist() == list(range(7))
        assert tokens.features[CANDIDATES].lengths()[0] == 7
        assert tokens.features[USER].values().tolist() == (users % 7).tolist()
        assert torch.equal(tokens.labels, items.labels)


def test_an_empty_batch_has_no_tokens_but_all_there_are():
    ranks = Ranks(1, 2, torch.device("cpu"))
    [empty] = evaluation_batches(SEQUENCES, "test", max_length=5, batch_size=32, ranks=ranks)
    tokens = TOKENIZER.for_decoding(empty, np.empty(0, dtype=np.int64)).features
    assert [tokens[key].values().numel() for key in (HISTORY, TARGETS, CANDIDATES, USER)] == [0, 0, 7, 0]


def test_an_item_without_codes_is_refused():
    fewer = Tokenizer(SemanticIds(IDS.codes[:9], IDS.codebook_sizes), num_user_tokens=7)
    with pytest.raises(ValueError, match=r"'(history|targets)' holds id \d+, but table 'item' has rows 0 to 8"):
        fewer.for_training(batch_of("users"))
