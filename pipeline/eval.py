"""The eval stage: checkpoint -> metrics.json -> report.html; `torchrun -m pipeline.eval RUN [key=value ...]`."""

# N = users, K = places of a list

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator
from rich.console import Console
from rich.table import Table
from upath import UPath

import muonrec
from muonrec.config import Config, parse_config, parse_value
from muonrec.data.loader import evaluation_batches, evaluation_targets, seen_items
from muonrec.data.manifest import ITEMS, USERS
from muonrec.data.places import parquet_of
from muonrec.data.shards import Sequences
from muonrec.generation import CodeDecoder, rank_held_out
from muonrec.mesh import Ranks, join_ranks
from muonrec.metrics import bootstrap_interval, breakdown, coverage, groups_between, metrics_per_user
from muonrec.report import write_report
from muonrec.retrieval import Encoder, PopularityEncoder, RankedTargets, rank_by_popularity
from muonrec.runlog import Progress, configure_logging, run_stage
from muonrec.runs import METRICS, RANKS, Ranked, read_runs, write_ranks
from muonrec.settings_help import settings_help
from pipeline.building import as_read_by
from pipeline.data import check_same_data
from pipeline.train import load_run
from pipeline.train_config import TrainConfig

logger = logging.getLogger(__name__)

_CONFIDENCE = 0.95
# Users whose recommendations are turned into rows at once.
_USERS_AT_ONCE = 65_536


class EvalConfig(Config):
    """What is evaluated, and how.

    Attributes:
        run: output folder of the train stage; receives metrics.json, ranks.parquet and report.html.
        part: which held-out items.
        checkpoint: the best on validation, or the last.
        k: lengths of the lists.
        mask_seen: leave out what the user has had before. Off, as in most published tables: compare like with like.
        batch_size: users encoded at once on one rank.
        num_beams: of a model that generates: prefixes that its search keeps, and items of its lists; without it the
            number in the model's own settings.
        item_chunk, user_block: items and users scored at once; they change memory and time, never a digit.
        num_resamples, seed: of the bootstrap.
        popularity_bounds, length_bounds: groups of the breakdowns, by training events of the held-out item and by
            events of the history.
        compare: other runs for the report; the first is the control of the paired differences.
        recommend: parquet file to write the best items of each user to.
        recommend_k: items per user in it.
    """

    run: Path
    part: Literal["valid", "test"] = "test"
    checkpoint: Literal["best", "last"] = "best"
    k: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [5, 10, 20]
    mask_seen: bool = False
    batch_size: int = Field(default=512, ge=1)
    num_beams: int | None = Field(default=None, ge=1)
    item_chunk: int = Field(default=8192, ge=1)
    user_block: int = Field(default=2048, ge=1)
    num_resamples: int = Field(default=1000, ge=1)
    seed: int = Field(default=0, ge=0)
    popularity_bounds: list[int] = [5, 20, 100, 500]
    length_bounds: list[int] = [5, 10, 20, 50]
    compare: list[Path] = []
    recommend: Path | None = None
    recommend_k: int = Field(default=10, ge=1)

    @field_validator("k")
    @classmethod
    def _increasing(cls, k: list[int]) -> list[int]:
        return sorted(set(k))

    @property
    def main_metric(self) -> str:
        """Metric of the headline and the breakdowns."""
        return f"ndcg@{10 if 10 in self.k else self.k[0]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.eval",
        description="Checkpoint to metrics.json, ranks.parquet and report.html in the run's folder.",
        epilog=f"settings and their defaults:\n{settings_help(EvalConfig, leave_out=('run',))}\n\n"
        "examples:\n"
        "  python -m pipeline.eval out/demo/muon\n"
        "  torchrun --nproc-per-node 2 -m pipeline.eval out/demo/muon 'compare=[out/demo/adamw]'\n"
        "  python -m pipeline.eval out/demo/muon part=valid mask_seen=true 'k=[10,50]' recommend=top10.parquet\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="output folder of the train stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, see below")
    options = parser.parse_args(arguments)
    configure_logging()

    def evaluate_on_ranks() -> None:
        with join_ranks() as ranks:
            configure_logging(is_first=ranks.is_first)
            evaluate(load_eval_config(options.run, options.overrides), ranks)

    return run_stage(evaluate_on_ranks)


