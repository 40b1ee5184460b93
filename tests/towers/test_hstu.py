"""HSTU's tower on packed events against a plain padded twin, against FBGEMM's jagged kernels, and its memory."""

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributed._tools.mem_tracker import MemTracker

from muonrec.data.loader import length_groups
from muonrec.towers import hstu
from muonrec.towers.hstu import NUM_TIME_BUCKETS, HSTUTower, time_buckets

D, LONGEST = 12, 20
LENGTHS = [19, 12, 9, 5, 5, 1]


def tower(time_bias=True, positions="from_start", max_length=LONGEST, **settings):
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "num_heads": 2, "linear_dim": 5, "attention_dim": 3, "num_layers": 2, **settings}
    made = HSTUTower(
        embedding_dim=D, max_length=max_length, time_bias=time_bias, positions=positions, **settings
    ).double()
    for name, p in made.named_parameters():
        if "bias" in name or "_uvqk" in name:  # else too small for their part to be seen
            torch.nn.init.normal_(p)
    return made


def packed(lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(sum(lengths), D, generator=generator, dtype=torch.float64)
    steps = (10 ** (8 * torch.rand(sum(lengths), generator=generator))).long()
    return x_TD, torch.tensor(lengths), length_groups(np.array(lengths)), 1_000_000_000 + steps.cumsum(0)


def one_user(tower, x_LD, timestamps_L):
    """The plain twin: one user alone, dense, every step spelled out."""
    length = len(x_LD)
    places = torch.arange(length)
    x_LD = x_LD + tower.position.weight[places.flip(0) if tower.positions == "from_end" else places]
    distance = places[:, None] - places
    for block in tower.blocks:
        u, v, q, k = F.silu(F.layer_norm(x_LD, (D,), eps=1e-6) @ block._uvqk).split(block._sizes, dim=1)
        q, k, v = (y.unflatten(1, (block._num_heads, -1)).transpose(0, 1) for y in (q, k, v))
        scores = q @ k.transpose(1, 2) + block.position_bias[distance.clamp(min=0)]
        if block.time_bias is not None:
            elapsed = (timestamps_L[:, None] - timestamps_L).abs().clamp(min=1)
            scores = scores + block.time_bias[(elapsed.float().log() / 0.301).long().clamp(max=128)]
        weights = F.silu(scores) / block.max_length * (distance >= 0)
        attended = (weights @ v).transpose(0, 1).flatten(1)
        x_LD = x_LD + block.output(u * F.layer_norm(attended, (attended.shape[1],), eps=1e-6))
    return tower.norm(x_LD)


def each_alone(tower, x_TD, timestamps_T, lengths=LENGTHS):
    return torch.cat([one_user(tower, *one) for one in zip(x_TD.split(lengths), timestamps_T.split(lengths))])


@pytest.mark.parametrize("query_block", [128, 4])
@pytest.mark.parametrize("time_bias, positions", [(True, "from_start"), (False, "from_end")])
def test_packed_tower_equals_each_user_alone_with_its_gradients(time_bias, positions, query_block, monkeypatch):
    monkeypatch.setattr(hstu, "QUERY_BLOCK", query_block)
    model = tower(time_bias, positions)
    x_TD, lengths_B, groups, times_T = packed()
    found = []
    for call in (lambda x: model(x, lengths_B, groups, times_T), lambda x: each_alone(model, x, times_T)):
        x = x_TD.clone().requires_grad_()
        model.zero_grad()
        hidden = call(x)
        (hidden * torch.linspace(-1, 2, D)).square().sum().backward()
        found.append([hidden.detach(), x.grad, *[p.grad.clone() for p in model.parameters()]])
    for got, expected in zip(*found, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)  # float64 rounding


def test_attention_equals_fbgemms_jagged_kernels():
    """As the reference computes it: FBGEMM pads q, k and v, torch multiplies, FBGEMM packs the result."""
    block = tower(num_heads=1).blocks[0]
    _, lengths_B, groups, times_T = packed()
    generator = torch.Generator().manual_seed(2)
    leaves = [torch.randn(sum(LENGTHS), width, generator=generator, requires_grad=True) for width in (3, 3, 5)]
    block = block.float()
    layout = hstu.PackedLayout.of(lengths_B, groups)
    ours = torch.cat(
        [
            hstu.unpad(block._attend(*[y[events] for y in leaves], pad_BL, times_T[events]), unpad_T)
            for events, pad_BL, unpad_T in layout.groups
        ]
    )
    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths_B)
    q, k, v = (torch.ops.fbgemm.jagged_to_padded_dense(y, [offsets], [LONGEST]) for y in leaves)
    times = torch.ops.fbgemm.jagged_to_padded_dense(times_T[:, None], [offsets], [LONGEST])[..., 0]
    places = torch.arange(LONGEST)
    distance = places[:, None] - places
    bias = (
        block.position_bias[distance.clamp(min=0)] + block.time_bias[time_buckets(times[:, :, None] - times[:, None])]
    )
    weights = F.silu(q @ k.transpose(1, 2) + bias) / LONGEST * (distance >= 0)
    (theirs,) = torch.ops.fbgemm.dense_to_jagged(weights @ v, [offsets])[:1]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # float32 rounding
    wanted = [*leaves, block.position_bias, block.time_bias]
    found = [torch.autograd.grad(y.square().sum(), wanted) for y in (ours, theirs)]
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_the_future_never_changes_the_past():
    model = tower()
    x_TD, lengths_B, groups, times_T = packed()
    changed_x, changed_times = x_TD.clone(), times_T.clone()
    changed_x[10:19] += 1.0  # the last nine events of the first user
    changed_times[10:19] += 10_000_000
    before, after = (model(x, lengths_B, groups, t) for x, t in ((x_TD, times_T), (changed_x, changed_times)))
    assert torch.equal(before[:10], after[:10])
    assert torch.equal(before[19:], after[19:])
    assert not torch.equal(before[10:19], after[10:19])
    # When the next event comes is not known either: an event's own time is all that its state has of the clock.
    changed_times = times_T.clone()
    changed_times[10] += 86_400
    assert torch.equal(before[:10], model(x_TD, lengths_B, groups, changed_times)[:10])
    # nor what comes later at all
    shorter = [10, *LENGTHS[1:]]
    kept = [*range(10), *range(19, sum(LENGTHS))]
    order = sorted(range(len(shorter)), key=lambda user: -shorter[user])
    rows = torch.arange(len(kept)).split(shorter)
    by_length = torch.cat([rows[user] for user in order])
    lengths = [shorter[user] for user in order]
    cut = model(
        x_TD[kept][by_length], torch.tensor(lengths), length_groups(np.array(lengths)), times_T[kept][by_length]
    )
    torch.testing.assert_close(cut, before[kept][by_length], rtol=1e-10, atol=1e-12)


