"""Tests of the routing of parameters to optimizers."""

import pytest
import torch
from torch import nn

from muonrec.optim import Role, Split, format_routing, param_groups


def _routing(model, **options):
    return {a.name: a for a in param_groups(model, **options)}


def _optimizers(model, **options):
    return {name: a.optimizer for name, a in _routing(model, **options).items()}


class _Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(100, 8)
        self.positions = nn.Embedding(32, 8)
        self.gru = nn.GRU(8, 6)
        self.lstm = nn.LSTM(6, 6, proj_size=4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm((4, 8))
        self.conv = nn.Conv1d(8, 4, 3)
        self.mlp = nn.Linear(8, 32)
        self.head = nn.Linear(8, 100, bias=False)
        self.score = nn.Linear(8, 1)
        self.mixing = nn.Parameter(torch.ones(5, 7))
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.ones(5, 7), requires_grad=False)


def test_each_role_of_torch_is_known():
    routing = _routing(_Tower())
    assert list(routing) == [name for name, p in _Tower().named_parameters() if p.requires_grad]
    muon = {name: a.split for name, a in routing.items() if a.optimizer == "muon"}
    assert muon == {
        "mixing": None,
        "gru.weight_ih_l0": Split(0, (6, 6, 6)),
        "gru.weight_hh_l0": Split(0, (6, 6, 6)),
        "lstm.weight_ih_l0": Split(0, (6, 6, 6, 6)),
        "lstm.weight_hh_l0": Split(0, (6, 6, 6, 6)),
        "lstm.weight_hr_l0": None,
        "attention.in_proj_weight": Split(0, (8, 8, 8)),
        "attention.out_proj.weight": None,
        "conv.weight": None,
        "mlp.weight": None,
    }
    reasons = {name: routing[name].reason for name in ("items.weight", "norm.weight", "head.weight", "score.weight")}
    assert reasons == {
        "items.weight": "rows of a lookup table",
        "norm.weight": "gain or bias of a norm",
        "head.weight": "output head: a row per row of a table",
        "score.weight": "a single row or column",
    }


def test_every_parameter_that_muon_gets_is_accepted_by_it():
    from muonrec.optim import Muon

    model = _Tower()
    assignments = [a for a in param_groups(model) if a.optimizer == "muon"]
    params = dict(model.named_parameters())
    Muon(
        [(a.name, params[a.name]) for a in assignments],
        splits={a.name: a.split for a in assignments if a.split is not None},
    )


@pytest.mark.parametrize(
    ("module", "optimizer"),
    [
        (nn.Linear(8, 200, bias=False), "adamw"),
        (nn.Linear(200, 8, bias=False), "muon"),
        (nn.Linear(8, 64, bias=False), "muon"),
        (nn.Linear(1, 8, bias=False), "adamw"),
        (nn.EmbeddingBag(5, 4), "adamw"),
        (nn.RMSNorm(8), "adamw"),
        (nn.BatchNorm1d(8, affine=True), "adamw"),
        (nn.Conv2d(4, 8, 3, bias=False), "muon"),
        (nn.Conv1d(8, 8, 3, groups=8, bias=False), "adamw"),
        (nn.ConvTranspose1d(8, 4, 3, bias=False), "adamw"),
        (nn.GRUCell(4, 6, bias=False), "muon"),
        (nn.GRU(4, 1, bias=False), "adamw"),
        (nn.RNN(4, 6, bias=False), "muon"),
        (nn.Bilinear(3, 4, 5, bias=False), "adamw"),
    ],
)
def test_the_role_of_a_module_alone(module, optimizer):
    assert set(_optimizers(module).values()) == {optimizer}


def test_a_grouped_convolution_has_a_block_per_group():
    assert _routing(nn.Conv1d(8, 6, 3, groups=2, bias=False))["weight"].split == Split(0, (3, 3))


def test_a_feed_forward_layer_as_wide_as_the_positions_are_long_is_no_head():
    model = nn.ModuleDict({"positions": nn.Embedding(32, 8), "mlp": nn.Linear(8, 32, bias=False)})
    assert _optimizers(model) == {"positions.weight": "adamw", "mlp.weight": "muon"}


def test_a_tied_parameter_is_assigned_once_with_both_names():
    model = nn.ModuleDict({"out": nn.Linear(8, 12, bias=False), "table": nn.Embedding(12, 8)})
    model["out"].weight = model["table"].weight
    (assignment,) = param_groups(model)
    assert assignment.name == "out.weight"
    assert assignment.aliases == ("table.weight",)
    assert assignment.optimizer == "adamw"
    assert assignment.reason == "tied: rows of a lookup table, also linear layer"


def test_rules_come_before_the_roles_of_torch():
    def rule(module, name):
        if isinstance(module, nn.Embedding):
            return Role("sparse", "table of TorchRec")
        if isinstance(module, nn.Linear) and name == "weight":
            return Role("muon", "u, v, q and k", Split(1, (4, 4), transposed=True))
        return None

    model = nn.ModuleDict({"table": nn.Embedding(12, 8), "uvqk": nn.Linear(8, 6)})
    routing = _routing(model, rules=[lambda module, name: None, rule])
    assert {name: a.optimizer for name, a in routing.items()} == {
        "table.weight": "sparse",
        "uvqk.weight": "muon",
        "uvqk.bias": "adamw",
    }
    assert routing["uvqk.weight"].split == Split(1, (4, 4), transposed=True)