def evaluate(config: EvalConfig, ranks: Ranks) -> dict[str, Any] | None:
    """Evaluate one run and write its files; every rank must call it, the first returns what metrics.json holds."""
    check_outputs(config)
    model, run_config, sequences, step = load_run(config.run, config.checkpoint, ranks)
    check_same_data(run_config.data, sequences.manifest)
    check_lengths(config, sequences)
    logger.info("evaluating %s at step %d on the %s items, %d ranks", config.run, step, config.part, ranks.num_ranks)

    started = time.monotonic()
    ranked = rank_all(model, "model", config, run_config, sequences, ranks, num_beams=config.num_beams)
    seconds = time.monotonic() - started
    if config.mask_seen:
        popular = PopularityEncoder(sequences.item_train_counts, ranks.device)
        popularity = rank_all(popular, "popularity", config, run_config, sequences, ranks)
    else:
        popularity = rank_by_popularity(ranked, sequences.item_train_counts)
    if not ranks.is_first:
        return None

    found = {
        **protocol_of(config, sequences),
        "checkpoint": config.checkpoint,
        "checkpoint_step": step,
        "num_users": len(latest_of_each_user(ranked, config, sequences).user_ids),
        "num_targets": len(ranked.user_ids),
        "list_length": ranked.list_length,
        **summarize(ranked, config, sequences),
        "popularity": summarize(popularity, config, sequences),
        "best_possible": best_possible(config, sequences),
        "breakdowns": breakdowns(ranked, config, sequences),
        "seconds": seconds,
        "users_per_s": len(ranked.user_ids) / seconds,
        "num_ranks": ranks.num_ranks,
        "device": str(ranks.device),
        "config": config.model_dump(mode="json"),
        "versions": versions(),
    }
    write_json(config.run / METRICS, found)
    columns = per_user_columns(ranked, config, sequences)
    write_ranks(config.run / RANKS, Ranked(columns, protocol_of(config, sequences), ranked.list_length))
    if config.recommend is not None:
        latest = latest_of_each_user(ranked, config, sequences)
        write_recommendations(config.recommend, latest, config.recommend_k, run_config.data.output)
    report = write_report(config.run, read_runs([*config.compare, config.run]), main_metric=config.main_metric)
    print_results(found, config)
    logger.info("ranked %d targets in %.1f s; report in %s", len(ranked.user_ids), seconds, report)
    return found


def load_eval_config(run: str | Path, overrides: Sequence[str] = ()) -> EvalConfig:
    """The config of evaluating ``run``, from ``key=value`` overrides alone. Raises ValueError."""
    tree: dict[str, Any] = {"run": str(run)}
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator:
            raise ValueError(f"override {override!r} is not of the form key=value, such as part=valid")
        tree[key] = parse_value(override)
    return parse_config(EvalConfig, tree, source="the command line")


def check_outputs(config: EvalConfig) -> None:
    """Refuse before the work what could not be written after it, or compared with.

    Raises:
        ValueError: names the setting.
    """
    for other in config.compare:
        if not (other / "resolved.yaml").is_file():
            raise ValueError(f"compare={other} is not a run: it has no resolved.yaml; pass a train stage's output")
        if other.resolve() == config.run.resolve():
            raise ValueError(f"compare={other} is the run itself; pass other runs")
    if config.recommend is None:
        return
    if config.recommend.is_dir():
        raise ValueError(f"recommend={config.recommend} is a folder; pass the path of a file, such as top10.parquet")
    try:
        config.recommend.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own for each rank, which all try at once, and nothing left behind.
        with tempfile.TemporaryFile(dir=config.recommend.parent):
            pass
    except OSError as error:
        raise ValueError(f"recommend={config.recommend} cannot be written: {error}; pass another path") from None


