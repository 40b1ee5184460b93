"""A SLURM cluster of two nodes on this machine: started, asked, broken and ended.

Everything lies in one folder of /tmp, daemons are ended by their pid, and /etc/hosts is put back; Debian's packages
stay, once installed. Seen with SLURM 22.05 of Debian 12.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("n1", "n2")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

_CONF = """
ClusterName=muonrec
SlurmctldHost={hostname}({ip})
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job is held back; 120 s by itself.
AuthInfo=socket={root}/run/munge.socket,cred_expire=8
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
# No control groups: neither needed nor to be had in every container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
ReturnToService=2
SlurmdParameters=config_overrides
# A lost node is noticed after so long; a requeued job has so long from SIGTERM to SIGKILL.
SlurmdTimeout=20
KillWait=90
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname={hostname} NodeAddr={ip} Port={ports[1]} CPUs=2 RealMemory=16000 State=UNKNOWN
NodeName=n2 NodeHostname={hostname} NodeAddr={ip} Port={ports[2]} CPUs=2 RealMemory=16000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# SLURM 22.05: `squeue --json -j ID` shows all jobs, and no job_resources of pending ones. TorchX wants later versions.
_SQUEUE = """#!{python}
import json, subprocess, sys
arguments = sys.argv[1:]
if "--json" not in arguments:
    sys.exit(subprocess.call(["{squeue}", *arguments]))
tree = json.loads(subprocess.check_output(["{squeue}", "--json"]))
if "-j" in arguments:
    asked = int(arguments[arguments.index("-j") + 1])
    tree["jobs"] = [job for job in tree["jobs"] if asked in (job["job_id"], job.get("het_job_id"))]
for job in tree["jobs"]:
    leader = job.get("het_job_id") or 0
    job["het_job_id"] = dict(set=bool(leader), infinite=False, number=leader)
    job.setdefault("job_resources", None)
    job["tres_req_str"] = job.get("tres_req_str", "")
print(json.dumps(tree))
"""


class Unavailable(Exception):
    """SLURM cannot be had on this machine; says why."""


def install() -> None:
    """Install SLURM and munge where they are missing. Raises Unavailable."""
    if os.getuid() != 0:
        raise Unavailable("it starts munge and slurmd as root; run as root")
    if all(shutil.which(name) for name in ("slurmctld", "slurmd", "sbatch", "munged")):
        return
    if not shutil.which("apt-get"):
        raise Unavailable(f"install {', '.join(PACKAGES)}; only Debian's are installed by themselves")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update"], env=env, capture_output=True)
    command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"apt-get install failed: {done.stderr[-500:]}")


