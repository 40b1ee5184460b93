"""Checkpoints that cannot be used: damaged, foreign or hostile ones are named before anything of them is loaded."""

import io
import json
import pickle
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from muonrec import checkpoint
from muonrec.checkpoint.marker import MARKER, find_faults, read_marker, record_files, write_marker
from muonrec.checkpoint.writing import flat, state_of
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import joined, sharded, whole

FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata", "progress.json", "resolved.yaml", MARKER)


def save_one(folder):
    dmp, _ = sharded()
    checkpoint.save(folder, dmp, joined(dmp), progress={"step": 3}, files={"resolved.yaml": "seed: 0"})


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "step-00000003"
    run_on_ranks(2, save_one, folder)
    return folder


@pytest.fixture
def copy(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / good.name))


def load_error(folder, **model):
    """What `load` says on this rank, and whether the weights were touched."""
    dmp, _ = sharded(**model)
    optimizer = joined(dmp)
    before = {name: whole(value) for name, value in dmp.state_dict().items()}
    try:
        checkpoint.load(folder, dmp, optimizer)
    except checkpoint.UnusableCheckpoint as error:
        after = dmp.state_dict()
        return str(error), all(torch.equal(before[name], whole(after[name])) for name in before)
    return "loaded", False


def test_the_marker_lists_every_file_with_its_size_and_hash(good):
    listed = json.loads((good / MARKER).read_text())["files"]
    assert sorted(listed) == sorted(set(FILES) - {MARKER})
    assert all(listed[name]["num_bytes"] == (good / name).stat().st_size for name in listed)


def test_an_untouched_copy_loads(copy):
    assert run_on_ranks(2, load_error, copy) == [("loaded", False)] * 2


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_wherever_it_is(copy, name):
    path, whole_file = copy / name, (copy / name).read_bytes()
    generator = random.Random(name)
    for _ in range(5):
        at, bit = generator.randrange(len(whole_file)), generator.randrange(8)
        path.write_bytes(whole_file[:at] + bytes([whole_file[at] ^ 1 << bit]) + whole_file[at + 1 :])
        for message, unchanged in run_on_ranks(2, load_error, copy):
            assert unchanged, f"byte {at}, bit {bit}: {message}"
            assert name == MARKER or f"is damaged: {name} was altered" in message


def test_every_flipped_bit_of_the_marker_is_found(copy):
    text = (copy / MARKER).read_bytes()
    for at in range(0, len(text), 7):
        for bit in range(8):
            (copy / MARKER).write_bytes(text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :])
            try:
                files = read_marker(copy)
            except checkpoint.UnusableCheckpoint:
                continue
            assert find_faults(copy, files), f"byte {at}, bit {bit}"


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_found(copy, name):
    data = (copy / name).read_bytes()
    for length in (0, random.Random(name).randrange(1, len(data)), len(data) - 1):
        (copy / name).write_bytes(data[:length])
        for message, unchanged in run_on_ranks(2, load_error, copy):
            assert unchanged, message
            expected = (
                "COMMITTED cannot be read" if name == MARKER else f"{name} has {length:,} bytes, was written with"
            )
            assert expected in message


@pytest.mark.parametrize("name", [name for name in FILES if name != MARKER])
def test_a_missing_file_is_found(copy, name):
    (copy / name).unlink()
    for message, unchanged in run_on_ranks(2, load_error, copy):
        assert message == f"{copy} is damaged: {name} is missing" and unchanged


def test_a_checkpoint_of_another_version_says_so(copy):
    tree = json.loads((copy / MARKER).read_text())
    (copy / MARKER).write_text(json.dumps({**tree, "schema_version": 99}))
    assert "has checkpoint schema 99, this version of muonrec reads 2" in run_on_ranks(1, load_error, copy)[0][0]


def save_foreign(folder):
    """A model with one layer more than `sharded` has, and one of another width."""
    from muonrec.embeddings.sharding import shard_model
    from muonrec.embeddings.tables import TableConfig
    from muonrec.losses import NextItemLoss
    from muonrec.models import SASRec, SASRecConfig
    from tests.embeddings.test_sharding import this_rank

    for name, settings in {"deeper": {"embedding_dim": 64, "num_layers": 3}, "narrower": {"embedding_dim": 32}}.items():
        model = SASRec(SASRecConfig(max_length=20, **settings), num_items=57, loss=NextItemLoss("full_softmax"))
        dmp, _ = shard_model(model, {"item": TableConfig(lr=0.1)}, dense="ddp", ranks=this_rank(), batch_size=16)
        checkpoint.save(Path(folder) / name, dmp, joined(dmp))


