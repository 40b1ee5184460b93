"""Two hundred damaged checkpoints: all found, none loaded, the one before used. The counts are printed."""

import hashlib
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist

from muonrec import checkpoint
from muonrec.checkpoint.marker import MARKER
from muonrec.checkpoint.weights import local_pieces
from muonrec.checkpoint.writing import flat, state_of
from muonrec.config import load_config
from pipeline.train import Run
from pipeline.train_config import TrainConfig
from tests.chaos.starts import SEED
from tests.distributed.ranks import run_on_ranks
from tests.pipeline import test_train
from tests.pipeline.test_train import config_file, this_rank, train_from

pytestmark = pytest.mark.chaos
dataset = test_train.dataset  # the fixture

KINDS = ("truncated", "bit flipped", "file missing", "wrong version")
NUM_DAMAGED = 200


def damage(folder, kind, generator):
    """Spoil one file of a checkpoint; the marker's own loss is not damage, it makes the checkpoint unfinished."""
    names = sorted(path.name for path in folder.iterdir())
    name = MARKER if kind == "wrong version" else generator.choice(names)
    if kind == "file missing" and name == MARKER:
        name = ".metadata"
    path = folder / name
    data = path.read_bytes()
    at = generator.randrange(len(data))
    if kind == "truncated":
        path.write_bytes(data[:at])
    elif kind == "bit flipped":
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1 :])
    elif kind == "file missing":
        path.unlink()
    else:
        version = generator.choice([0, 1, 3, 99, "2", None])
        path.write_text(json.dumps({**json.loads(data), "schema_version": version}))
    return name


def resumed(path, original):
    """Resume after each damage; ``(kind, file, step resumed at, whether the state is that of the one before)``."""
    config = load_config(TrainConfig, path)
    root, generator = config.output / "checkpoints", random.Random(f"{SEED} damage")
    run = Run.start(config, this_rank())

    def digest():
        pieces = [
            piece.numpy().tobytes()
            for _, value in sorted(flat(state_of(run.model, run.optimizer)).items())
            for piece, _ in local_pieces(value)
        ]
        return hashlib.sha256(b"".join(pieces)).hexdigest()

    before, last = checkpoint.finished(original)
    states = {}
    for folder in (before, last):
        checkpoint.load(folder, run.model, run.optimizer)
        states[folder.name] = digest()
    assert len(set(states.values())) == 2
    found = []
    for number in range(NUM_DAMAGED):
        checkpoint.load(last, run.model, run.optimizer)  # so that nothing is left of an earlier round
        kind, name = KINDS[number % len(KINDS)], None
        if dist.get_rank() == 0:
            shutil.rmtree(root)
            shutil.copytree(original, root)
            name = damage(root / last.name, kind, generator)
        dist.barrier()
        step, _ = run.resume(root)
        found.append((kind, name, step, digest() == states[before.name]))
        aside = (root / f"unusable-{last.name}").is_dir()
        assert aside and not checkpoint.is_committed(root / last.name), (kind, name)
        dist.barrier()
    return found


def test_every_damaged_checkpoint_is_found_and_the_one_before_is_used(dataset, tmp_path, capsys):
    path = config_file(dataset, tmp_path, num_steps=6, validation={"every_steps": 6}, checkpoints={"every_steps": 3})
    run_on_ranks(2, train_from, path)
    original = Path(shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "original"))
    first, second = run_on_ranks(2, resumed, path, original, timeout_s=900)
    assert len(first) == len(second) == NUM_DAMAGED
    for of_rank in (first, second):
        assert all(step == 3 and is_before for _, _, step, is_before in of_rank)
    kinds, files = Counter(kind for kind, *_ in first), Counter(name for _, name, *_ in first)
    with capsys.disabled():
        print(
            f"\n{NUM_DAMAGED} damaged checkpoints, seed {SEED}: {NUM_DAMAGED} found, 0 loaded, the one before used "
            f"{NUM_DAMAGED} times; by kind {dict(kinds)}; by file {dict(files)}"
        )