def test_time_buckets_are_steps_of_the_logarithm():
    seconds = torch.tensor([0, 1, -1, 2, 60, -60, 86_400, 10**9, 2**62])
    steps = [int(np.log(max(abs(s), 1)) / 0.301) for s in seconds.tolist()]
    assert time_buckets(seconds).tolist() == [min(step, NUM_TIME_BUCKETS) for step in steps]
    assert steps[-1] > NUM_TIME_BUCKETS


def test_a_batch_of_no_events_passes_and_reaches_every_parameter():
    model = tower()
    x_TD = torch.empty(0, D, dtype=torch.float64, requires_grad=True)
    model(x_TD, torch.tensor([0]), [], torch.empty(0, dtype=torch.int64)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_time_bias_without_times_is_refused():
    x_TD, lengths_B, groups, _ = packed()
    for times in (None, torch.empty(0, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"brings 0 times for 51 events.*timestamps=True"):
            tower()(x_TD, lengths_B, groups, times)


def test_dropout_is_a_function_of_the_seed_in_blocks_too(monkeypatch):
    monkeypatch.setattr(hstu, "QUERY_BLOCK", 4)
    model = tower(dropout=0.3, attention_dropout=0.3).train()
    inputs = packed()
    found = []
    for seed in (3, 3, 4):
        model.zero_grad()
        torch.manual_seed(seed)
        hidden = model(*inputs)
        hidden.square().sum().backward()  # computes blocks again, with the weights dropped that were dropped before
        found.append([hidden, *[p.grad.clone() for p in model.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0])


def peak_of(model, lengths):
    """Bytes of all live tensors at the worst moment of a step."""
    x_TD = torch.randn(sum(lengths), D, requires_grad=True)
    times_T = torch.arange(sum(lengths)) * 1000
    lengths_B, groups = torch.tensor(lengths), length_groups(np.array(lengths))
    with MemTracker() as tracker:
        model(x_TD, lengths_B, groups, times_T).sum().backward()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def test_memory_grows_with_the_events_and_not_with_the_longest_user():
    model = tower(max_length=4096, num_layers=1).float()
    half, whole = (peak_of(model, [longest, *[16] * (longest // 16)]) for longest in (2048, 4096))
    assert 1.8 < whole / half < 2.2
    assert whole < 4096**2 * 2 * 4  # the scores of two heads, even once, would be as large
    short = peak_of(model, [128] * 64)  # as many events, and no user among them that is long
    assert whole < 2 * short
