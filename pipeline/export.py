"""The export: a run's weights -> one safetensors file; `python -m pipeline.export RUN weights.safetensors`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muonrec import checkpoint
from muonrec.runlog import configure_logging, run_stage
from pipeline.resuming import choose_checkpoints

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the export; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.export",
        description="Weights of a run, under the names of the unsharded model, for other programs or for init_from. "
        "One process; memory holds one shard of the checkpoint at a time.",
        epilog="example: python -m pipeline.export out/demo/muon weights.safetensors",
    )
    parser.add_argument("run", type=Path, help="output folder of the train stage")
    parser.add_argument("file", type=Path, help="safetensors file to write")
    parser.add_argument("--checkpoint", choices=["best", "last"], default="best", help="best on validation, or last")
    options = parser.parse_args(arguments)
    configure_logging()
    return run_stage(lambda: export(options.run, options.file, which=options.checkpoint))


def notes_of(progress: dict[str, Any]) -> dict[str, str]:
    """What the file says of itself: the step, and the data and the semantic IDs whose rows the weights mean."""
    return {key: str(progress[key]) for key in ("step", "data", "semantic_ids") if key in progress}


def export(run: Path, file: Path, *, which: str = "best") -> None:
    """Write the weights of a run's best or last checkpoint to ``file``."""

    def write(folder: Path) -> None:
        progress = checkpoint.read_progress(folder)
        checkpoint.export_weights(folder, file, notes=notes_of(progress))

    used = checkpoint.use_first(choose_checkpoints(run, which), write)
    assert used is not None
    logger.info("wrote the weights of %s to %s", used.folder, file)


if __name__ == "__main__":
    sys.exit(main())
