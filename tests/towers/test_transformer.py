"""The tower on packed events against a plain padded twin."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from muonrec.data.loader import length_groups
from muonrec.towers.transformer import TransformerTower

D = 16
LENGTHS = [19, 12, 9, 5, 5, 1]


def tower(norm="pre", positions="from_end", dropout=0.0):
    torch.manual_seed(0)
    return TransformerTower(
        embedding_dim=D,
        num_layers=2,
        num_heads=4,
        feedforward_dim=32,
        dropout=dropout,
        max_length=20,
        norm=norm,
        positions=positions,
    ).double()


def packed(lengths=LENGTHS, seed=1):
    x_TD = torch.randn(sum(lengths), D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x_TD, torch.tensor(lengths), length_groups(np.array(lengths))


def one_user(tower, x_LD):
    """The plain twin: one user alone, every step spelled out, no packing and no fused attention."""
    length = len(x_LD)
    places = torch.arange(length)
    if tower.positions == "from_end":
        places = places.flip(0)
    x_LD = x_LD + tower.position.weight[places]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    for block in tower.blocks:

        def attend(y_LD, attention=block.attention):
            q, k, v = (
                layer(y_LD).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
                for layer in (attention.query, attention.key, attention.value)
            )
            scores = (q @ k.transpose(1, 2) / q.size(-1) ** 0.5).masked_fill(hidden, -torch.inf)
            return attention.output((F.softmax(scores, -1) @ v).transpose(0, 1).flatten(1))

        if block.pre:
            x_LD = x_LD + attend(block.attention_norm(x_LD))
            x_LD = x_LD + block.feedforward(block.feedforward_norm(x_LD))
        else:
            x_LD = block.attention_norm(x_LD + attend(x_LD))
            x_LD = block.feedforward_norm(x_LD + block.feedforward(x_LD))
    return tower.norm(x_LD)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", ["from_end", "from_start"])
def test_packed_tower_equals_each_user_alone(norm, positions):
    model = tower(norm, positions)
    x_TD, lengths_B, groups = packed()
    expected = torch.cat([one_user(model, x_LD) for x_LD in x_TD.split(LENGTHS)])
    torch.testing.assert_close(model(x_TD, lengths_B, groups), expected, rtol=1e-10, atol=1e-12)  # float64 rounding


def test_gradients_of_the_packed_tower_equal_those_of_each_user_alone():
    model = tower()
    x_TD, lengths_B, groups = packed()
    model(x_TD, lengths_B, groups).square().sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.cat([one_user(model, x_LD) for x_LD in x_TD.split(LENGTHS)]).square().sum().backward()
    for name_grad, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(name_grad, p.grad, rtol=1e-9, atol=1e-9)


def test_the_future_never_changes_the_past():
    model = tower()
    x_TD, lengths_B, groups = packed()
    changed = x_TD.clone()
    changed[10:19] += 1.0  # the last nine events of the first user
    before, after = model(x_TD, lengths_B, groups), model(changed, lengths_B, groups)
    assert torch.equal(before[:10], after[:10])
    assert torch.equal(before[19:], after[19:])
    assert not torch.equal(before[10:19], after[10:19])


def test_a_batch_of_no_events_passes_and_reaches_every_parameter():
    model = tower()
    x_TD = torch.empty(0, D, dtype=torch.float64, requires_grad=True)
    model(x_TD, torch.tensor([0]), []).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_dropout_is_a_function_of_the_seed():
    model = tower(dropout=0.5).train()
    x_TD, lengths_B, groups = packed()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(x_TD, lengths_B, groups))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="embedding_dim 10 is not a multiple of num_heads 4"):
        TransformerTower(embedding_dim=10, num_layers=1, num_heads=4, feedforward_dim=10, dropout=0.0, max_length=5)