class Cluster:
    """Two nodes of two processors. Jobs are submitted from ``work``, which looks like the root of the clone."""

    def __init__(self, root: Path) -> None:
        self.root, self.work = root, root / "work"
        self.env = {
            **os.environ,
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": os.pathsep.join([str(root / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            # A job that starts again would truncate its logs.
            "SLURM_OPEN_MODE": "append",
            "SBATCH_OPEN_MODE": "append",
        }

    @classmethod
    @contextmanager
    def started(cls) -> Iterator["Cluster"]:
        """A running cluster, gone after the block with every process of it."""
        root = Path(tempfile.mkdtemp(prefix="muonrec-slurm-"))
        root.chmod(0o755)  # munge runs as a user of its own
        cluster = cls(root)
        hosts = Path("/etc/hosts").read_text()
        try:
            cluster._lay_out()
            cluster._start()
            yield cluster
        finally:
            cluster._end()
            Path("/etc/hosts").write_text(hosts)
            if not os.environ.get("MUONREC_KEEP_SLURM"):  # to read its logs
                shutil.rmtree(root, ignore_errors=True)

    def _lay_out(self) -> None:
        for name in ("state", "spool-n1", "spool-n2", "log", "run", "bin", "work"):
            (self.root / name).mkdir()
        hostname = socket.gethostname()
        # The nodes need the address of the host name: torchrun serves the rendezvous where the two are equal.
        ip = socket.gethostbyname(hostname)
        with open("/etc/hosts", "a") as hosts:
            hosts.write(f"{ip} {' '.join(NODES)}\n")
        ports = [free_port() for _ in range(3)]
        conf = _CONF.format(root=self.root, hostname=hostname, ip=ip, ports=ports)
        (self.root / "slurm.conf").write_text(conf)
        for name in ("muonrec", "pipeline", "components", "configs", "docs", ".torchxconfig"):
            (self.work / name).symlink_to(ROOT / name)
        squeue = shutil.which("squeue")
        version = subprocess.run([str(squeue), "--version"], env=self.env, capture_output=True, text=True).stdout
        if int(re.findall(r"\d+", version)[0]) < 23:
            (self.root / "bin" / "squeue").write_text(_SQUEUE.format(python=sys.executable, squeue=squeue))
            (self.root / "bin" / "squeue").chmod(0o755)

    def _start(self) -> None:
        run = self.root / "run"
        shutil.chown(run, "munge", "munge")
        self.call(
            "runuser", "-u", "munge", "--", "munged", f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid",
            f"--log-file={run}/munged.log", f"--seed-file={run}/munged.seed",
        )  # fmt: skip
        shutil.chown(run, "root", "root")
        self.call("slurmctld", "-c")
        for node in NODES:
            self.start_slurmd(node)
        wait_for(lambda: all(self.node_state(node) == "idle" for node in NODES), 60, "two idle nodes")

    def _end(self) -> None:
        run = self.root / "run"
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munged"):
            kill_pid_file(run / f"{name}.pid", signal.SIGTERM)
        time.sleep(1)
        # Steps and tasks, by the mark that every process of this cluster carries in its environment.
        mark = f"SLURM_CONF={self.root}/slurm.conf"
        for pid in processes(mark):
            if pid != os.getpid():
                kill(pid, signal.SIGKILL)

    # Asking --------------------------------------------------------------------------------------------------------

    def call(self, *command: str, check: bool = True, timeout_s: float = 300, **env: str) -> str:
        """Run a command in ``work``; its output."""
        done = subprocess.run(
            command, cwd=self.work, env={**self.env, **env}, text=True, timeout=timeout_s,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    def torchx(self, *arguments: str, check: bool = True, **env: str) -> str:
        """The command ``torchx``."""
        return self.call(sys.executable, "-m", "torchx.cli.main", *arguments, check=check, **env)

    def submit(self, stage: str, *arguments: str, cfg: str = "partition=debug", **env: str) -> str:
        """``torchx run -s slurm components/stages.py:STAGE``; the id of the job."""
        component = f"components/stages.py:{stage}"
        said = self.torchx("run", "-s", "slurm", "--workspace", "", "-cfg", cfg, component, *arguments, **env)
        return re.findall(r"slurm://torchx/(\d+)", said)[0]

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says of the (first part of the) job."""
        text = self.call("scontrol", "-o", "show", "job", job, check=False).splitlines()
        return dict(re.findall(r"(\w+)=(\S*)", text[0])) if text else {}

    def wait(self, job: str, timeout_s: float = 600) -> str:
        """Wait for the job's end; its state."""

        def state() -> str | None:
            # An idle controller begins a requeued job after minutes only.
            self.call("scontrol", "update", "PartitionName=debug", "State=UP", check=False)
            found = self.job(job).get("JobState", "")
            return found if found in ENDED else None

        try:
            return str(wait_for(state, timeout_s, f"the end of job {job}", every_s=2.0))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.job(job)}\n{self.log(job)[-4000:]}") from None

    def log(self, job: str) -> str:
        """What all replicas said on stderr, over all starts."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.work.glob(f"slurm-{job}-*.err")))

    def node_state(self, node: str) -> str:
        """Such as idle, mixed, down."""
        return self.call("sinfo", "-h", "-n", node, "-o", "%t", check=False).strip()

    # Breaking -------------------------------------------------------------------------------------------------------

    def start_slurmd(self, node: str) -> None:
        """Start the daemon of a node."""
        self.call("slurmd", "-N", node)

    def kill_slurmd(self, node: str) -> None:
        """Kill the daemon of a node; its tasks live on."""
        kill_pid_file(self.root / "run" / f"slurmd-{node}.pid", signal.SIGKILL)

    def tasks(self, job: str, node: str) -> list[int]:
        """Processes of a job on a node."""
        on_node = set(processes(f"SLURMD_NODENAME={node}"))
        return [pid for pid in self.processes_of(job) if pid in on_node]

    def workers(self, job: str) -> dict[int, int]:
        """Process of each rank of a job."""
        found = {}
        for pid in self.processes_of(job):
            env = environment(pid)
            if "RANK" in env and b"pipeline.train" in command_line(pid):
                found[int(env["RANK"])] = pid
        return found

    def processes_of(self, job: str) -> list[int]:
        mine = set(processes(f"SLURM_CONF={self.root}/slurm.conf"))
        return [pid for pid in processes(f"SLURM_JOB_ID={job}", f"SLURM_JOBID={job}") if pid in mine]

    def lose_node(self, job: str, node: str) -> None:
        """Everything of a node at once: daemon, steps, tasks."""
        tasks = self.tasks(job, node)
        steps = {pid for task in tasks for pid in ancestors(task) if b"slurmstepd" in command_line(pid)}
        self.kill_slurmd(node)
        for pid in (*steps, *tasks):
            kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], object], timeout_s: float, what: str, every_s: float = 0.5) -> object:
    """The first true value of ``condition``."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(every_s)
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def processes(*marks: str) -> list[int]:
    """Processes with one of the variables ``NAME=VALUE`` in their environment."""
    wanted = {mark.encode() for mark in marks}
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted & set(path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def environment(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return
        yield pid


def kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def kill_pid_file(path: Path, number: signal.Signals) -> None:
    if path.exists():
        kill(int(path.read_text()), number)
