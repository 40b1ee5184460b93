"""The encoder-decoder on packed tokens: users alone, prefixes alone, cached decoding, and no users."""

# L = levels

import numpy as np
import pytest
import torch
from torch import nn

from muonrec.data.loader import length_groups
from muonrec.towers.attention import Attention
from muonrec.towers.encoder_decoder import EncoderDecoderTower

D, SIZES, LENGTHS = 8, (5, 4, 6), [11, 5, 5, 1]
L, USERS, BEAMS = len(SIZES), len(LENGTHS), 3


@pytest.fixture(params=[False, True], ids=["both_ways", "causal"])
def tower(request):
    torch.manual_seed(0)
    return EncoderDecoderTower(
        embedding_dim=D,
        codebook_sizes=SIZES,
        num_layers=2,
        num_heads=2,
        head_dim=3,
        feedforward_dim=16,
        dropout=0.0,
        max_length=12,
        causal=request.param,
    ).double()


def rows(count, seed):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups(lengths):
    return length_groups(np.array(lengths))


def logits(tower, users_BD, events_TD, lengths, targets_TD):
    """``[targets, all codes]``."""
    return torch.cat(tower(users_BD, events_TD, torch.tensor(lengths) * L, targets_TD, groups(lengths)), dim=1)


def everyone(tower):
    num_targets = sum(LENGTHS) if tower.causal else USERS
    return rows(USERS, 1), rows(sum(LENGTHS) * L, 2), LENGTHS, rows(num_targets * L, 3)


def each_user(tower):
    """The arguments of `logits` for one user after the other."""
    users, events, lengths, targets = everyone(tower)
    counts = [length * L if tower.causal else L for length in lengths]
    parts = zip(users.split(1), events.split([length * L for length in lengths]), lengths, targets.split(counts))
    return [(user, own, [length], target) for user, own, length, target in parts]


def test_attention_has_a_dropout_of_its_own_or_that_of_the_tower():
    def dropouts(**settings):
        sizes = {"embedding_dim": D, "codebook_sizes": SIZES, "num_layers": 2, "num_heads": 2, "head_dim": 3}
        tower = EncoderDecoderTower(**sizes, feedforward_dim=16, dropout=0.3, max_length=12, causal=True, **settings)
        attentions = [layer.dropout for layer in tower.modules() if isinstance(layer, Attention)]
        return {*attentions}, {layer.p for layer in tower.modules() if isinstance(layer, nn.Dropout)}

    assert dropouts() == ({0.3}, {0.3})
    assert dropouts(attention_dropout=0.0) == ({0.0}, {0.3})


def test_more_rows_than_a_kernel_takes_are_attended_in_parts(tower, monkeypatch):
    expected = logits(tower, *everyone(tower))
    monkeypatch.setattr("muonrec.towers.attention._MOST_ROWS", 2)
    torch.testing.assert_close(logits(tower, *everyone(tower)), expected, rtol=1e-12, atol=1e-12)  # float64 rounding


def test_packed_users_equal_each_user_alone_and_so_do_their_gradients(tower):
    together = logits(tower, *everyone(tower))
    together.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in tower.parameters()]
    tower.zero_grad()
    alone = torch.cat([logits(tower, *user) for user in each_user(tower)])
    alone.square().sum().backward()
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)  # float64 rounding
    for gradient, parameter in zip(gradients, tower.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-9)


def test_a_causal_tower_reads_every_prefix_as_if_it_were_alone(tower):
    users, events, [length], targets = each_user(tower)[0]
    whole = logits(tower, users, events, [length], targets)
    for prefix in (1, 7):
        targets_of = targets[: prefix * L] if tower.causal else targets
        cut = logits(tower, users, events[: prefix * L], [prefix], targets_of)
        if tower.causal:
            torch.testing.assert_close(cut, whole[:prefix], rtol=1e-9, atol=1e-11)
        else:  # what comes later is read too
            assert (cut - whole).abs().max() > 1e-3


def test_a_code_knows_those_before_it_and_the_events_and_the_user(tower):
    arguments = everyone(tower)
    before = logits(tower, *arguments)
    changed = arguments[3].clone()
    changed.view(-1, L, D)[:, 1] = rows(1, 7)  # the second code of every target
    after = logits(tower, *arguments[:3], changed)
    assert torch.equal(before[:, : SIZES[0] + SIZES[1]], after[:, : SIZES[0] + SIZES[1]])
    assert (before[:, -SIZES[2] :] != after[:, -SIZES[2] :]).all()
    users, events, *rest = arguments
    assert (logits(tower, rows(USERS, 8), events, *rest) != before).all()
    assert (logits(tower, users, rows(len(events), 8), *rest) != before).all()


def test_cached_decoding_of_reordered_beams_equals_decoding_from_scratch(tower):
    generator = torch.Generator().manual_seed(4)
    users, events, lengths, _ = everyone(tower)
    tokens_MD = rows(sum(SIZES), 5)
    first, second = (torch.randint(size, (USERS, BEAMS), generator=generator) for size in SIZES[:2])
    state = tower.begin(users, events, torch.tensor(lengths) * L, tokens_MD, groups(lengths))
    state = state.select(torch.zeros(USERS, BEAMS, dtype=torch.int64))
    _, state = tower.step(state, first, 1)
    order = torch.rand(USERS, BEAMS, generator=generator).argsort(1)
    got, _ = tower.step(state.select(order), second, 2)
    first = first.gather(1, order)
    for b, (user, own, [length], _) in enumerate(each_user(tower)):
        for k in range(BEAMS):
            written = torch.stack([tokens_MD[first[b, k]], tokens_MD[SIZES[0] + second[b, k]], tokens_MD[0]])
            earlier = rows((length - 1) * L if tower.causal else 0, 6)  # targets of events before the last
            scratch = logits(tower, user, own, [length], torch.cat([earlier, written]))[-1, -SIZES[2] :]
            expected = scratch.float().log_softmax(0)
            torch.testing.assert_close(got[b, k], expected, rtol=1e-5, atol=1e-6)  # float32, of float64 logits


def test_no_users_pass_and_reach_every_parameter(tower):
    none = rows(0, 0)
    out = tower(none, none, torch.tensor([0]), none, [])
    sum(part.sum() for part in out).backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    state = tower.begin(none, none, torch.tensor([0]), rows(sum(SIZES), 5), [])
    log_probs, _ = tower.step(state.select(torch.zeros(0, BEAMS, dtype=torch.int64)), torch.zeros(0, BEAMS).long(), 1)
    assert log_probs.shape == (0, BEAMS, SIZES[1])
