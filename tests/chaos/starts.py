"""Starts of a run whose ranks can be killed: forked from a process that has imported torch, or under torchrun.

A start under torchrun takes ten seconds of imports; one forked from the fork server takes one or two, and is else the
same: `pipeline.train.main` in a process per rank, joined by the environment that torchrun would set.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from muonrec import checkpoint
from tests.distributed.ranks import forked_from_a_server

ROOT = Path(__file__).resolve().parents[2]
SEED = int(os.environ.get("CHAOS_SEED", "0"))
ENDS_WITHIN_S = 15.0  # the others, by themselves, after one rank was killed; a busy machine with two cores


class Start:
    """One start of ``pipeline.train`` on ``num_ranks`` ranks; ``folder`` takes its log and the batches it saw."""

    def __init__(self, num_ranks, config, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with forked_from_a_server() as server:
            self.processes = [
                server.Process(target=_rank, args=(rank, num_ranks, port, str(config), str(folder)))
                for rank in range(num_ranks)
            ]
            for process in self.processes:
                process.start()

    def pids(self):
        return [process.pid for process in self.processes]

    def is_over(self):
        return not any(process.is_alive() for process in self.processes)

    def wait(self, timeout_s):
        """Seconds until the last rank has ended, and the exit codes."""
        began_s = time.monotonic()
        for process in self.processes:
            process.join(max(0.0, began_s + timeout_s - time.monotonic()))
        passed_s, codes = time.monotonic() - began_s, [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        return passed_s, codes

    def kill(self):
        """SIGKILL for every rank."""
        for process in self.processes:
            process.kill()
            process.join()

    def log(self):
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


class TorchrunStart(Start):
    """The same under torchrun, which ends when a rank does."""

    def __init__(self, num_ranks, config, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        with (self.folder / "torchrun.log").open("w") as log:
            self.process = subprocess.Popen(
                [*command, "-m", "pipeline.train", str(config)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def pids(self):
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def is_over(self):
        return self.process.poll() is not None

    def kill(self):
        """SIGKILL for torchrun; its ranks lead sessions of their own, and die with it since `join_ranks` says so."""
        pids = self.pids()
        self.process.kill()
        self.process.wait(timeout=30)
        while any(_runs(pid) for pid in pids):
            time.sleep(0.005)

    def wait(self, timeout_s):
        began_s = time.monotonic()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return timeout_s, [None]
        return time.monotonic() - began_s, [self.process.returncode]


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def run_to_the_end(num_ranks, config, folder):
    """A start that nobody kills."""
    start = Start(num_ranks, config, folder)
    _, codes = start.wait(600)
    assert codes == [0] * num_ranks, start.log()


def kill_at_random(start, run, generator):
    """SIGKILL one rank of ``start`` at a random moment; what was going on, and when the other ranks ended.

    Args:
        start: just started.
        run: its output folder.
        generator: draws the moment and the rank.

    Returns:
        ``(moment, seconds)``: the moment as text; seconds until the other ranks had ended by themselves.
    """
    wanted = generator.choices(["start", "step", "checkpoint"], weights=[1, 2, 3])[0]
    delay_s, num_steps = generator.uniform(0, 2.0 if wanted == "start" else 0.02), generator.randint(1, 8)
    left = unfinished(run)  # by the start before
    (before, _), resumed = _progress(run), checkpoint.newest(run / "checkpoints")
    until = int(resumed.name.removeprefix("step-")) + num_steps if resumed else num_steps
    deadline_s = time.monotonic() + 300
    while not start.pids() or wanted != "start":  # torchrun takes its time to start ranks
        assert time.monotonic() < deadline_s and not start.is_over(), f"nothing to kill\n{start.log()}"
        now, step = _progress(run)
        if now != before and step >= until and (wanted == "step" or unfinished(run) - left):
            break
        time.sleep(0.001)
    time.sleep(delay_s)
    assert not start.is_over(), f"ended before it was killed\n{start.log()}"
    os.kill(generator.choice(start.pids()), signal.SIGKILL)
    seconds, codes = start.wait(ENDS_WITHIN_S)
    # Ranks that are just being connected wait for the dead one, and a launcher has to end them: here, `wait` does.
    is_alone = None in codes
    assert not is_alone or wanted == "start", f"ranks outlived one that was killed by {ENDS_WITHIN_S} s\n{start.log()}"
    moment = "checkpoint" if unfinished(run) - left else "start" if wanted == "start" else "step"
    return ("start, and had to be ended", 0.0) if is_alone else (moment, seconds)


def unfinished(run):
    """Checkpoints without a marker, newer than all that have one, since `prune` takes an old one's marker first."""
    folders = sorted((run / "checkpoints").glob("step-*"))
    try:
        return {(last, last.stat().st_ctime_ns) for last in folders[-1:] if not checkpoint.is_committed(last)}
    except FileNotFoundError:  # just being replaced
        return set()


def batches_trained(folders, num_steps):
    """User ids of each step's global batch, of the start that brought it into the final model; and how many starts did.

    A start brought in the steps from where it resumed to where the next one did that came as far as a batch.
    """
    starts = [start for start in (_seen(folder) for folder in folders) if all(start)]
    begins = [min(min(of_rank) for of_rank in start) for start in starts]
    trained = {}
    for start, begin, end in zip(starts, begins, [*begins[1:], num_steps], strict=True):
        for step in range(begin, end):
            assert step not in trained
            trained[step] = sorted(user for of_rank in start for user in of_rank[step])
    return trained, len(starts)


def _seen(folder):
    """Of each rank ``{step: user ids}``; empty where it came to no batch."""
    of_ranks = []
    for path in sorted(Path(folder).glob("seen-*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("]")]
        assert len({step for step, _ in lines}) == len(lines)
        of_ranks.append(dict(lines))
    return of_ranks or [{}]


def _progress(run):
    """Which metrics.jsonl there is, since every start puts a new one in its place, and its last step."""
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        return None, 0
    text, _, _ = metrics.read_text().rpartition("\n")
    return metrics.stat().st_ino, json.loads(text.splitlines()[-1])["step"] if text else 0


def _rank(rank, num_ranks, port, config, folder):
    log = os.open(f"{folder}/rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    import torch

    from pipeline import train

    torch.set_num_threads(1)
    batches = train.Run.batches

    def watched(run, step, end):
        with open(f"{folder}/seen-{rank}.jsonl", "a", buffering=1) as seen:
            for batch in batches(run, step, end):
                seen.write(json.dumps([batch.step, batch.user_ids.tolist()]) + "\n")
                yield batch

    train.Run.batches = watched
    sys.argv = ["pipeline.train", config]
    sys.exit(train.main())


def generator_of(test):
    """Random numbers that repeat for a ``CHAOS_SEED``."""
    return random.Random(f"{SEED} {test}")
