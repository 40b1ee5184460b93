"""Runs one function on several gloo ranks of this machine, in a pool of processes that outlives the test.

    from tests.distributed.ranks import run_on_ranks

    def sum_of_ranks(rank_offset):
        total = torch.tensor(float(dist.get_rank() + rank_offset))
        dist.all_reduce(total)
        return total.item()

    def test_sum_of_ranks():
        assert run_on_ranks(2, sum_of_ranks, 10) == [21.0, 21.0]

The function is pickled by reference, so it stands at the top level of a module under the repository root. Results and
arguments travel by plain pickle: return tensors, not DTensors. A test that expects an error catches it *inside* the
function: a pool whose rank raised is thrown away, since the other ranks may still wait for it in a collective.
"""

import atexit
import faulthandler
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection, context, get_context, parent_process
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 180.0  # importing torch on a busy machine with two cores
STACK_GRACE_S = 1.0  # for a hung rank to write down where it hangs
CLOSE_TIMEOUT_S = 5.0

_pools: dict[int, "_Pool"] = {}


class RankError(AssertionError):
    """One rank raised or died; the message ends with that rank's own traceback."""


class RankTimeout(AssertionError):
    """The ranks did not all answer in time; the message says where each of the others stood."""


def run_on_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Call ``function(*args)`` on every rank of a gloo group and return the results by rank.

    Each call starts from ``torch.manual_seed(0)`` with one thread per rank. The default process group exists, and it
    is the same one for every call with the same ``num_ranks``.

    Args:
        num_ranks: number of processes, 1 or more. The first call with a number starts them, later ones reuse them.
        function: a top-level function of an importable module.
        *args: the same on every rank; the rank itself is ``torch.distributed.get_rank()``.
        timeout_s: wall-clock limit of the call, without the start of the processes.

    Raises:
        RankError: a rank raised or died. The pool is killed, the next call starts a new one.
        RankTimeout: a rank did not answer within ``timeout_s``. The pool is killed as well.
    """
    call = pickle.dumps((function, args))
    if num_ranks not in _pools:
        _pools[num_ranks] = _Pool(num_ranks)
    pool = _pools[num_ranks]
    try:
        return pool.call(call, function.__qualname__, timeout_s)
    except BaseException:
        _pools.pop(num_ranks).kill()
        raise


def close_pools() -> None:
    """End every process that ``run_on_ranks`` started."""
    while _pools:
        _pools.popitem()[1].close()


# Registered after multiprocessing's own hook, hence run before it: that one waits for the children forever.
atexit.register(close_pools)


@contextmanager
def forked_from_a_server() -> Iterator[context.ForkServerContext]:
    """Start processes within it: forked from one that has imported torch and the stages, which takes it five seconds.

    Not forked from this one, which may hold threads of torch: a fork of those deadlocks now and then.
    """
    server = get_context("forkserver")
    server.set_forkserver_preload(["pipeline.train"])
    # The server starts here, once. Numerical libraries read the number of threads when they load.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    # fbgemm looks for CUDA on import; asking the driver itself would spoil it for every fork.
    nvml = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT), **threads, **nvml):
        yield server


class _Pool:
    """``num_ranks`` forked processes, each with a pipe to this one."""

    def __init__(self, num_ranks: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.connections: list[connection.Connection] = []
        self.processes = []
        with forked_from_a_server() as server:
            for rank in range(num_ranks):
                here, there = server.Pipe()
                # Not daemonic: daemons may not have children, and a data loader on a rank has workers.
                process = server.Process(
                    target=_serve, args=(there, rank, num_ranks, str(self.folder)), name=f"rank{rank}of{num_ranks}"
                )
                process.start()
                there.close()
                self.connections.append(here)
                self.processes.append(process)
        try:
            self._collect("the start of the ranks", START_TIMEOUT_S)
        except BaseException:
            self.kill()
            raise

    def call(self, call: bytes, name: str, timeout_s: float) -> list[Any]:
        for rank, conn in enumerate(self.connections):
            try:
                conn.send_bytes(call)
            except OSError:
                raise RankError(self._died(name, rank)) from None
        return self._collect(name, timeout_s)

    def _collect(self, name: str, timeout_s: float) -> list[Any]:
        deadline_s = time.monotonic() + timeout_s
        results: dict[int, Any] = {}
        while len(results) < len(self.connections):
            waiting = [conn for rank, conn in enumerate(self.connections) if rank not in results]
            ready = connection.wait(waiting, timeout=max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise RankTimeout(self._where_they_hang(name, timeout_s, sorted(results)))
            failures = []
            for conn in ready:
                rank = next(r for r, known in enumerate(self.connections) if known is conn)
                try:
                    succeeded, results[rank] = pickle.loads(conn.recv_bytes())
                except (EOFError, OSError):
                    raise RankError(self._died(name, rank)) from None
                if not succeeded:
                    failures.append(f"rank {rank} of {len(self.connections)} failed in {name}:\n\n{results[rank]}")
            if failures:
                raise RankError("\n".join(failures))
        return [results[rank] for rank in range(len(self.connections))]

    def _died(self, name: str, rank: int) -> str:
        self.processes[rank].join(CLOSE_TIMEOUT_S)
        return (
            f"rank {rank} of {len(self.connections)} died in {name} with exit code {self.processes[rank].exitcode}\n\n"
            f"{self._stack(rank)}"
        )

    def _where_they_hang(self, name: str, timeout_s: float, answered: list[int]) -> str:
        late = [rank for rank in range(len(self.connections)) if rank not in answered]
        for rank in late:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(STACK_GRACE_S)
        stacks = "\n\n".join(f"rank {rank}:\n{self._stack(rank)}" for rank in late)
        return f"{name} did not end within {timeout_s:g} s; ranks {answered} answered, ranks {late} did not\n\n{stacks}"

    def _stack(self, rank: int) -> str:
        path = self.folder / f"stack{rank}.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        """Let every rank return from its loop, and kill those that do not."""
        for conn in self.connections:
            conn.close()
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        for process in self.processes:
            process.join(max(0.0, deadline_s - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()
        for conn in self.connections:
            conn.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _serve(conn: connection.Connection, rank: int, num_ranks: int, folder: str) -> None:
    """The life of one rank: join the group, then answer calls until the pipe is closed."""
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    stack = open(Path(folder) / f"stack{rank}.txt", "w")  # open for life: faulthandler writes to it
    faulthandler.enable(stack)
    faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))

    answer: tuple[bool, Any]
    try:
        _join_group(rank, num_ranks, folder)
        answer = (True, None)
    except BaseException:
        answer = (False, traceback.format_exc())
    conn.send_bytes(pickle.dumps(answer))

    import torch

    while True:
        try:
            call = conn.recv_bytes()
        except (EOFError, OSError):
            # No destroy_process_group: it may wait for ranks that are gone.
            os._exit(0)
        torch.manual_seed(0)
        torch.set_num_threads(1)
        try:
            function, args = pickle.loads(call)
            reply = pickle.dumps((True, function(*args)))
        except BaseException:
            reply = pickle.dumps((False, traceback.format_exc()))
        conn.send_bytes(reply)


def _join_group(rank: int, num_ranks: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # What torchrun sets, for code that reads it; the rendezvous itself is a file and needs no free port.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks))
    # Without a name gloo resolves the host's, which fails or is slow on a machine without a network.
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(minutes=30),  # run_on_ranks has its own, and reports it better
    )
    # All connections are made now, so that a later time limit covers the test alone.
    dist.barrier()


def _die_with_the_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
    os._exit(1)
