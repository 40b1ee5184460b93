"""What `tower_activations` promises: that the tower keeps no more numbers for its backward pass."""

import pytest
import torch

from muonrec.data.loader import length_groups
from muonrec.losses import NextItemLoss
from muonrec.models import MODELS

USERS, LENGTH = 16, 48


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"tiger"}))  # reads codes: `estimate_token_workload`
def test_the_tower_keeps_no_more_for_backward_than_its_config_says(name):
    # Without dropout: with it SDPA on a CPU keeps probabilities, as its fused kernels on CUDA do not.
    config = MODELS[name].config_class(embedding_dim=32, max_length=LENGTH, dropout=0.0)
    model = MODELS[name](config, num_items=10, loss=NextItemLoss("full_softmax")).train()
    tower = model.tower
    weights = {parameter.untyped_storage().data_ptr() for parameter in tower.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor  # held, so that no other takes its address
        return tensor

    lengths = torch.full((USERS,), LENGTH)
    x = torch.randn(USERS * LENGTH, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tower(x * 1.0, lengths, length_groups(lengths.numpy()))
    numbers = sum(tensor.untyped_storage().nbytes() / 4 for tensor in kept.values()) / (USERS * LENGTH)
    promised, _ = config.tower_activations()
    assert promised / 4 < numbers <= promised
