"""The RQ-VAE learns, its gradients go where they should, dead codes come back, and a seed gives the same codes."""

import numpy as np
import pytest
import torch

from muonrec.data.semantic_ids.config import RqVae
from muonrec.data.semantic_ids.methods import quantise_by_rqvae
from muonrec.data.semantic_ids.residual_kmeans import quantise
from muonrec.data.semantic_ids.rqvae import (
    ResidualQuantisedAutoencoder,
    make_optimizers,
    revive_dead_codes,
    train_rqvae,
)

SMALL = {"hidden_dims": [16], "latent_dim": 4, "codebook_size": 8, "num_levels": 2, "batch_size": 64, "num_epochs": 8}


def vectors(num_items: int = 160, width: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(12, width))[rng.integers(0, 12, num_items)] + 0.1 * rng.normal(size=(num_items, width))
    x = x.astype(np.float32)
    return (x - x.mean(0)) / float((x - x.mean(0)).std())


def small_model() -> ResidualQuantisedAutoencoder:
    torch.manual_seed(0)
    return ResidualQuantisedAutoencoder(8, hidden_dims=[16], latent_dim=4, num_levels=2, codebook_size=8)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_error_falls_under_both_optimizers_and_the_seed_gives_the_same_codes(optimizer: str) -> None:
    config = RqVae.model_validate(
        {**SMALL, "num_epochs": 15, "optimizer": {"name": optimizer, "lr": 0.03}, "adamw": {"lr": 0.01}}
    )
    errors: list[float] = []
    # As `quantise_by_rqvae` does: rounding would make another run of it.
    x = (vectors() - vectors().mean(0)) / float((vectors() - vectors().mean(0)).std())
    trained = train_rqvae(torch.from_numpy(x), config, seed=0, on_epoch=lambda _, error: errors.append(error))
    assert errors[-1] < 0.75 * errors[0]
    assert trained.error == pytest.approx(min(errors), rel=2e-3)

    one, two = (quantise_by_rqvae(vectors(), config, seed=0, device="cpu") for _ in range(2))
    assert np.array_equal(one.codes, two.codes)
    assert one.codewords is not None
    # What was trained on is what is stored: in units of the vectors' variance, and decoded from the codes alone.
    assert one.codewords.reconstruction_error(one.codes) == pytest.approx(trained.error, rel=1e-3)


def test_matrices_go_to_the_optimizer_asked_for_and_codebooks_to_adamw() -> None:
    model = small_model()
    for name in ("Muon", "AdamW"):
        config = RqVae.model_validate({**SMALL, "optimizer": {"name": name.lower(), "lr": 0.123}})
        matrices, rest = make_optimizers(model, config)
        assert (type(matrices).__name__, type(rest).__name__) == (name, "AdamW")
        assert {p for group in matrices.param_groups for p in group["params"]} == {
            layer.weight for layer in [*model.encoder, *model.decoder] if isinstance(layer, torch.nn.Linear)
        }
        assert matrices.param_groups[0]["lr"] == 0.123
        assert set(model.codebooks) <= {p for group in rest.param_groups for p in group["params"]}


def test_losses_equal_a_plain_loop_and_the_gradient_goes_straight_through() -> None:
    model, x = small_model(), torch.from_numpy(vectors(5))
    losses = model(x)
    z = model.encoder(x).detach()
    codes, _ = quantise(z, model.codebooks)
    expected, decoded = 0.0, torch.zeros_like(z)
    for item in range(5):
        left = z[item].clone()
        for level in range(2):
            word = model.codebooks[level][codes[item, level]].detach()
            distances = (left - model.codebooks[level].detach()).square().sum(1)
            assert int(distances.argmin()) == int(codes[item, level])
            expected += float((left - word).square().sum()) / z.numel()
            left, decoded[item] = left - word, decoded[item] + word
    assert losses.codebook.item() == pytest.approx(expected, rel=1e-5)
    assert losses.commitment.item() == pytest.approx(expected, rel=1e-5)

    decoded.requires_grad_()
    reconstruction = (model.decoder(decoded) - x).square().mean()
    torch.testing.assert_close(losses.reconstruction, reconstruction)
    # Straight through: to the encoder's output as if the decoder had been given that.
    (to_the_codes,) = torch.autograd.grad(reconstruction, decoded)
    expected_grads = torch.autograd.grad(model.encoder(x), list(model.encoder.parameters()), to_the_codes)
    found_grads = torch.autograd.grad(losses.reconstruction, list(model.encoder.parameters()), retain_graph=True)
    for found, wanted in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted)


def test_each_loss_moves_only_what_it_is_for() -> None:
    model, x = small_model(), torch.from_numpy(vectors(5))
    moved = {}
    for name in ("reconstruction", "codebook", "commitment"):
        model.zero_grad()
        getattr(model(x), name).backward()
        moved[name] = {
            part
            for part in ("encoder", "decoder", "levels")
            if any(p.grad is not None and p.grad.any() for p in getattr(model, part).parameters())
        }
    assert moved == {"reconstruction": {"encoder", "decoder"}, "codebook": {"levels"}, "commitment": {"encoder"}}


def test_dead_codes_get_the_residual_of_an_item_and_forget_their_gradients() -> None:
    model, x = small_model(), torch.from_numpy(vectors())
    matrices, rest = make_optimizers(model, RqVae.model_validate(SMALL))
    sum(model(x)).backward()
    rest.step()
    with torch.no_grad():
        for codebook in model.codebooks:
            codebook[3:] = 1e4  # nobody is near
    codes, _ = model.evaluate(x)
    alive = [codebook[:3].clone() for codebook in model.codebooks]
    assert codes.max() < 3
    revived = revive_dead_codes(model, x, codes, [matrices, rest], torch.Generator().manual_seed(0))
    assert revived >= 10
    z = model.encoder(x)
    for level, left in enumerate((z, z - model.codebooks[0][codes[:, 0]])):
        codebook = model.codebooks[level]
        assert torch.cdist(codebook[3:], left, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max() < 1e-5
        assert torch.equal(codebook[:3][codes[:, level].unique()], alive[level][codes[:, level].unique()])
        assert not rest.state[codebook]["exp_avg"][3:].any()
        assert rest.state[codebook]["exp_avg_sq"][codes[:, level].unique()].any()
    codes, _ = model.evaluate(x)
    assert len(codes[:, 0].unique()) > 3


def test_training_stops_when_nothing_gets_better_and_keeps_the_best() -> None:
    config = RqVae.model_validate({**SMALL, "num_epochs": 50, "patience": 2, "optimizer": {"name": "adamw", "lr": 5.0}})
    errors: list[float] = []
    trained = train_rqvae(torch.from_numpy(vectors()), config, seed=0, on_epoch=lambda _, error: errors.append(error))
    assert trained.num_epochs == len(errors) < 50
    assert trained.error <= min(errors) * 1.002
    assert trained.model.evaluate(torch.from_numpy(vectors()))[1] == pytest.approx(trained.error)


def test_a_loss_that_is_no_number_is_said() -> None:
    config = RqVae.model_validate({**SMALL, "optimizer": {"name": "adamw", "lr": 1e30}})
    with pytest.raises(FloatingPointError, match=r"the RQ-VAE's loss is .* in epoch 1; lower data.semantic_ids.method"):
        train_rqvae(torch.from_numpy(vectors()), config, seed=0)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is cuda, but torch finds no such device here; set device=cpu"):
        quantise_by_rqvae(vectors(), RqVae.model_validate(SMALL), seed=0, device="cuda")
