"""A checkpoint of somebody else's run with AdamW goes on with Muon: weights, tables and AdamW's state are kept."""

import logging

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

import muonrec
from tests.adoption.models import shard, share
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import whole

MUON, ADAMW = {"lr": 0.02, "ns_dtype": torch.float32}, {"lr": 1e-3, "eps": 1e-5}
FIRST, STEPS = 3, 6


def weights_of(dmp):
    return {name: whole(value) for name, value in dmp.state_dict().items()}


def train(dmp, optimizer, first, stop):
    dmp.train()
    for number in range(first, stop):
        optimizer.zero_grad()
        dmp(share(number))[0].backward()
        optimizer.step()


def theirs(folder, part, name="dlrm-dcn"):
    """Nothing of muonrec: AdamW on everything dense, saved after some steps, and trained on."""
    dmp = shard(name)
    dense = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    optimizer = KeyedOptimizerWrapper(dense, lambda params: torch.optim.AdamW(params, **ADAMW))
    optimizer = CombinedOptimizer([dmp.fused_optimizer, (part, optimizer)])
    train(dmp, optimizer, 0, FIRST)
    state = {"model": dmp.state_dict(), "opt": optimizer.state_dict(), "epoch": 3}
    dcp.save(state, checkpoint_id=folder)
    weights = weights_of(dmp)
    train(dmp, optimizer, FIRST, STEPS)
    return weights, weights_of(dmp)


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def ours(folder, dense, muon, name="dlrm-dcn"):
    dmp = shard(name, muonrec.FSDP2Wrapper() if dense == "fsdp2" else None)
    settings = {"muon": MUON} if muon else {"muon": None, "matrices": ADAMW}
    optimizer = muonrec.build_optimizer(dmp, **settings, adamw=ADAMW)
    messages = Messages()
    logging.getLogger("muonrec").addHandler(messages)
    try:
        adopted = muonrec.adopt_checkpoint(folder, dmp, optimizer)
    finally:
        logging.getLogger("muonrec").removeHandler(messages)
    loaded = weights_of(dmp)
    train(dmp, optimizer, FIRST, STEPS)
    return loaded, weights_of(dmp), adopted, messages.texts


@pytest.mark.parametrize(("dense", "num_ranks", "part"), [("ddp", 2, ""), ("fsdp2", 2, "dense"), ("ddp", 1, "a.b")])
def test_adamw_everywhere_continues_as_if_nothing_had_happened(tmp_path, dense, num_ranks, part):
    folder = str(tmp_path / "theirs")
    at_save, at_end = run_on_ranks(2, theirs, folder, part)[0]
    for loaded, trained, adopted, _ in run_on_ranks(num_ranks, ours, folder, dense, False):
        assert adopted.fresh == []
        for name in at_save:
            assert torch.equal(loaded[name], at_save[name]), name
            # float32 sums in another order
            torch.testing.assert_close(trained[name], at_end[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dense", ["ddp", "fsdp2"])
def test_muon_takes_over_with_a_fresh_momentum_and_says_so(tmp_path, dense):
    folder = str(tmp_path / "theirs")
    at_save, at_end = run_on_ranks(2, theirs, folder, "dense")[0]
    results = run_on_ranks(2, ours, folder, dense, True)
    fresh = {name for _, _, adopted, _ in results for name in adopted.fresh}
    kept = {name for _, _, adopted, _ in results for name in adopted.kept}
    assert fresh and all(name.startswith("muon.") and name.endswith(".momentum_buffer") for name in fresh)
    assert any(name.endswith("t0.momentum1") for name in kept)
    assert "adamw.model.over_arch.model.1.weight.exp_avg_sq" in kept and len(fresh) == 7
    for loaded, trained, adopted, texts in results:
        assert any("start at zero" in text and adopted.fresh[0] in text for text in texts)
        for name in at_save:
            assert torch.equal(loaded[name], at_save[name]), name
        # Muon moves the matrices elsewhere than AdamW would have.
        moved = trained["model.dense_arch.model._mlp.0._linear.weight"]
        assert not torch.allclose(moved, at_end["model.dense_arch.model._mlp.0._linear.weight"], atol=1e-3)


def refused(folder):
    errors = []
    for path, name in ((folder, "deepfm"), (f"{folder}-elsewhere", "dlrm")):
        try:
            ours(path, "ddp", True, name)
        except (ValueError, OSError) as error:
            errors.append(str(error))
    return errors


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder = str(tmp_path / "theirs")
    run_on_ranks(2, theirs, folder, "")
    for other_model, nowhere in run_on_ranks(2, refused, folder):
        assert (
            "is of another model" in other_model and "model.model.dense_arch.model.0.weight is not in it" in other_model
        )
        assert "no checkpoint of DCP" in nowhere


def adopted_by_wrong_keys(folder):
    dmp = shard("dlrm")
    optimizer = muonrec.build_optimizer(dmp, muon=MUON, adamw=ADAMW)
    errors = []
    for keys in ({"optimizer_key": "optimizer"}, {"model_key": "module"}):
        try:
            muonrec.adopt_checkpoint(folder, dmp, optimizer, **keys)
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_a_key_that_nothing_was_saved_under_is_refused(tmp_path):
    folder = str(tmp_path / "theirs")
    run_on_ranks(2, theirs, folder, "dense", "dlrm")
    for optimizer_error, model_error in run_on_ranks(2, adopted_by_wrong_keys, folder):
        assert "no tensors under 'optimizer.state.'; it has tensors under model, opt; pass optimizer_key" in (
            optimizer_error
        )
        assert "no tensors under 'module.'" in model_error and "pass model_key" in model_error
