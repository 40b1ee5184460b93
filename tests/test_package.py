"""What is importable where, and what the wheel holds."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import muonrec

ROOT = Path(__file__).parents[1]

# Runs before the program: every listed package is as good as not installed.
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""
ALL_BUT_TORCH = {
    "torchrec", "fbgemm_gpu", "tensordict", "torchmetrics", "numpy", "pydantic", "yaml", "pyarrow", "duckdb", "rich",
    "matplotlib", "tensorboard", "torchx",
}  # fmt: skip


def run_without(blocked: set[str], program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + program], cwd=ROOT, capture_output=True, text=True
    )


def test_muonrec_imports_without_torch() -> None:
    result = run_without({"torch", *ALL_BUT_TORCH}, "import muonrec; print(muonrec.__version__)")
    assert (result.stdout.strip(), result.returncode) == (muonrec.__version__, 0), result.stderr


def test_the_optimizers_need_torch_alone() -> None:
    program = """
import torch, torch.distributed.tensor
by_torch = set(sys.modules)
import muonrec.optim
roots = {name.partition(".")[0] for name in set(sys.modules) - by_torch}
print(muonrec.optim.Muon.__name__, sorted(roots - set(sys.stdlib_module_names)))
"""
    result = run_without(ALL_BUT_TORCH, program)
    assert (result.stdout.strip(), result.returncode) == ("Muon ['muonrec']", 0), result.stderr


def test_every_public_name_without_torchrec_says_how_to_install_it() -> None:
    program = (
        "import muonrec\nfor name in [name for name in muonrec._HOMES if name != 'compare']:\n"
        "    try:\n        getattr(muonrec, name)\n    except ImportError as error:\n        print(error)\n"
    )
    messages = run_without({"torchrec"}, program).stdout.splitlines()
    assert [message.split(",")[0] for message in messages] == [
        f"muonrec.{name} needs torchrec" for name in muonrec._HOMES if name != "compare"
    ]
    assert all("pip install 'muonrec[torchrec,data]'" in message for message in messages)


def test_comparing_needs_no_torchrec_and_says_what_it_needs() -> None:
    result = run_without({"torchrec", "fbgemm_gpu"}, "import muonrec; print(muonrec.compare.__name__)")
    assert result.stdout.strip() == "compare", result.stderr
    result = run_without({"numpy", "torchrec"}, "import muonrec; muonrec.compare")
    assert "muonrec.compare needs numpy" in result.stderr
    assert "pip install 'muonrec[compare]'" in result.stderr


@pytest.mark.parametrize("name", sorted(set(muonrec.__all__) - {"__version__"}))
def test_a_public_name_lives_where_it_is_looked_for(name: str) -> None:
    pytest.importorskip("torchrec")
    assert getattr(muonrec, name).__name__ == name


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'optimise'; it has .*build_optimizer"):
        _ = muonrec.optimise


def test_dir_shows_the_lazy_names() -> None:
    assert set(muonrec.__all__) <= set(dir(muonrec))


def test_the_wheel_holds_muonrec_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for package in ("muonrec", "pipeline", "components", "tests"):
        shutil.copytree(ROOT / package, source / package, ignore=hidden)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w",
         str(tmp_path), str(source)],
        check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"muonrec-{muonrec.__version__}-py3-none-any.whl"
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in held} == {"muonrec", f"muonrec-{muonrec.__version__}.dist-info"}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "muonrec").rglob("*.py")}
    assert code <= held
    assert "muonrec/py.typed" in held


def test_version_and_licence_are_those_of_the_project_file() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', text, re.M)[1] == muonrec.__version__
    assert 'license = "BSD-3-Clause"' in text
    assert (ROOT / "LICENSE").read_text().startswith("BSD 3-Clause License")


def test_no_extra_asks_for_both_builds_of_fbgemm() -> None:
    requirements = [
        line.partition("#")[0]
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert "fbgemm-gpu==1.8.*" in "".join(requirements)
    assert "fbgemm-gpu-cpu" not in "".join(requirements)


def test_both_constraint_sets_pin_the_same_trio() -> None:
    pins = {}
    for accelerator in ("cpu", "cuda"):
        lines = (ROOT / f"requirements/constraints-{accelerator}.txt").read_text().splitlines()
        pins[accelerator] = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    assert pins["cpu"].pop("fbgemm-gpu-cpu") == pins["cuda"].pop("fbgemm-gpu")
    assert pins["cpu"] == pins["cuda"]
