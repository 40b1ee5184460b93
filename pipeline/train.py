"""The train stage: parquet sequences -> a trained model; `torchrun -m pipeline.train CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from muonrec import checkpoint
from muonrec.batch import SequenceBatch
from muonrec.config import load_config, to_yaml
from muonrec.data.candidates import CandidateSampler
from muonrec.data.loader import TrainingBatches, evaluation_batches, seen_items
from muonrec.data.semantic_ids import SemanticIds
from muonrec.data.shards import Sequences
from muonrec.embeddings.comms import CommsConfig
from muonrec.embeddings.fused import check_tables
from muonrec.embeddings.joined import AccumulatedStep, JoinedOptimizer, build_optimizer
from muonrec.embeddings.sharding import format_plan, shard_model
from muonrec.embeddings.tables import initialize_tables, table_of
from muonrec.generation import rank_held_out
from muonrec.mesh import Ranks, join_ranks
from muonrec.metrics import ranking_metrics
from muonrec.models import TigerConfig, scorer_of
from muonrec.optim import Schedule, format_routing
from muonrec.runlog import Clock, RunLog, Stopwatch, configure_logging, peak_memory_bytes, run_stage
from muonrec.settings_help import settings_help
from muonrec.supervision import Supervision
from pipeline.building import as_read_by, build_model, load_data, make_tokenizer, semantic_ids_of
from pipeline.data import check_same_data
from pipeline.fingerprints import record_fingerprints
from pipeline.plan import parse_ranks, parse_rows, print_plan
from pipeline.resuming import check_output, check_same_codes, check_trained_on, choose_checkpoints, first_items
from pipeline.spectra import Spectra
from pipeline.train_config import TrainConfig

logger = logging.getLogger(__name__)


# Which entry of ``schedules`` each part of the optimizer follows.
_SCHEDULED: Mapping[str, Literal["tables", "dense", "adamw"]] = {
    "tables": "tables",
    "muon": "dense",
    "matrices": "dense",
    "adamw": "adamw",
}


def main() -> int:
    """Parse the command line and train, resuming where an earlier run of the same config stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.train",
        description=__doc__,
        epilog="settings and their defaults, beside those of python -m pipeline.data; model=hstu chooses a section\n"
        "that is one of several, model.dropout=0.1 sets what is in it:\n"
        f"{settings_help(TrainConfig, leave_out=('data',))}\n\nexamples:\n"
        "  torchrun --nproc-per-node 2 -m pipeline.train configs/demo/sasrec.yaml\n"
        "  torchrun --nproc-per-node 2 -m pipeline.train configs/demo/sasrec.yaml dense_optimizer=adamw output=out/a\n"
        "  torchrun --nproc-per-node 2 -m pipeline.train CONFIG data.output=out/data/day2 data.extends=out/data/day1 \\"
        "\n      data.source.path=day2.csv output=out/day2 init_from=out/day1   # after pipeline.data with the same\n"
        "  python -m pipeline.train configs/demo/sasrec.yaml --plan 16x8 --hbm 80 --rows item=200000000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file of the experiment, such as configs/demo/sasrec.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as dense_optimizer=adamw dense_optimizer.lr=0.001"
    )
    parser.add_argument("--plan", metavar="NODESxRANKS", help="only print the plan for such machines (16x8)")
    parser.add_argument("--hbm", type=float, default=80, metavar="GIB", help="with --plan: memory of one rank")
    parser.add_argument(
        "--host", type=float, metavar="GIB", help="with --plan: memory of one node, which its ranks share; 128 a rank"
    )
    parser.add_argument("--rows", action="append", default=[], metavar="TABLE=COUNT", help="with --plan: table sizes")
    arguments = parser.parse_intermixed_args()  # parse_args refuses key=value after an option
    configure_logging()
    if arguments.plan is not None:
        return run_stage(lambda: plan(arguments))

    def train_on_ranks() -> None:
        with join_ranks() as ranks:
            configure_logging(is_first=ranks.is_first)
            train(load_config(TrainConfig, arguments.config, arguments.overrides), ranks)

    return run_stage(train_on_ranks)


def plan(arguments: argparse.Namespace) -> None:
    """Print what the run would be on the machines of ``--plan``, without any of them."""
    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    rows = parse_rows(arguments.rows)
    print_plan(config, *parse_ranks(arguments.plan), arguments.hbm, host_gib=arguments.host, rows=rows)


