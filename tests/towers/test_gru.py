"""The recurrent tower on packed events against a loop over the events of one user."""

import pytest
import torch
from torch import nn

from muonrec.optim import format_routing, param_groups
from muonrec.towers.gru import GRUTower
from tests.devices import DEVICES
from tests.towers.test_transformer import LENGTHS, D, packed


def tower(hidden_dim=D, num_layers=2, dropout=0.0):
    torch.manual_seed(0)
    return GRUTower(
        embedding_dim=D, hidden_dim=hidden_dim, num_layers=num_layers, dropout=dropout, hidden_dropout=dropout
    ).double()


def one_user(tower, x_LD):
    """The plain twin: the recurrence spelled out, event by event (Cho et al. 2014, with torch's place of the bias)."""
    rnn = tower.gru
    states = [x_LD.new_zeros(rnn.hidden_size) for _ in range(rnn.num_layers)]
    hidden = []
    for x in x_LD:
        for layer, state in enumerate(states):
            names = (f"{kind}_{part}_l{layer}" for kind in ("weight", "bias") for part in ("ih", "hh"))
            w_ih, w_hh, b_ih, b_hh = (getattr(rnn, name) for name in names)
            (r_in, z_in, n_in), (r_old, z_old, n_old) = (w_ih @ x + b_ih).chunk(3), (w_hh @ state + b_hh).chunk(3)
            update = torch.sigmoid(z_in + z_old)
            x = states[layer] = (1 - update) * torch.tanh(n_in + torch.sigmoid(r_in + r_old) * n_old) + update * state
        hidden.append(tower.output(x))
    return torch.stack(hidden)


@pytest.mark.parametrize(("hidden_dim", "num_layers"), [(D, 1), (24, 2)])
def test_packed_tower_equals_a_loop_over_each_users_events_and_so_do_its_gradients(hidden_dim, num_layers):
    model = tower(hidden_dim, num_layers)
    x_TD, lengths_B, groups = packed()
    got = model(x_TD, lengths_B, groups)
    got.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = torch.cat([one_user(model, x_LD) for x_LD in x_TD.split(LENGTHS)])
    expected.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)  # float64 rounding
    for grad, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-9)


def test_a_batch_of_no_events_passes_and_reaches_every_parameter():
    model = tower(hidden_dim=24, dropout=0.5)
    hidden_TD = model(torch.empty(0, D, dtype=torch.float64), torch.tensor([0]), [])
    assert hidden_TD.shape == (0, D)
    hidden_TD.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_the_recurrence_keeps_its_dtype_under_autocast(device):
    x_TD, lengths_B, groups = packed()
    x_TD, lengths_B = x_TD.float().to(device), lengths_B.to(device)
    model = tower().float().to(device)  # with no layer after the recurrence
    expected = model(x_TD, lengths_B, groups)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(model(x_TD, lengths_B, groups), expected)


def test_dropout_falls_on_events_between_layers_and_on_the_last_states():
    x_TD, lengths_B, groups = packed()
    model = tower(dropout=0.5)
    torch.manual_seed(1)
    assert (model(x_TD, lengths_B, groups) == 0).double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert model.gru.dropout == 0.5 and tower(num_layers=1, dropout=0.5).gru.dropout == 0
    model.eval()
    assert torch.equal(model(x_TD, lengths_B, groups), model(x_TD, lengths_B, groups))


def test_muon_takes_each_gate_by_itself_and_says_so():
    table = format_routing(param_groups(nn.ModuleDict({"tower": tower(hidden_dim=24, num_layers=1)})))
    for name, shape in (("weight_ih_l0", "72 x 16"), ("weight_hh_l0", "72 x 24")):
        line = next(line for line in table.splitlines() if name in line)
        assert shape in line and "muon" in line and "3 x 24 rows" in line
