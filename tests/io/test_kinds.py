"""Only regular files are read, and paths of the wrong kind are identified in messages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from spjax.convert.__main__ import main as convert
from spjax.io import StorageError, load_kmeans, load_pack, places, read_encoder, read_unit_lm
from spjax.io.banks import load_bank, load_packs
from spjax.io.packs import push_pack
from spjax.packs import main
from tests.io.test_seals import KINDS


@pytest.fixture
def things(tmp_path: Path) -> dict[str, Path]:
    """One path of every kind that may be confused."""
    made: dict[str, Path] = {}
    for kind in ("pack", "bank", "lm", "hubert", "whisper", "kmeans"):
        made[kind] = tmp_path / "things" / f"a_{kind}"
        KINDS[kind][0](made[kind])
    for name, config in {"hf": "hubert", "hf whisper": "whisper", "gpt2": "gpt2"}.items():
        made[name] = tmp_path / name
        made[name].mkdir()
        (made[name] / "config.json").write_text(json.dumps({"model_type": config}))
    made["artefact"] = tmp_path / "artefact"
    made["artefact"].mkdir()
    (made["artefact"] / "card.json").write_text('{"format": "spjax-served", "version": 2}')
    made["checkpoints"] = tmp_path / "fairseq"
    made["checkpoints"].mkdir()
    (made["checkpoints"] / "checkpoint_best.pt").write_bytes(b"PK\x03\x04")
    made["zip"] = tmp_path / "pack.zip"
    with zipfile.ZipFile(made["zip"], "w") as archive:
        archive.write(made["pack"] / "card.json", "card.json")
    made["tar"] = tmp_path / "pack.tar.gz"
    with tarfile.open(made["tar"], "w:gz") as tar:
        tar.add(made["pack"], "pack")
    made["plain tar"] = tmp_path / "pack.tar"
    with tarfile.open(made["plain tar"], "w") as tar:
        tar.add(made["pack"], "pack")
    made["empty"] = tmp_path / "empty"
    made["empty"].mkdir()
    made["no card"] = tmp_path / "no_card"
    shutil.copytree(made["pack"], made["no card"])
    (made["no card"] / "card.json").unlink()
    made["absent"] = tmp_path / "absent"
    return made


NAMES = {
    "pack": "is a prompt pack, not",
    "bank": "is a bank of prompt packs, not",
    "lm": "is a unit LM, not",
    "hubert": "is a HuBERT, not",
    "whisper": "is a Whisper encoder, not",
    "kmeans": "is a k-means, not",
    "hf": "is a Hugging Face model (hubert), not",
    "hf whisper": "is a Hugging Face model (whisper), not",
    "gpt2": "is a Hugging Face model (gpt2), not",
    "artefact": "is an exported artefact (programs for serving), not",
    "checkpoints": "is a directory of checkpoints (checkpoint_best.pt), not",
    "zip": "is a zip archive, not",
    "tar": "is compressed with gzip, not",
    "plain tar": "is a tar archive, not",
    "empty": " is missing: ",
    "absent": "does not exist, nor does",
}
OTHERS = {"file": "is a file, not", "/dev/zero": "is a pipe or a device, not"}
LOADERS: dict[str, Callable[[Any], Any]] = {
    "pack": load_pack,
    "bank": load_bank,
    "lm": read_unit_lm,
    "hubert": read_encoder,
    "kmeans": load_kmeans,
}


def test_every_wrong_kind_is_named(things: dict[str, Path]):
    for wanted, load in LOADERS.items():
        for given, name in NAMES.items():
            if given == wanted or {given, wanted} == {"hubert", "whisper"}:  # one loader for every encoder
                load(things[given])
                continue
            with pytest.raises(StorageError) as raised:
                load(things[given])
            message = str(raised.value)
            assert name in message, (wanted, given, message)
            assert str(things[given]) in message
            if given in ("zip", "tar", "plain tar"):
                assert "npack" in message, message  # suggests to unpack it
    with pytest.raises(StorageError, match=r"card\.json is missing"):
        load_pack(things["no card"])
    (things["empty"] / "file").write_text("x")
    for given, name in OTHERS.items():
        with pytest.raises(StorageError, match=name):
            load_pack(things["empty"] / given)


def test_load_packs_names_wrong_kinds(things: dict[str, Path]):
    for given in NAMES.keys() - {"pack", "bank"}:
        with pytest.raises(StorageError) as raised:
            load_packs(things[given])
        name = NAMES[given].removeprefix("is ").removesuffix(", not")
        if given not in ("empty", "absent"):
            assert name in str(raised.value), given
    with pytest.raises(StorageError, match=r"without its card\.json, which is missing"):
        load_packs(things["no card"])


def test_a_bank_given_as_a_pack_is_split_by_the_command_of_the_message(things: dict[str, Path], capsys):
    for use in (load_pack, lambda path: push_pack(path, "someone/toy"), lambda path: load_packs(f"mine={path}")):
        with pytest.raises(StorageError, match="Split it first") as raised:
            use(things["bank"])
    main(str(raised.value).split("spjax.packs ")[1].split("`")[0].split())
    for place in capsys.readouterr().out.split():
        load_pack(place)


def test_archives_are_unpacked_by_the_command_of_the_message(things: dict[str, Path], tmp_path: Path):
    for kind in ("zip", "tar", "plain tar"):
        with pytest.raises(StorageError) as raised:
            load_pack(things[kind])
        command = str(raised.value).split("`")[1].replace("DIRECTORY", "unpacked").split()
        command = [sys.executable if word == "python" else word for word in command]
        subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "unpacked" / "card.json").is_file()
    assert load_pack(tmp_path / "pack").task.name == "toy"


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


CONVERSIONS = [
    ["unit_lm", "{bad}", "{out}"],
    ["pgslm", "{bad}", "{out}"],
    ["prompt", "{bad}", "{out}", "--lm={lm}"],
    ["kmeans", "{bad}", "{out}", "--encoder=x"],
    ["hubert", "{bad}", "{out}"],
    ["whisper", "{bad}", "{out}"],
]


@pytest.mark.parametrize("bad", ["pipe", "/dev/zero", "/dev/null", "link to /dev/zero", "directory", "empty file"])
@pytest.mark.parametrize("command", CONVERSIONS, ids=lambda command: command[0])
def test_only_regular_files_are_imported(tmp_path: Path, pipe: Path, things, command, bad: str):
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "nothing").write_bytes(b"")
    given = {
        "pipe": pipe,
        "link to /dev/zero": tmp_path / "link",
        "directory": tmp_path / "empty",
        "empty file": tmp_path / "nothing",
    }
    places_ = {"bad": given.get(bad, bad), "out": tmp_path / "out", "lm": things["lm"]}
    empty = "is not a Hugging Face model" if command[0] == "whisper" else "empty"
    what = {"pipe": "named pipe", "directory": "directory|holds neither", "empty file": empty}.get(bad, "a device")
    with pytest.raises(SystemExit, match=what):
        convert([word.format(**places_) for word in command])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", LOADERS)
def test_pipes_and_devices_in_a_directory_are_refused(tmp_path: Path, kind: str):
    make, load, _ = KINDS[kind]
    for bad in ("pipe", "/dev/zero"):
        make(tmp_path / bad[-4:])
        for file in sorted((tmp_path / bad[-4:]).iterdir(), reverse=True):
            if file.name == "README.md":
                continue
            file.unlink()
            if bad == "pipe":
                os.mkfifo(file)
            else:
                file.symlink_to(bad)
            with pytest.raises(StorageError, match=r"named pipe|a device|is not a file"):
                load(file.parent)


def test_a_card_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    KINDS["pack"][0](tmp_path / "pack")
    monkeypatch.setattr("spjax.io.kinds.MAX_JSON", 1000)
    with pytest.raises(StorageError, match="larger than"):
        load_pack(tmp_path / "pack")


def test_links_to_files_are_followed(tmp_path: Path):
    """The hub's cache consists of links."""
    KINDS["pack"][0](tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name}")
    assert load_pack(tmp_path / "snapshot").task.name == "toy"


