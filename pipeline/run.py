"""Data -> train -> evaluate on a cluster, one after the other; `python -m pipeline.run CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from muonrec.runlog import configure_logging, run_stage

logger = logging.getLogger(__name__)

STAGES = ("data", "train", "evaluate")
# Relative, so that [component:components/stages.py:train] of .torchxconfig applies: jobs run where they are submitted.
_COMPONENTS = "components/stages.py"
_TAIL_LINES = 40  # torchrun adds a summary of about 20 below the stage's own message
# How long the scheduler may fail to answer before the driver leaves; the job goes on without it.
_PATIENCE_S = 300.0
_SECONDS_BETWEEN_LINES = 30.0

_EPILOG = """\
The progress is kept in --state. The same command again goes on where this one stopped: a stage that is done is skipped,
a job that still runs is waited for and not submitted twice, a run that failed goes on from its last checkpoint.
Ctrl-C leaves the jobs of a cluster running, and says how to cancel them; on this machine it ends them.

examples:
  python -m pipeline.run configs/demo/sasrec.yaml
  python -m pipeline.run configs/demo/sasrec.yaml --scheduler slurm --cfg partition=gpu,time=600 --out /shared/out \\
      --j 4x8 --train '--cpu 64 --gpu 8 --memMB 500000' num_epochs=20
  python -m pipeline.run configs/demo/sasrec.yaml --scheduler kubernetes --cfg queue=default,namespace=muonrec \\
      --image REGISTRY/muonrec:0.1.0 --out /out --mounts type=volume,src=muonrec-out,dst=/out --state muonrec.json \\
      data.output=/out/data