def train(config: TrainConfig, ranks: Ranks) -> None:
    """Train as ``config`` says; every rank must call it. SIGTERM on any of them saves, and ends all with status 143."""
    run = Run.start(config, ranks)
    supervision = Supervision(config.output, ranks)
    root = config.output / "checkpoints"
    step, best = run.resume(root)
    if config.fingerprints and step == 0:
        whole = dataclasses.replace(ranks, rank=0, num_ranks=1)
        loader = make_loader(config, run.sequences, whole, semantic_ids_of(config))
        record_fingerprints(config.output, run.model, loader, ranks)
    saved = step
    settings = config.checkpoints
    writer = checkpoint.Writer(
        root, keep=settings.keep, asynchronous=settings.asynchronous, may_commit=supervision.may_write
    )
    cuda = ranks.device.type == "cuda"
    stopwatch = Stopwatch(cuda=cuda)
    accumulated = AccumulatedStep(run.optimizer, run.model, timed=stopwatch)
    pipeline = TrainPipelineSparseDist(run.model, accumulated, ranks.device)
    log = RunLog(
        config.output, enabled=ranks.is_first, start_step=step, num_steps=run.num_steps, tensorboard=config.tensorboard
    )
    clock = Clock(already_s=best.seconds)
    every, speaks = config.spectra_every_steps, ranks.is_first
    spectra = Spectra(config.output, run.model, config.routing, every_steps=every, enabled=speaks, paused=clock.paused)
    with log, supervision, writer:
        while step < run.num_steps and not best.is_stale(config.validation.patience):
            # A stretch between two validations: the pipeline ends it with no batch in flight, since TorchRec's sharded
            # modules cannot evaluate while a batch is half way through them.
            end = min(run.next_validation(step), run.num_steps)
            batches = run.batches(step, end)
            run.model.train()
            while step < end:
                if supervision.must_stop(or_if=writer.has_failed()):
                    supervision.check_lease()
                    if step != saved:
                        run.save(writer, step, dataclasses.replace(best, seconds=clock.seconds))
                    writer.finish()
                    supervision.stop(step)
                rates = run.set_rates(step)
                run.seed_dropout(step)
                statistics = {"loss_nats": 0.0, "num_targets": 0.0}
                with spectra.around(step + 1):
                    for _ in accumulated.over(run.micro_steps(step)):
                        for name, part in pipeline.progress(batches).items():
                            statistics[name] += part
                step += 1
                clock.count(statistics["num_targets"])
                if step % config.log_every_steps == 0 or step == end:
                    numbers = {**statistics, **rates, **run.norms(), **clock.lap()}
                    numbers["optimizer_s"] = stopwatch.lap()
                    log.write(step, epoch=step / run.steps_per_epoch, **numbers)
                    log.show(step, loss_nats=statistics["loss_nats"], events_per_s=numbers["events_per_s"])
                if step % config.checkpoints.every_steps == 0 and step != end:
                    with clock.paused():
                        supervision.check_lease()
                        run.save(writer, step, dataclasses.replace(best, seconds=clock.seconds))
                        saved = step
                    log.write(step, checkpoint_pause_s=writer.pause_s)

            with clock.paused():
                run.model = pipeline.detach()
                metrics = run.validate()
                pipeline.attach(run.model)
                best = best.after(step, metrics["valid_ndcg@10"], seconds=clock.seconds)
                log.write(step, **metrics, seconds=clock.seconds, peak_memory_bytes=peak_memory_bytes(cuda=cuda))
                ndcg = metrics["valid_ndcg@10"]
                log.say(f"step {step}: validation NDCG@10 {ndcg:.4f}, best {best.value:.4f} at {best.step}")
                supervision.check_lease()
                run.save(writer, step, best)
                saved = step
                log.write(step, checkpoint_pause_s=writer.pause_s)
    logger.info(
        "trained %d steps in %.0f s; best validation NDCG@10 %.4f at step %d; the run is in %s",
        step,
        clock.seconds,
        best.value,
        best.step,
        config.output,
    )


