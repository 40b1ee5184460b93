"""Doctor: whether the installed packages fit together and what this machine can train with them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TextIO

Severity = Literal["fault", "warning", "note"]

# The set that the tests run on (requirements/constraints-cpu.txt, down to what may differ without a warning).
TESTED = {
    "torch": "2.13",
    "torchrec": "1.8",
    "fbgemm": "1.8",
    "torchx-nightly": "2026.10.26",
    "duckdb": "2.0",
    "pyarrow": "26",
    "numpy": "2.4",
    "pydantic": "2.14",
}
TESTED_PYTHON = (3, 11)

# Distributions that own the same directory of site-packages: the last one installed wins, file by file.
FBGEMM_NAMES = ("fbgemm-gpu", "fbgemm-gpu-cpu", "fbgemm-gpu-nightly", "fbgemm-gpu-nightly-cpu")
TORCHREC_NAMES = ("torchrec", "torchrec-nightly", "torchrec-nightly-cpu")
TORCHX_NAMES = ("torchx", "torchx-nightly")

TO_READ_DATA = ("numpy", "pyarrow", "pydantic", "pyyaml")
TO_MAKE_DATA = ("duckdb", "rich")
TO_REPORT = ("matplotlib", "jinja2", "tensorboard")
LISTED = ("torch", *TORCHREC_NAMES, *FBGEMM_NAMES, *TORCHX_NAMES, *TO_READ_DATA, *TO_MAKE_DATA, *TO_REPORT)

INSTALL_TORCHREC = {
    "cuda": "pip install torch==2.13.0 torchrec==1.8.0 fbgemm-gpu==1.8.0",
    "cpu": (
        "pip install torch==2.13.0 fbgemm-gpu-cpu==1.8.0 tensordict torchmetrics==1.0.3 tqdm pyre-extensions"
        " && pip install --no-deps torchrec==1.8.0"
    ),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to know; a fault is one that keeps this machine from training."""

    severity: Severity
    text: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Probe:
    """What was seen by running torch and fbgemm, in a process of their own.

    Args:
        torch_cuda: version of CUDA that torch was built for, None for a CPU build.
        devices: names of the CUDA devices that torch sees.
        backends: of torch.distributed.
        torch_error: why ``import torch`` failed.
        fbgemm_error: why ``import fbgemm_gpu`` failed.
        torchrec_error: why ``import torchrec`` failed.
        fused: for ``cpu`` and ``cuda``, each fused table optimizer tried, with the reason why it does not run.
        kernels: the same for the compute kernels of a table.
    """

    torch_cuda: str | None = None
    devices: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("gloo",)
    torch_error: str | None = None
    fbgemm_error: str | None = None
    torchrec_error: str | None = None
    fused: Mapping[str, Mapping[str, str | None]] = dataclasses.field(default_factory=dict)
    kernels: Mapping[str, Mapping[str, str | None]] = dataclasses.field(default_factory=dict)


def diagnose(
    installed: Mapping[str, str | None],
    probe: Probe | None = None,
    *,
    python: tuple[int, int] = TESTED_PYTHON,
    driver: str | None = None,
) -> list[Finding]:
    """What does not fit, worst first. Reads nothing but its arguments.

    Args:
        installed: version by distribution name (``fbgemm-gpu-cpu``); None or absent where it is not installed.
        probe: what running them showed; None judges by the versions alone.
        python: major and minor version.
        driver: version of the NVIDIA driver, None where there is none.
    """
    probe = probe or Probe()
    accelerator = "cuda" if driver else "cpu"
    findings = [
        *_python(python),
        *_twice(installed, accelerator),
        *_trio(installed, accelerator),
        *_accelerator(installed, probe, driver),
        *_probed(installed, probe, accelerator),
        *_companions(installed),
        *_untested(installed),
    ]
    return sorted(findings, key=lambda finding: ("fault", "warning", "note").index(finding.severity))


def can_train(findings: Iterable[Finding]) -> bool:
    return all(finding.severity != "fault" for finding in findings)


