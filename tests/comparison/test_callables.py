"""Any function that trains a model enters the protocol."""

import numpy as np
import pytest
import torch

import muonrec
from muonrec.comparison.results import read_comparison

ARMS = {
    "control": {"optimizer": "adamw", "width": 8, "lr": [0.01, 0.1, 1.0]},
    "muon": {"optimizer": "muon", "width": 8, "lr": [0.01, 0.1, 1.0]},
}
FEW = {"trials": 3, "tuning_seeds": (0, 9), "leaders": 1, "seeds": (1, 2), "max_extensions": 0}


class Trainer:
    """AUC is best at a rate of 0.1 and a little better with Muon; counts its calls."""

    def __init__(self, **extra):
        self.calls, self.extra = [], extra

    def __call__(self, settings, *, seed, budget, is_final):
        self.calls.append((settings["optimizer"], settings["lr"], seed, budget, is_final))
        if settings["lr"] == 1.0 and settings["optimizer"] == "adamw":
            raise FloatingPointError("the loss is nan")
        auc = 0.7 - 0.05 * abs(np.log10(settings["lr"] / 0.1)) + 0.01 * (settings["optimizer"] == "muon") + 0.001 * seed
        losses = np.random.default_rng(seed).random(50) - 0.1 * (settings["optimizer"] == "muon")
        return {
            "valid": {"auc": auc},
            "test": {"auc": auc - 0.01, "log_loss": float(losses.mean())},
            "per_unit": {"log_loss": losses},
            **self.extra,
        }


def test_arms_are_tuned_by_their_lists_and_compared(tmp_path, monkeypatch):
    trainer = Trainer()
    comparison = muonrec.compare(trainer, ARMS, "auc", output=tmp_path, **FEW)
    assert sum(is_final for *_, is_final in trainer.calls) == 4
    assert all(lr == 0.1 for _, lr, *_, is_final in trainer.calls if is_final)
    assert {(seed, lr) for _, lr, seed, _, is_final in trainer.calls if not is_final and seed} == {(9, 0.1)}
    assert not any(run.test or run.per_unit for run in comparison.trials("muon", 1.0))
    found = comparison.answer()
    muon = found.arms[1.0]["muon"]
    assert muon.test["auc"].difference.mean == pytest.approx(0.01 / 0.6915)
    assert muon.test["log_loss"].difference.high < 0
    assert "1 of 4 tuning runs of control diverged." in found.flags
    assert "muon reaches test AUC 0.7015, +1.4 %" in found.verdict

    again = Trainer()
    assert len(muonrec.compare(again, ARMS, "auc", output=tmp_path, **FEW).runs) == 12
    assert again.calls == []
    # Fewer trials now: what is known counts as the trial that it would be today.
    fewer = muonrec.compare(again, ARMS, "auc", output=tmp_path, **{**FEW, "trials": 2})
    assert again.calls == []
    for arm in ARMS:
        assert sorted({run.trial for run in fewer.trials(arm, 1.0)}) == list(
            range(len({run.rates["lr"] for run in fewer.trials(arm, 1.0)}))
        )
    with pytest.raises(ValueError, match="trials=3 and leaders=0 were asked"):
        muonrec.compare(again, ARMS, "auc", **{**FEW, "leaders": 0})
    monkeypatch.setattr("muonrec.comparison.callables._version_of", lambda _: "2")  # the file was edited
    muonrec.compare(again, ARMS, "auc", output=tmp_path, **FEW)
    assert len(again.calls) == 12
    assert sum(not run.superseded for run in read_comparison(tmp_path).runs) == 12


