"""The runs of a comparison: the settings of each, its folder, what is known of it, and the queue that trains it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import logging
import math
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from muonrec import checkpoint
from muonrec.checkpoint.marker import MARKER, record_files
from muonrec.comparison.collect import collect
from muonrec.comparison.kept import Kept
from muonrec.comparison.protocol import check_fingerprints, check_settings, check_tuned, matches
from muonrec.comparison.queue import QUEUE_STATE, Ended, Job, Queue, available_cores, slots
from muonrec.comparison.results import (
    RESULTS,
    Arm,
    Comparison,
    Design,
    RunResult,
    Stage,
    read_comparison,
    write_results,
    write_targets,
)
from muonrec.comparison.sources import sources_hash
from muonrec.comparison.tuning import Asked
from muonrec.config import flat, parse_config, read_yaml, set_at, to_yaml
from muonrec.data.loader import evaluation_targets
from muonrec.data.shards import Sequences, load_sequences
from muonrec.mesh import Ranks
from muonrec.runlog import Progress
from muonrec.runs import METRICS
from pipeline.building import semantic_ids_of
from pipeline.data import check_same_data
from pipeline.train import make_loader
from pipeline.train_config import TrainConfig

if TYPE_CHECKING:
    from pipeline.compare import CompareConfig

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
# What changes where or how often a run writes, and not what it learns; the data set counts by its fingerprint.
_NOT_LEARNED = {
    "output",
    "data",
    "tensorboard",
    "log_every_steps",
    "checkpoints",
    "fingerprints",
    "spectra_every_steps",
}
# Of the first seed's final runs.
_SPECTRA_PER_RUN = 10
_METRIC = "ndcg@10"


class Experiment:
    """The settings of every run of a comparison.

    Args:
        config: of the comparison.

    Raises:
        ValueError: a setting, or the data set, is not as it must be; or an arm differs from the control in more than it
            names.
    """

    def __init__(self, config: CompareConfig) -> None:
        self._config = config
        tree = read_yaml(config.train) if isinstance(config.train, Path) else copy.deepcopy(config.train)
        for path, value in flat(config.overrides).items():
            set_at(tree, path, value)
        tree["output"] = str(config.output)
        base = parse_config(TrainConfig, tree, source="section train", prefix="train.")
        self._tree = base.model_dump(mode="json")  # so that an arm may override what stands at its default
        self.data_folder = base.data.output
        sequences = load_sequences(base.data.output)
        check_same_data(base.data, sequences.manifest)
        self.fingerprint = sequences.manifest.fingerprint
        self.targets = targets_of_test(sequences)
        alone = Ranks(0, 1, torch.device("cpu"))
        steps_per_epoch = -(-make_loader(base, sequences, alone).steps_per_epoch // base.accumulate_steps)
        self.num_steps = base.num_steps or (base.num_epochs or 0) * steps_per_epoch
        packages = ("muonrec", "pipeline")
        self.sources_hashes = {
            "tune": sources_hash(ROOT, ["pipeline.train"], packages),
            "final": sources_hash(ROOT, ["pipeline.train", "pipeline.eval"], packages),
        }
        self.design = self._design()

    def settings(self, asked: Asked, output: Path) -> TrainConfig:
        """The resolved config of a run that writes to ``output``."""
        config, arm = self._config, self._config.arms[asked.arm]
        tree = copy.deepcopy(self._tree)
        for path, value in arm.overrides.items():
            set_at(tree, path, copy.deepcopy(value))
        for name, rate in asked.rates.items():
            for path in arm.rates[name]:
                set_at(tree, path, rate)
        num_steps = self.steps(asked.budget)
        tree |= {"output": str(output), "seed": asked.seed, "num_steps": num_steps, "num_epochs": None}
        tree |= {"tensorboard": False, "fingerprints": True}
        if asked.stage == "final" and asked.seed == config.seeds[0]:
            tree["spectra_every_steps"] = max(num_steps // _SPECTRA_PER_RUN, 1)
        every = config.evaluate_every if asked.stage == "final" else config.evaluate_trials_every
        set_at(tree, "validation.every_steps", max(int(every * num_steps), 1))
        set_at(tree, "validation.max_users", config.validation_users)
        set_at(tree, "validation.patience", 0)  # every run has the steps of its budget
        return parse_config(TrainConfig, tree, source=f"arm {asked.arm}")

    def steps(self, budget: float) -> int:
        """The steps of a run."""
        return max(round(budget * self.num_steps), 1)

    def config_hash(self, settings: TrainConfig) -> str:
        """Hash of what a run learns: its settings but those that only say where it writes, and the data."""
        tree = settings.model_dump(mode="json", exclude=_NOT_LEARNED)
        tree["data"] = self.fingerprint
        if (ids := semantic_ids_of(settings)) is not None:
            tree["semantic_ids"] = ids.fingerprint
        if settings.init_from is not None:
            tree["init_from"] = _contents_hash(settings.init_from)
        if self._config.ranks > 1:
            tree["ranks"] = self._config.ranks
        text = json.dumps(tree, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _design(self) -> Design:
        config = self._config
        arms = {
            name: Arm(
                name,
                overrides=arm.overrides,
                may_differ=tuple(arm.may_differ),
                grids={rate: tuple({**config.grids, **arm.grids}[rate]) for rate in arm.rates},
                rate_settings={rate: tuple(paths) for rate, paths in arm.rates.items()},
            )
            for name, arm in config.arms.items()
        }
        trees = {name: self._resolved(arm) for name, arm in arms.items()}
        tuned = {name: [path for paths in arm.rate_settings.values() for path in paths] for name, arm in arms.items()}
        for name, arm in list(arms.items()):
            check_tuned(name, tuned[name], tuned[config.control], may_differ=arm.may_differ)
            rates = [*tuned[name], *tuned[config.control]]
            found = check_settings(name, trees[name], trees[config.control], named=[*arm.may_differ, *rates])
            known = ("dense_optimizer", *rates)
            also = [path for path in found if not any(matches(path, pattern) for pattern in known)]
            arms[name] = dataclasses.replace(arm, also_differs=tuple(also))
        return Design(
            name=config.output.resolve().name,
            arms=tuple(arms.values()),
            control=config.control,
            metric=_METRIC,
            trials=config.trials,
            tuning_seeds=tuple(config.tuning_seeds),
            leaders=config.leaders,
            seeds=tuple(config.seeds),
            budgets=tuple(sorted(config.budgets, reverse=True)),
            popularity_bounds=tuple(config.popularity_bounds),
            length_bounds=tuple(config.length_bounds),
            facts={
                "config": config.model_dump(mode="json"),
                "train": _without_rates(trees[config.control], tuned[config.control]),
                "num_steps": self.num_steps,
                "fingerprint": self.fingerprint,
                "sources_hashes": self.sources_hashes,
                "torch": torch.__version__,
            },
        )

    def _resolved(self, arm: Arm) -> dict[str, Any]:
        """The arm's settings at the middle of its grids."""
        rates = {name: values[len(values) // 2] for name, values in arm.grids.items()}
        asked = Asked(arm.name, "final", 1.0, 0, None, rates)
        return self.settings(asked, self._config.output).model_dump(mode="json")


class Runs:
    """Carries out what a comparison asks for, and keeps ``results.parquet`` up to date, ``targets.parquet`` beside it.

    Args:
        config: of the comparison.
        python: starts a module of this repository; its name and arguments follow.

    Raises:
        ValueError: as `Experiment`, or ``results.parquet`` in the output is damaged.
    """

    def __init__(self, config: CompareConfig, python: Sequence[str] = (sys.executable, "-m")) -> None:
        self._config = config
        self._experiment = Experiment(config)
        self._python = tuple(python)
        self.design = self._experiment.design
        earlier = read_comparison(config.output) if (config.output / RESULTS).is_file() else None
        if earlier is not None:
            self._check_data(earlier)
        self._kept = Kept(earlier.runs if earlier else (), self.design, key=_identity, stands=self._stands)
        write_targets(config.output, self._experiment.targets)
        self._planned = self._plan()
        total = sum(count * self._experiment.steps(budget) for (_, budget), count in self._planned.items())
        self.progress = Progress("compare", "steps", total=total)
        self._slots = slots(
            config.parallel_runs, ranks=config.ranks, devices=torch.cuda.device_count(), cores=available_cores()
        )
        self._machine = _machine(config.ranks, len(self._slots))
        self._num_reused = 0

    @property
    def comparison(self) -> Comparison:
        """All that is known so far."""
        return Comparison(self.design, tuple(self._kept), self._experiment.targets)

    def folder(self, run: str) -> Path:
        """Where a run writes."""
        return self._config.output / "runs" / run

    def execute(self, asked: Sequence[Asked]) -> list[RunResult]:
        """Run what is asked and not known: an `muonrec.comparison.tuning.Execute`.

        Raises:
            ValueError: two arms did not start alike, or were not ranked on the same targets.
            KeyboardInterrupt: what ran was stopped, and goes on with the next start.
        """
        wanted = [self._identify(ask) for ask in asked]
        self._expect(wanted)
        jobs: dict[Path, tuple[Job, list[RunResult]]] = {}
        for run in wanted:
            if self._reuse(run):
                self.progress.expect_less(run.num_steps)
                self._num_reused += 1
            else:
                job = self._job(run)
                jobs.setdefault(job.folder, (job, []))[1].append(run)  # several, where arms have the same settings
        self._write()
        if jobs:
            logger.info("%d runs, %d at a time; %d known so far", len(jobs), len(self._slots), self._num_reused)
        queue = Queue(self._slots, self.progress, tries=self._config.tries)
        queue.run([job for job, _ in jobs.values()], lambda job, ended: self._record(job, jobs[job.folder][1], ended))
        return [self._kept.like(run) or run for run in wanted]

    def check(self, asked: Asked) -> None:
        """Raises ValueError: the rates make no valid config."""
        self._experiment.settings(asked, self._config.output)

    def finish(self) -> Comparison:
        """The comparison, once nothing more is asked."""
        self._kept.let_go()
        self._write()
        return self.comparison

    def _plan(self) -> dict[tuple[Stage, float], int]:
        """How many runs of each stage and budget are to be expected, before any search says how many it takes."""
        design = self.design
        points = [min(design.trials, math.prod(map(len, arm.grids.values()))) for arm in design.arms]
        # Leaders with the other seeds, and about as many that come from other arms or from beyond a grid.
        leaders = [min(design.leaders, own) * len(design.tuning_seeds) for own in points]
        counts: dict[Stage, int] = {"tune": sum(points + leaders), "final": len(design.arms) * len(design.seeds)}
        return {(stage, budget): count for budget in design.budgets for stage, count in counts.items()}

    def _expect(self, wanted: Sequence[RunResult]) -> None:
        """Correct what the progress expects: by what is asked beyond the plan, or will not be asked any more."""
        for run in wanted:
            place = (run.stage, run.budget)
            if not self._planned[place]:
                self.progress.expect_less(-run.num_steps)
            self._planned[place] = max(self._planned[place] - 1, 0)
        for budget in {run.budget for run in wanted if run.stage == "final"}:  # after these nothing more is asked of it
            for stage in ("tune", "final"):
                self.progress.expect_less(self._planned[stage, budget] * self._experiment.steps(budget))
                self._planned[stage, budget] = 0

    def _check_data(self, earlier: Comparison) -> None:
        then, now = earlier.design.facts.get("fingerprint"), self._experiment.fingerprint
        if then not in (None, now):
            raise ValueError(
                f"the runs in {self._config.output} are of another data set (fingerprint {str(then)[:12]}) than "
                f"{self._experiment.data_folder} holds ({now[:12]}); compare into another output"
            )

    def _stands(self, run: RunResult) -> bool:
        """Whether an earlier run would come out the same today."""
        now = self._identify(Asked(run.arm, run.stage, run.budget, run.seed, run.trial, run.rates))
        return run.config_hash == now.config_hash and run.sources_hash in self._accepted(now)

    def _accepted(self, run: RunResult) -> set[str]:
        return {run.sources_hash, *self._config.accept_sources}

    def _identify(self, asked: Asked) -> RunResult:
        """The run that is asked for, without results."""
        config_hash = self._experiment.config_hash(self._experiment.settings(asked, self._config.output))
        sources_hash = self._experiment.sources_hashes[asked.stage]
        return RunResult(
            f"{config_hash}-{sources_hash}",
            **vars(asked),
            config_hash=config_hash,
            sources_hash=sources_hash,
            num_steps=self._experiment.steps(asked.budget),
        )

    def _reuse(self, run: RunResult) -> bool:
        """Take over the result of a run with the same settings and sources, if there is one."""
        for known in self._kept:
            is_whole = known.status == "diverged" or (known.status == "done" and (run.stage == "tune" or known.test))
            if known.config_hash == run.config_hash and known.sources_hash in self._accepted(run) and is_whole:
                self._kept.add(_named(known, run))
                return True
        return False

    def _job(self, run: RunResult) -> Job:
        """What trains a run, and evaluates it if it is final; its config is written into its folder."""
        folder = self.folder(run.run)
        asked = Asked(run.arm, run.stage, run.budget, run.seed, run.trial, run.rates)
        folder.mkdir(parents=True, exist_ok=True)
        settings = self._experiment.settings(asked, folder)
        (folder / "config.yaml").write_text(to_yaml(settings))
        ranks = str(self._config.ranks)
        launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "-m")
        start = (*self._python, *(launcher if self._config.ranks > 1 else ()))
        commands = [(*start, "pipeline.train", str(folder / "config.yaml"))]
        if run.stage == "final":
            mask = f"mask_seen={str(settings.validation.mask_seen).lower()}"
            commands.append((*start, "pipeline.eval", str(folder), mask))
        if not (folder / "checkpoints").exists() and not (folder / METRICS).exists():
            (folder / QUEUE_STATE).unlink(missing_ok=True)  # a trial whose checkpoints were deleted is trained again
        return Job(folder, tuple(commands), run.num_steps, _name(run))

    def _record(self, job: Job, runs: Sequence[RunResult], ended: Ended) -> None:
        """Keep what a run left, once it is seen to be comparable."""
        run = dataclasses.replace(
            runs[0], status=ended.status, fault=ended.fault, wall_s=ended.wall_s, machine=self._machine
        )
        if ended.status == "failed":
            logger.error("%s failed, the others go on: %s", job.name, ended.fault.splitlines()[-1])
        else:
            run, targets = collect(job.folder, run, self.design.metric)
            if targets is not None:
                self._check_targets(job, targets)
            check_fingerprints(self.design, [*self.comparison.current, run])
        for other in runs:
            self._kept.add(_named(run, other))
        self._write()
        if ended.status == "done":
            what = f"validation {run.valid.get(self.design.metric, float('nan')):.4f}"
            if run.test:
                what += f", test {run.test[self.design.metric]:.4f}"
            logger.info("%s: %s, %.0f s", job.name, what, run.wall_s)
            if not self._config.keep_checkpoints:
                shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
        elif ended.status == "diverged":
            logger.warning("%s diverged", job.name)

    def _check_targets(self, job: Job, targets: dict[str, np.ndarray]) -> None:
        wanted = self._experiment.targets
        if not all(np.array_equal(column, targets[name]) for name, column in wanted.items()):
            raise ValueError(
                f"{job.folder} was not ranked on the test targets of {self._experiment.data_folder}, which has changed "
                "since this start; compare into another output"
            )

    def _write(self) -> None:
        write_results(self._config.output, self.design, self._kept)


def _without_rates(tree: dict[str, Any], tuned: Sequence[str]) -> dict[str, Any]:
    """Settings for people, who would take a value in the place of a tuned rate for the one that was used."""
    tree = copy.deepcopy(tree)
    for path in tuned:
        set_at(tree, path, "tuned")
    return tree


def targets_of_test(sequences: Sequences) -> dict[str, np.ndarray]:
    """What ``ranks.parquet`` of the eval stage says of the test targets of a data set, in its order."""
    rows, places = sequences.locate(evaluation_targets(sequences, "test"), "test")
    targets = sequences.values[sequences.offsets[rows] + places].astype(np.int64)
    return {
        "user_id": rows,
        "target": targets,
        "history_length": places,
        "target_train_count": sequences.item_train_counts[targets],
    }


@functools.cache
def _contents_hash(source: Path) -> str:
    """Hash of what a run starts from: of a file, or of the marker of the newest checkpoint, which hashes its files.

    Raises:
        ValueError: there is neither.
    """
    path: Path | None = source
    if source.is_dir():
        folders = [source] if checkpoint.is_committed(source) else checkpoint.newest_first(source / "checkpoints")
        path = folders[0] / MARKER if folders else None
    if path is None or not path.is_file():
        raise ValueError(f"init_from={source} is no run with a finished checkpoint, no checkpoint and no file")
    return record_files(path.parent, [path.name])[path.name].sha256[:12]


def _machine(ranks: int, at_once: int) -> str:
    """What the seconds of a run depend on, for people."""
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    else:
        known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
        names = [line.partition(":")[2].strip() for line in known.splitlines() if line.startswith("model name")]
        processor = f"{available_cores()} cores of {names[0] if names else platform.machine()}"
    return f"{processor}, torch {torch.__version__}, {at_once} at once of {ranks} ranks"


def _identity(run: RunResult) -> tuple[object, ...]:
    return (run.arm, run.stage, run.budget, run.seed, run.trial, run.config_hash)


def _named(result: RunResult, run: RunResult) -> RunResult:
    """``result`` as that of ``run``, which has the same settings."""
    asked = {field.name: getattr(run, field.name) for field in dataclasses.fields(Asked)}
    return dataclasses.replace(result, **asked)


def _name(run: RunResult) -> str:
    which = f"{f'trial {run.trial}, ' if run.stage == 'tune' else ''}seed {run.seed} at budget {run.budget:g}"
    return f"{run.arm}, {which} ({', '.join(f'{name} {rate:g}' for name, rate in run.rates.items())})"