def _python(python: tuple[int, int]) -> list[Finding]:
    if python < (3, 10):
        return [
            Finding("fault", f"Python {_dotted(python)} is too old, 3.10 is needed", "make setup PYTHON=python3.11")
        ]
    if python != TESTED_PYTHON:
        return [Finding("note", f"Python {_dotted(python)}: the tests run on {_dotted(TESTED_PYTHON)}")]
    return []


def _twice(installed: Mapping[str, str | None], accelerator: str) -> list[Finding]:
    findings = []
    fbgemm = _present(installed, FBGEMM_NAMES)
    if len(fbgemm) > 1:
        keep = "fbgemm-gpu" if accelerator == "cuda" else "fbgemm-gpu-cpu"
        findings.append(
            Finding(
                "fault",
                f"{' and '.join(fbgemm)} are both installed and overwrite each other's files",
                f"pip uninstall -y {' '.join(fbgemm)} && pip install --no-deps {keep}==1.8.0",
            )
        )
    torchx = _present(installed, TORCHX_NAMES)
    if len(torchx) > 1:
        findings.append(
            Finding(
                "warning",
                f"{' and '.join(torchx)} are both installed and overwrite each other's files",
                f"pip uninstall -y {' '.join(torchx)} && pip install torchx-nightly=={TESTED['torchx-nightly']}",
            )
        )
    return findings


def _trio(installed: Mapping[str, str | None], accelerator: str) -> list[Finding]:
    install = INSTALL_TORCHREC[accelerator]
    if not installed.get("torch"):
        return [Finding("fault", "torch is not installed", install)]
    missing = [names[0] for names in (TORCHREC_NAMES, FBGEMM_NAMES) if not _present(installed, names)]
    if missing:
        return [Finding("fault", f"{' and '.join(missing)} not installed: muonrec.optim works, tables do not", install)]

    torch = _release(installed["torch"])
    torchrec = _release(installed[_present(installed, TORCHREC_NAMES)[0]])
    if torch is None or torchrec is None or torchrec[0] != 1 or torch[0] != 2:
        return [Finding("warning", "torch or torchrec is a development build: whether they match cannot be told")]
    findings = []
    if torch[1] != torchrec[1] + 5:
        findings.append(
            Finding(
                "fault",
                f"torchrec {_dotted(torchrec)} was built for torch 2.{torchrec[1] + 5}, found {_dotted(torch)}",
                install,
            )
        )
    for name in _present(installed, FBGEMM_NAMES):
        fbgemm = _release(installed[name])
        if fbgemm is not None and fbgemm[0] == 1 and fbgemm != torchrec:
            text = f"{name} {_dotted(fbgemm)} does not match torchrec {_dotted(torchrec)}: it needs {_dotted(torchrec)}"
            findings.append(Finding("fault", text, install))
    return findings


def _accelerator(installed: Mapping[str, str | None], probe: Probe, driver: str | None) -> list[Finding]:
    if not installed.get("torch") or probe.torch_error:
        return []
    fbgemm = _present(installed, FBGEMM_NAMES)
    findings = []
    if driver and probe.torch_cuda is None:
        text = f"there is an NVIDIA driver ({driver}), but this torch is a CPU build: training would run on the CPU"
        findings.append(Finding("warning", text, "rm -rf .venv && make setup ACCELERATOR=cuda"))
    elif driver and not probe.devices:
        text = f"torch for CUDA {probe.torch_cuda} finds no device under driver {driver}"
        remedy = "check nvidia-smi and CUDA_VISIBLE_DEVICES; an old driver needs a torch built for an older CUDA"
        findings.append(Finding("warning", text, remedy))
    elif probe.devices and fbgemm and all(name.endswith("cpu") for name in fbgemm):
        text = f"torch sees {len(probe.devices)} CUDA device(s), but {fbgemm[0]} knows only tables on the CPU"
        remedy = f"pip uninstall -y {fbgemm[0]} && pip install --no-deps fbgemm-gpu==1.8.0"
        findings.append(Finding("fault", text, remedy))
    if probe.devices and "nccl" not in probe.backends:
        findings.append(Finding("fault", "this torch has CUDA but not NCCL", INSTALL_TORCHREC["cuda"]))
    if not probe.devices and "gloo" not in probe.backends:
        findings.append(Finding("fault", "this torch has no gloo: ranks on a CPU cannot talk", INSTALL_TORCHREC["cpu"]))
    return findings


