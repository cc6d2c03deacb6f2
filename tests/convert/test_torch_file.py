"""torch.save's files are read without torch; views are checked, damage is reported, nothing is run."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spjax.convert import ConvertError
from spjax.convert.fairseq import read_checkpoint
from spjax.convert.safe_pickle import Inert
from spjax.convert.torch_file import Tensor, read_torch_file

FORMATS = ("zip", "legacy")
per_folder = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def views(draw):
    """A base array and a strided view of it without overlaps, as slicing and transposing make them."""
    base = np.arange(np.prod(shape := draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))), dtype=np.float32)
    view = base.reshape(shape).transpose(draw(st.permutations(range(len(shape)))))
    slices = []
    for size in view.shape:
        start = draw(st.integers(0, size - 1))
        slices.append(slice(start, draw(st.integers(start, size)), draw(st.integers(1, 2))))
    return base, view[tuple(slices)]


@pytest.mark.parametrize("layout", FORMATS)
@per_folder
@given(pair=views())
def test_views_round_trip(torch_writer, tmp_path: Path, layout, pair):
    base, view = pair
    start = (view.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // 4
    claim = torch_writer.View(base, start, view.shape, tuple(stride // 4 for stride in view.strides))
    path = getattr(torch_writer, layout)(tmp_path / "x.pt", {"view": claim, "base": base})
    found = read_torch_file(path)
    np.testing.assert_array_equal(found["view"].numpy(), view)
    np.testing.assert_array_equal(found["base"].numpy(), base)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.bool_])
def test_types(torch_writer, tmp_path: Path, layout, dtype):
    array = np.array([[0, 1, 2.5], [-3, 0, 7]]).astype(dtype)
    found = read_torch_file(getattr(torch_writer, layout)(tmp_path / "x.pt", {"x": array}))["x"]
    assert isinstance(found, Tensor)
    assert found.dtype == found.numpy().dtype == array.dtype
    np.testing.assert_array_equal(found.numpy(), array)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("offset", "shape", "strides", "message"),
    [
        (0, (13,), (1,), "exceeds its storage"),
        (7, (6,), (1,), "exceeds its storage"),
        (0, (3, 4), (5, 1), "exceeds its storage"),
        (-1, (3,), (1,), "offset -1"),
        (0, (3,), (-1,), r"strides \(-1\)"),
        (0, (-3,), (1,), r"shape \(-3\)"),
        (0, (3, 3), (1, 1), "overlaps itself"),
        (0, (1 << 40,), (0,), "overlaps itself"),
        (0, (4, 3), (2, 1), "overlaps itself"),
        (0, (3,), (1, 1), "shape"),
        (0, (1 << 62,), (1,), "shape"),
        (0, (1,) * 40, (1,) * 40, "shape"),
    ],
)
def test_invalid_views_are_refused(torch_writer, tmp_path: Path, layout, offset, shape, strides, message):
    claim = torch_writer.View(np.arange(12, dtype=np.float32), offset, shape, strides)
    path = getattr(torch_writer, layout)(tmp_path / "x.pt", {"x": claim})
    with pytest.raises(ConvertError, match=message) as raised:
        read_torch_file(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("size", [11, 13, 1 << 40])
def test_storages_of_wrong_size_are_refused(torch_writer, tmp_path: Path, layout, size):
    claim = torch_writer.View(np.arange(12, dtype=np.float32), 0, (3,), (1,), claimed_size=size)
    path = getattr(torch_writer, layout)(tmp_path / "x.pt", {"x": claim})
    with pytest.raises(ConvertError, match=r"should hold|cut off|numbers in"):
        read_torch_file(path)


@pytest.mark.parametrize("layout", FORMATS)
def test_truncated_anywhere(torch_writer, tmp_path: Path, layout):
    path = getattr(torch_writer, layout)(tmp_path / "x.pt", {"x": np.arange(40, dtype=np.float32), "n": [1, 2]})
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ConvertError, match=r"x\.pt cannot be read"):
            read_torch_file(path)


def test_a_damaged_storage_is_reported(torch_writer, tmp_path: Path):
    array = np.arange(100, dtype=np.float32)
    path = torch_writer.zip(tmp_path / "x.pt", {"x": array})
    content = path.read_bytes()
    assert content.count(array.tobytes()) == 1
    path.write_bytes(content.replace(array.tobytes(), (array + 1).tobytes()))
    tensor = read_torch_file(path)["x"]
    with pytest.raises(ConvertError, match=r"x\.pt: storage 0 is damaged"):
        tensor.numpy()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), layout=st.sampled_from(FORMATS))
def test_damage_anywhere_is_read_or_refused(torch_writer, tmp_path: Path, data, layout):
    tree = {"model": {"a": np.arange(5, dtype=np.float32), "b": np.ones((2, 2), np.float16)}, "n": [1, 2.5]}
    path = getattr(torch_writer, layout)(tmp_path / "x.pt", tree)
    content = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(ConvertError):
        for tensor in read_checkpoint(path).tensors.values():
            tensor.numpy()


def test_compressed_archives_are_refused(torch_writer, tmp_path: Path):
    bomb = torch_writer.zip(tmp_path / "x.pt", {"x": np.zeros(1_000_000, np.float32)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10_000
    with pytest.raises(ConvertError, match="compressed"):
        read_torch_file(bomb)


def test_other_zip_files_are_refused(torch_writer, tmp_path: Path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ConvertError, match=r"is a zip archive: unpack it .*give the file that is in it\.$"):
        read_torch_file(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConvertError, match="a zip file that is damaged or cut off"):
        read_torch_file(path)
    torch_writer.zip(path, {"x": np.arange(3, dtype=np.float32)})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", b"\0" * 12)
    with pytest.raises(ConvertError, match="twice"):
        read_torch_file(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02K\x01.", b"PK\x03\x04 not really", b"\x80"])
def test_other_files_are_refused(tmp_path: Path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(ConvertError, match=r"x\.pt cannot be read"):
        read_torch_file(path)
    with pytest.raises(ConvertError, match="No such file"):
        read_torch_file(tmp_path / "absent.pt")


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("layout", FORMATS)
def test_code_in_a_file_is_not_run(torch_writer, tmp_path: Path, layout):
    call = torch_writer.Raw(pickle.dumps(_Touch(tmp_path / "ran"), 2)[2:-1])
    found = read_torch_file(
        getattr(torch_writer, layout)(tmp_path / "x.pt", {"model": call, "x": np.ones(2, np.float32)})
    )
    assert isinstance(found["model"], Inert)
    assert not (tmp_path / "ran").exists()
    assert found["x"].numpy().tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["FloatStorage", "os.system"])
def test_storages_of_unknown_types_are_refused(torch_writer, tmp_path: Path, kind):
    module, name = ("os", "system") if "." in kind else ("builtins", kind)
    identity = f"(X\x07\0\0\0storagec{module}\n{name}\nX\x01\0\0\0" + "0X\x03\0\0\0cpuK\x03tQ"
    path = torch_writer.zip(tmp_path / "x.pt", {"x": torch_writer.Raw(identity.encode())})
    with pytest.raises(ConvertError, match="is of type"):
        read_torch_file(path)


@pytest.mark.parametrize("name", ["hubert/hubert_tiny", "lm/checkpoint_fp16_legacy", "pgslm/continuous_prosody"])
def test_golden_files_are_read(golden: Path, name):
    model = read_torch_file(golden / f"{name}.pt")["model"]
    assert all(np.isfinite(tensor.numpy()).all() for tensor in model.values())
    if name == "hubert/hubert_tiny":
        expected = np.load(golden / f"{name}_state.npz")
        assert set(expected) == set(model)
        for key, tensor in model.items():
            np.testing.assert_array_equal(tensor.numpy(), expected[key])


def test_golden_pgslm_and_f0_edges(golden: Path):
    for path in (golden / "pgslm").glob("*.pt"):
        assert read_torch_file(path)["model"]["decoder.embed_tokens.weight"].shape == (104, 64)
    edges = read_torch_file(golden / "pgslm" / "f0_bin.th")[32].numpy()
    np.testing.assert_array_equal(edges, np.load(golden / "pgslm" / "discrete_prosody.npz")["f0_edges"])


def test_fairseq_classes_in_a_golden_file_stay_inert(golden: Path):
    state = read_torch_file(golden / "hubert" / "hubert_tiny.pt")["task_state"]
    (found,) = {value.name for values in state.values() for value in values}
    assert found == "fairseq.data.dictionary.Dictionary"


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch_itself(tmp_path: Path, legacy):
    torch = pytest.importorskip("torch", reason="torch, which only benchmarks need, is not installed")
    base = torch.arange(48.0).reshape(6, 8)
    saved = {
        "t": base.t(),
        "part": base[1:5:2, 2:7],
        "half": base.bfloat16(),
        "p": torch.nn.Parameter(base),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    for name, tensor in read_torch_file(tmp_path / "x.pt").items():
        np.testing.assert_array_equal(tensor.numpy().astype(np.float32), saved[name].detach().float().numpy())