def test_a_rule_with_an_unknown_optimizer_or_a_wrong_split_is_refused():
    with pytest.raises(ValueError, match="a rule gave 'weight' to 'lion'; use one of sparse, muon, adamw"):
        param_groups(nn.Linear(4, 4), rules=[lambda module, name: Role("lion", "")])
    with pytest.raises(ValueError, match=r"the split of 'weight' has sizes \(3,\)"):
        param_groups(nn.Linear(4, 4, bias=False), rules=[lambda module, name: Role("muon", "", Split(0, (3,)))])


def test_the_first_override_that_matches_wins():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    routing = _routing(model, overrides=[(r"^a\.", "adamw"), ("weight", "sparse")])
    assert {name: a.optimizer for name, a in routing.items()} == {"a.weight": "adamw", "b.weight": "sparse"}
    assert routing["a.weight"].reason == r"override '^a\\.'"


def test_an_override_to_muon_keeps_the_blocks():
    overrides = [("in_proj", "adamw"), ("bias", "adamw"), ("out_proj.weight", "adamw")]
    model = nn.MultiheadAttention(8, 2)
    assert set(_optimizers(model, overrides=overrides[:1] + overrides[2:]).values()) == {"adamw"}
    assert _routing(model, overrides=[("in_proj_weight", "muon")])["in_proj_weight"].split == Split(0, (8, 8, 8))


def test_an_override_to_muon_whole_joins_the_blocks_and_keeps_the_orientation():
    def rule(module, name):
        return (
            Role("muon", "u, v, q and k", Split(1, (4, 4), transposed=True)) if isinstance(module, nn.Linear) else None
        )

    model = nn.ModuleDict({"gru": nn.GRU(8, 6, bias=False), "uvqk": nn.Linear(8, 4, bias=False)})
    routing = _routing(model, rules=[rule], overrides=[("gru.weight_hh", "muon_whole"), ("uvqk", "muon_whole")])
    assert {name: (a.optimizer, a.split) for name, a in routing.items()} == {
        "gru.weight_ih_l0": ("muon", Split(0, (6, 6, 6))),
        "gru.weight_hh_l0": ("muon", Split(0, (18,))),
        "uvqk.weight": ("muon", Split(1, (8,), transposed=True)),
    }
    assert routing["gru.weight_hh_l0"].reason == "override 'gru.weight_hh': not in blocks"
    plain = param_groups(nn.Linear(4, 4, bias=False), overrides=[("weight", "muon_whole")])
    assert plain[0].split is None  # there is nothing to join


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("heed.weight", "adamw")], "override 'heed.weight' matches no parameter; close names are head.weight"),
        ([("head", "adamw"), (r"head\.w", "muon")], "never decides: earlier patterns match all its names"),
        ([("head", "lion")], "override 'head' asks for optimizer 'lion'; use one of sparse, muon, adamw"),
        ([("scale", "muon")], r"Muon was given 'scale' of shape \(\), which is not a matrix"),
    ],
)
def test_overrides_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        param_groups(_Tower(), overrides=overrides)


def test_the_routing_reads_as_a_table():
    model = nn.ModuleDict({"qkv": nn.MultiheadAttention(4, 1, bias=False), "norm": nn.LayerNorm(4, bias=False)})
    assert format_routing(param_groups(model)).splitlines() == [
        "name                 shape   optimizer  blocks      reason",
        "-------------------  ------  ---------  ----------  -----------------------",
        "qkv.in_proj_weight   12 x 4  muon       3 x 4 rows  q, k and v of attention",
        "qkv.out_proj.weight  4 x 4   muon                   linear layer",
        "norm.weight          4       adamw                  gain or bias of a norm",
    ]


def test_a_layer_is_no_head_if_another_takes_in_what_it_gives():
    first = nn.Linear(13, 512, bias=False)
    assert _optimizers(nn.Sequential(first))["0.weight"] == "adamw"
    assert _optimizers(nn.Sequential(first, nn.ReLU(), nn.Linear(512, 64, bias=False)))["0.weight"] == "muon"
    layer = nn.TransformerEncoderLayer(16, 2)  # 2048 wide by default
    assert _optimizers(layer)["linear1.weight"] == "muon"


def test_a_role_as_override_brings_its_own_blocks():
    role = Role("muon", "two experts", Split(0, (2, 6)))
    routing = _routing(nn.Linear(4, 8), overrides=[("weight", role)])
    assert (routing["weight"].split, routing["weight"].reason) == (role.split, "two experts")
    with pytest.raises(ValueError, match=r"the split of 'weight' has sizes \(3,\)"):
        param_groups(nn.Linear(4, 8), overrides=[("weight", Role("muon", "", Split(0, (3,))))])


def test_layers_that_repeat_are_folded_and_unfold_for_a_search():
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(12)), nn.Linear(4, 2, bias=False))
    routing = param_groups(model)
    folded = str(routing).splitlines()
    assert [line.split()[0] for line in folded[2:]] == ["{0..11}.weight", "12.weight"]
    assert len(format_routing(routing, fold=False).splitlines()) == 2 + 13


def test_numbers_that_do_not_follow_each_other_are_not_folded():
    model = nn.ModuleDict({f"blocks{i}": nn.ModuleDict({str(i): nn.Linear(4, 4, bias=False)}) for i in (0, 2)})
    model["last"] = nn.ModuleDict({str(i): nn.Linear(4, 4, bias=False) for i in (0, 1, 3)})
    names = [line.split()[0] for line in str(param_groups(model)).splitlines()[2:]]
    assert names == ["blocks0.0.weight", "blocks2.2.weight", "last.0.weight", "last.1.weight", "last.3.weight"]
