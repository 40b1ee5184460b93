"""The components pass TorchX's own validation, render for every scheduler, and one of them really trains."""

import json
import os
import shlex
import signal
import subprocess
import sys
import uuid
import venv
from collections.abc import Iterator
from pathlib import Path
from string import Template

import pytest

pytest.importorskip("torchx", reason="pip install 'muonrec[torchx]'")

from torchx.runner import get_runner
from torchx.specs import AppDef, BindMount, VolumeMount, file_linter, finder, macros

from components import _torchrun, stages

ROOT = Path(__file__).parents[2]
STAGES = ROOT / "components" / "stages.py"
DRYRUN_CFG: dict[str, dict[str, object]] = {
    "local_cwd": {},
    "slurm": {"partition": "debug"},
    # Off a cluster: no server to validate the request at.
    "kubernetes": {"queue": "default", "validate_spec": False},
}


@pytest.fixture
def schedulers() -> list[str]:
    """The schedulers whose client is installed."""
    try:
        import kubernetes  # noqa: F401
    except ImportError:
        return ["local_cwd", "slurm"]
    return ["local_cwd", "slurm", "kubernetes"]


@pytest.mark.parametrize("name", ["data", "train", "evaluate", "compare"])
def test_torchx_finds_no_fault_in_a_component(name: str) -> None:
    assert file_linter.validate(str(STAGES), name) == []
    assert finder.get_component(f"{STAGES}:{name}").fn_name == name


@pytest.mark.parametrize("name", ["data", "train", "evaluate", "compare"])
def test_every_argument_is_documented(name: str) -> None:
    _, descriptions = file_linter.get_fn_docstring(getattr(stages, name))
    assert [argument for argument, text in descriptions.items() if not text.strip()] == []