@dataclasses.dataclass
class Run:
    """What a run is made of, built once from its config."""

    config: TrainConfig
    ranks: Ranks
    sequences: Sequences
    ids: SemanticIds | None
    loader: TrainingBatches
    model: DistributedModelParallel
    optimizer: JoinedOptimizer
    num_steps: int
    steps_per_epoch: int
    schedules: dict[str, Schedule]

    @classmethod
    def start(cls, config: TrainConfig, ranks: Ranks) -> Run:
        """Build data, model and optimizer; write and print what was decided."""
        check_output(config)
        sequences = load_data(config)
        check_same_data(config.data, sequences.manifest)
        ids = semantic_ids_of(config)
        loader = make_loader(config, sequences, ranks, ids)
        steps_per_epoch = -(-loader.steps_per_epoch // config.accumulate_steps)
        num_steps = config.num_steps or (config.num_epochs or 0) * steps_per_epoch
        model, plan = make_model(config, sequences, ranks, ids)
        tables = check_tables(model, config.tables)
        optimizer = make_optimizer(config, model)
        routing, plan_text = format_routing(optimizer.routing), format_plan(plan)
        if ranks.is_first:
            config.output.mkdir(parents=True, exist_ok=True)
            (config.output / "routing.txt").write_text(routing + "\n")
            (config.output / "plan.txt").write_text(plan_text + "\n")
            # Renamed into place: a run killed here must find its whole config when it comes back.
            (config.output / "resolved.tmp").write_text(to_yaml(config))
            (config.output / "resolved.tmp").rename(config.output / "resolved.yaml")
        logger.info("sharding plan over %d ranks\n%s", ranks.num_ranks, plan_text)
        for table in tables:
            logger.info("table %s", table)
        if config.comms != CommsConfig():
            precisions = (config.comms.forward, config.comms.backward)
            logger.info("between ranks rows travel as %s, their gradients as %s", *precisions)
        logger.info("optimizer of each parameter\n%s", routing)
        schedules = {
            part: config.schedules.get(key, config.schedule).over(num_steps)
            for part, key in _SCHEDULED.items()
            if part in optimizer.parts
        }
        return cls(config, ranks, sequences, ids, loader, model, optimizer, num_steps, steps_per_epoch, schedules)

    def resume(self, root: Path) -> tuple[int, Best]:
        """Load the newest checkpoint below ``root`` that can be used; without any, start from ``init_from``.

        One that is damaged or of another model is named in a warning and set aside.

        Raises:
            ValueError: there are checkpoints, and none can be used or they are of other data.
        """
        used = checkpoint.use_first(checkpoint.newest_first(root), self.load_own)
        if used is None:
            if self.config.init_from is not None:
                self.initialize_from(self.config.init_from)
            return 0, Best()
        for folder in used.passed_over:
            checkpoint.set_aside(folder)
        step, best = used.result["step"], Best(**used.result["best"])
        # What was cut off left behind.
        checkpoint.prune(root, keep=self.config.checkpoints.keep, best=best.step)
        logger.info("resumed from %s", used.folder)
        return step, best

    def load_own(self, folder: Path) -> dict[str, Any]:
        """Load everything from a checkpoint of this run; its progress."""
        progress = checkpoint.read_progress(folder)
        check_trained_on(folder, progress["data"], self.sequences.manifest, self.config)
        check_same_codes(folder, progress, self.ids)
        return checkpoint.load(folder, self.model, self.optimizer)

    def initialize_from(self, source: Path) -> None:
        """Take the weights, and the tables' state where there is one, from another run; nothing else.

        A table whose data set extends the source's has new rows; those stay as they are drawn, without state.

        Args:
            source: a run (its newest checkpoint that can be used), a checkpoint, or a safetensors file.
        """
        if source.is_file():
            notes = checkpoint.read_notes(source)
            if "semantic_ids" in notes:
                check_same_codes(source, notes, self.ids)
            fingerprint = notes.get("data", self.sequences.manifest.fingerprint)
            checkpoint.import_weights(source, self.model, grows=self.growing_tables(source, fingerprint))
            logger.info("started from the weights in %s; every optimizer starts afresh, tables too", source)
        else:
            folders = [source] if checkpoint.is_committed(source) else checkpoint.newest_first(source / "checkpoints")
            used = checkpoint.use_first(folders, self.load_weights)
            if used is None:
                raise ValueError(
                    f"init_from={source} is no run with a finished checkpoint, no checkpoint and no file; pass the "
                    "output of python -m pipeline.train, or what python -m pipeline.export wrote"
                )
            fingerprint = used.result["data"]
            logger.info(
                "started from %s, step %d: weights and the tables' optimizer state are kept, the momentum of the dense "
                "optimizers starts afresh",
                used.folder,
                used.result["step"],
            )
        before, now = first_items(self.sequences.manifest, fingerprint), self.sequences.num_items
        if before != now:
            logger.info(
                "table item grows from %s to %s rows; %s new rows start fresh",
                *(f"{count:,}" for count in (before, now, now - before)),
            )

    def load_weights(self, folder: Path) -> dict[str, Any]:
        """Load weights and the tables' state from a checkpoint of another run; its progress."""
        progress = checkpoint.read_progress(folder)
        grows = self.growing_tables(folder, progress["data"])
        check_same_codes(folder, progress, self.ids)
        return checkpoint.load(folder, self.model, self.optimizer.parts["tables"], grows=grows)

    def growing_tables(self, source: Path, fingerprint: str) -> list[str]:
        """Weights with new rows since ``source`` was trained. Raises ValueError where its rows mean other items."""
        check_trained_on(source, fingerprint, self.sequences.manifest, self.config, may_grow=True)
        if fingerprint == self.sequences.manifest.fingerprint:  # or a file of weights that does not say
            return []
        return [name for name in self.model.state_dict() if table_of(name) == "item"]

    def micro_steps(self, step: int) -> range:
        """The loader's batches that make up global batch ``step``; the last of an epoch has what is left of it."""
        epoch, index = divmod(step, self.steps_per_epoch)
        size = self.config.accumulate_steps
        starts = range(epoch * self.loader.steps_per_epoch, (epoch + 1) * self.loader.steps_per_epoch)
        return starts[index * size : (index + 1) * size]

    def batches(self, step: int, end: int) -> Iterator[SequenceBatch]:
        """The micro-batches of steps ``step`` to ``end``, each knowing the targets of its whole global batch."""
        loaded = self.loader.iterate(self.micro_steps(step).start, self.micro_steps(end - 1).stop)
        for at in range(step, end):
            micro_batches = [next(loaded) for _ in self.micro_steps(at)]
            num_targets = sum(batch.labels.numel() for batch in micro_batches)
            for batch in micro_batches:
                yield dataclasses.replace(batch, step=at, num_step_targets=num_targets)

    def set_rates(self, step: int) -> dict[str, float]:
        """Set every part's learning rate for ``step``; the rates, of the first table for all, by name."""
        dense = self.config.dense_optimizer.lr
        # From the config: a rank may hold no table, and knows no rate then.
        table = next(iter(self.config.tables.values())).lr
        peaks = {"tables": table, "muon": dense, "matrices": dense, "adamw": self.config.adamw.lr}
        for part, schedule in self.schedules.items():
            self.optimizer.scale_lr(part, schedule(step))
        return {f"lr_{part}": peaks[part] * schedule(step) for part, schedule in self.schedules.items()}

    def seed_dropout(self, step: int) -> None:
        """Make the step's random numbers a function of seed, step and rank, so that none have to be saved."""
        torch.manual_seed(((self.config.seed * 1_000_003 + step) * 65_537 + self.ranks.rank) % 2**63)

    def norms(self) -> dict[str, float]:
        """The norm the last step clipped, if it did."""
        norm = self.optimizer.grad_norm
        return {} if norm is None else {"grad_norm_adamw": norm}

    def next_validation(self, step: int) -> int:
        """The first validation after ``step``."""
        every = self.config.validation.every_steps
        return (step // every + 1) * every

    def save(self, writer: checkpoint.Writer, step: int, best: Best) -> None:
        """Write the checkpoint of ``step``."""
        # The loader's position is the step; random numbers are a function of seed, step and rank (`seed_dropout`).
        progress = {
            "step": step,
            "seed": self.config.seed,
            "best": dataclasses.asdict(best),
            "data": self.sequences.manifest.fingerprint,
            **({} if self.ids is None else {"semantic_ids": self.ids.fingerprint}),
        }
        files = {"resolved.yaml": to_yaml(self.config)}
        writer.save(step, self.model, self.optimizer, best=best.step, progress=progress, files=files)

    def validate(self) -> dict[str, float]:
        """Full-ranking metrics on the validation items."""
        settings = self.config.validation
        batches = evaluation_batches(
            self.sequences,
            "valid",
            max_length=self.config.model.max_length,
            batch_size=settings.batch_size,
            ranks=self.ranks,
            max_users=settings.max_users,
        )
        scorer = scorer_of(self.model, num_items=self.sequences.num_items, device=self.ranks.device)
        seen = (lambda user_ids: seen_items(self.sequences, user_ids, "valid")) if settings.mask_seen else None
        batches = as_read_by(scorer, batches, self.sequences, "valid")
        ranked = rank_held_out(scorer, batches, ranks=self.ranks, mask_seen=seen)
        return {f"valid_{name}": value for name, value in ranking_metrics(ranked, k=(10,)).items()}


@dataclasses.dataclass(frozen=True)
class Best:
    """The best validation so far, how many have not beaten it, and the seconds trained."""

    step: int = 0
    value: float = -1.0
    stale: int = 0
    seconds: float = 0.0

    def after(self, step: int, value: float, *, seconds: float) -> Best:
        if value > self.value:
            return Best(step, value, 0, seconds)
        return dataclasses.replace(self, stale=self.stale + 1, seconds=seconds)

    def is_stale(self, patience: int) -> bool:
        return bool(patience) and self.stale >= patience


def make_loader(
    config: TrainConfig, sequences: Sequences, ranks: Ranks, ids: SemanticIds | None = None
) -> TrainingBatches:
    """The training batches ``config`` asks for, in codes for a model that reads those."""
    sampler = CandidateSampler(
        config.loss.candidates,
        num_items=sequences.num_items,
        count=config.loss.num_negatives,
        item_counts=sequences.item_train_counts,
        seed=config.seed,
    )
    return TrainingBatches(
        sequences,
        batch_size=config.batch_size // config.accumulate_steps,
        max_length=config.model.max_length,
        sampler=sampler,
        needs_targets=config.loss.name not in ("full_softmax", "token_softmax"),
        seed=config.seed,
        ranks=ranks,
        num_streams=config.num_streams,
        samples=config.model.samples if isinstance(config.model, TigerConfig) else "users",
        finish=None if ids is None else make_tokenizer(config, ids).for_training,
    )


def make_model(
    config: TrainConfig, sequences: Sequences, ranks: Ranks, ids: SemanticIds | None = None
) -> tuple[DistributedModelParallel, Any]:
    """The sharded model with its initial weights, which depend on the seed alone, and the sharding plan."""
    torch.manual_seed(config.seed)
    model = build_model(config, num_items=sequences.num_items, ids=ids, has_times=sequences.timestamps_s is not None)
    if config.precision == "bf16":
        # The forward pass alone: autocast around the optimizer would change Newton-Schulz.
        model.forward = torch.autocast(ranks.device.type, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    sharded, plan = shard_model(
        model,
        config.tables,
        dense=config.dense_sharding,
        ranks=ranks,
        batch_size=max(config.batch_size // config.accumulate_steps // ranks.num_ranks, 1),
        comms=config.comms,
    )
    initialize_tables(sharded, std={name: table.init_std for name, table in config.tables.items()}, seed=config.seed)
    return sharded, plan


def make_optimizer(config: TrainConfig, model: DistributedModelParallel) -> JoinedOptimizer:
    """The joined optimizer: tables, matrices by ``dense_optimizer``, the rest by ``adamw``."""
    settings = config.dense_optimizer.model_dump(exclude={"name"})
    is_muon = config.dense_optimizer.name == "muon"
    return build_optimizer(
        model,
        muon=settings if is_muon else None,
        matrices=None if is_muon else settings,
        adamw=config.adamw.model_dump(exclude={"name"}),
        overrides=config.routing,
        max_grad_norm=config.max_grad_norm,
    )


def load_run(folder: str | Path, which: str, ranks: Ranks) -> tuple[Any, TrainConfig, Sequences, int]:
    """A trained run's scorer (`scorer_of`), config, data set and step; every rank must call it.

    Args:
        folder: a run's output.
        which: ``best`` on validation or ``last``.
        ranks: any number, not only the one that trained.

    Raises:
        ValueError: the folder is no run, or has no finished checkpoint.
    """
    folder = Path(folder)
    resolved = folder / "resolved.yaml"
    if not resolved.is_file():
        raise ValueError(
            f"{folder} is not a run: there is no resolved.yaml; pass the output of python -m pipeline.train"
        )
    config = load_config(TrainConfig, resolved)
    folders = choose_checkpoints(folder, which)
    sequences = load_data(config)
    ids = semantic_ids_of(config)
    model, _ = make_model(for_evaluation(config, ranks), sequences, ranks, ids)

    def load(folder: Path) -> int:
        progress = checkpoint.read_progress(folder)
        check_trained_on(folder, progress["data"], sequences.manifest, config)
        check_same_codes(folder, progress, ids)
        checkpoint.load(folder, model)
        return progress["step"]

    used = checkpoint.use_first(folders, load)
    assert used is not None
    scorer = scorer_of(model, num_items=sequences.num_items, device=ranks.device)
    return scorer, config, sequences, used.result


def for_evaluation(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """``config`` with tables that have no optimizer state, exact rows between ranks, and on a CPU what it has."""
    changes: dict[str, Any] = {"optimizer": "sgd", "weight_decay": 0.0, "max_gradient": None}
    if ranks.device.type == "cpu":
        changes |= {"memory": "hbm", "stochastic_rounding": False}
    tables = {}
    for name, table in config.tables.items():
        # The CPU kernels have no bf16; every such number is one of float32.
        widened = {"data_type": "fp32"} if ranks.device.type == "cpu" and table.data_type == "bf16" else {}
        tables[name] = table.model_copy(update=changes | widened)
    return config.model_copy(update={"tables": tables, "comms": CommsConfig()})


if __name__ == "__main__":
    sys.exit(main())
