"""RQ-VAE: an autoencoder whose code is a sum of codewords (Lee et al. 2022; of items, Rajput et al. 2023)."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from muonrec.data.semantic_ids.config import RqVae
from muonrec.data.semantic_ids.residual_kmeans import fit_residual_kmeans, quantise
from muonrec.dense_optimizer import MuonConfig
from muonrec.optim import Muon, format_routing, param_groups

logger = logging.getLogger(__name__)

# N = items, B = items of a batch, D = width of the vectors, E = width of the codewords, K = codes of a level

# An epoch's gain must be this share of the error to count as one.
_LEAST_GAIN = 1e-3


class Losses(NamedTuple):
    """What a batch costs; scalars.

    Attributes:
        reconstruction: mean square of what the decoder misses.
        codebook: mean square from the codewords to what they stand for, which does not move.
        commitment: mean square from the encoder's output to the codewords, which do not move.
    """

    reconstruction: Tensor
    codebook: Tensor
    commitment: Tensor


class ResidualQuantisedAutoencoder(nn.Module):
    """Encoder, codebooks of every level, and decoder.

    Args:
        width: of the vectors.
        hidden_dims: of the encoder's layers; the decoder has them the other way round.
        latent_dim: width of the codewords.
        num_levels: of codes.
        codebook_size: codewords of each level.
    """

    def __init__(
        self, width: int, *, hidden_dims: Sequence[int], latent_dim: int, num_levels: int, codebook_size: int
    ) -> None:
        super().__init__()
        self.encoder = _perceptron([width, *hidden_dims, latent_dim])
        self.decoder = _perceptron([latent_dim, *reversed(hidden_dims), width])
        self.levels = nn.ModuleList(nn.Embedding(codebook_size, latent_dim) for _ in range(num_levels))

    @property
    def codebooks(self) -> list[Tensor]:
        """Of each level, ``[K, E]``."""
        return [level.weight for level in self.levels]  # type: ignore[misc]

    def forward(self, x_BD: Tensor) -> Losses:
        """What ``x_BD`` costs. The decoder's gradient goes straight through the codes to the encoder."""
        z_BE = self.encoder(x_BD)
        with torch.no_grad():
            codes, _ = quantise(z_BE, self.codebooks)
        left_BE, sum_BE = z_BE, torch.zeros_like(z_BE)
        codebook, commitment = z_BE.new_zeros(()), z_BE.new_zeros(())
        for level, code_B in zip(self.levels, codes.T, strict=True):
            word_BE = level(code_B)
            codebook = codebook + (left_BE.detach() - word_BE).square().mean()
            commitment = commitment + (left_BE - word_BE.detach()).square().mean()
            left_BE = left_BE - word_BE.detach()
            sum_BE = sum_BE + word_BE.detach()
        straight_BE = z_BE + (sum_BE - z_BE).detach()
        return Losses((self.decoder(straight_BE) - x_BD).square().mean(), codebook, commitment)

    @torch.no_grad()
    def evaluate(self, x_ND: Tensor) -> tuple[Tensor, float]:
        """The codes of all items, int64 ``[N, num_levels]``, and the mean square of what the decoder misses."""
        z_NE = self.encoder(x_ND)
        codes, left_NE = quantise(z_NE, self.codebooks)
        return codes, float((self.decoder(z_NE - left_NE) - x_ND).square().mean())


class Trained(NamedTuple):
    """The best of a training run.

    Attributes:
        model: as it was then, on the CPU.
        error: mean square of what the decoder misses, of vectors of unit variance.
        num_epochs: that were trained in all.
        num_revived: codewords that were given a new place because no item had them, over all epochs.
    """

    model: ResidualQuantisedAutoencoder
    error: float
    num_epochs: int
    num_revived: int


