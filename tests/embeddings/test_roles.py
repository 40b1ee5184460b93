"""Roles in modules that torch does not know: TorchRec's cross nets, HSTU's bare parameters, GPT-2's linear layer."""

import pytest
import torch
from torch import nn
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet, LowRankMixtureCrossNet, VectorCrossNet
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from muonrec import explain
from muonrec.embeddings.roles import role_rules
from muonrec.optim import Muon, Split, param_groups


def routing(model, **options):
    return {a.name: a for a in explain(model, **options)}


@pytest.mark.parametrize(
    ("cross", "muon"),
    [
        (CrossNet(6, 2), {"kernels.0", "kernels.1"}),
        (LowRankCrossNet(6, 2, low_rank=3), {"W_kernels.0", "W_kernels.1", "V_kernels.0", "V_kernels.1"}),
        (LowRankCrossNet(6, 1, low_rank=1), set()),
        (VectorCrossNet(6, 2), set()),
        (LowRankMixtureCrossNet(6, 1, num_experts=2, low_rank=3), set()),
    ],
)
def test_the_matrices_of_a_cross_net_go_to_muon(cross, muon):
    found = routing(nn.ModuleDict({"cross": cross}))
    assert {name.removeprefix("cross.") for name, a in found.items() if a.optimizer == "muon"} == muon
    reasons = {a.reason for name, a in found.items() if "bias" in name}
    assert reasons == {"bias of a cross layer"}


class HSTU(nn.Module):
    """The parameters of a layer of generative_recommenders, by its names and shapes."""

    def __init__(self, width=8, heads=2, hidden=3, attention=5):
        super().__init__()
        self._num_heads, self._hidden_dim, self._attention_dim = heads, hidden, attention
        self._uvqk_weight = nn.Parameter(torch.randn(width, (2 * hidden + 2 * attention) * heads))
        self._uvqk_beta = nn.Parameter(torch.zeros((2 * hidden + 2 * attention) * heads))
        self._input_norm_weight = nn.Parameter(torch.ones(width))
        self._output_weight = nn.Parameter(torch.randn(hidden * heads * 3, width))


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self._position_embeddings_weight = nn.Parameter(torch.randn(20, 8))
        self._timestamp_embeddings_weight = nn.Parameter(torch.randn(30, 8))
        self._action_embedding_table = nn.Parameter(torch.randn(4, 8))
        self.position_tables = nn.ParameterList([torch.randn(20, 8)])
        self.embedding_proj = nn.Parameter(torch.randn(20, 8))


def test_hstu_splits_columns_and_keeps_the_orientation():
    found = routing(nn.ModuleDict({"stu": HSTU(), "positions": Positions()}))
    assert {name: a.split for name, a in found.items() if a.optimizer == "muon"} == {
        "stu._uvqk_weight": Split(1, (6, 6, 10, 10), transposed=True),
        "stu._output_weight": Split(1, (8,), transposed=True),
        "positions.embedding_proj": None,
    }
    # (in, out) = 8 x 6 and 8 x 10: sqrt(out / in) where that is above 1
    assert found["stu._uvqk_weight"].lr_scales == pytest.approx((1.0, 1.0, 1.25**0.5, 1.25**0.5))
    assert found["stu._output_weight"].lr_scales == (1.0,)
    assert found["positions._timestamp_embeddings_weight"].reason == "rows of a table, by its name"


def test_scales_follow_the_rule_for_the_rate():
    model = nn.Linear(100, 25, bias=False)
    assert routing(model)["weight"].lr_scales == (1.0,)
    assert routing(model, adjust_lr_fn="match_rms_adamw")["weight"].lr_scales == (2.0,)
    assert routing(model, adjust_lr_fn="spectral_unclamped")["weight"].lr_scales == (0.5,)


class Scored(nn.Module):
    """Tables of both kinds, a head over the items of one, and a hidden layer that is as wide."""

    def __init__(self):
        super().__init__()
        item = EmbeddingConfig(name="item", num_embeddings=90, embedding_dim=16, feature_names=["item"])
        user = EmbeddingBagConfig(name="user", num_embeddings=96, embedding_dim=16, feature_names=["user"])
        self.items = EmbeddingCollection(tables=[item], device=torch.device("meta"))
        self.users = EmbeddingBagCollection(tables=[user], device=torch.device("meta"))
        self.head = nn.Linear(16, 90, bias=False)
        self.tied = nn.Linear(16, 90, bias=False)
        self.tied.weight = self.items.embeddings["item"].weight
        self.feed_forward = nn.Sequential(nn.Linear(16, 96, bias=False), nn.Linear(96, 16, bias=False))
        self.dense_arch = nn.Sequential(nn.Linear(13, 512, bias=False), nn.Linear(512, 16, bias=False))


def test_tables_are_told_by_identity_and_heads_by_their_tables():
    found = routing(Scored())
    assert {name: a.optimizer for name, a in found.items()} == {
        "items.embeddings.item.weight": "sparse",
        "users.embedding_bags.user.weight": "sparse",
        "head.weight": "adamw",
        "feed_forward.0.weight": "muon",
        "feed_forward.1.weight": "muon",
        "dense_arch.0.weight": "muon",
        "dense_arch.1.weight": "muon",
    }
    assert found["items.embeddings.item.weight"].aliases == ("tied.weight",)


def test_muon_takes_every_block_that_the_rules_give_it():
    model = nn.ModuleDict({"stu": HSTU(), "cross": LowRankCrossNet(6, 2, low_rank=3)})
    assigned = [a for a in param_groups(model, rules=role_rules(model)) if a.optimizer == "muon"]
    params = dict(model.named_parameters())
    splits = {a.name: a.split for a in assigned if a.split is not None}
    muon = Muon([(a.name, params[a.name]) for a in assigned], lr=0.1, weight_decay=0.0, splits=splits)
    before = params["stu._uvqk_weight"].detach().clone()
    for param in params.values():
        param.grad = torch.randn_like(param)
    muon.step()
    for block, scale in zip(
        (params["stu._uvqk_weight"] - before).split((6, 6, 10, 10), dim=1), (1, 1, 1.25**0.5, 1.25**0.5)
    ):
        # five steps of Jordan's quintic leave singular values in about [0.7, 1.2]
        values = torch.linalg.svdvals(block) / (0.1 * scale)
        assert 0.6 < values.min() and values.max() < 1.3
