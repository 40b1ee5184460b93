"""The doctor's judgement of made-up machines, and one look at this one."""

import io
import re
import sys
from pathlib import Path

import pytest

from muonrec import __main__, doctor
from muonrec.doctor import Finding, Probe, can_train, diagnose

ROOT = Path(__file__).parents[1]
REST = {
    "torchx-nightly": "2026.10.26", "numpy": "2.4.6", "pyarrow": "26.0.1", "pydantic": "2.14.3", "pyyaml": "6.0.3",
    "duckdb": "2.0.0", "rich": "15.0.0", "matplotlib": "3.11.2", "jinja2": "3.1.6", "tensorboard": "2.21.0",
}  # fmt: skip
CPU = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0", **REST}
CUDA = {"torch": "2.13.0+cu130", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0", **REST}
H200 = Probe(torch_cuda="13.0", devices=("NVIDIA H200",), backends=("gloo", "nccl"))


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_the_tested_set_has_no_findings() -> None:
    assert diagnose(CPU) == []
    assert diagnose(CUDA, H200, driver="580.65") == []


def test_what_pip_resolves_by_itself_is_three_versions_that_do_not_match() -> None:
    findings = diagnose({**CUDA, "torch": "2.15.0", "fbgemm-gpu": "1.9.0"})
    faults = [finding.text for finding in findings if finding.severity == "fault"]
    assert faults == [
        "torchrec 1.8 was built for torch 2.13, found 2.15",
        "fbgemm-gpu 1.9 does not match torchrec 1.8: it needs 1.8",
    ]


@pytest.mark.parametrize(("torch", "torchrec"), [("2.9.1", "1.4.0"), ("2.14.1", "1.9.2"), ("2.13.2", "1.8.1")])
def test_a_matching_trio_of_another_version_is_only_untested(torch: str, torchrec: str) -> None:
    findings = diagnose({**CPU, "torch": torch, "torchrec": torchrec, "fbgemm-gpu-cpu": f"{torchrec[:3]}.0"})
    assert can_train(findings)
    assert all(finding.severity == "warning" and "untested" in finding.text for finding in findings)
    assert len(findings) == (0 if torchrec.startswith("1.8") else 3)


@pytest.mark.parametrize(("driver", "kept"), [(None, "fbgemm-gpu-cpu==1.8.0"), ("580.65", "fbgemm-gpu==1.8.0")])
def test_both_builds_of_fbgemm_are_a_fault_and_the_right_one_is_kept(driver: str | None, kept: str) -> None:
    probe = H200 if driver else Probe()
    fault = only(diagnose({**CPU, "fbgemm-gpu": "1.8.0"}, probe, driver=driver))
    assert fault.severity == "fault"
    assert fault.remedy == f"pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && pip install --no-deps {kept}"


def test_torchx_beside_its_nightly_is_a_warning() -> None:
    warning = only(diagnose({**CPU, "torchx": "0.7.0"}))
    assert (warning.severity, "overwrite each other's files" in warning.text) == ("warning", True)
    assert warning.remedy == "pip uninstall -y torchx torchx-nightly && pip install torchx-nightly==2026.10.26"


def test_an_old_torchx_alone_is_a_warning() -> None:
    warning = only(diagnose({**CPU, "torchx-nightly": None, "torchx": "0.7.0"}))
    assert warning.text == "torchx 0.7.0 is not the tested torchx-nightly 2026.10.26"


def test_torchx_is_not_needed() -> None:
    assert only(diagnose({**CPU, "torchx-nightly": None})).severity == "note"


@pytest.mark.parametrize(
    ("gone", "text", "remedy"),
    [
        ("torch", "torch is not installed", "pip install torch==2.13.0"),
        ("torchrec", "torchrec not installed: muonrec.optim works", "--no-deps torchrec==1.8.0"),
        ("fbgemm-gpu-cpu", "fbgemm-gpu not installed: muonrec.optim works", "fbgemm-gpu-cpu==1.8.0"),
        ("pyarrow", "pyarrow not installed: training cannot read", "pip install 'muonrec[data]'"),
    ],
)
def test_what_training_needs_is_missed(gone: str, text: str, remedy: str) -> None:
    fault = only(diagnose({**CPU, gone: None}))
    assert fault.severity == "fault"
    assert fault.text.startswith(text)
    assert remedy in fault.remedy


@pytest.mark.parametrize(
    ("gone", "remedy"), [("duckdb", "pip install 'muonrec[data]'"), ("jinja2", "pip install 'muonrec[report]'")]
)
def test_what_only_another_stage_needs_is_a_warning(gone: str, remedy: str) -> None:
    warning = only(diagnose({**CPU, gone: None}))
    assert (warning.severity, warning.remedy) == ("warning", remedy)


def test_a_cuda_fbgemm_under_a_cpu_torch_is_replaced() -> None:
    probe = Probe(fbgemm_error="OSError: libtorch_cuda.so: cannot open shared object file: No such file or directory")
    fault = only(diagnose({**CUDA, "torch": "2.13.0+cpu"}, probe))
    assert fault.text.startswith("fbgemm does not load: OSError: libtorch_cuda.so")
    assert fault.remedy == "pip uninstall -y fbgemm-gpu && pip install --no-deps fbgemm-gpu-cpu==1.8.0"


def test_pytorchs_own_cpu_build_called_fbgemm_gpu_is_fine() -> None:
    installed = {**CPU, "fbgemm-gpu-cpu": None, "fbgemm-gpu": "1.8.0+cpu"}
    assert diagnose(installed) == []


def test_a_cpu_torch_beside_a_driver_trains_but_warns() -> None:
    warning = only(diagnose(CPU, driver="580.65"))
    assert warning.severity == "warning"
    assert (
        warning.text
        == "there is an NVIDIA driver (580.65), but this torch is a CPU build: training would run on the CPU"
    )
    assert "ACCELERATOR=cuda" in warning.remedy


def test_a_cpu_fbgemm_under_a_cuda_torch_is_a_fault() -> None:
    fault = only(diagnose({**CPU, "torch": "2.13.0"}, H200, driver="580.65"))
    assert fault.severity == "fault"
    assert fault.text == "torch sees 1 CUDA device(s), but fbgemm-gpu-cpu knows only tables on the CPU"


def test_a_broken_fused_adagrad_is_a_fault() -> None:
    probe = Probe(fused={"cpu": {"EXACT_SGD": None, "EXACT_ROWWISE_ADAGRAD": "RuntimeError: no kernel"}})
    assert only(diagnose(CPU, probe)).text == "fused row-wise Adagrad does not run on cpu: RuntimeError: no kernel"


def test_ranks_need_a_backend() -> None:
    assert only(diagnose(CPU, Probe(backends=()))).text == "this torch has no gloo: ranks on a CPU cannot talk"
    no_nccl = Probe(torch_cuda="13.0", devices=("NVIDIA H200",), backends=("gloo",))
    assert only(diagnose(CUDA, no_nccl, driver="580.65")).text == "this torch has CUDA but not NCCL"


def test_an_old_python_is_a_fault_and_a_new_one_a_note() -> None:
    assert only(diagnose(CPU, python=(3, 9))).severity == "fault"
    assert only(diagnose(CPU, python=(3, 12))).severity == "note"


def test_development_builds_cannot_be_matched() -> None:
    installed = {**CPU, "torchrec": None, "torchrec-nightly": "2026.11.20"}
    assert only(diagnose(installed)).text.startswith("torch or torchrec is a development build")


def test_faults_come_first() -> None:
    findings = diagnose({"torch": "2.13.0", "torchx": "0.7.0"})
    order = [("fault", "warning", "note").index(finding.severity) for finding in findings]
    assert order == sorted(order)
    assert order[0] == 0
    assert order[-1] == 1


def test_the_tested_set_is_the_pinned_set() -> None:
    pins = {}
    for name in ("cpu", "common"):
        for line in (ROOT / f"requirements/constraints-{name}.txt").read_text().splitlines():
            if "==" in line and not line.startswith("#"):
                pins.update([line.split("==")])
    pins["fbgemm"] = pins["fbgemm-gpu-cpu"]
    for name, tested in doctor.TESTED.items():
        assert f"{pins[name]}.".startswith(f"{tested}."), name
    for line in doctor.INSTALL_TORCHREC.values():
        for name, version in re.findall(r"(\S+)==(\S+)", line):
            assert pins[name.replace("fbgemm-gpu", "fbgemm-gpu-cpu") if name == "fbgemm-gpu" else name] == version


def test_the_report_shows_versions_findings_and_remedies() -> None:
    probe = Probe(fused={"cpu": {"EXACT_SGD": None, "ADAM": "AssertionError"}}, kernels={"cpu": {"fused": None}})
    installed = {**CPU, "fbgemm-gpu": "1.9.0"}
    findings = diagnose(installed, probe)
    report = doctor.format_report(installed, probe, findings, python="3.11.7", driver=None)
    assert re.search(r"^  torchrec +1\.8\.0$", report, re.M)
    assert re.search(r"^  fused optimizers +EXACT_SGD$", report, re.M)
    assert re.search(r"^  not here +ADAM$", report, re.M)
    assert "-> pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && pip install --no-deps fbgemm-gpu-cpu==1.8.0" in report
    assert report.splitlines()[-1] == "This machine cannot train yet: 2 faults."
    assert max(len(line) for line in report.splitlines() if "->" not in line) <= 100


def test_a_process_that_dies_is_reported_not_shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Stands for a library built against another torch, which takes the interpreter down.
    fbgemm = tmp_path / "fbgemm_gpu"
    fbgemm.mkdir()
    (fbgemm / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probe = doctor.run_probe()
    assert probe.fbgemm_error is not None
    assert probe.fbgemm_error.startswith("the process ended with signal 11")
    assert "gloo" in probe.backends


def test_this_machine_runs_the_optimizers_that_its_kernels_have() -> None:
    pytest.importorskip("fbgemm_gpu")
    probe = doctor.run_probe()
    works = [name for name, reason in probe.fused["cpu"].items() if reason is None]
    assert works == ["EXACT_SGD", "EXACT_ADAGRAD", "EXACT_ROWWISE_ADAGRAD"]
    assert probe.fused["cpu"]["ADAM"] == "AssertionError: Optimizer adam is not supported in CPU mode."
    assert probe.kernels["cpu"] == {"fused": None, "dense": None}


@pytest.mark.gpu
def test_cuda_runs_adam_in_the_backward_pass() -> None:
    probe = doctor.run_probe()
    if not probe.devices:
        pytest.skip("no CUDA device")
    assert probe.fused["cuda"]["ADAM"] is None
    assert probe.fused["cuda"]["PARTIAL_ROWWISE_ADAM"] is None
    assert probe.kernels["cuda"] == {"fused": None, "fused_uvm": None, "fused_uvm_caching": None, "dense": None}


def test_the_exit_status_tells_whether_it_can_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run_probe", lambda: Probe())
    monkeypatch.setattr(doctor, "find_driver", lambda: None)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(doctor, "find_installed", lambda: dict(CPU))
    assert __main__.main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "find_installed", lambda: {**CPU, "torch": "2.15.0"})
    assert __main__.main(["doctor"]) == 1
