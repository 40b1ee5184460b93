"""The page for people with a TorchRec model: its scripts run, and the change that it prints is the one between them."""

import difflib
import re
import runpy
from pathlib import Path

import torch

import muonrec
from tests.distributed.ranks import run_on_ranks

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "existing-torchrec-model.md"
BEFORE, AFTER = DOCS / "examples" / "dlrm_before.py", DOCS / "examples" / "dlrm_after.py"


def run(script, folder):
    return runpy.run_path(script)["train"](torch.device("cpu"), folder)


def test_both_scripts_train(tmp_path):
    for script in (BEFORE, AFTER):
        losses = run_on_ranks(2, run, str(script), str(tmp_path / script.stem))[0]
        assert len(losses) == 40
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), script.name


def compare(script):
    scope = runpy.run_path(script)

    def train_arm(settings, **asked):
        return scope["train_arm"](settings, num_steps=4, **asked)

    arms = {name: {**arm, "dense_lr": [0.003], "rest_lr": [0.001]} for name, arm in scope["ARMS"].items()}
    comparison = muonrec.compare(train_arm, arms, "auc", trials=1, seeds=(1, 2), max_extensions=0)
    return comparison.answer()


def test_the_comparison_of_a_dlrm_runs():
    answer = run_on_ranks(1, compare, str(DOCS / "examples" / "dlrm_compare.py"))[0]
    control, muon = answer.arms[1.0]["control"], answer.arms[1.0]["muon"]
    assert len(muon.test["auc"].values) == 2 == len(muon.targets[0].reached)
    assert 0.3 < muon.test["auc"].mean < 0.9
    # Over seeds and examples for the entropy, which is a mean over these; over seeds alone for AUC.
    assert muon.test["normalized_entropy"].difference.low < muon.test["normalized_entropy"].difference.high
    assert control.test["auc"].difference is None
    assert 0 < muon.optimizer_share < 1


def test_the_page_shows_the_change_between_them():
    printed = re.search(r"```diff\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    before, after = (path.read_text().split('"""', 2)[2].splitlines() for path in (BEFORE, AFTER))
    lines = [
        line for line in difflib.unified_diff(before, after, n=0, lineterm="") if line[:2] not in ("--", "++", "@@")
    ]
    shown = [line for line in printed.splitlines() if line[:1] in ("+", "-")]
    assert [line.rstrip() for line in lines] == [line.rstrip() for line in shown]


def test_python_on_the_page_is_python_and_needs_no_torchrec_where_it_says_so():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for block in blocks:
        compile(block, "block", "exec")
    (torch_alone,) = (block for block in blocks if "param_groups(model)" in block)
    scope = {"model": (model := torch.nn.TransformerEncoderLayer(16, 2)), "torch": torch}
    exec(torch_alone, scope)
    stepped = [p for name in ("muon", "adamw") for group in scope[name].param_groups for p in group["params"]]
    assert len(stepped) == len(set(stepped)) == len(list(model.parameters()))