def _probed(installed: Mapping[str, str | None], probe: Probe, accelerator: str) -> list[Finding]:
    install = INSTALL_TORCHREC[accelerator]
    if not installed.get("torch"):
        return []
    if probe.torch_error:
        return [Finding("fault", f"torch does not load: {probe.torch_error}", install)]
    if _present(installed, FBGEMM_NAMES) and probe.fbgemm_error:
        return [Finding("fault", f"fbgemm does not load: {probe.fbgemm_error}", _mend_fbgemm(probe, install))]
    if _present(installed, TORCHREC_NAMES) and probe.torchrec_error:
        return [Finding("fault", f"torchrec does not load: {probe.torchrec_error}", install)]
    device = "cuda" if probe.devices else "cpu"
    rowwise_adagrad = probe.fused.get(device, {}).get("EXACT_ROWWISE_ADAGRAD")
    if rowwise_adagrad:
        return [Finding("fault", f"fused row-wise Adagrad does not run on {device}: {rowwise_adagrad}", install)]
    return []


def _mend_fbgemm(probe: Probe, install: str) -> str:
    if probe.torch_cuda is None and "cuda" in (probe.fbgemm_error or ""):  # the CUDA wheel under a CPU build of torch
        return "pip uninstall -y fbgemm-gpu && pip install --no-deps fbgemm-gpu-cpu==1.8.0"
    return install


def _companions(installed: Mapping[str, str | None]) -> list[Finding]:
    groups: list[tuple[tuple[str, ...], Severity, str, str]] = [
        (TO_READ_DATA, "fault", "training cannot read its config and data", "data"),
        (TO_MAKE_DATA, "warning", "the data stage does not run here", "data"),
        (TO_REPORT, "warning", "no report, curves or TensorBoard", "report"),
    ]
    findings = []
    for names, severity, consequence, extra in groups:
        missing = [name for name in names if not installed.get(name)]
        if missing:
            text = f"{', '.join(missing)} not installed: {consequence}"
            findings.append(Finding(severity, text, f"pip install 'muonrec[{extra}]'"))
    torchx = _present(installed, TORCHX_NAMES)
    if not torchx:
        findings.append(
            Finding("note", "torchx is not installed: start the stages with torchrun", "pip install 'muonrec[torchx]'")
        )
    elif torchx == ["torchx"]:
        text = f"torchx {installed['torchx']} is not the tested torchx-nightly {TESTED['torchx-nightly']}"
        remedy = f"pip uninstall -y torchx && pip install torchx-nightly=={TESTED['torchx-nightly']}"
        findings.append(Finding("warning", text, remedy))
    return findings


def _untested(installed: Mapping[str, str | None]) -> list[Finding]:
    findings = []
    for name, tested in TESTED.items():
        for distribution in FBGEMM_NAMES if name == "fbgemm" else (name,):
            version = installed.get(distribution)
            if version and not f"{version.partition('+')[0]}.".startswith(f"{tested}."):
                text = f"{distribution} {version} is untested, the tests run on {tested}; it may work"
                findings.append(Finding("warning", text))
    return findings


def _present(installed: Mapping[str, str | None], names: Iterable[str]) -> list[str]:
    return [name for name in names if installed.get(name)]


