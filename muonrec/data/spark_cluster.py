"""A Spark cluster of one job, started SPMD: the same command on every replica, but for the replica's number.

    python -m muonrec.data.spark_cluster --replica 0 --num-replicas 2 --hosts node1 --port 20100 -- COMMAND

Replica 0 is master, worker and driver: it waits for the workers, runs ``COMMAND``, such as ``python -m pipeline.data
CONFIG data.engine=spark``, with ``PYSPARK_SUBMIT_ARGS`` set to the cluster, and ends with its exit status. The others
are workers, which leave once the master's port is closed. The first host must resolve, on every node, to an address
that all nodes reach. Spark does not ask who connects: as with torchrun, the network between the nodes must be trusted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from muonrec.runlog import configure_logging

logger = logging.getLogger("muonrec.data.spark_cluster")

_POLL_S = 0.5
_STOP_S = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Be one replica; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m muonrec.data.spark_cluster", description=__doc__.split("\n")[0])
    parser.add_argument("--replica", type=int, required=True, help="number of this replica, from 0")
    parser.add_argument("--num-replicas", type=int, required=True)
    parser.add_argument("--hosts", required=True, help="host of replica 0, alone or first of a list")
    parser.add_argument("--port", type=int, required=True, help="of the master; its state is served on the next")
    parser.add_argument("--cores", type=int, help="of this replica's worker; all that it may use unless given")
    parser.add_argument("--wait-s", type=float, default=600, help="for the master, and for all workers")
    parser.add_argument("command", nargs="+", help="of the driver, on replica 0")
    options = parser.parse_args(arguments)
    configure_logging()
    signal.signal(signal.SIGTERM, _exit_on_signal)
    host = re.split(r"[,\s]+", options.hosts.strip())[0]
    with tempfile.TemporaryDirectory(prefix="muonrec-spark-") as folder:
        replica = _Replica(Path(folder), host, options.port, wait_s=options.wait_s, cores=options.cores)
        try:
            if options.replica == 0:
                return replica.lead(options.num_replicas, options.command)
            return replica.follow()
        except _ClusterError as error:
            logger.error("%s", error)
            return 1
        finally:
            replica.stop()


class _ClusterError(Exception):
    """The cluster cannot be used; the message says what to do."""


class _Replica:
    """The processes of one replica."""

    def __init__(self, folder: Path, host: str, port: int, *, wait_s: float, cores: int | None) -> None:
        self._folder = folder
        self._host, self._port = host, port
        self._wait_s = wait_s
        self._cores = cores or len(os.sched_getaffinity(0))
        self._daemons: dict[str, subprocess.Popen] = {}

    def lead(self, num_replicas: int, command: Sequence[str]) -> int:
        """Master, worker and driver; returns the driver's exit status."""
        if _address_towards(self._host, self._port) is not None:
            raise _ClusterError(f"port {self._port} of {self._host} is taken; pass another --port")
        self._start(
            "master.Master", "--host", self._host, "--port", str(self._port), "--webui-port", str(self._port + 1)
        )
        address = self._work()
        self._wait(lambda: self._num_workers() >= num_replicas, f"{num_replicas} workers registered")
        logger.info("%d workers at spark://%s:%d", num_replicas, self._host, self._port)
        arguments = (
            f"--master spark://{self._host}:{self._port} "
            f"--conf spark.driver.host={address} --conf spark.driver.bindAddress={address} pyspark-shell"
        )
        environment = {"SPARK_LOCAL_IP": address, "PYSPARK_SUBMIT_ARGS": arguments}
        driver = subprocess.Popen(command, env={**os.environ, **environment})
        try:
            while driver.poll() is None:
                self._check_daemons()
                time.sleep(_POLL_S)
        finally:
            _stop(driver)
        return driver.returncode

    def follow(self) -> int:
        """Worker until the master is gone."""
        self._work()
        while _address_towards(self._host, self._port) is not None:
            self._check_daemons()
            time.sleep(_POLL_S)
        logger.info("the master at %s:%d has left: done", self._host, self._port)
        return 0

    def stop(self) -> None:
        """End what was started, the last first."""
        for process in reversed(self._daemons.values()):
            _stop(process)

    def _work(self) -> str:
        """Start a worker once the master listens; returns this host's address, as the master sees it."""
        self._wait(lambda: _address_towards(self._host, self._port) is not None, "the master listened")
        address = _address_towards(self._host, self._port) or self._host
        self._start(
            "worker.Worker", "--host", address, "--cores", str(self._cores), "--webui-port", "0",
            "--work-dir", str(self._folder), f"spark://{self._host}:{self._port}",
            address=address,
        )  # fmt: skip
        return address

    def _start(self, daemon: str, *arguments: str, address: str | None = None) -> None:
        log = self._folder / f"{daemon}.log"
        environment = {"SPARK_DAEMON_MEMORY": "512m", **os.environ}
        if address is not None:
            environment["SPARK_LOCAL_IP"] = address
        with log.open("wb") as stream:
            self._daemons[daemon] = subprocess.Popen(
                [_find_spark_class(), f"org.apache.spark.deploy.{daemon}", *arguments],
                env=environment,
                stdout=stream,
                stderr=stream,
            )

    def _check_daemons(self) -> None:
        for daemon, process in self._daemons.items():
            if process.poll() is not None:
                tail = (self._folder / f"{daemon}.log").read_text(errors="replace").splitlines()[-15:]
                raise _ClusterError(f"Spark's {daemon} ended with status {process.returncode}:\n" + "\n".join(tail))

    def _num_workers(self) -> int:
        try:
            with urllib.request.urlopen(f"http://{self._host}:{self._port + 1}/json/", timeout=5) as answer:
                return int(json.load(answer)["aliveworkers"])
        except (OSError, ValueError):
            return 0

    def _wait(self, is_done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self._wait_s
        while not is_done():
            self._check_daemons()
            if time.monotonic() > deadline:
                raise _ClusterError(
                    f"{self._wait_s:g} s went by before {what} at {self._host}:{self._port}; see whether all replicas "
                    f"have started and reach that host (workers there: {self._num_workers()})"
                )
            time.sleep(_POLL_S)


def _address_towards(host: str, port: int) -> str | None:
    """The address of this machine from which ``host:port`` is reached; None where nobody listens there."""
    try:
        with socket.create_connection((host, port), timeout=5) as connection:
            return str(connection.getsockname()[0])
    except OSError:
        return None


def _find_spark_class() -> str:
    try:
        import pyspark
    except ImportError:
        raise _ClusterError("the data stage on several nodes needs PySpark: pip install 'muonrec[spark]'") from None
    if "JAVA_HOME" not in os.environ and shutil.which("java") is None:
        raise _ClusterError("Spark needs Java 17 or later: install openjdk-17-jre-headless, or set JAVA_HOME")
    home = os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent
    return str(Path(home) / "bin" / "spark-class")


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
