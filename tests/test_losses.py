"""Losses against plain loops, and the global mean."""

from types import SimpleNamespace

import pytest
import torch

from muonrec.losses import NextItemLoss, TokenLoss, binary_cross_entropy, full_softmax, sampled_softmax, token_softmax

T, K, D, M, ITEMS = 7, 11, 5, 3, 20


@pytest.fixture
def made():
    g = torch.Generator().manual_seed(0)
    table = torch.randn(ITEMS, D, generator=g, dtype=torch.float64)
    labels = torch.randint(ITEMS, (T,), generator=g)
    candidates = torch.randint(ITEMS, (K,), generator=g)
    candidates[0] = labels[2]  # an accidental hit
    hidden = torch.randn(T, D, generator=g, dtype=torch.float64)
    log_q = torch.rand(T + K, generator=g, dtype=torch.float64).log()
    return SimpleNamespace(table=table, labels=labels, candidates=candidates, hidden=hidden, log_q=log_q)


def batch_of(labels, candidates, log_q=None, step=4):
    features = {"candidates": SimpleNamespace(values=lambda: candidates)}
    log_q = torch.empty(0) if log_q is None else log_q
    return SimpleNamespace(
        features=features, labels=labels, log_q=log_q, user_ids=torch.tensor([17, 18]), step=step, num_step_targets=None
    )


@pytest.mark.parametrize("corrected", [False, True])
def test_sampled_softmax_equals_a_loop(made, corrected):
    log_q = made.log_q if corrected else torch.empty(0)
    got = sampled_softmax(
        made.hidden, made.table[made.labels], made.table[made.candidates], made.labels, made.candidates, log_q
    )
    for t in range(T):
        target = made.hidden[t] @ made.table[made.labels[t]] - (made.log_q[t] if corrected else 0)
        logits = [target]
        for c in range(K):
            if made.candidates[c] != made.labels[t]:
                logits.append(made.hidden[t] @ made.table[made.candidates[c]] - (made.log_q[T + c] if corrected else 0))
        expected = torch.logsumexp(torch.stack(logits), 0) - target
        torch.testing.assert_close(got[t], expected, rtol=1e-12, atol=1e-12)  # float64 rounding


def test_sampled_softmax_over_all_items_is_the_full_softmax(made):
    everything = torch.arange(ITEMS)
    sampled = sampled_softmax(made.hidden, made.table[made.labels], made.table, made.labels, everything, torch.empty(0))
    torch.testing.assert_close(sampled, full_softmax(made.hidden, made.table, made.labels), rtol=1e-12, atol=1e-12)


def test_binary_cross_entropy_equals_a_loop(made):
    negatives = torch.randint(ITEMS, (T, M), generator=torch.Generator().manual_seed(1))
    negatives[3, 1] = made.labels[3]
    got = binary_cross_entropy(
        made.hidden, made.table[made.labels], made.table[negatives.flatten()], made.labels, negatives.flatten()
    )
    for t in range(T):
        expected = -torch.log(torch.sigmoid(made.hidden[t] @ made.table[made.labels[t]]))
        for item in negatives[t]:
            if item != made.labels[t]:
                expected = expected - torch.log(1 - torch.sigmoid(made.hidden[t] @ made.table[item]))
        torch.testing.assert_close(got[t], expected, rtol=1e-12, atol=1e-12)


def test_in_batch_negatives_are_the_other_targets(made):
    loss = NextItemLoss("in_batch_softmax")
    targets = made.table[made.labels]
    got, _ = loss(made.hidden, targets, targets[:0], batch_of(made.labels, made.labels[:0], made.log_q[:T]))
    expected = sampled_softmax(
        made.hidden, targets, targets, made.labels, made.labels, torch.cat([made.log_q[:T], made.log_q[:T]])
    ).mean()
    torch.testing.assert_close(got, expected)


def test_the_loss_is_the_mean_over_the_targets(made):
    loss, statistics = NextItemLoss("full_softmax")(
        made.hidden, made.table[:0], made.table, batch_of(made.labels, torch.arange(ITEMS))
    )
    torch.testing.assert_close(loss, full_softmax(made.hidden, made.table, made.labels).mean())
    assert statistics == {"loss_nats": pytest.approx(loss.item()), "num_targets": T}


def test_temperature_divides_the_logits(made):
    batch = batch_of(made.labels, torch.arange(ITEMS))
    warm, _ = NextItemLoss("full_softmax", temperature=2.0)(made.hidden, made.table[:0], made.table, batch)
    half, _ = NextItemLoss("full_softmax")(made.hidden / 2, made.table[:0], made.table, batch)
    torch.testing.assert_close(warm, half)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_rank_and_batch(made, bad):
    hidden = made.hidden.clone()
    hidden[1, 1] = bad
    with pytest.raises(FloatingPointError, match=r"step 4 .* on rank 0, .* 7 targets and starts with user 17"):
        NextItemLoss("full_softmax")(hidden, made.table[:0], made.table, batch_of(made.labels, torch.arange(ITEMS)))


@pytest.mark.parametrize("kind", ["full_softmax", "sampled_softmax", "in_batch_softmax", "bce"])
def test_a_share_without_targets_costs_nothing(made, kind):
    none = made.labels[:0]
    candidates = none if kind in ("bce", "in_batch_softmax") else torch.arange(ITEMS)
    log_q = torch.empty(0)
    hidden = made.hidden[:0].requires_grad_()
    loss, statistics = NextItemLoss(kind)(
        hidden,
        made.table[none],
        made.table[candidates],
        SimpleNamespace(**vars(batch_of(none, candidates, log_q)) | {"user_ids": none}),
    )
    loss.backward()
    assert loss.item() == 0.0
    assert statistics["num_targets"] == 0


def test_the_token_softmax_is_minus_the_log_probability_of_the_whole_item(made):
    logits = [torch.randn(T, size, generator=torch.Generator().manual_seed(size)).double() for size in (4, 3)]
    tokens = torch.stack([torch.arange(T) % 4, 4 + torch.arange(T) % 3], dim=1)
    probabilities = (logits[0].softmax(1)[:, :, None] * logits[1].softmax(1)[:, None]).flatten(1)  # of all 12 items
    expected = -probabilities[torch.arange(T), (tokens[:, 0] * 3 + tokens[:, 1] - 4)].log()
    torch.testing.assert_close(token_softmax(logits, tokens), expected, rtol=1e-12, atol=1e-12)  # float64 rounding

    batch = batch_of(made.labels, made.labels[:0])
    batch.features["targets"] = SimpleNamespace(values=lambda: tokens.flatten())
    loss, statistics = TokenLoss()(logits, batch)
    torch.testing.assert_close(loss, expected.mean())
    assert statistics == {"loss_nats": pytest.approx(loss.item()), "num_targets": T}