def _release(version: str | None) -> tuple[int, int] | None:
    """Major and minor, None for what is dated (a nightly) or has no number."""
    match = re.match(r"(\d+)\.(\d+)", version or "")
    if match is None or int(match[1]) > 1000:
        return None
    return int(match[1]), int(match[2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


# What is seen on this machine ----------------------------------------------------------------------------------------


def find_installed() -> dict[str, str | None]:
    """Version of every listed distribution, by the name that pip knows it under."""
    installed: dict[str, str | None] = {}
    for name in LISTED:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def find_driver() -> str | None:
    """Version of the NVIDIA driver, as nvidia-smi says."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.split()
    return lines[0] if result.returncode == 0 and lines else None


def run_probe(*, timeout_s: float = 300.0) -> Probe:
    """Load torch, fbgemm and torchrec in a process of their own: a library that does not fit can take it down."""
    # From the same place: `python -m muonrec doctor` in a clone finds muonrec through the working directory.
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-c", "from muonrec import doctor; doctor.print_probe()"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=env)
    except subprocess.TimeoutExpired:
        return Probe(fbgemm_error=f"loading torch and fbgemm took more than {timeout_s:.0f} s")
    seen: dict[str, Any] = {}
    for line in result.stdout.splitlines():  # a line per thing seen, so that what came before a crash is kept
        if line.startswith('{"probe"'):
            seen.update(json.loads(line)["probe"])
    if result.returncode != 0:
        during = "torch" if "backends" not in seen else "fbgemm" if "fbgemm_error" not in seen else "torchrec"
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        ended = f"signal {-result.returncode}" if result.returncode < 0 else f"status {result.returncode}"
        seen[f"{during}_error"] = f"the process ended with {ended} ({last})"
    return Probe(**{**seen, "devices": tuple(seen.get("devices", ())), "backends": tuple(seen.get("backends", ()))})


def print_probe() -> None:
    """The other side of `run_probe`: a line of JSON per thing seen."""

    def tell(**seen: Any) -> None:
        print(json.dumps({"probe": seen}), flush=True)

    try:
        import torch
    except Exception as error:
        tell(torch_error=_first_line(error))
        return
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    is_available = {"gloo": torch.distributed.is_gloo_available, "nccl": torch.distributed.is_nccl_available}
    backends = [name for name, available in is_available.items() if available()]
    tell(torch_cuda=torch.version.cuda, devices=devices, backends=backends)

    try:
        import fbgemm_gpu  # noqa: F401
    except Exception as error:
        tell(fbgemm_error=_first_line(error))
        return
    tell(fbgemm_error=None)
    targets = ["cpu", "cuda"] if devices else ["cpu"]
    tell(fused={target: _try_optimizers(target) for target in targets})
    tell(kernels={target: _try_kernels(target) for target in targets})

    try:
        import torchrec  # noqa: F401
    except Exception as error:
        tell(torchrec_error=_first_line(error))


def _try_optimizers(target: str) -> dict[str, str | None]:
    """Each fused optimizer, with None where one step changed the looked-up row, else the reason."""
    names = ("EXACT_SGD", "EXACT_ADAGRAD", "EXACT_ROWWISE_ADAGRAD", "ADAM", "PARTIAL_ROWWISE_ADAM", "LAMB", "LARS_SGD")
    location = "HOST" if target == "cpu" else "DEVICE"
    return {name: _attempt(_step_fused_table, target, location, name) for name in names}


def _try_kernels(target: str) -> dict[str, str | None]:
    """Each compute kernel by TorchRec's name, tried the same way."""
    locations = {"fused": "HOST"} if target == "cpu" else {
        "fused": "DEVICE", "fused_uvm": "MANAGED", "fused_uvm_caching": "MANAGED_CACHING",
    }  # fmt: skip
    tried = {
        kernel: _attempt(_step_fused_table, target, location, "EXACT_ROWWISE_ADAGRAD")
        for kernel, location in locations.items()
    }
    return {**tried, "dense": _attempt(_differentiate_dense_table, target)}


def _attempt(action: Any, *arguments: str) -> str | None:
    try:
        action(*arguments)
    except Exception as error:
        return _first_line(error)
    return None


def _step_fused_table(target: str, location: str, optimizer: str) -> None:
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(8, 4, EmbeddingLocation[location], ComputeDevice[target.upper()])],
        optimizer=EmbOptimType[optimizer],
        learning_rate=0.1,
    )
    weights_KD = table.split_embedding_weights()[0]
    weights_KD.detach().fill_(1.0)  # LARS and LAMB scale by the norm of a row: zeros would never move
    ids, offsets = (torch.tensor(values, device=target) for values in ([3], [0, 1]))
    table(ids, offsets).sum().backward()
    table.flush()
    moved = (table.split_embedding_weights()[0].detach().cpu() != 1.0).any(dim=1)
    assert moved.tolist() == [row == 3 for row in range(8)], (
        f"a step on row 3 moved {moved.nonzero().flatten().tolist()}"
    )


