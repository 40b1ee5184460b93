"""Vectors to codes, by each method; the part of it that needs torch."""

from __future__ import annotations

import logging

import numpy as np
import torch

from muonrec.data.semantic_ids.config import ResidualKMeans, RqVae
from muonrec.data.semantic_ids.quantised import Codewords, Quantised
from muonrec.data.semantic_ids.residual_kmeans import fit_residual_kmeans, quantise
from muonrec.data.semantic_ids.rqvae import train_rqvae
from muonrec.runlog import Progress

logger = logging.getLogger(__name__)

# N = items, D = width of the vectors, E = width of the codewords


def quantise_by_kmeans(vectors_ND: np.ndarray, config: ResidualKMeans, *, seed: int, device: str) -> Quantised:
    """Codes of ``vectors_ND`` (float32) by residual k-means. Raises ValueError: no such device."""
    x_ND = torch.from_numpy(vectors_ND).to(_device(device))
    with Progress("residual k-means", "rounds", total=config.num_levels * config.max_rounds) as progress:
        codebooks = fit_residual_kmeans(
            x_ND,
            config.num_levels,
            config.codebook_size,
            max_rounds=config.max_rounds,
            generator=torch.Generator(x_ND.device).manual_seed(seed),
            on_round=lambda level, rounds: progress.move_to(level * config.max_rounds + rounds),
        )
    codes, _ = quantise(x_ND, codebooks)
    codewords = Codewords(vectors_ND, vectors_ND, [codebook.cpu().numpy() for codebook in codebooks])
    return Quantised(codes.cpu().numpy(), (config.codebook_size,) * config.num_levels, codewords)


def quantise_by_rqvae(vectors_ND: np.ndarray, config: RqVae, *, seed: int, device: str) -> Quantised:
    """Codes of ``vectors_ND`` (float32) by an RQ-VAE that is trained on them.

    It sees them less their mean and divided by their standard deviation over all numbers, so that one range of rates
    serves all sources.

    Raises:
        ValueError: no such device.
        FloatingPointError: the loss is no number any more.
    """
    mean_D, scale = vectors_ND.mean(0), float((vectors_ND - vectors_ND.mean(0)).std()) or 1.0
    x_ND = torch.from_numpy((vectors_ND - mean_D) / scale).to(_device(device))
    with Progress("RQ-VAE", "epochs", total=config.num_epochs) as progress:
        model, error, num_epochs, num_revived = train_rqvae(
            x_ND,
            config,
            seed=seed,
            on_epoch=lambda epoch, error: progress.move_to(epoch, status=f"{100 * error:.2f} % untold"),
        )
    logger.info(
        "RQ-VAE: %.2f %% of the variance untold after the best of %d epochs, %d dead codes revived",
        100 * error, num_epochs, num_revived,
    )  # fmt: skip

    def decode(sums_NE: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            decoded_ND: np.ndarray = model.decoder(torch.from_numpy(sums_NE).to(x_ND.device)).cpu().numpy()
        return decoded_ND * scale + mean_D

    with torch.no_grad():
        z_NE = model.encoder(x_ND)
        codes, _ = quantise(z_NE, model.codebooks)
    codebooks = [codebook.detach().cpu().numpy() for codebook in model.codebooks]
    codewords = Codewords(vectors_ND, z_NE.cpu().numpy(), codebooks, decode)
    return Quantised(codes.cpu().numpy(), (config.codebook_size,) * config.num_levels, codewords)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("data.semantic_ids.device is cuda, but torch finds no such device here; set device=cpu")
    return torch.device(name)
