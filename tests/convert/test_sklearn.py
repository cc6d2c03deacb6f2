"""km.bin of any scikit-learn and joblib: the centroids are read exactly, and no code is run."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import joblib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import PCA

from spjax.convert import ConvertError, sklearn
from spjax.convert.__main__ import main
from spjax.convert.sklearn import import_kmeans
from spjax.io import load_kmeans

RNG = np.random.default_rng(0)
FRAMES = RNG.normal(size=(300, 5)).astype(np.float32)


def centroids(path: Path) -> np.ndarray:
    return import_kmeans(path, "hubert", 6).centroids


@pytest.fixture(scope="module")
def model() -> MiniBatchKMeans:
    return MiniBatchKMeans(4, n_init=1, random_state=0).fit(FRAMES)


@pytest.mark.parametrize("version", ["1.0.1", "0.24.2"])
def test_golden_files(golden: Path, version):
    expected = np.load(golden / "kmeans" / f"kmeans_sk{version}.npz")
    for name, key in (("km", "cluster_centers"), ("km_hubert_layer6", "hubert_cluster_centers")):
        path = golden / "kmeans" / f"{name}_sk{version}.bin"
        found = import_kmeans(path, "hubert_base_ls960", 6)
        assert found.centroids.tobytes() == expected[key].tobytes()
        assert found.card["provenance"]["made_by"] == f"scikit-learn {version}"
        assert found.card["provenance"]["source"] == path.name
        assert (found.card["encoder"], found.card["layer"]) == ("hubert_base_ls960", 6)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("compress", [0, 3, ("zlib", 9), ("gzip", 3), ("bz2", 3), ("lzma", 3), ("xz", 3)])
def test_files_of_the_installed_joblib(model, tmp_path: Path, compress, protocol):
    joblib.dump(model, tmp_path / "km.bin", compress=compress, protocol=protocol)
    np.testing.assert_array_equal(centroids(tmp_path / "km.bin"), model.cluster_centers_)


def other_models():
    partial = MiniBatchKMeans(4, random_state=np.random.RandomState(3))
    partial.partial_fit(FRAMES).partial_fit(FRAMES)
    turned = MiniBatchKMeans(4, n_init=1).fit(FRAMES)
    turned.cluster_centers_ = np.asfortranarray(turned.cluster_centers_)
    swapped = MiniBatchKMeans(4, n_init=1).fit(FRAMES)
    swapped.cluster_centers_ = swapped.cluster_centers_.astype(">f4")
    return {
        "partial": partial,
        "fortran": turned,
        "big_endian": swapped,
        "float64": MiniBatchKMeans(4, n_init=1).fit(FRAMES.astype(np.float64)),
        "plain": KMeans(4, n_init=1).fit(FRAMES),
    }


@pytest.mark.parametrize("name", ["partial", "fortran", "big_endian", "float64", "plain"])
def test_models_of_other_kinds(tmp_path: Path, name):
    made = other_models()[name]
    for shift in range(3):  # different paddings before the array
        made.note = "x" * shift
        joblib.dump(made, tmp_path / "km.bin")
        found = centroids(tmp_path / "km.bin")
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, made.cluster_centers_.astype(np.float32))


def test_a_plain_pickle_is_read_too(model, tmp_path: Path):
    (tmp_path / "km.bin").write_bytes(pickle.dumps(model))
    np.testing.assert_array_equal(centroids(tmp_path / "km.bin"), model.cluster_centers_)


def test_vendored_joblib(model, tmp_path: Path):
    joblib.dump(model, tmp_path / "km.bin", protocol=2)
    content = (tmp_path / "km.bin").read_bytes()
    old = content.replace(b"cjoblib.numpy_pickle\n", b"csklearn.externals.joblib.numpy_pickle\n")
    assert old != content
    (tmp_path / "km.bin").write_bytes(old.replace(b"csklearn.cluster._kmeans\n", b"csklearn.cluster.k_means_\n"))
    np.testing.assert_array_equal(centroids(tmp_path / "km.bin"), model.cluster_centers_)


class Attack:
    """Pickles as a call that makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(tmp_path: Path):
    hidden = MiniBatchKMeans(4, n_init=1).fit(FRAMES)
    hidden.note = Attack(tmp_path / "ran")
    joblib.dump(hidden, tmp_path / "km.bin")
    np.testing.assert_array_equal(centroids(tmp_path / "km.bin"), hidden.cluster_centers_)
    joblib.dump(Attack(tmp_path / "ran"), tmp_path / "km.bin")
    with pytest.raises(ConvertError, match=r"km\.bin holds <inert .*mkdir>, not a k-means"):
        centroids(tmp_path / "km.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (PCA(2).fit(FRAMES), "PCA.*not a k-means"),
        (MiniBatchKMeans(4), "never fitted"),
        ({"cluster_centers_": FRAMES}, "a dict, not a k-means"),
        (FRAMES, "not a k-means"),
    ],
    ids=["pca", "unfitted", "dict", "array"],
)
def test_other_contents_are_refused(tmp_path: Path, value, message):
    joblib.dump(value, tmp_path / "km.bin")
    with pytest.raises(ConvertError, match=message):
        centroids(tmp_path / "km.bin")