def train_rqvae(
    x_ND: Tensor,
    config: RqVae,
    *,
    seed: int,
    on_epoch: Callable[[int, float], None] = lambda epoch, error: None,
) -> Trained:
    """Train on all items until the reconstruction no longer gets better; ``on_epoch`` is told how it stands.

    Args:
        x_ND: float32, of mean 0 and variance 1 over all numbers; where it lies, the work is done.
        config: sizes, losses and optimizer.
        seed: of weights, batches and revivals.
        on_epoch: told the epochs that are done and the error.

    Raises:
        FloatingPointError: the loss is no number any more.
    """
    generator = torch.Generator(x_ND.device).manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResidualQuantisedAutoencoder(
            x_ND.shape[1],
            hidden_dims=config.hidden_dims,
            latent_dim=config.latent_dim,
            num_levels=config.num_levels,
            codebook_size=config.codebook_size,
        ).to(x_ND.device)
    _start_codebooks(model, x_ND, config, generator)
    optimizers = make_optimizers(model, config)

    codes, error = model.evaluate(x_ND)
    best, best_error, best_epoch = copy.deepcopy(model.state_dict()), error, 0
    num_revived = epoch = 0
    for epoch in range(1, config.num_epochs + 1):
        num_revived += revive_dead_codes(model, x_ND, codes, optimizers, generator)
        for rows in torch.randperm(len(x_ND), generator=generator, device=x_ND.device).split(config.batch_size):
            losses = model(x_ND[rows])
            loss = losses.reconstruction + losses.codebook + config.commitment_weight * losses.commitment
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the RQ-VAE's loss is {float(loss)} in epoch {epoch}; lower data.semantic_ids.method.optimizer.lr"
                )
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        codes, error = model.evaluate(x_ND)
        on_epoch(epoch, error)
        if error < best_error * (1 - _LEAST_GAIN):
            best, best_error, best_epoch = copy.deepcopy(model.state_dict()), error, epoch
        elif epoch - best_epoch >= config.patience:
            break
    model.load_state_dict(best)
    return Trained(model, best_error, epoch, num_revived)


def make_optimizers(model: nn.Module, config: RqVae) -> list[torch.optim.Optimizer]:
    """Matrices by ``config.optimizer``; codebooks and biases always by AdamW, with ``config.adamw``'s settings."""
    routing = param_groups(model)
    logger.info("routing of the RQ-VAE\n%s", format_routing(routing))
    params = dict(model.named_parameters())
    matrices = [(a.name, params[a.name]) for a in routing if a.optimizer == "muon"]
    rest = [params[a.name] for a in routing if a.optimizer != "muon"]
    settings = config.optimizer.model_dump(exclude={"name"})
    first: torch.optim.Optimizer
    if isinstance(config.optimizer, MuonConfig):
        first = Muon(matrices, **settings)
    else:
        first = torch.optim.AdamW([param for _, param in matrices], **settings)
    return [first, torch.optim.AdamW(rest, **config.adamw.model_dump(exclude={"name"}))]


@torch.no_grad()
def revive_dead_codes(
    model: ResidualQuantisedAutoencoder,
    x_ND: Tensor,
    codes: Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    generator: torch.Generator,
) -> int:
    """Put every codeword that no item has where some item's residual is, with no memory of gradients.

    Args:
        model: whose codebooks change.
        x_ND: all items.
        codes: int64 ``[N, num_levels]``, of all items.
        optimizers: whose state of those codewords is set to zero.
        generator: draws the items.

    Returns:
        Codewords that were moved.
    """
    num_revived = 0
    left_NE = model.encoder(x_ND)
    for codebook_KE, code_N in zip(model.codebooks, codes.T, strict=True):
        dead = (code_N.bincount(minlength=len(codebook_KE)) == 0).nonzero()[:, 0]
        # The words that items have do not move, so what is left for the next level stays what it is.
        next_NE = left_NE - codebook_KE[code_N]
        rows = torch.randperm(len(left_NE), generator=generator, device=left_NE.device)[: len(dead)]
        dead = dead[: len(rows)]
        codebook_KE[dead] = left_NE[rows]
        for optimizer in optimizers:
            for buffer in optimizer.state.get(codebook_KE, {}).values():
                if isinstance(buffer, Tensor) and buffer.shape == codebook_KE.shape:
                    buffer[dead] = 0
        num_revived += len(dead)
        left_NE = next_NE
    return num_revived


@torch.no_grad()
def _start_codebooks(
    model: ResidualQuantisedAutoencoder, x_ND: Tensor, config: RqVae, generator: torch.Generator
) -> None:
    found = fit_residual_kmeans(
        model.encoder(x_ND),
        config.num_levels,
        config.codebook_size,
        max_rounds=config.kmeans_rounds,
        generator=generator,
    )
    for codebook_KE, centres_KE in zip(model.codebooks, found, strict=True):
        codebook_KE.copy_(centres_KE)


def _perceptron(dims: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for dim_in, dim_out in itertools.pairwise(dims):
        layers += [nn.Linear(dim_in, dim_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
