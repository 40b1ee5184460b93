"""Settings of the optimizers of what no table holds, one section of a config for whatever is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from muonrec.config import Config, name_only


class MuonConfig(Config):
    """Muon on matrices; names and meaning as `muonrec.optim.Muon`, hence as `torch.optim.Muon`.

    Fused matrices of a tower are taken in blocks, by their roles; ``muon_whole`` in ``routing`` takes one as it stands.

    Attributes:
        lr: learning rate, scaled by the shape of each matrix, see ``adjust_lr_fn``.
        weight_decay: decoupled, times ``lr`` as scheduled, whatever the shape.
        momentum: how much of the running average of gradients is kept each step.
        nesterov: orthogonalize the average moved one more step towards the gradient.
        ns_steps: Newton-Schulz iterations.
        ns_coefficients: Jordan's, with which most published rates were found, or Polar Express, which ends nearer to
            singular values of 1.
        ns_gram: iterate on the Gram matrix of what is more than twice as long as wide: faster, rounds otherwise.
        normuon_beta2: 0.95 makes it NorMuon (arXiv 2510.05491); null: plain Muon.
        cautious_weight_decay: decay only what the update does not move away from zero (arXiv 2510.12402).
        adjust_lr_fn: what the rate is multiplied by, for each block. ``match_rms_adamw``: 0.2 sqrt(max(rows, columns)),
            an update the size of AdamW's (Liu et al. 2025), so that one range of rates serves both. ``original``,
            Jordan's: sqrt(max(1, rows / columns)), which is that divided by 0.2 sqrt(columns). ``spectral_unclamped``:
            sqrt(rows / columns), the same but for wide matrices, where it is less.
    """

    name: Literal["muon"] = "muon"
    lr: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    nesterov: bool = True
    ns_steps: int = Field(default=5, ge=1, lt=100)
    ns_coefficients: Literal["jordan", "polar_express"] = "jordan"
    ns_gram: bool = False
    normuon_beta2: float | None = Field(default=None, ge=0, lt=1)
    cautious_weight_decay: bool = False
    adjust_lr_fn: Literal["original", "match_rms_adamw", "spectral_unclamped"] = "match_rms_adamw"


class AdamWConfig(Config):
    """AdamW, on matrices or on the rest.

    Attributes:
        lr: learning rate.
        betas: of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times ``lr``.
    """

    name: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)


DenseOptimizerConfig = Annotated[MuonConfig | AdamWConfig, Field(discriminator="name"), BeforeValidator(name_only)]