def header(text: str, tail: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + tail


SAFETENSORS = [
    b"",
    b"\x01",
    b"\xff" * 8,
    header("{"),
    header("{}"),
    header('{"sep": {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 32]}}'),
    header('{"sep": {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 9999999]}}', b"\0" * 32),
    header('{"../../etc/passwd": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}', b"\0" * 32),
    header('{"sep": {"dtype": "F32", "shape": [-1, 8], "data_offsets": [0, 32]}}', b"\0" * 32),
    header('{"sep": {"dtype": "F32", "shape": [9223372036854775807, 8], "data_offsets": [0, 32]}}', b"\0" * 32),
]


@pytest.mark.parametrize("content", SAFETENSORS, ids=range(len(SAFETENSORS)))
def test_invalid_safetensors_are_refused(tmp_path: Path, content: bytes):
    KINDS["pack"][0](tmp_path / "pack")
    (tmp_path / "pack" / "prompt.safetensors").write_bytes(content)
    with pytest.raises(StorageError, match=r"prompt\.safetensors"):
        load_pack(tmp_path / "pack")


def test_a_read_never_exceeds_its_limit(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"12345")
    assert places.read_limited(tmp_path / "x", 5) == b"12345"
    with pytest.raises(OSError, match="larger"):
        places.read_limited(tmp_path / "x", 4)
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, tmp_path / "y")
    with places.open_regular(tmp_path / "y") as file:
        assert file.read(1)


def test_a_missing_directory_is_not_refreshed(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"nothing does not exist\. Give a pack"):
        main(["refresh", str(tmp_path / "nothing")])


def test_foreign_centroids_are_named_with_the_import_command(tmp_path: Path) -> None:
    for suffix in (".npy", ".npz", ".pkl", ".joblib"):
        path = tmp_path / f"km{suffix}"
        path.write_bytes(b"PK\x03\x04" if suffix == ".npz" else b"\x93NUMPY")
        with pytest.raises(StorageError, match=r"is a file of arrays, not a k-means.*spjax.convert kmeans --help"):
            load_kmeans(path)