@pytest.mark.parametrize(
    ("centers", "message"),
    [
        (np.full((2, 2), np.nan), "NaN"),
        (np.zeros(3), r"\[3\], must be floats \[C, D\]"),
        (np.zeros((2, 2), np.int64), "int64"),
        (np.zeros((0, 2)), r"\[0, 2\]"),
        (np.array([[object()]]), "numbers"),
        ([[1.0]], "never fitted"),
    ],
    ids=["nan", "flat", "int", "empty", "object", "list"],
)
def test_bad_centroids_are_refused(tmp_path: Path, centers, message):
    model = MiniBatchKMeans(2)
    model.cluster_centers_ = centers
    with contextlib.suppress(TypeError, AttributeError):
        joblib.dump(model, tmp_path / "km.bin")
    with pytest.raises(ConvertError, match=message):
        centroids(tmp_path / "km.bin")


@pytest.mark.parametrize("compress", [0, ("zlib", 3), ("xz", 3), ("bz2", 3)])
def test_truncated_anywhere(model, tmp_path: Path, compress):
    joblib.dump(model, tmp_path / "km.bin", compress=compress)
    content = (tmp_path / "km.bin").read_bytes()
    for length in range(0, len(content) - 12, 17):
        (tmp_path / "km.bin").write_bytes(content[:length])
        with pytest.raises(ConvertError, match=r"km\.bin cannot be read"):
            centroids(tmp_path / "km.bin")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), compress=st.sampled_from([0, 3]))