def test_components_import_neither_torch_nor_the_stages() -> None:
    program = (
        "import sys, components.stages; "
        "print(sorted(set(sys.modules) & {'torch', 'torchrec', 'pipeline', 'muonrec', 'fbgemm_gpu'}))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.filterwarnings(r"ignore:\s*Role train")
def test_train_renders_one_line_for_every_scheduler(schedulers: list[str]) -> None:
    app = stages.train("dense_optimizer=muon", config="configs/demo/sasrec.yaml", j="2x4", out="/shared/out", cpu=8)
    rendered = {scheduler: render(app, scheduler) for scheduler in schedulers}
    for request in rendered.values():
        assert "-m pipeline.train configs/demo/sasrec.yaml" in request
        assert "--nnodes 2 --nproc-per-node 4 --max-restarts 1 --shutdown-timeout 120" in request
        assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in request
    assert '"${TORCHX_RANK0_HOST:=localhost}:$((20000 + ' in rendered["local_cwd"]
    assert '"${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:$((20000 + ' in rendered["slurm"]
    assert "OMP_NUM_THREADS=2" in rendered["slurm"]
    # The number of the job outlives a requeue, so that the restarted one finds the checkpoint.
    assert "output=/shared/out/'\"$SLURM_JOB_ID\"' dense_optimizer=muon" in rendered["slurm"]
    assert "scontrol requeue" in rendered["slurm"]


@pytest.mark.filterwarnings(r"ignore:\s*Role train")
def test_kubernetes_names_its_first_host() -> None:
    pytest.importorskip("kubernetes", reason="pip install 'muonrec[kubernetes]'")
    request = render(stages.train(j="2x4"), "kubernetes")
    assert "${VC_TRAIN_0_HOSTS:=localhost}:$((20000 + " in request
    assert "image: muonrec:0.1.0" in request
    assert "RestartJob" in request


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_components_render_on_the_last_stable_torchx_too(tmp_path: Path) -> None:
    # In an environment of its own: both own the directory torchx/. The kubernetes client it wants is an old one.
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "torchx[kubernetes]==0.7.0", "setuptools"]
    if (pip := subprocess.run(install, capture_output=True, text=True)).returncode:
        pytest.skip(f"torchx 0.7.0 cannot be installed here: {pip.stderr[-200:]}")
    program = """
from torchx.runner import get_runner
from torchx.specs import file_linter
from components import stages
mounts = ["type=volume", "src=claim", "dst=/out"]
apps = stages.data(mounts=mounts), stages.train(j="2x4", mounts=mounts), stages.evaluate(run="out/a", j="2x4")
for name in ("data", "train", "evaluate"):
    assert file_linter.validate("components/stages.py", name) == []
with get_runner() as runner:
    for app in apps:
        for scheduler, cfg in (("local_cwd", {}), ("slurm", {}), ("kubernetes", {"queue": "default"})):
            text = str(runner.dryrun(app, scheduler=scheduler, cfg=cfg))
            assert "exec torchrun" in text or "pipeline.data" in text, (scheduler, text)
            print(app.name, scheduler, "ok")
"""
    done = subprocess.run([str(python), "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("ok\n") == 9, done.stdout + done.stderr


def test_data_evaluate_and_compare_run_their_stages() -> None:
    data = stages.data("seed=1", config="configs/a.yaml")
    assert data.roles[0].args == ["-c", "exec python -m pipeline.data configs/a.yaml seed=1"]
    evaluate = stages.evaluate("compare=[out/b]", run="out/a", j="1x8", cpu=8)
    assert evaluate.roles[0].args == [
        "-c",
        "exec torchrun --standalone --nnodes 1 --nproc-per-node 8 --max-restarts 0 --shutdown-timeout 30 "
        "-m pipeline.eval out/a 'compare=[out/b]'",
    ]
    compare = stages.compare("seeds=[1, 2]", config="configs/compare/a.yaml", gpu=4)
    assert compare.roles[0].args == ["-c", "exec python -m pipeline.compare configs/compare/a.yaml 'seeds=[1, 2]'"]
    assert (compare.roles[0].num_replicas, compare.roles[0].resource.gpu) == (1, 4)


@pytest.mark.parametrize(
    "argument", ["", "a b", "it's", "$HOME/x", "${name}", "$$", 'say "x"', "a;b", "[1, 2]", "a\\b"]
)
def test_an_argument_reaches_the_stage_as_it_was_typed(argument: str) -> None:
    line = _torchrun.python_command("stage", ["first", argument, "last"])
    # What TorchX does to every argument of a role, then what bash does.
    line = Template(line).safe_substitute(app_id="app", replica_id="0").removeprefix("exec python -m stage ")
    result = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:3] == ["first", argument, "last"]


def test_the_app_id_stays_open_for_torchx() -> None:
    line = _torchrun.python_command("stage", [f"output=/my out/{macros.app_id}"])
    assert shlex.split(Template(line).safe_substitute(app_id="job-7"))[-1] == "output=/my out/job-7"


def rendezvous_port(job: str, **arguments: int) -> int:
    """What bash on the node makes of the endpoint of job ``job``."""
    (line,) = stages.train(j="2x1", **arguments).roles[0].args[1:]
    line = Template(line).safe_substitute(app_id=job, rank0_env="HOST").replace("exec torchrun", "printf '%s\\n'")
    said = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.splitlines()
    host, port = said[said.index("--rdzv-endpoint") + 1].split(":")
    assert host == "localhost"
    return int(port)


def test_every_job_meets_at_a_port_of_its_own() -> None:
    ports = [rendezvous_port(str(job)) for job in range(100, 120)]
    assert len(set(ports)) == 20 and min(ports) >= 20000 and max(ports) < 30000
    assert ports[0] == rendezvous_port("100")  # the same on every node
    assert rendezvous_port("100", rdzv_port=29501) == 29501


def test_mounts_are_typed_and_a_wrong_one_shows_the_form() -> None:
    mounts = "type=volume,src=logs,dst=/data,readonly,type=bind,src=/scratch,dst=/out".split(",")
    assert stages.train(mounts=mounts).roles[0].mounts == [
        VolumeMount(src="logs", dst_path="/data", read_only=True),
        BindMount(src_path="/scratch", dst_path="/out", read_only=False),
    ]
    with pytest.raises(ValueError, match="type must be specified first; pass for instance type=volume,src=CLAIM"):
        stages.train(mounts=["src=logs"])


def test_an_environment_that_slurm_would_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="NCCL_SOCKET_IFNAME has a comma in its value"):
        stages.data(env={"NCCL_SOCKET_IFNAME": "eth0,eth1"})


@pytest.mark.parametrize("j", ["2", "0x2", "2x", "x", "1:2x4", "2x2x2"])
def test_a_malformed_j_names_the_form(j: str) -> None:
    with pytest.raises(ValueError, match=r"is not \{nnodes\}x\{nproc_per_node\}; pass for instance j=1x2"):
        stages.train(j=j)


def test_the_users_environment_wins() -> None:
    env = stages.train(cpu=8, j="1x2", env={"OMP_NUM_THREADS": "7", "NCCL_DEBUG": "INFO"}).roles[0].env
    assert (env["OMP_NUM_THREADS"], env["NCCL_DEBUG"]) == ("7", "INFO")
    assert stages.train(cpu=8, j="1x2").roles[0].env["OMP_NUM_THREADS"] == "4"


