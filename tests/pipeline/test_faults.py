"""What a machine does to a run: one clear line, a status that is not 0, and the checkpoints before as they were."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from muonrec import checkpoint
from muonrec.checkpoint.marker import find_faults, read_marker
from tests.chaos.starts import Start, TorchrunStart
from tests.pipeline import test_train
from tests.pipeline.test_train import config_file

dataset = test_train.dataset  # the fixture
ENDLESS = {"num_steps": 100_000, "validation": {"every_steps": 5, "max_users": 20}, "checkpoints": {"every_steps": 5}}


def until(happens, start, timeout_s=200):
    deadline_s = time.monotonic() + timeout_s
    while not happens():
        assert time.monotonic() < deadline_s and not start.is_over(), start.log()
        time.sleep(0.01)


def ended(start, timeout_s=200):
    """Exit codes, the lines that are errors, and all that was said."""
    _, codes = start.wait(timeout_s)
    said = start.log()
    return codes, [line for line in said.splitlines() if line[8:11] == " E "], said


def whole(root):
    """The newest checkpoint, which is as it was written."""
    newest = checkpoint.newest(root)
    assert find_faults(newest, read_marker(newest)) == []
    return newest


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root mounts a file system that is then filled")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_said_in_one_line_and_leaves_the_checkpoint_before(dataset, tmp_path, small_disk, asynchronous):
    run = small_disk / "run"
    checkpoints = {"every_steps": 5, "asynchronous": asynchronous}
    path = config_file(dataset, tmp_path, **{**ENDLESS, "checkpoints": checkpoints}, output=str(run))
    start = Start(2, path, tmp_path / "start")
    until(lambda: checkpoint.newest(run / "checkpoints") is not None, start)
    # As another program might, in the middle of whatever the run does.
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        for block in (bytes(1 << 20), bytes(4096)):  # at once, and then to the last page
            with suppress(OSError):
                while True:
                    filler.write(block)
    codes, errors, said = ended(start)
    assert codes == [1, 1] and "Traceback" not in said, said
    assert len(errors) == 1 and "No space left on device" in errors[0]
    whole(run / "checkpoints")


def test_a_folder_that_cannot_be_written_is_said_in_one_line(dataset, tmp_path, small_disk):
    path = config_file(dataset, tmp_path, **ENDLESS, output=str(small_disk / "run"))
    start = Start(2, path, tmp_path / "start")
    until(lambda: checkpoint.newest(small_disk / "run" / "checkpoints") is not None, start)
    os.kill(start.pids()[1], signal.SIGTERM)
    assert ended(start)[0] == [143, 143]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    codes, errors, said = ended(Start(2, path, tmp_path / "again"))
    assert codes == [1, 1] and "Traceback" not in said, said
    assert len(errors) == 1 and "Read-only file system" in errors[0]
    whole(small_disk / "run" / "checkpoints")


def test_a_data_file_that_has_vanished_is_named(dataset, tmp_path):
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    tree = {"source": {"format": "synthetic", "num_users": 300, "num_items": 120}, "output": str(data)}
    path = config_file(dataset, tmp_path, **ENDLESS, data=tree)
    gone = next(data.glob("*.parquet"))
    gone.unlink()
    codes, errors, said = ended(Start(2, path, tmp_path / "start"))
    assert codes == [1, 1] and "Traceback" not in said, said
    assert len(errors) == 1 and gone.name in errors[0] and "run python -m pipeline.data" in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_that_dies_takes_torchrun_and_the_other_ranks_down_within_seconds(dataset, tmp_path):
    start = TorchrunStart(3, config_file(dataset, tmp_path, **ENDLESS), tmp_path / "start")
    until(lambda: checkpoint.newest(tmp_path / "run" / "checkpoints") is not None, start)
    pids = start.pids()
    os.kill(pids[1], signal.SIGKILL)
    seconds, codes = start.wait(60)
    assert codes == [1] and seconds < 20, start.log()  # torchrun gives ranks 30 s before it kills them itself
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    whole(tmp_path / "run" / "checkpoints")