def test_damage_anywhere_is_read_or_refused(model, tmp_path: Path, data, compress):
    joblib.dump(model, tmp_path / "km.bin", compress=compress)
    content = bytearray((tmp_path / "km.bin").read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    (tmp_path / "km.bin").write_bytes(content)
    with contextlib.suppress(ConvertError):
        centroids(tmp_path / "km.bin")


def test_arrays_that_claim_more_than_the_file_has(model, tmp_path: Path):
    joblib.dump(model, tmp_path / "km.bin")
    content = (tmp_path / "km.bin").read_bytes()
    shape = b"K\x04K\x05\x86"  # (4, 5)
    assert content.count(shape) == 1
    for claimed in (b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", b"J\xff\xff\xff\xffK\x05\x86", b"NN\x86", b"](K\x09e"):
        (tmp_path / "km.bin").write_bytes(content.replace(shape, claimed))
        with pytest.raises(ConvertError, match=r"cut off|has shape"):
            centroids(tmp_path / "km.bin")


def test_compressed_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sklearn, "_MAX_UNPACKED", 10_000_000)
    for name in ("zlib", "gzip", "bz2", "xz"):
        packed = io.BytesIO()
        joblib.dump(b"\0" * 20_000_000, packed, compress=(name, 9))
        assert len(packed.getvalue()) < 50_000
        (tmp_path / "km.bin").write_bytes(packed.getvalue())
        with pytest.raises(ConvertError, match="decompresses to more than"):
            centroids(tmp_path / "km.bin")


def test_other_files_are_refused(tmp_path: Path):
    path = tmp_path / "km.bin"
    for content, message in (
        (b"", "it is empty"),
        (b"<html>404 Not Found</html>", "damaged"),
        (b"\x04\x22\x4d\x18\0\0\0\0", "LZ4"),
        (b"ZF0x10", "before 0.10"),
        (bz2.compress(b"hello"), "holds no pickle"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConvertError, match=message) as raised:
            centroids(path)
        assert str(path) in str(raised.value)
    with pytest.raises(ConvertError, match="No such file"):
        centroids(tmp_path / "absent.bin")


def test_arrays_in_other_files_are_refused(tmp_path: Path):
    content = b"\x80\x02cjoblib.numpy_pickle\nNDArrayWrapper\n)\x81}X\x08\0\0\0filenameX\x05\0\0\0a.npysb."
    (tmp_path / "km.bin").write_bytes(content)
    with pytest.raises(ConvertError, match=r"before 0\.10 wrote it"):
        centroids(tmp_path / "km.bin")


def test_command(model, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    joblib.dump(model, tmp_path / "km.bin")
    arguments = ["kmeans", str(tmp_path / "km.bin"), str(tmp_path / "km"), "--encoder=hubert_base_ls960", "--layer=6"]
    main(arguments)
    read = load_kmeans(tmp_path / "km")
    np.testing.assert_array_equal(read.centroids, model.cluster_centers_)
    printed = capsys.readouterr().out
    assert "4 clusters, dim 5, for hubert_base_ls960, layer 6" in printed
    assert read.id in printed
    with pytest.raises(SystemExit, match=r"exists\. Choose another directory"):
        main(arguments)
    main([*arguments, "--force"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("order", ["C", "F"])
def test_centroids_of_numpy(tmp_path: Path, dtype, order: str):
    table = np.asarray(FRAMES[:7], dtype, order=order)
    np.save(tmp_path / "c.npy", table)
    np.testing.assert_array_equal(centroids(tmp_path / "c.npy"), table.astype(np.float32))
    main(["kmeans", str(tmp_path / "c.npy"), str(tmp_path / "out"), "--encoder=hubert", "--layer=6"])
    assert load_kmeans(tmp_path / "out").card["provenance"]["made_by"] == "an array"


def test_textlesslib_calls_its_pickles_pt(model, tmp_path: Path):
    joblib.dump(model, tmp_path / "hubert_base_ls960_km500.pt")
    found = centroids(tmp_path / "hubert_base_ls960_km500.pt")
    np.testing.assert_array_equal(found, np.asarray(model.cluster_centers_, np.float32))


def test_centroids_of_torch(tmp_path: Path, torch_writer):
    for kind in ("zip", "legacy"):
        write = getattr(torch_writer, kind)
        for value in (FRAMES[:7], {"centroids": FRAMES[:7]}, {"centroids": FRAMES[:7], "steps": FRAMES[0], "layer": 6}):
            np.testing.assert_array_equal(centroids(write(tmp_path / "c.pt", value)), FRAMES[:7])
        with pytest.raises(ConvertError, match=r"holds a dict of 'a', 'b', not one array"):
            centroids(write(tmp_path / "c.pt", {"a": FRAMES, "b": FRAMES}))


def objects(path: Path) -> None:
    np.save(path, np.array([object(), None]), allow_pickle=True)


def claims(path: Path) -> None:
    np.save(path, FRAMES)
    path.write_bytes(path.read_bytes().replace(b"(300, 5)", b"(3000,5)"))


ARRAYS = {
    "objects": (objects, "Python objects"),
    "claims more": (claims, "greater than file size"),
    "cut off": (
        lambda path: (np.save(path, FRAMES), path.write_bytes(path.read_bytes()[:-1])),
        "greater than file size",
    ),
    "cut header": (lambda path: (np.save(path, FRAMES), path.write_bytes(path.read_bytes()[:40])), "damaged"),
    "flat": (lambda path: np.save(path, FRAMES[0]), r"float32 \[5\], must be floats \[C, D\]"),
    "labels": (lambda path: np.save(path, np.arange(6).reshape(3, 2)), r"int64 \[3, 2\], must be floats"),
    "nan": (lambda path: np.save(path, FRAMES * np.nan), "NaN"),
    "overflow": (lambda path: np.save(path, FRAMES.astype(np.float64) * 1e300), "infinity"),
    "none": (lambda path: np.save(path, FRAMES[:0]), r"\[0, 5\]"),
    "structured": (lambda path: np.save(path, np.zeros(3, [("a", "f4")])), "must be floats"),
    "code in the header": (
        lambda path: path.write_bytes(
            b"\x93NUMPY\x01\x00" + (40).to_bytes(2, "little") + b"__import__('os').system('false')".ljust(39) + b"\n"
        ),
        "damaged",
    ),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_cannot_be_centroids_are_refused(tmp_path: Path, kind: str):
    make, message = ARRAYS[kind]
    make(tmp_path / "c.npy")
    with pytest.raises(ConvertError, match=message) as raised:
        centroids(tmp_path / "c.npy")
    assert str(raised.value).count(str(tmp_path)) == 1


def test_an_archive_of_arrays_is_named(tmp_path: Path):
    np.savez(tmp_path / "c.npz", centroids=FRAMES)
    with pytest.raises(ConvertError, match=r"\.npz archive: save its array of centroids with"):
        centroids(tmp_path / "c.npz")


def test_archives_of_anything_are_named(tmp_path: Path):
    np.save(tmp_path / "c.npy", FRAMES)
    packed = {"gz": gzip.compress((tmp_path / "c.npy").read_bytes()), "xz": lzma.compress(b"<html>")}
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        archive.add(tmp_path / "c.npy", "c.npy")
    packed |= {"tar": (tmp_path / "c.tar").read_bytes(), "tgz": gzip.compress((tmp_path / "c.tar").read_bytes())}
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.write(tmp_path / "c.npy", "c.npy")
    packed["zip"] = (tmp_path / "c.zip").read_bytes()
    for name, content in packed.items():
        path = tmp_path / f"km.{name}"
        path.write_bytes(content)
        with pytest.raises(ConvertError, match=r"km\.\w+ is .*: unpack it.*, and give the file that is in it\.$"):
            centroids(path)