def _differentiate_dense_table(target: str) -> None:
    import torch
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import DenseTableBatchedEmbeddingBagsCodegen

    table = DenseTableBatchedEmbeddingBagsCodegen([(8, 4)], use_cpu=target == "cpu").to(target)
    ids, offsets = (torch.tensor(values, device=target) for values in ([3], [0, 1]))
    table(ids, offsets).sum().backward()
    gradient_KD = table.weights.grad.view(8, 4)
    assert gradient_KD.sum(dim=1).tolist() == [4.0 * (row == 3) for row in range(8)], "the gradient of row 3 is wrong"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# Printing ------------------------------------------------------------------------------------------------------------


def format_report(
    installed: Mapping[str, str | None],
    probe: Probe,
    findings: Iterable[Finding],
    *,
    python: str,
    driver: str | None,
    color: bool = False,
    width: int = 100,
) -> str:
    """The report as text: versions, what this machine can run, what to mend, the verdict."""
    findings = list(findings)

    def paint(text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if color else text

    def heading(text: str) -> list[str]:
        return ["", paint(text, "1")]

    def row(name: str, value: str) -> list[str]:
        return textwrap.wrap(value, width - 24, initial_indent=f"  {name:<20}  ", subsequent_indent=" " * 24)

    lines = heading("Versions") + row("python", python)
    for name in LISTED:
        version = installed.get(name)
        # Of several names of one thing only the first is missed, and only where no other is there.
        aliases: tuple[str, ...] = next((g for g in (TORCHREC_NAMES, FBGEMM_NAMES, TORCHX_NAMES) if name in g), (name,))
        if version or (name == aliases[0] and not _present(installed, aliases)):
            lines += row(name, version or "-")

    lines += heading("Machine")
    lines += row("CUDA devices", ", ".join(probe.devices) or "none")
    lines += row("NVIDIA driver", driver or "none")
    lines += row("torch built for", f"CUDA {probe.torch_cuda}" if probe.torch_cuda else "CPU")
    lines += row("torch.distributed", ", ".join(probe.backends) or "none")

    for target, tried in probe.fused.items():
        lines += heading(f"Tables on {target.upper()} (each tried with one step)")
        lines += row("fused optimizers", _names(tried, works=True))
        if _names(tried, works=False) != "none":
            lines += row("not here", _names(tried, works=False))
        lines += row("compute kernels", _names(probe.kernels.get(target, {}), works=True))
        if tried.get("PARTIAL_ROWWISE_ADAM") and not probe.kernels.get(target, {}).get("dense"):
            lines += row("adam, by rows or not", "through the dense kernel and muonrec's own plain optimizer")

    codes = {"fault": "31;1", "warning": "33", "note": "36"}
    if findings:
        lines += heading("Findings")
    for finding in findings:
        label = f"  {finding.severity:<9}"
        wrapped = textwrap.wrap(finding.text, width - 11)
        lines.append(paint(label, codes[finding.severity]) + wrapped[0])
        lines += [" " * 11 + line for line in wrapped[1:]]
        if finding.remedy:  # never wrapped: it is there to be copied
            lines.append(" " * 11 + paint(f"-> {finding.remedy}", "1"))

    faults = sum(finding.severity == "fault" for finding in findings)
    if faults:
        verdict = paint(f"This machine cannot train yet: {faults} fault{'s' * (faults > 1)}.", codes["fault"])
    else:
        verdict = paint(f"This machine can train, on {'CUDA' if probe.devices else 'the CPU'}.", "32;1")
    return "\n".join([*lines[1:], "", verdict])


def _names(tried: Mapping[str, str | None], *, works: bool) -> str:
    return ", ".join(name for name, reason in tried.items() if (reason is None) == works) or "none"


def main(stream: TextIO | None = None) -> int:
    """Look, diagnose, print. Exit status 0 if this machine can train, 1 on a fault."""
    stream = stream or sys.stdout
    installed, driver, probe = find_installed(), find_driver(), run_probe()
    findings = diagnose(installed, probe, python=sys.version_info[:2], driver=driver)
    report = format_report(
        installed,
        probe,
        findings,
        python=f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        driver=driver,
        color=stream.isatty() and "NO_COLOR" not in os.environ,
        width=min(110, shutil.get_terminal_size().columns),
    )
    print(report, file=stream)
    return 0 if can_train(findings) else 1
