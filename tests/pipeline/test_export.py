"""What an exported file says of itself holds whoever starts from it to it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from muonrec.data.semantic_ids import SemanticIds
from pipeline.export import notes_of
from pipeline.train import Run


def test_a_run_never_starts_from_a_file_of_other_semantic_ids(tmp_path):
    theirs, ours = (SemanticIds(np.array([[0], [last]]), (3,)) for last in (1, 2))
    notes = notes_of({"step": 7, "seed": 0, "data": "abc", "semantic_ids": theirs.fingerprint})
    assert notes == {"step": "7", "data": "abc", "semantic_ids": theirs.fingerprint}
    assert notes_of({"step": 7, "data": "abc"}) == {"step": "7", "data": "abc"}
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors", metadata=notes)
    run: Any = SimpleNamespace(ids=ours)
    with pytest.raises(ValueError, match=r"weights\.safetensors was trained with other semantic IDs"):
        Run.initialize_from(run, tmp_path / "weights.safetensors")