@pytest.mark.parametrize(
    ("arms", "extra", "message"),
    [
        ({"muon": {**ARMS["muon"], "width": 16}}, {}, r"arm 'muon' differs from the control in width \(8 and 16\)"),
        ({}, {"auc": 1.0}, "train_arm returned auc; it may return valid, test, per_unit"),
        ({}, {"valid": {}}, r"train_arm returned no valid auc; return \{'valid': \{...\}, ...\}"),
        ({}, {"curve_step": [1, 2]}, "train_arm returned 2 of curve_step, 0 of curve_seconds, 0 of curve_value"),
        ({"muon": {**ARMS["muon"], "width": [8, 16]}}, {}, r"width \(muon alone\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(arms, extra, message):
    with pytest.raises(ValueError, match=message):
        muonrec.compare(Trainer(**extra), {**ARMS, **arms}, "auc", **FEW)


def test_a_metric_that_is_no_number_has_diverged_and_code_without_a_file_needs_a_version(tmp_path):
    class Broken(Trainer):
        def __call__(self, settings, **asked):
            found = super().__call__(settings, **asked)
            return {**found, "valid": {"auc": float("nan")}} if settings["lr"] == 0.1 else found

    comparison = muonrec.compare(Broken(), ARMS, "auc", **FEW)
    assert comparison.finals("muon")[0].rates["lr"] != 0.1
    assert {run.status for run in comparison.trials("muon", 1.0) if run.rates["lr"] == 0.1} == {"diverged"}

    made_up = {"Trainer": Trainer}
    exec("def train_arm(settings, **asked): return Trainer()(settings, **asked)", made_up)
    with pytest.raises(ValueError, match="has no file to tell one version of it from another; give version="):
        muonrec.compare(made_up["train_arm"], ARMS, "auc", output=tmp_path, **FEW)


def test_per_unit_must_be_of_the_same_examples_in_every_arm():
    class Fewer(Trainer):
        def __call__(self, settings, **asked):
            found = super().__call__(settings, **asked)
            num_units = 40 if settings["optimizer"] == "muon" else 50
            found["test"].pop("log_loss")  # which would be the mean of others
            return {**found, "per_unit": {"log_loss": found["per_unit"]["log_loss"][:num_units]}}

    with pytest.raises(ValueError, match=r"per_unit log_loss of shape \(40,\) for muon, and \(50,\) for control"):
        muonrec.compare(Fewer(), ARMS, "auc", **FEW)


def test_numbers_of_numpy_and_torch_are_as_good_as_pythons(tmp_path):
    class Curved(Trainer):
        def __call__(self, settings, **asked):
            assert type(settings["lr"]) is float
            found = super().__call__(settings, **asked)
            curve = np.linspace(0.5, found["valid"]["auc"], 5)
            return {
                **found,
                "valid": {"auc": torch.tensor(found["valid"]["auc"])},
                "curve_step": np.arange(1, 6),
                "curve_seconds": torch.arange(5.0),
                "curve_value": curve,
                "num_steps": np.int64(5),
                "per_unit": {"log_loss": torch.tensor(found["per_unit"]["log_loss"])},
            }

    arms = {arm: {**settings, "lr": list(np.array([0.01, 0.1]))} for arm, settings in ARMS.items()}
    as_array = {arm: {**settings, "lr": np.array([0.01, 0.1])} for arm, settings in ARMS.items()}
    found = muonrec.compare(Curved(), arms, "auc", output=tmp_path, **FEW).answer()
    assert found.arms[1.0]["muon"].targets and found.arms[1.0]["muon"].rates == {"lr": 0.1}
    assert muonrec.compare(Curved(), as_array, "auc", **FEW).answer().verdict == found.verdict


def test_values_by_example_that_do_not_make_the_metric_are_refused():
    class Other(Trainer):
        def __call__(self, settings, **asked):
            found = super().__call__(settings, **asked)
            return {**found, "per_unit": {"auc": np.full(50, 0.1)}}

    with pytest.raises(ValueError, match=r"test auc 0\.\d+, and per_unit values of it whose mean is 0\.1"):
        muonrec.compare(Other(), ARMS, "auc", **FEW)
    with pytest.raises(ValueError, match=r"budgets=\[1.0, 1.0\] was asked"):
        muonrec.compare(Trainer(), ARMS, "auc", **FEW, budgets=[1.0, 1.0])


def test_arms_that_start_unlike_are_refused():
    class Unlike(Trainer):
        def __call__(self, settings, **asked):
            return {**super().__call__(settings, **asked), "fingerprints": {"initial_state": settings["optimizer"]}}

    with pytest.raises(ValueError, match=r"did not start alike: they differ in initial_state \(adamw and muon\)"):
        muonrec.compare(Unlike(), ARMS, "auc", **FEW)
