"""Stage ``data``: raw logs to Parquet sequences and a manifest.

    python -m pipeline.data configs/demo/sasrec.yaml [data.k_core=5 ...]

Reads the section ``data`` of the config and nothing else of it. A repeated run with the same source and settings is
recognised and skipped; a folder with other data is replaced only once the new data is complete.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pydantic
from upath import UPath

from muonrec.config import Config, parse_config, read_yaml
from muonrec.data.download import fetch
from muonrec.data.engines import EngineName
from muonrec.data.events import READERS, AmazonSource, FileSource, MovielensSource
from muonrec.data.items import METADATA, AmazonItems, FileItems, MovielensItems, read_items
from muonrec.data.manifest import (
    ITEMS,
    SCHEMA_VERSION,
    USERS,
    Ancestor,
    BestPossible,
    ItemMetadata,
    Manifest,
    describe_file,
    read_manifest,
    verify_dataset,
    write_manifest,
)
from muonrec.data.places import Place
from muonrec.data.rejected import RejectedRows
from muonrec.data.replacement import put_right, replaced_folder
from muonrec.data.semantic_ids.build import build_semantic_ids
from muonrec.data.semantic_ids.config import SemanticIdsConfig
from muonrec.data.sequences import EventStore, LeaveOneOut, RatioSplit, Split, Ties
from muonrec.data.shards import shard_name, write_shards, write_table
from muonrec.data.synthetic import SyntheticSource, best_possible, read_synthetic
from muonrec.data.text import OnShare, describe_sources, source_files
from muonrec.runlog import Progress, configure_logging, run_stage
from muonrec.settings_help import settings_help

logger = logging.getLogger("pipeline.data")

Source: TypeAlias = Annotated[FileSource | SyntheticSource, pydantic.Field(discriminator="format")]


class DataConfig(Config):
    """Section ``data``.

    Attributes:
        source: where the events come from; ``format`` says of which kind it is.
        output: folder of the data set, or its URL on an object store (``s3://BUCKET/data``, of any fsspec file system).
        work: folder where a data set for an object store is built, which Spark's nodes must share; null: the system's
            temporary one. Other data sets are built beside the output.
        items: where the items' titles, categories, texts, ... come from, by ``format``, too; null: nowhere. They stand
            in items.parquet and change nothing else.
        extends: folder of an earlier data set, whose users and items keep their rows so that a model of it goes on
            with this one; new ones are appended. The source is the log to train on now, with or without the old events.
        max_rejected_share: rows that may be no events; all are listed beside the output. One in a thousand is less
            than the seed moves a metric, and a wrong column, unit or delimiter spoils nearly every row.
        repeats: ``keep`` what a user meets again, or ``drop_later``: its first event with each item stays.
        k_core: users and items keep at least so many events; 0 and 1 keep all.
        split: ``leave_one_out``, ``{name: global_time, ...}`` or ``{name: ratio, ...}``.
        ties: order of a user's events of one second: ``shuffle`` (seeded), ``file_order``, or ``drop`` them all.
        seed: of the shuffle of ties.
        num_shards: files that the users are dealt to.
        semantic_ids: codes of every item for generative models, by what they are made of; null: none. They are a set of
            files of their own, and change nothing of the data set.
        engine: ``duckdb``, in this process, or ``spark``, on the nodes of the component ``data`` or on your own cluster
            (`muonrec.data.engines.Spark`); does not change the result.
        memory_limit: of the database, or of each process of Spark; does not change the result.
    """

    source: Source
    output: Place
    work: Path | None = None
    items: Annotated[FileItems, pydantic.Field(discriminator="format")] | None = None
    extends: Place | None = None
    max_rejected_share: float = pydantic.Field(default=0.001, ge=0, le=1)
    repeats: Literal["keep", "drop_later"] = "keep"
    k_core: int = pydantic.Field(default=0, ge=0)
    split: Split = LeaveOneOut()
    ties: Ties = "shuffle"
    seed: int = 0
    num_shards: int = pydantic.Field(default=16, ge=1, le=99_999)
    semantic_ids: SemanticIdsConfig | None = None
    engine: EngineName = "duckdb"
    memory_limit: Annotated[str, pydantic.Field(pattern=r"^\d+(\.\d+)? ?[KMGT]i?B$")] = "4GiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.data",
        description="Raw logs to parquet sequences and a manifest.",
        epilog="settings and their defaults; data.source.format=csv chooses a section that is one of several,\n"
        f"data.source.delimiter=';' sets what is in it:\n{settings_help(DataConfig, prefix='data.')}\n\nexamples:\n"
        "  python -m pipeline.data configs/demo/sasrec.yaml\n"
        "  python -m pipeline.data configs/amazon-beauty/sasrec.yaml data.source.path=Beauty.txt data.k_core=10\n"
        "  python -m pipeline.data configs/ml-100k/tiger.yaml data.semantic_ids.method=rqvae\n"
        '  python -m pipeline.data my.yaml \'data.source={format: csv, path: "logs/*.csv", '
        "columns: {user_id: user, item_id: sku, timestamp_s: ts}, timestamp_unit: ms}'\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file with a section `data`")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings by full path, such as data.k_core=5"
    )
    options = parser.parse_args(arguments)
    configure_logging()
    return run_stage(lambda: build(load_data_config(options.config, options.overrides)))


def load_data_config(path: str | Path, overrides: Sequence[str] = ()) -> DataConfig:
    """Read the section ``data`` of a YAML file; the other sections belong to other stages.

    Raises:
        ValueError: no such file or section, or a setting that is unknown or out of range.
    """
    tree = read_yaml(path, overrides)
    for override in overrides:
        if not override.startswith(("data.", "data=")):
            logger.warning("%s is nothing to this stage, whose settings begin with data.", override)
    if not isinstance(tree.get("data"), dict):
        raise ValueError(
            f"config {path} has no section 'data' (found {', '.join(tree) or 'nothing'}); "
            "add one with source and output"
        )
    return parse_config(DataConfig, tree["data"], source=f"section 'data' of {path}", prefix="data.")


def build(config: DataConfig) -> None:
    """Build what ``config`` asks for: the data set, then the semantic IDs of its items."""
    build_dataset(config)
    if config.semantic_ids is not None:
        build_semantic_ids(config.semantic_ids, config.output)


def build_dataset(config: DataConfig) -> Manifest:
    """Build the data set of ``config``, or return its manifest where it is there already.

    Raises:
        ValueError: the source, the settings or the output folder do not allow it; the output is as it was then.
        OSError: the source was to be downloaded, and cannot be.
    """
    put_right(config.output)
    ancestors = _ancestors(config)
    ancestor = ancestors[0] if ancestors else None
    for setting, asked in (("source", config.source), ("items", config.items)):
        if isinstance(asked, AmazonSource | MovielensSource | AmazonItems | MovielensItems) and asked.download:
            fetch(
                asked.format,
                asked.download,
                Path(asked.path),
                setting=f"data.{setting}",
                accept_terms=asked.accept_terms,
            )
    source = describe_source(config)
    fingerprint = fingerprint_of(config, source, ancestor)
    items_source = None if config.items is None else _describe_files(config.items, setting="data.items")
    items_fingerprint = _items_fingerprint(config, items_source)
    if (manifest := _up_to_date(config.output, fingerprint, items_fingerprint)) is not None:
        logger.info("%s is up to date (fingerprint %s...): skipped", config.output, fingerprint[:12])
        return manifest

    logger.info("building %s from %s", config.output, _where(source))
    started = time.monotonic()
    phases = _Phases()
    with replaced_folder(config.output, scratch=config.work) as folder:
        work = folder / "work"
        work.mkdir()
        with (
            RejectedRows(_rejected_path(config.output)) as rejected,
            EventStore(work, memory_limit=config.memory_limit, engine=config.engine) as store,
        ):
            with phases.phase("read", total=getattr(config.source, "num_events_expected", None)) as progress:
                reader = _open_source(config, progress, rejected)
                num_source_events = store.load(reader, on_events=progress.advance)
            num_rejected = rejected.check(num_source_events, max_share=config.max_rejected_share)
            with phases.phase("order", num_events=num_source_events):
                num_duplicates = store.drop_duplicates()
                num_repeats = store.drop_repeats() if config.repeats == "drop_later" else 0
                num_ties = store.drop_ties() if config.ties == "drop" else 0
                core_rounds = store.keep_core(config.k_core)
                num_users, num_items = store.build_vocabularies(config.extends)
                time_range_s = store.time_range_s()
                split = store.split(config.split, ties=config.ties, seed=config.seed)
            num_events = core_rounds[-1]["num_events"]
            metadata = None
            if config.items is not None:
                with phases.phase("items", unit="rows") as progress:
                    metadata = _load_metadata(config, store, progress, rejected)
            with phases.phase("write", total=num_events) as progress:
                events = store.ordered(ties=config.ties, seed=config.seed, num_shards=config.num_shards)
                all_targets = isinstance(config.split, RatioSplit)
                statistics = write_shards(
                    events,
                    folder,
                    num_shards=config.num_shards,
                    num_items=num_items,
                    all_targets=all_targets,
                    on_events=progress.advance,
                )
                described = _write_vocabularies(store, folder, statistics.item_train_counts, described=bool(metadata))
        shutil.rmtree(work)

        names = [ITEMS, USERS, *(shard_name(shard, config.num_shards) for shard in range(config.num_shards))]
        seconds = time.monotonic() - started
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            fingerprint=fingerprint,
            num_users=num_users,
            num_items=num_items,
            num_events=num_events,
            num_events_per_part=statistics.num_events,
            all_targets=all_targets,
            num_users_with_target=statistics.num_users_with_target,
            num_targets=statistics.num_targets,
            num_tied_targets=statistics.num_tied_targets,
            num_items_unseen_in_training=int((statistics.item_train_counts == 0).sum()),
            num_source_events=num_source_events,
            num_rejected_by_kind=num_rejected,
            num_duplicates_dropped=num_duplicates,
            num_repeats_dropped=num_repeats,
            num_ties_dropped=num_ties,
            core_rounds=core_rounds,
            history_length_quantiles=statistics.length_quantiles(),
            time_range_s=time_range_s,
            tied_event_share=None if time_range_s is None else statistics.num_tied_events / num_events,
            split=split,
            num_shards=config.num_shards,
            files={name: describe_file(folder / name) for name in names},
            config=config.model_dump(mode="json", exclude={"semantic_ids"}),
            source=source,
            ancestor=ancestor,
            older_ancestors=ancestors[1:],
            item_metadata=metadata
            and ItemMetadata(fingerprint=items_fingerprint, source=items_source, **metadata, **described),
            best_possible=_best_possible(config, complete=num_events == num_source_events),
            rates={**phases.rates, "total_events_per_s": round(num_source_events / seconds, 1)},
        )
        write_manifest(folder, manifest)
    _log_summary(config.output, manifest, seconds)
    return manifest


def describe_source(config: DataConfig) -> dict[str, Any]:
    """What identifies the source: path, size and sha256 of every input file, or the generator's parameters."""
    if isinstance(config.source, SyntheticSource):
        return {"format": "synthetic", "parameters": config.source.model_dump(mode="json", exclude={"format"})}
    return _describe_files(config.source, setting="data.source")


def _where(source: dict[str, Any]) -> str:
    if not (files := source.get("files")):
        return "a synthetic log"
    size = f"{sum(file['num_bytes'] for file in files) / 1e6:,.1f} MB of {source['format']}"
    return f"{files[0]['path']} ({size})" if len(files) == 1 else f"{len(files):,} files ({size})"


def _describe_files(source: FileSource | FileItems, *, setting: str) -> dict[str, Any]:
    return {"format": source.format, "files": describe_sources(source_files(source.path, setting=setting))}


def fingerprint_of(config: DataConfig, source: dict[str, Any], ancestor: Ancestor | None = None) -> str:
    """Sha256 over what decides the shards: schema version, settings, contents and ancestor; where they lie does not."""
    settings = deciding_settings(config.model_dump(mode="json"))
    contents = [file["sha256"] for file in source.get("files", [])]
    known = None if ancestor is None else ancestor.fingerprint
    text = json.dumps([SCHEMA_VERSION, settings, contents, known], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _items_fingerprint(config: DataConfig, source: dict[str, Any] | None) -> str | None:
    """Sha256 over what decides the items' metadata where the items are the same."""
    if config.items is None or source is None:
        return None
    settings = config.items.model_dump(mode="json", exclude=set(_PLACES))
    known = None if config.extends is None else read_manifest(config.extends).item_metadata
    text = json.dumps([settings, [file["sha256"] for file in source["files"]], known and known.fingerprint])
    return hashlib.sha256(text.encode()).hexdigest()


_PLACES = ("path", "download", "accept_terms")  # where a source is, not what it holds


def deciding_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a data stage without those under which the sequences would be the same."""
    settings = {**settings, "source": {**settings["source"]}, "extends": settings.get("extends") is not None}
    for name in ("output", "work", "items", "semantic_ids", "engine", "memory_limit", "max_rejected_share"):
        settings.pop(name, None)
    for name in _PLACES:
        settings["source"].pop(name, None)
    return settings


def _ancestors(config: DataConfig) -> list[Ancestor]:
    if config.extends is None:
        return []
    if str(config.extends.resolve()) == str(config.output.resolve()):
        raise ValueError(f"data.extends {config.extends} is the output itself; pass another folder as data.output")
    manifest = verify_dataset(config.extends)
    nearest = Ancestor(**manifest.model_dump(include={"fingerprint", "num_users", "num_items"}))
    return [nearest, *manifest.ancestors]


def _rejected_path(output: Path | UPath) -> Path | UPath:
    # Beside the data set and not in it: a run that is stopped leaves the one before, and still must show its rows.
    return output.with_name(f"{output.name}.rejected.parquet")


def _open_source(config: DataConfig, progress: Progress, rejected: RejectedRows) -> pa.RecordBatchReader:
    """The source's events; files know their bytes, from which the number of events that are to come is estimated."""
    if isinstance(config.source, SyntheticSource):
        return read_synthetic(config.source)

    return READERS[config.source.format](config.source, on_rejected=rejected, on_share=_expecting(progress))


def _expecting(progress: Progress) -> OnShare:
    def on_share(share: float) -> None:
        if share:
            progress.expect(progress.done / share)

    return on_share


def _load_metadata(config: DataConfig, store: EventStore, progress: Progress, rejected: RejectedRows) -> dict[str, Any]:
    """Store what ``data.items`` says of the items; returns the counts of `ItemMetadata` that are known by now."""
    assert config.items is not None
    reader = read_items(config.items, on_rejected=rejected, on_share=_expecting(progress))
    num_rows, num_duplicates = store.load_metadata(reader, config.extends, on_rows=progress.advance)
    num_rejected = rejected.check(num_rows, max_share=config.max_rejected_share, what="items", setting="items")
    return {"num_rows": num_rows, "num_duplicates": num_duplicates, "num_rejected_by_kind": num_rejected}


def _up_to_date(output: Path | UPath, fingerprint: str, items_fingerprint: str | None) -> Manifest | None:
    try:
        found = read_manifest(output)
        if (found.fingerprint, found.item_metadata and found.item_metadata.fingerprint) != (
            fingerprint,
            items_fingerprint,
        ):
            logger.info(
                "%s holds the data of another config or source: it is replaced once the new data is complete", output
            )
            return None
    except ValueError:
        return None
    try:
        return verify_dataset(output)
    except ValueError as error:
        logger.warning("%s: building it again", error)
        return None


def _write_vocabularies(
    store: EventStore, folder: Path, item_train_counts: np.ndarray, *, described: bool
) -> dict[str, Any]:
    """Write users and items; returns the counts of `ItemMetadata` that are known by then."""
    id_fields = {kind: pa.field(f"{kind}_id", pa.int64(), nullable=False) for kind in ("item", "user")}
    raw_id = pa.field("raw_id", pa.string(), nullable=False)
    num_train_events = pa.field("num_train_events", pa.int64(), nullable=False)

    metadata = METADATA if described else ()
    num_by_column = {column.name: 0 for column in metadata}
    num_described = 0

    def items() -> Iterator[pa.RecordBatch]:
        nonlocal num_described
        for batch in store.described_items(list(num_by_column)) if described else store.vocabulary("item"):
            known = {name: batch.column(name).is_valid().to_numpy(zero_copy_only=False) for name in num_by_column}
            for name, is_known in known.items():
                num_by_column[name] += int(is_known.sum())
            num_described += int(np.logical_or.reduce(list(known.values())).sum()) if known else 0
            counts = pa.array(item_train_counts[batch.column("item_id").to_numpy()])
            yield batch.append_column("num_train_events", counts)

    write_table(folder / ITEMS, items(), pa.schema([id_fields["item"], raw_id, num_train_events, *metadata]))
    write_table(folder / USERS, store.vocabulary("user"), pa.schema([id_fields["user"], raw_id]))
    return {"num_items_described": num_described, "num_items_by_column": num_by_column}


def _best_possible(config: DataConfig, *, complete: bool) -> BestPossible | None:
    """Known only while the last event of a user is the test target and nothing of the law was filtered away."""
    if not isinstance(config.source, SyntheticSource):
        return None
    if not isinstance(config.split, LeaveOneOut):
        logger.warning("best possible metrics are known for split leave_one_out only: the manifest says null")
        return None
    if not complete:
        logger.warning(
            "distinct, repeats, ties or k_core=%d dropped synthetic events: best possible metrics are null",
            config.k_core,
        )
        return None
    return best_possible(config.source)


def _kinds(num_by_kind: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(num_by_kind.items()))


def _log_summary(output: Path | UPath, manifest: Manifest, seconds: float) -> None:
    parts, targets = manifest.num_events_per_part, manifest.num_targets
    logger.info(
        "%s: %s users, %s items, %s events (of %s read, %s duplicates)",
        output,
        *_grouped(manifest.num_users, manifest.num_items, manifest.num_events),
        *_grouped(manifest.num_source_events, manifest.num_duplicates_dropped),
    )
    if manifest.num_rejected_by_kind:
        logger.warning(
            "%s rows were no events (%s): listed in %s", *_grouped(sum(manifest.num_rejected_by_kind.values())),
            _kinds(manifest.num_rejected_by_kind), _rejected_path(output),
        )  # fmt: skip
    if (metadata := manifest.item_metadata) is not None:
        logger.info(
            "metadata: %s rows%s describe %s of %s items (%s)",
            *_grouped(metadata.num_rows),
            "" if manifest.ancestor is None else " and what was known before",
            *_grouped(metadata.num_items_described, manifest.num_items),
            ", ".join(f"{count:,} with {name}" for name, count in metadata.num_items_by_column.items() if count)
            or "none is in the log: are the ids the same?",
        )
        if metadata.num_rejected_by_kind:
            logger.warning(
                "%s rows of metadata were no items (%s): listed in %s",
                *_grouped(sum(metadata.num_rejected_by_kind.values())), _kinds(metadata.num_rejected_by_kind),
                _rejected_path(output),
            )  # fmt: skip
    if manifest.num_repeats_dropped or manifest.num_ties_dropped:
        logger.info(
            "left out %s repeats and %s events of unknown order",
            *_grouped(manifest.num_repeats_dropped, manifest.num_ties_dropped),
        )
    if (ancestor := manifest.ancestor) is not None:
        logger.info(
            "extends %s...: its %s users and %s items keep their rows, %s users and %s items are new",
            ancestor.fingerprint[:12],
            *_grouped(ancestor.num_users, ancestor.num_items),
            *_grouped(manifest.num_users - ancestor.num_users, manifest.num_items - ancestor.num_items),
        )
    logger.info(
        "split %s: %s train, %s valid, %s test events; %s valid, %s test targets; %s items unseen in training",
        manifest.split["name"],
        *_grouped(parts.train, parts.valid, parts.test, targets.valid, targets.test),
        *_grouped(manifest.num_items_unseen_in_training),
    )
    if not (targets.valid and targets.test):
        logger.warning(
            "no user has both a history and a held-out event: nothing can be validated or tested on this data"
        )
    if manifest.time_range_s is None:
        logger.info("the source has no times: a user's events are in the order of the file")
    if manifest.tied_event_share:
        logger.info(
            "%.1f %% of the events share user and second with another: ordered by data.ties=%s",
            100 * manifest.tied_event_share, manifest.config["ties"],
        )  # fmt: skip
    tied = manifest.num_tied_targets
    if tied.valid or tied.test:
        logger.warning(
            "%s of %s valid and %s of %s test targets share user and second with another event: which event is the "
            "target, and what its history ends with, was decided by data.ties=%s; data.ties=drop leaves them out",
            *_grouped(tied.valid, targets.valid, tied.test, targets.test), manifest.config["ties"],
        )  # fmt: skip
    if (best := manifest.best_possible) is not None:
        logger.info(
            "best possible: ndcg@10 %.4f, recall@10 %.4f over %d users",
            best.ndcg_at_10, best.recall_at_10, best.num_users,
        )  # fmt: skip
    logger.info("done in %.1f s, %s events/s", seconds, f"{manifest.rates['total_events_per_s']:,.0f}")


def _grouped(*counts: int) -> tuple[str, ...]:
    """Counts as people read them."""
    return tuple(f"{count:,}" for count in counts)


def check_same_data(config: DataConfig, manifest: Manifest) -> None:
    """Refuse a data set that was built with other settings than ``config`` asks for.

    Raises:
        ValueError: names the settings that differ.
    """
    asked, found = deciding_settings(config.model_dump(mode="json")), deciding_settings(manifest.config)
    pairs = [("data.", asked, found), ("data.source.", asked.pop("source"), found.pop("source"))]
    differing = [
        f"{prefix}{name} (asked {ours.get(name)!r}, found {theirs.get(name)!r})"
        for prefix, ours, theirs in pairs
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise ValueError(
            f"{config.output} was built with other settings: {', '.join(differing)}; "
            "run python -m pipeline.data CONFIG again, or pass another data.output"
        )


_PHASES = {
    "read": "reading events",
    "order": "distinct, k-core, vocabulary, split",
    "items": "reading item metadata",
    "write": "writing shards",
}


class _Phases:
    """Named phases: progress while they last, a log line and a rate at the end of each."""

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}

    @contextmanager
    def phase(
        self, name: str, *, unit: str = "events", total: int | None = None, num_events: int = 0
    ) -> Iterator[Progress]:
        """Time a phase; ``num_events`` is for one that does them all at once."""
        with Progress(_PHASES[name], unit, total=total) as progress:
            yield progress
            progress.advance(num_events)
            self.rates[f"{name}_{unit}_per_s"] = round(progress.rate, 1)
            logger.info(
                "%s: %s %s, %s %s/s", _PHASES[name], f"{progress.done:,.0f}", unit, f"{progress.rate:,.0f}", unit
            )


if __name__ == "__main__":
    sys.exit(main())