"""


class StageFailed(ValueError):
    """A stage ended badly; the message holds the end of its log."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the driver; returns the exit status: 0, 1 after a failure, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.run",
        description="Submit data, train and evaluate through TorchX, each when the one before has succeeded.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file of the experiment, at a path that the jobs see too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config, for data and train")
    parser.add_argument("--scheduler", "-s", default="local_cwd", help="local_cwd, slurm or kubernetes")
    parser.add_argument("--cfg", default="", metavar="K=V,...", help="of the scheduler, over those in .torchxconfig")
    parser.add_argument("--out", default="out", help="root of the outputs, as the jobs see it")
    parser.add_argument("--state", type=Path, help="where the progress is kept, default OUT/<config>.launch.json")
    parser.add_argument("--j", metavar="NODESxPROCS", help="ranks of train and evaluate, such as 2x8")
    for name, text in (
        ("image", "container image"),
        ("env", "environment, K1=V1,K2=V2"),
        ("mounts", "volumes, type=volume,src=CLAIM,dst=/out,..."),
        ("pod", "YAML file of pod fields to add"),
    ):
        parser.add_argument(f"--{name}", help=f"of all stages: {text}")
    for stage in STAGES:
        parser.add_argument(
            f"--{stage}", default="", metavar="ARGS", help=f"of that stage's component, such as '--cpu 16'; for all of "
            f"them: torchx run {_COMPONENTS}:{stage} --help",
        )  # fmt: skip
    parser.add_argument("--settings", default="", metavar="ARGS", help="of the eval stage, such as 'mask_seen=true'")
    parser.add_argument("--dryrun", action="store_true", help="only print what would be submitted")
    options = parser.parse_intermixed_args(arguments)
    configure_logging()
    # TorchX warns of Volcano's retries once per role; docs/launch.md says it.
    warnings.filterwarnings("ignore", message=r"\s*Role ")
    return run_stage(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Submit what is not done yet, in order. Raises StageFailed, ValueError, OSError."""
    try:
        from torchx.runner import get_runner
        from torchx.runner.config import apply, load_sections
    except ImportError as error:
        raise ImportError(f"pipeline.run submits through TorchX: {error}; pip install 'muonrec[torchx]'") from None
    if not Path(_COMPONENTS).is_file():
        raise ValueError(f"there is no {_COMPONENTS} in {Path.cwd()}; start from the root of the clone")
    if any(override.startswith("output=") for override in options.overrides):
        raise ValueError("output is OUT/<id of the job>, which outlives a restart; pass --out instead of output=")
    # Jobs of SLURM inherit the environment: one that starts again would truncate its logs.
    os.environ.setdefault("SLURM_OPEN_MODE", "append")
    os.environ.setdefault("SBATCH_OPEN_MODE", "append")
    with get_runner(component_defaults=load_sections(prefix="component")) as runner:
        if options.scheduler not in (known := runner.scheduler_backends()):
            raise ValueError(f"--scheduler {options.scheduler} is not known; pass one of {', '.join(known)}")
        runner.scheduler_run_opts(options.scheduler)  # loads it
        # TorchX's local scheduler turned both into an Exception, which "no answer from the scheduler" would swallow.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        cfg = dict(runner.cfg_from_str(options.scheduler, options.cfg)) if options.cfg else {}
        apply(options.scheduler, cfg)
        driver = Driver(runner, options, cfg)
        if options.dryrun:
            for stage in STAGES:
                run = f"{options.out}/<id of train>" if stage == "evaluate" else None
                print(f"--- {stage}\n{driver.request(stage, run)}")
            return
        state = State.open(options.state or default_state(options.config, options.out), identity(options))
        try:
            for stage in STAGES:
                driver.complete(stage, state)
        except KeyboardInterrupt:
            driver.say_how_to_go_on(state)
            raise
    logger.info("done: %s/report.html, metrics.json beside it", state.stages["train"]["run"])


class Driver:
    """Submits stages, follows them and reads their logs, by TorchX's runner.

    Args:
        runner: a `torchx.runner.Runner`.
        options: of the command line.
        cfg: of the scheduler.
        sleep: waits so many seconds.
    """

    def __init__(
        self, runner: Any, options: argparse.Namespace, cfg: dict[str, Any], sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.runner, self.options, self.cfg, self.sleep = runner, options, cfg, sleep
        self.poll_s = 1.0 if options.scheduler.startswith("local") else 10.0

    def complete(self, stage: str, state: State) -> None:
        """Bring ``stage`` to its end, whatever has been done of it."""
        record = state.stages.get(stage, {})
        settings = self.settings(stage, state)
        if record.get("state") == "SUCCEEDED" and record["settings"] == settings:
            logger.info("%s: done before (%s)", stage, record["handle"])
            return
        if record.get("state") == "submitting":
            logger.warning(
                "%s: the driver was ended while it submitted this stage; if a job of it runs, cancel one of the two",
                stage,
            )
        handle = record.get("handle", "")
        if record.get("state") == "submitted" and self.is_worth_waiting_for(stage, handle):
            logger.info("%s: %s was submitted before and is waited for", stage, handle)
        else:
            handle = self.submit(stage, state, settings)
        ended = self.wait(stage, handle)
        state.write(stage, state=ended)
        if ended != "SUCCEEDED":
            replicas = state.stages[stage]["replicas"]
            raise StageFailed(
                f"{stage} ended as {ended}: {handle}\n{self.tail(stage, handle, replicas)}\n"
                "mend the cause and start the same command again: it goes on from here"
            )

    def submit(self, stage: str, state: State, settings: list[str]) -> str:
        """Submit ``stage`` and record it; returns the handle."""
        run = state.stages.get("train", {}).get("run")
        state.write(stage, state="submitting", settings=settings)
        request = self.request(stage, run)
        try:
            handle = self.runner.schedule(request)
        except subprocess.CalledProcessError as error:
            raise OSError(f"{stage} was refused: {shlex.join(error.cmd[:1])} said why above") from None
        facts: dict[str, Any] = {"handle": handle, "replicas": sum(role.num_replicas for role in request.app.roles)}
        if stage == "train":
            # A run that failed goes on in its folder, as another job. Kubernetes' handles end in namespace:app id.
            facts["run"] = run or f"{self.options.out}/{re.split('[/:]', handle)[-1]}"
        state.write(stage, state="submitted", submitted=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts)
        logger.info("%s: submitted %s%s", stage, handle, f", writes to {facts['run']}" if "run" in facts else "")
        return handle

    def settings(self, stage: str, state: State) -> list[str]:
        """What follows ``--`` on the component's command line."""
        if stage == "data":
            return [override for override in self.options.overrides if override.startswith(("data.", "data="))]
        if stage == "train":
            return list(self.options.overrides)
        return shlex.split(self.options.settings)

    def request(self, stage: str, run: str | None) -> Any:
        """What would be submitted (`torchx.specs.AppDryRunInfo`); ``run`` is the folder of the run, if there is one."""
        options, arguments = self.options, []
        for name in ("image", "env", "mounts", "pod"):
            if getattr(options, name) is not None:
                arguments += [f"--{name}", getattr(options, name)]
        if stage != "data" and options.j is not None:
            arguments += ["--j", options.j]
        settings = self.settings(stage, State(Path(), {}))
        if stage == "evaluate":
            arguments += ["--run", run]
        else:
            arguments += ["--config", options.config]
        if stage == "train":
            arguments += ["--out", options.out]
            settings += [f"output={run}"] if run is not None else []
        arguments += shlex.split(getattr(options, stage))
        return self.runner.dryrun_component(
            f"{_COMPONENTS}:{stage}", [*arguments, "--", *settings], options.scheduler, cfg=self.cfg
        )

    def wait(self, stage: str, handle: str) -> str:
        """Follow ``handle`` to its end; returns the final state's name.

        Raises:
            OSError: the scheduler knows nothing of it for minutes; the job was not touched.
        """
        started = said = answered = time.monotonic()
        shown, ended = "", ""
        while True:
            status, error = self.status(handle)
            now = time.monotonic()
            if status is None:
                if now - answered > _PATIENCE_S:
                    why = "it does not know the job" if error is None else repr(error)
                    raise OSError(
                        f"{self.options.scheduler} has said nothing of {handle} for {now - answered:.0f} s ({why}); "
                        "the job was left alone; start the same command again to go on waiting"
                    )
            else:
                answered = now
                name = status.state.name
                # A job that SLURM is about to requeue looks failed for a moment: an end counts when it is seen twice.
                if status.is_terminal() and (name == ended or name == "SUCCEEDED"):
                    logger.info("%s: %s after %.0f s", stage, name, now - started)
                    return name
                ended = name if status.is_terminal() else ""
                if name != shown or now - said > _SECONDS_BETWEEN_LINES:
                    newest = self.newest_line(stage, handle)
                    logger.info("%s: %s for %.0f s%s", stage, name.lower(), now - started, newest)
                    shown, said = name, now
            self.sleep(self.poll_s)

    def status(self, handle: str) -> tuple[Any, Exception | None]:
        """The status, None if the scheduler does not know the job; and the error, if it does not answer."""
        try:
            return self.runner.status(handle), None
        except Exception as error:  # of squeue, sacct, the network: each scheduler has its own
            return None, error

    def is_worth_waiting_for(self, stage: str, handle: str) -> bool:
        """Whether a job of an earlier start runs or has succeeded; False also for one that is forgotten."""
        status, error = self.status(handle)
        if error is not None:
            raise OSError(f"{self.options.scheduler} does not answer about {handle} ({error!r}); try again later")
        if status is not None and status.is_terminal() and status.state.name != "SUCCEEDED":
            logger.warning("%s: %s ended as %s, another one is submitted", stage, handle, status.state.name)
            return False
        return status is not None

    def newest_line(self, stage: str, handle: str) -> str:
        """The last line of the first replica's log, to be shown as progress."""
        if self.options.scheduler == "kubernetes":
            return ""  # each look would fetch the whole log
        try:
            lines = deque(self.lines(stage, handle, 0), maxlen=1)
        except Exception:
            return ""  # not there yet
        return f"; {lines[0]}" if lines else ""

    def tail(self, stage: str, handle: str, replicas: int) -> str:
        """The end of every replica's log: the cause of a failure."""
        tails = []
        for replica in range(replicas):
            try:
                lines = list(deque(self.lines(stage, handle, replica), maxlen=_TAIL_LINES))
            except Exception as error:
                lines = [f"(no log: {error}; try torchx log {handle}/{stage})"]
            tails.append("\n".join([f"--- {stage}/{replica}", *lines]))
        return "\n".join(tails)

    def lines(self, stage: str, handle: str, replica: int) -> Iterator[str]:
        """The log of one replica; stages speak on stderr, which SLURM keeps in a file of its own."""
        from torchx.schedulers.api import Stream

        streams = Stream.STDERR if self.options.scheduler == "slurm" else None
        for line in self.runner.log_lines(handle, stage, replica, streams=streams):
            if line.strip():
                yield line.rstrip()

    def say_how_to_go_on(self, state: State) -> None:
        """After Ctrl-C: what still runs."""
        if self.options.scheduler.startswith("local"):
            return  # TorchX ends the jobs of this machine with its client
        running = [record for record in state.stages.values() if record["state"] == "submitted"]
        for record in running:
            logger.warning(
                "%s goes on without this driver; torchx cancel %s ends it", record["handle"], record["handle"]
            )


@dataclasses.dataclass
class State:
    """The progress of one request, in a file that is whole at any moment."""

    path: Path
    identity: dict[str, Any]
    stages: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, identity: dict[str, Any]) -> State:
        """The progress in ``path``, or none yet.

        Raises:
            ValueError: the file is damaged or of another request; says what differs.
        """
        if not path.is_file():
            return cls(path, identity)
        try:
            tree = json.loads(path.read_text())
            state = cls(path, tree["identity"], tree["stages"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error!r}); delete it to start anew") from None
        if differing := [key for key in identity if identity[key] != state.identity.get(key)]:
            raise ValueError(
                f"{path} holds the progress of a request with another {', '.join(differing)}; pass "
                "--state ANOTHER.json for this one, or delete it to start anew"
            )
        return state

    def write(self, stage: str, **facts: Any) -> None:
        """Add facts of ``stage``; renamed into place."""
        self.stages[stage] = {**self.stages.get(stage, {}), **facts}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(json.dumps({"identity": self.identity, "stages": self.stages}, indent=1) + "\n")
        partial.replace(self.path)


def identity(options: argparse.Namespace) -> dict[str, Any]:
    """What must not change between two starts; scheduler, ranks and resources may."""
    path = Path(options.config)
    if not path.is_file():
        raise ValueError(f"config {path} does not exist; pass the path of a YAML file such as configs/demo/sasrec.yaml")
    return {
        "config": hashlib.sha256(path.read_bytes()).hexdigest(),
        "overrides": list(options.overrides),
        "out": options.out,
    }


def default_state(config: str, out: str) -> Path:
    """``out/demo-sasrec.launch.json`` for ``configs/demo/sasrec.yaml``."""
    return Path(out) / f"{'-'.join(Path(config).with_suffix('').parts[-2:])}.launch.json"


if __name__ == "__main__":
    sys.exit(main())