def test_a_checkpoint_of_another_model_names_what_differs(tmp_path):
    run_on_ranks(2, save_foreign, tmp_path)
    for message, unchanged in run_on_ranks(2, load_error, tmp_path / "deeper"):
        assert unchanged and re.search(r"it has model\.tower\.\S*2\S*, which the model has not; .* more", message)
    for message, unchanged in run_on_ranks(2, load_error, tmp_path / "narrower"):
        assert unchanged and "is of another model or optimizer" in message
        assert "model.embeddings.embeddings.item.weight is [57, 32] there and [" in message


# Hostile ones: their checksums are right, since whoever wrote the bomb can also hash it -----------------------------


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def sealed(folder):
    (folder / MARKER).unlink()
    write_marker(folder, record_files(folder, [path.name for path in folder.iterdir()]))


def test_a_bomb_goes_off_in_stock_dcp(copy, tmp_path):
    (copy / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(dcp.CheckpointException):  # it is no metadata either
        dcp.load({"x": torch.zeros(1)}, checkpoint_id=copy, no_dist=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["instead", "inside", "as a path", "by eval", "in a class"])
def test_a_bomb_in_the_metadata_is_refused_and_does_not_run(copy, tmp_path, where):
    ran = tmp_path / "ran"
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    if where == "instead":
        metadata = Bomb(ran)
    elif where == "inside":
        metadata.planner_data = {"x": Bomb(ran)}
    elif where == "as a path":
        metadata.storage_meta.checkpoint_id = Bomb(ran)
    data = pickle.dumps(metadata)
    if where == "by eval":
        data = b"c__builtin__\neval\n(V__import__('pathlib').Path(" + repr(str(ran)).encode() + b").touch()\ntR."
    elif where == "in a class":  # sets an attribute of the class itself
        data = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}Vversion\nVhostile\nstb."
    (copy / ".metadata").write_bytes(data)
    sealed(copy)
    for message, unchanged in run_on_ranks(2, load_error, copy):
        assert "is not the metadata of a checkpoint" in message and "nothing of it was run or loaded" in message
        assert unchanged
    assert not ran.exists()
    assert dcp.metadata.Metadata.version is None


def test_a_metadata_that_points_out_of_the_folder_is_refused(copy):
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    sealed(copy)
    assert "points to '../elsewhere'" in run_on_ranks(1, load_error, copy)[0][0]


def test_a_marker_that_lists_files_elsewhere_is_refused(copy):
    tree = json.loads((copy / MARKER).read_text())
    tree["files"]["../elsewhere"] = tree["files"][".metadata"]
    (copy / MARKER).write_text(json.dumps(tree))
    message = run_on_ranks(1, load_error, copy)[0][0]
    assert "COMMITTED cannot be read" in message and "../elsewhere" in message


def save_by_stock_dcp(folder, ran):
    """The right model beside an entry that is no tensor, as stock DCP would unpickle it."""
    dmp, _ = sharded()
    dcp.save({**flat(state_of(dmp, joined(dmp))), "extra": Bomb(ran)}, checkpoint_id=folder)
    if dist.get_rank() == 0:
        (folder / "progress.json").write_text("{}")
        (folder / MARKER).touch()
        sealed(folder)
    dist.barrier()
    return load_error(folder)


def test_a_pickled_entry_is_refused_and_does_not_run(tmp_path):
    ran = tmp_path / "ran"
    for message, unchanged in run_on_ranks(2, save_by_stock_dcp, tmp_path / "step-1", ran):
        assert "extra is no tensor, and only tensors are loaded" in message and unchanged
    assert not ran.exists()


def test_a_bomb_in_the_place_of_a_tensor_is_refused_and_does_not_run(copy, tmp_path):
    ran = tmp_path / "ran"
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if index.fqn.startswith("model.tower"))
    bomb = io.BytesIO()
    torch.save(Bomb(ran), bomb)
    with (copy / place.relative_path).open("ab") as file:
        place.offset, place.length = file.tell(), len(bomb.getvalue())
        file.write(bomb.getvalue())
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    sealed(copy)
    for message, _ in run_on_ranks(2, load_error, copy):
        assert "could not be read" in message and "Weights only load failed" in message
    assert not ran.exists()


def refuse_what_is_no_tensor(folder):
    with_state = torch.nn.Module()
    with_state.state_dict = lambda: {"epoch": 3}
    try:
        checkpoint.save(folder, with_state)
    except ValueError as error:
        return str(error)


def test_what_is_no_tensor_is_not_saved(tmp_path):
    message = run_on_ranks(1, refuse_what_is_no_tensor, tmp_path / "step-1")[0]
    assert "['model.epoch'] are no tensors" in message and "keep it in progress" in message
    assert not (tmp_path / "step-1").exists()