def test_torchx_starts_ranks_on_this_machine(tmp_path: Path, torchx_run: "TorchxRun") -> None:
    # A stand-in for pipeline.train, found first in the working directory of local_cwd.
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "train.py").write_text(
        "import os, pathlib, sys, torch.distributed as dist\n"
        "import torch\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.tensor(dist.get_rank() + 1)\n"
        "dist.all_reduce(total)\n"
        "output = pathlib.Path(next(a for a in sys.argv if a.startswith('output=')).removeprefix('output='))\n"
        "output.mkdir(parents=True, exist_ok=True)\n"
        "said = [total.item(), os.environ['OMP_NUM_THREADS'], sys.argv[-1]]\n"
        "(output / f'rank{dist.get_rank()}').write_text(' '.join(map(str, said)))\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    torchx_run(tmp_path, "train", "--config", "a.yaml", "--j", "1x2", "--out", "runs", "--", "name=two words")
    (output,) = (tmp_path / "runs").iterdir()
    assert output.name.startswith("muonrec-train-")
    assert [(output / f"rank{rank}").read_text() for rank in range(2)] == ["3 1 name=two words"] * 2


def test_torchx_builds_data_and_trains_the_demo_for_three_steps(tmp_path: Path, torchx_run: "TorchxRun") -> None:
    config = str(ROOT / "configs" / "demo" / "sasrec.yaml")
    data = f"data.output={tmp_path / 'data'}"
    torchx_run(ROOT, "data", "--config", config, "--", data)
    length = ("num_epochs=null", "num_steps=3", "log_every_steps=1")
    where = ("--j", "1x2", "--out", str(tmp_path / "runs"), "--max_restarts", "0")
    torchx_run(ROOT, "train", "--config", config, *where, "--", data, *length)
    (output,) = (tmp_path / "runs").iterdir()
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss_nats" in record] == [1, 2, 3]
    assert (output / "resolved.yaml").is_file()


def test_what_torchx_leaves_behind_is_ended(torchx_run: "TorchxRun") -> None:
    name, value = torchx_run.mark.split("=")
    # As TorchX starts its replicas: a session of its own, deaf to SIGTERM.
    stubborn = subprocess.Popen(
        ["bash", "-c", "trap '' TERM; echo deaf; sleep 60; true"],
        env={**os.environ, name: value}, start_new_session=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert stubborn.stdout is not None
    assert stubborn.stdout.readline() == b"deaf\n"
    torchx_run.end()
    assert stubborn.wait(timeout=10) == -signal.SIGKILL


class TorchxRun:
    """``torchx run -s local_cwd components/stages.py:STAGE`` from a working directory; nothing outlives the test."""

    def __init__(self) -> None:
        self.mark = f"MUONREC_TEST={uuid.uuid4()}"

    def __call__(self, cwd: Path, stage: str, *arguments: str, timeout_s: float = 240.0) -> str:
        name, value = self.mark.split("=")
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": tools, name: value}
        command = [sys.executable, "-m", "torchx.cli.main", "run", "-s", "local_cwd", "--workspace", "", "--wait"]
        result = subprocess.run(
            [*command, "--log", f"{STAGES}:{stage}", *arguments],
            cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-4000:]
        return result.stdout

    def end(self) -> None:
        """Kill what is left, by the mark in its environment.

        TorchX starts every replica in a session of its own and its workers may swallow SIGTERM, so that neither killing
        our child nor its group reaches them.
        """
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in environ.read_bytes().split(b"\0"):
                    os.kill(int(environ.parent.name), signal.SIGKILL)
            except OSError:  # gone meanwhile, or not ours to read
                continue


@pytest.fixture
def torchx_run() -> Iterator[TorchxRun]:
    run = TorchxRun()
    yield run
    run.end()


def render(app: AppDef, scheduler: str) -> str:
    """What the scheduler would be handed."""
    with get_runner() as runner:
        info = runner.dryrun(app, scheduler=scheduler, cfg=DRYRUN_CFG[scheduler])
    request = info.request
    if scheduler == "local_cwd":
        return "\n".join(str(replica) for replicas in request.role_params.values() for replica in replicas)
    # YAML breaks long lines at their spaces.
    return " ".join(str(info).split()) if scheduler == "kubernetes" else request.materialize()
