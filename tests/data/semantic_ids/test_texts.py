"""Texts become vectors in the order of the items; a stand-in for the library, and the library itself where it is."""

import hashlib
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from muonrec.data.semantic_ids.config import Text
from muonrec.data.semantic_ids.texts import encode_texts, item_texts
from pipeline.data import DataConfig, build

ITEMS = pa.table(
    {
        "title": ["Hammer", None, "Saw", ""],
        "brand": ["Acme", None, None, None],
        "categories": [["Tools", "Steel"], None, [], None],
        "price": [9.5, None, None, None],
    }
)


class Stub:
    """Takes what we pass to ``SentenceTransformer`` and nothing else."""

    made: list[tuple[str, str, bool]] = []
    known = ("here", "on-the-hub")

    def __init__(self, name: str, *, device: str, local_files_only: bool = False) -> None:
        Stub.made.append((name, device, local_files_only))
        if name not in Stub.known or (name == "on-the-hub" and local_files_only):
            raise OSError(f"{name} is no folder\n and no model of the hub")

    def encode(
        self, texts: list[str], *, batch_size: int, show_progress_bar: bool, convert_to_numpy: bool
    ) -> np.ndarray:
        assert (batch_size, show_progress_bar, convert_to_numpy) == (2, False, True)
        return np.array([vector_of(text) for text in texts])


def vector_of(text: str) -> list[float]:
    return [byte / 255 for byte in hashlib.sha256(text.encode()).digest()[:8]]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> type[Stub]:
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Stub))
    Stub.made = []
    return Stub


def test_texts_name_what_is_known_and_leave_out_the_rest() -> None:
    assert item_texts(ITEMS, ["categories", "title", "price", "brand"]) == [
        "categories: Tools, Steel\ntitle: Hammer\nprice: 9.5\nbrand: Acme", "", "title: Saw", "",
    ]  # fmt: skip


def test_each_text_has_its_vector_and_no_text_has_zeros(library: type[Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muonrec.data.semantic_ids.texts._BATCHES_AT_ONCE", 1)
    texts, done = ["a", "", "b", "c", "", "d", "e"], []
    source = Text(model="here", batch_size=2)
    vectors = encode_texts(source, texts, device="cpu", on_items=done.append)
    expected = [vector_of(text) if text else [0] * 8 for text in texts]
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)
    assert vectors.dtype == np.float32
    assert done == [2, 4, 5]
    assert library.made == [("here", "cpu", True)], "a model that is here asks nobody"


def test_a_model_that_is_not_here_is_asked_for_and_an_unknown_one_is_refused(library: type[Stub]) -> None:
    encode_texts(Text(model="on-the-hub", batch_size=2), ["a"], device="cpu")
    assert library.made == [("on-the-hub", "cpu", True), ("on-the-hub", "cpu", False)]
    with pytest.raises(ValueError, match="text model 'no' cannot be loaded: no is no folder and no model of the hub; "):
        encode_texts(Text(model="no"), ["a"], device="cpu")
    with pytest.raises(ValueError, match="no item has a text in title, brand, categories, description; name other"):
        encode_texts(Text(model="here"), ["", ""], device="cpu")


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"needs sentence-transformers: pip install 'muonrec\[text\]'"):
        encode_texts(Text(model="here"), ["a"], device="cpu")


def test_the_stage_reads_the_texts_of_the_items(tmp_path: Path, library: type[Stub]) -> None:
    (tmp_path / "log.txt").write_text("".join(f"u{user} i{user} i{user + 1} i{user + 2} i9\n" for user in range(8)))
    rows = [f"i{item},title {item % 4}" for item in range(9)]
    (tmp_path / "items.csv").write_text("\n".join(["item_id,title", *rows]))
    semantic_ids = {
        "source": {"name": "text", "model": "here", "columns": ["title"], "batch_size": 2},
        "method": {"name": "residual_kmeans", "num_levels": 1, "codebook_size": 4},
    }
    tree = {"source": {"format": "sequences", "path": str(tmp_path / "log.txt")}, "output": tmp_path / "data"}
    with pytest.raises(ValueError, match="has no item metadata; name its source"):
        build(DataConfig.model_validate({**tree, "semantic_ids": semantic_ids}))
    items = {"format": "csv", "path": str(tmp_path / "items.csv")}
    build(DataConfig.model_validate({**tree, "items": items, "semantic_ids": semantic_ids}))

    from muonrec.data.semantic_ids.stored import verify_semantic_ids

    manifest = verify_semantic_ids(tmp_path / "data-semantic-ids")
    assert manifest.num_items_unknown == 1, "i9 has no title"
    assert manifest.source["items"] is not None
    assert manifest.reconstruction_error is not None
    assert manifest.levels[0].num_used == 4
    (tmp_path / "items.csv").write_text("\n".join(["item_id,title", *rows[:-1], "i8,another"]))
    build(DataConfig.model_validate({**tree, "items": items, "semantic_ids": semantic_ids}))
    assert verify_semantic_ids(tmp_path / "data-semantic-ids").fingerprint != manifest.fingerprint


def test_a_tiny_model_of_the_library_itself(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="pip install 'muonrec[text]'")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "title", ":", "hammer", "saw"]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    fast.save_pretrained(tmp_path / "bert")
    from sentence_transformers import models as parts

    body = parts.Transformer(str(tmp_path / "bert"))
    library.SentenceTransformer(modules=[body, parts.Pooling(8)], device="cpu").save(str(tmp_path / "model"))
    vectors = encode_texts(
        Text(model=str(tmp_path / "model"), batch_size=2), ["title: hammer", "", "title: saw"], device="cpu"
    )
    assert vectors.shape == (3, 8)
    assert not vectors[1].any()
    assert np.abs(vectors[0] - vectors[2]).max() > 1e-3
