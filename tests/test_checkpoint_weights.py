"""Weights as safetensors: whole, by the unsharded names, from any sharding and into any."""

import json

import pytest
import torch
from torch import nn

from muonrec import checkpoint
from tests.distributed.ranks import run_on_ranks
from tests.embeddings.test_sharding import sharded, whole


def save_one(folder, sharding, dense):
    dmp, _ = sharded(sharding=sharding, dense=dense)
    checkpoint.save(folder, dmp)
    return {name: whole(value) for name, value in dmp.state_dict().items()}


def import_one(file, sharding, dense):
    dmp, _ = sharded(sharding=sharding, dense=dense, std=0.5, seed=7)
    checkpoint.import_weights(file, dmp)
    return {name: whole(value) for name, value in dmp.state_dict().items()}


@pytest.mark.parametrize(
    ("sharding", "dense"), [("row_wise", "fsdp2"), ("table_wise", "ddp"), ("column_wise", "fsdp2")]
)
def test_what_is_exported_comes_back_into_any_sharding(tmp_path, sharding, dense):
    expected = run_on_ranks(3, save_one, tmp_path / "step-1", sharding, dense)[0]
    file = tmp_path / "new" / "weights.safetensors"
    checkpoint.export_weights(tmp_path / "step-1", file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing partial is left
    for num_ranks, *other in [(1, "table_wise", "ddp"), (2, "row_wise", "fsdp2"), (2, "column_wise", "ddp")]:
        for got in run_on_ranks(num_ranks, import_one, file, *other):
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[name], expected[name]) for name in expected)


class Odd(nn.Module):
    """Tensors of every size and kind that the format can get wrong."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Parameter(torch.arange(6, dtype=torch.float64).view(2, 3))
        self.thin = nn.Parameter(torch.tensor([1.5, -2.5, 3.25], dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(41))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("none", torch.empty(0, 4))


@pytest.fixture
def odd(tmp_path):
    checkpoint.save(tmp_path / "step-1", Odd())
    checkpoint.export_weights(tmp_path / "step-1", tmp_path / "odd.safetensors", notes={"step": "1"})
    return tmp_path / "odd.safetensors"


def test_scalars_empty_tensors_and_odd_sizes_survive(odd):
    model = Odd()
    for value in model.state_dict().values():
        value.zero_()
    assert checkpoint.import_weights(odd, model) == {"format": "pt", "step": "1"}
    for name, value in Odd().state_dict().items():
        assert torch.equal(model.state_dict()[name], value) and model.state_dict()[name].dtype == value.dtype


def test_the_library_of_the_format_reads_it(odd):
    load_file = pytest.importorskip("safetensors.torch", reason="safetensors is not needed, only compared with")
    loaded = load_file.load_file(odd)
    assert loaded.keys() == Odd().state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in Odd().state_dict().items())


def test_it_reads_what_the_library_of_the_format_wrote(tmp_path):
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not needed, only compared with")
    library.save_file(dict(Odd().state_dict()), tmp_path / "theirs.safetensors")
    model = Odd()
    for value in model.state_dict().values():
        value.zero_()
    checkpoint.import_weights(tmp_path / "theirs.safetensors", model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in Odd().state_dict().items())


def header_of(file):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(file, header, data):
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_file_that_is_not_whole_is_refused(odd):
    header, data = header_of(odd)
    for spoil in (
        lambda: odd.write_bytes(b"no safetensors"),
        lambda: odd.write_bytes(b""),
        lambda: write(odd, header, data[:-1]),
        lambda: write(odd, {**header, "wide": {**header["wide"], "data_offsets": [0, 10**9]}}, data),
        lambda: write(odd, {**header, "wide": {**header["wide"], "data_offsets": [-48, 0]}}, data),
        lambda: write(odd, {**header, "wide": {**header["wide"], "shape": [3, 3]}}, data),
        lambda: write(odd, {**header, "wide": {**header["wide"], "dtype": "F17"}}, data),
        lambda: write(odd, ["wide"], data),
    ):
        spoil()
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            checkpoint.import_weights(odd, Odd())


def test_a_file_of_another_model_names_what_differs(odd):
    model = Odd()
    model.wide = nn.Parameter(torch.zeros(4, 3))
    model.extra = nn.Parameter(torch.zeros(1))
    del model.count
    with pytest.raises(ValueError) as error:
        checkpoint.import_weights(odd, model)
    assert "wide is [2, 3] there and [4, 3] here" in str(error.value)
    assert "extra is not in it" in str(error.value) and "it has count, which the model has not" in str(error.value)


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    checkpoint.save(tmp_path / "step-1", Odd())
    (tmp_path / "step-1" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(checkpoint.UnusableCheckpoint, match=r"__0_0.distcp has 0 bytes"):
        checkpoint.export_weights(tmp_path / "step-1", tmp_path / "weights.safetensors")
    assert not (tmp_path / "weights.safetensors").exists()


def test_a_full_disk_is_an_error_and_leaves_nothing_behind(odd, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.export_weights(tmp_path / "step-1", tmp_path / "more.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.safetensors", "step-1"]