def check_lengths(config: EvalConfig, sequences: Sequences) -> None:
    """Refuse lists longer than the catalogue, by ValueError: a recall over all items would be 1 for any model."""
    longest = {"k": max(config.k), "recommend_k": config.recommend_k if config.recommend is not None else 1}
    for name, length in longest.items():
        if length > sequences.num_items:
            raise ValueError(f"{name}={length} was asked but there are {sequences.num_items} items; lower {name}")


# Ranking --------------------------------------------------------------------------------------------------------------


def rank_all(
    model: Encoder | CodeDecoder,
    what: str,
    config: EvalConfig,
    run_config: TrainConfig,
    sequences: Sequences,
    ranks: Ranks,
    *,
    num_beams: int | None = None,
) -> RankedTargets:
    """Rank every held-out item of the part among all items; every rank must call it."""
    batches = evaluation_batches(
        sequences,
        config.part,
        max_length=run_config.model.max_length,
        batch_size=config.batch_size,
        ranks=ranks,
    )
    num_targets = len(evaluation_targets(sequences, config.part))
    with Progress(f"ranking by {what}", "users", total=num_targets, enabled=ranks.is_first) as progress:
        return rank_held_out(
            model,
            as_read_by(model, batches, sequences, config.part),
            ranks=ranks,
            k=max(*config.k, config.recommend_k if config.recommend is not None else 1),
            num_beams=num_beams,
            item_chunk=config.item_chunk,
            user_block=config.user_block,
            mask_seen=(lambda target_ids: seen_items(sequences, target_ids, config.part)) if config.mask_seen else None,
            progress=progress.move_to,
        )


# Numbers --------------------------------------------------------------------------------------------------------------


def protocol_of(config: EvalConfig, sequences: Sequences) -> dict[str, Any]:
    """What must be equal for two runs' numbers to be comparable."""
    return {
        "part": config.part,
        "mask_seen": config.mask_seen,
        "num_items": sequences.num_items,
        "fingerprint": sequences.manifest.fingerprint,
    }


def summarize(ranked: RankedTargets, config: EvalConfig, sequences: Sequences) -> dict[str, Any]:
    """Every metric with its interval, and the share of the catalogue that the lists show."""
    per_user = metrics_per_user(ranked, k=config.k)
    users_N, _ = sequences.locate(ranked.user_ids, config.part)
    assert ranked.topk_ids is not None
    return {
        "metrics": {
            name: bootstrap_interval(
                values_N, users_N, num_resamples=config.num_resamples, confidence=_CONFIDENCE, seed=config.seed
            )._asdict()
            for name, values_N in per_user.items()
        },
        "coverage": {f"coverage@{k}": coverage(ranked.topk_ids[:, :k], sequences.num_items) for k in config.k},
    }


def breakdowns(ranked: RankedTargets, config: EvalConfig, sequences: Sequences) -> dict[str, Any]:
    """The metrics of the main length by popularity of the held-out item and by length of the history."""
    length = config.main_metric.partition("@")[2]
    per_user = metrics_per_user(ranked, k=[int(length)])
    per_user = {name: per_user[name] for name in (config.main_metric, f"recall@{length}")}
    columns = per_user_columns(ranked, config, sequences)
    groups = {
        "training events of the held-out item": groups_between(columns["target_train_count"], config.popularity_bounds),
        "events of the history": groups_between(columns["history_length"], config.length_bounds),
    }
    return {
        title: breakdown(
            per_user,
            *group,
            columns["user_id"],
            num_resamples=config.num_resamples,
            confidence=_CONFIDENCE,
            seed=config.seed,
        )
        for title, group in groups.items()
    }


def best_possible(config: EvalConfig, sequences: Sequences) -> dict[str, Any] | None:
    """What the data set's own law allows, where it is known: for the test items, with nothing left out."""
    known = sequences.manifest.best_possible
    if known is None or config.part != "test" or config.mask_seen:
        return None
    return known.model_dump(by_alias=True)


