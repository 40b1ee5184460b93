"""What a training run is told: `TrainConfig`, its sections and what of it must fit together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from muonrec.config import Config, name_only
from muonrec.data.candidates import Candidates
from muonrec.dense_optimizer import AdamWConfig, DenseOptimizerConfig, MuonConfig
from muonrec.embeddings.comms import CommsConfig
from muonrec.embeddings.sharding import DenseSharding
from muonrec.embeddings.tables import TableConfig
from muonrec.losses import Loss
from muonrec.models import MODELS, ModelConfig, SASRecConfig
from muonrec.optim import Schedule
from pipeline.data import DataConfig


class ScheduleConfig(Config):
    """Multiplier of a learning rate over the run's steps.

    Attributes:
        name: what follows the warm-up: half a cosine; ``constant`` stays, ``warmup_stable_decay`` stays and then falls
            in a straight line.
        warmup_fraction: of the steps, in a straight line.
        final_fraction: of the rate, where cosine and warmup_stable_decay end.
        decay_fraction: of the steps after the warm-up, in which warmup_stable_decay falls.
    """

    name: Literal["constant", "cosine", "warmup_stable_decay"] = "cosine"
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    decay_fraction: float = Field(default=0.2, gt=0, le=1)

    def over(self, num_steps: int) -> Schedule:
        """The schedule of a run of ``num_steps``."""
        return Schedule(
            self.name,
            warmup_steps=round(self.warmup_fraction * num_steps),
            num_steps=num_steps,
            final_fraction=self.final_fraction,
            decay_fraction=self.decay_fraction,
        )


class LossConfig(Config):
    """The loss and what the targets compete with.

    Attributes:
        name: ``full_softmax`` is over all items, ``sampled_softmax`` over the target and negatives that the batch
            shares, ``in_batch_softmax`` over the targets of a rank's share of it; ``bce`` holds each target against
            negatives of its own, ``token_softmax`` is over the codes of a model that generates.
        negatives: of the sampled softmax: ``popularity`` draws by training counts to the power of 0.75, ``mixed`` each
            uniformly or by training counts at even odds; logits are corrected for either, as those of in-batch
            negatives.
        num_negatives: shared ones of a micro-batch, or of each target by bce, whose are uniform.
        temperature: logits are divided by it, but for ``token_softmax``.
    """

    name: Loss = "sampled_softmax"
    negatives: Literal["uniform", "popularity", "mixed"] = "uniform"
    num_negatives: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, gt=0)

    @property
    def candidates(self) -> Candidates:
        """How the loader draws the candidates."""
        by_loss: Mapping[Loss, Candidates] = {
            "full_softmax": "all",
            "in_batch_softmax": "in_batch",
            "bce": "per_target",
            "token_softmax": "none",
        }
        return by_loss.get(self.name, self.negatives)


class ValidationConfig(Config):
    """When the model is validated and on whom.

    Attributes:
        every_steps: between two validations; there is one at the end, too.
        max_users: so many targets, evenly spread over all; null: all of them.
        mask_seen: leave out what a user has had before, as the eval stage does by its own setting.
        batch_size: users encoded at once on one rank.
        patience: validations in a row without a better NDCG@10 that stop the run; 0: never.
    """

    every_steps: int = Field(default=200, ge=1)
    max_users: int | None = Field(default=5000, ge=1)
    mask_seen: bool = False
    batch_size: int = Field(default=512, ge=1)
    patience: int = Field(default=0, ge=0)


class CheckpointConfig(Config):
    """When a checkpoint is written, and how many are kept.

    Attributes:
        every_steps: between two of them; one follows each validation, too.
        keep: the newest so many, and the best where it is older; with two, one may be damaged.
        asynchronous: go on training while a copy of the state, in host memory, is written.
    """

    every_steps: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)
    asynchronous: bool = False


class TrainConfig(Config):
    """One experiment; give ``num_epochs`` or ``num_steps``.

    Attributes:
        output: folder of the run: resolved.yaml, metrics.jsonl, checkpoints. The same command goes on with it.
        init_from: a run, a checkpoint or a safetensors file to take the weights from, and from the first two the state
            of the tables; steps are counted from 0 and the dense optimizers start afresh. Where this data set extends
            the one it was trained on, over any number of `data.extends`, the tables grow: known items keep their rows
            and state, new ones start as in a new model.
        seed: of the initial weights, the order of the data, negatives and dropout.
        data: what the data stage was given; the data set at ``data.output`` is read, and TIGER's semantic IDs.
        model: by ``name``.
        loss: by ``name``; tiger learns by ``token_softmax`` alone, the other models by any but that.
        tables: of embeddings, by name (``item``; TIGER's are ``token`` and ``user``).
        comms: precision of what the ranks send each other of the tables.
        dense_optimizer: of the tower's matrices, by ``name``.
        adamw: of all else that is dense: gains, biases, tables of positions, output heads.
        routing: ``[pattern, optimizer]``, for parameters whose role should not decide: the first whose regular
            expression is found in the name. ``muon_whole`` is Muon on a fused matrix (a GRU's gates, q, k and v) as it
            stands, and not in the blocks that its role knows.
        schedule: of all learning rates.
        schedules: in its place, of ``tables``, of ``dense`` (the matrices, whoever updates them) or of ``adamw``; what
            an entry leaves out stands at its default, not as in ``schedule``.
        max_grad_norm: clip the gradients of what ``adamw`` updates, never those of the matrices, to this norm; null:
            leave them alone.
        dense_sharding: of the tower: a copy on every rank, or shards by FSDP2.
        batch_size: samples of the global batch, of all ranks together: users, or prefixes (``model.samples``).
        num_streams: virtual streams that the samples are dealt to, so that any number of ranks up to it sees the same
            global batches; ``batch_size`` is a multiple of it times ``accumulate_steps``.
        accumulate_steps: micro-batches that a global batch is computed in. The dense gradients are those of the whole
            batch. FBGEMM updates its tables in the backward pass, hence at every micro-batch, by that one's part of the
            batch's gradient; with row-wise Adagrad that is not the update of the sum. Our Adam on a CPU updates
            once, by the sum.
        precision: ``bf16`` runs the forward pass under `torch.autocast`; weights and optimizer state are as without it.
            There is no fp16: it needs a GradScaler, and the fused tables would take the scaled gradients.
        num_epochs, num_steps: length of the run, one of them.
        validation: when, and on whom.
        checkpoints: when, and how many.
        log_every_steps: between two lines of metrics.jsonl.
        tensorboard: write the same for TensorBoard.
        fingerprints: write ``fingerprints.json``, hashes of the initial weights and of the data's order, that
            `pipeline.compare` checks.
        spectra_every_steps: write ``spectra.jsonl``, singular values of the tower's matrices and of their updates; 0:
            never.
    """

    output: Path
    init_from: Path | None = None
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    model: ModelConfig = SASRecConfig()
    loss: Annotated[LossConfig, BeforeValidator(name_only)] = LossConfig()
    tables: dict[str, TableConfig]
    comms: CommsConfig = CommsConfig()
    dense_optimizer: DenseOptimizerConfig = MuonConfig()
    adamw: AdamWConfig = AdamWConfig()
    routing: list[tuple[str, Literal["muon", "muon_whole", "adamw"]]] = []
    schedule: Annotated[ScheduleConfig, BeforeValidator(name_only)] = ScheduleConfig()
    schedules: dict[Literal["tables", "dense", "adamw"], Annotated[ScheduleConfig, BeforeValidator(name_only)]] = {}
    max_grad_norm: float | None = Field(default=None, gt=0)
    dense_sharding: DenseSharding = "ddp"
    batch_size: int = Field(default=256, ge=1)
    num_streams: int = Field(default=32, ge=1)
    accumulate_steps: int = Field(default=1, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    num_epochs: int | None = Field(default=None, ge=1)
    num_steps: int | None = Field(default=None, ge=1)
    validation: ValidationConfig = ValidationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    log_every_steps: int = Field(default=10, ge=1)
    tensorboard: bool = True
    fingerprints: bool = False
    spectra_every_steps: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.num_epochs is None) == (self.num_steps is None):
            raise ValueError(f"give num_epochs or num_steps, one of them; found {self.num_epochs} and {self.num_steps}")
        return self

    @model_validator(mode="after")
    def _loss_of_the_model(self) -> TrainConfig:
        taken = MODELS[self.model.name].losses
        if self.loss.name not in taken:
            raise ValueError(
                f"model {self.model.name} learns by {' or '.join(taken)}, found loss {self.loss.name}; set loss.name"
            )
        return self

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainConfig:
        if self.accumulate_steps > 1 and self.batch_size % (self.accumulate_steps * self.num_streams):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulate_steps {self.accumulate_steps} times "
                f"num_streams {self.num_streams}; change one of them"
            )
        return self
