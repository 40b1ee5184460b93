"""The convolutional tower on packed events against one window at a time."""

import pytest
import torch

from muonrec.optim import param_groups
from muonrec.towers.caser import CaserTower
from tests.towers.test_transformer import LENGTHS, D, packed


def tower(window=4, dropout=0.0):
    torch.manual_seed(0)
    return CaserTower(embedding_dim=D, window=window, num_horizontal=5, num_vertical=3, dropout=dropout).double()


def one_user(tower, x_LD):
    """The plain twin: the window of each event as a rectangle, every kernel laid on it by itself (equations 3 to 8)."""
    hidden = []
    for last in range(len(x_LD)):
        known_WD = x_LD[max(last + 1 - tower.window, 0) : last + 1]
        window_WD = torch.cat([x_LD.new_zeros(tower.window - len(known_WD), D), known_WD])
        features = []
        for height, conv in enumerate(tower.horizontal, start=1):
            for kernel_DH, bias in zip(conv.weight, conv.bias, strict=True):
                places = range(tower.window - height + 1)
                sums = [(kernel_DH.T * window_WD[place : place + height]).sum() + bias for place in places]
                features.append(torch.stack(sums).relu().amax()[None])
        vertical_DV = window_WD.T @ tower.vertical.weight[:, 0].T + tower.vertical.bias
        features.append(vertical_DV.flatten())
        hidden.append(tower.output(tower.hidden(torch.cat(features)).relu()))
    return torch.stack(hidden)


@pytest.mark.parametrize("window", [1, 4])
def test_packed_tower_equals_each_window_by_itself_and_so_do_its_gradients(window):
    model = tower(window)
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


def test_an_event_changes_the_states_of_its_windows_alone():
    model = tower()
    x_TD, lengths_B, groups = packed()
    changed_TD = x_TD.clone()
    changed_TD[10] += 1.0  # of the first user, who has 19
    changed = (model(x_TD, lengths_B, groups) != model(changed_TD, lengths_B, groups)).any(1)
    assert changed.nonzero().flatten().tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("lengths", [[0], []])
def test_a_batch_of_no_events_passes_and_reaches_every_parameter(lengths):
    model = tower(dropout=0.5)
    hidden_TD = model(torch.empty(0, D, dtype=torch.float64), torch.tensor(lengths, dtype=torch.int64), [])
    assert hidden_TD.shape == (0, D)
    hidden_TD.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_kernels_are_matrices_of_out_by_in_times_height_or_adamws_if_asked():
    model = tower()
    found = {a.name: a.with_lr_scales("match_rms_adamw") for a in param_groups(model)}
    assert found["horizontal.3.weight"].lr_scales == pytest.approx([0.2 * (D * 4) ** 0.5])
    assert found["vertical.weight"].lr_scales == pytest.approx([0.2 * 4**0.5])
    asked = {
        a.name: a.optimizer for a in param_groups(model, overrides=[("horizontal.*weight|vertical.weight", "adamw")])
    }
    assert [name for name, optimizer in asked.items() if optimizer == "muon"] == ["hidden.weight", "output.weight"]