def per_user_columns(ranked: RankedTargets, config: EvalConfig, sequences: Sequences) -> dict[str, np.ndarray]:
    """The columns of ranks.parquet; histories count in full, not only what the encoder was given of them."""
    rows, history_lengths = sequences.locate(ranked.user_ids, config.part)
    return {
        "user_id": rows,
        "target": ranked.targets,
        "num_greater": ranked.num_greater,
        "num_equal": ranked.num_equal,
        "history_length": history_lengths,
        "target_train_count": sequences.item_train_counts[ranked.targets],
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "muonrec": muonrec.__version__}
    for package in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# Files and terminal ---------------------------------------------------------------------------------------------------


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write ``tree`` so that the file appears whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield where to write instead of ``path``, which it becomes if the block ends well."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def latest_of_each_user(ranked: RankedTargets, config: EvalConfig, sequences: Sequences) -> RankedTargets:
    """One row per user, of its last target: a split may give a user several."""
    rows, _ = sequences.locate(ranked.user_ids, config.part)
    is_last = np.append(np.diff(rows) != 0, True)
    columns = {name: part[is_last] for name, part in vars(ranked).items() if isinstance(part, np.ndarray)}
    return dataclasses.replace(ranked, **{**columns, "user_ids": rows[is_last]})


def write_recommendations(path: Path, ranked: RankedTargets, k: int, dataset: Path | UPath) -> None:
    """Write the best ``k`` items of each user, a row each; ids as in the raw logs, rank from 1."""
    raw_users, raw_items = (
        pq.read_table(parquet_of(dataset / name), columns=["raw_id"]).column(0) for name in (USERS, ITEMS)
    )
    raw_users, raw_items = raw_users.combine_chunks(), raw_items.combine_chunks()
    assert ranked.topk_ids is not None and ranked.topk_scores is not None
    schema = pa.schema(
        [("user_id", raw_users.type), ("rank", pa.int32()), ("item_id", raw_items.type), ("score", pa.float32())]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for first in range(0, len(ranked.user_ids), _USERS_AT_ONCE):
            block = slice(first, first + _USERS_AT_ONCE)
            ids_NK, scores_NK = ranked.topk_ids[block, :k], ranked.topk_scores[block, :k]
            users, places = np.nonzero(ids_NK >= 0)
            columns = [
                raw_users.take(pa.array(ranked.user_ids[block][users])),
                pa.array(places + 1, pa.int32()),
                raw_items.take(pa.array(ids_NK[users, places])),
                pa.array(scores_NK[users, places]),
            ]
            writer.write_table(pa.table(columns, schema=schema))
    logger.info("wrote the best %d items of %d users to %s", k, len(ranked.user_ids), path)


def print_results(found: dict[str, Any], config: EvalConfig) -> None:
    """Show the metrics beside popularity and the best possible."""
    title = f"{config.run.resolve().name}: {config.part} items of {found['num_users']:,} users"
    title += f" among {found['num_items']:,} items"
    table = Table(title=title + (", seen left out" if config.mask_seen else ""), title_justify="left")
    table.add_column("metric")
    columns = (f"step {found['checkpoint_step']:,}", "95 % interval", "popularity", "best possible")
    for column in columns:
        table.add_column(column, justify="right")
    for name, value in found["metrics"].items():
        best = (found["best_possible"] or {}).get(name)
        table.add_row(
            name,
            f"{value['mean']:.4f}",
            f"{value['low']:.4f} – {value['high']:.4f}",
            f"{found['popularity']['metrics'][name]['mean']:.4f}",
            "" if best is None else f"{best:.4f}",
            style="bold" if name == config.main_metric else None,
        )
    for name, value in found["coverage"].items():
        table.add_row(name, f"{value:.1%}", "", f"{found['popularity']['coverage'][name]:.1%}", "")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
