"""Downloads from a local server: interrupted, resumed, refused, damaged; and complete sets, converted."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import hashlib
import http.server
import io
import os
import shutil
import socket
import tarfile
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spjax import fetch as fetching
from spjax.convert import ConvertError
from spjax.fetch import SETS, FetchError, FetchSet, File, download, fetch, main, unpack
from spjax.io import download as downloading
from spjax.io import load_kmeans, read_unit_lm
from spjax.io.encoders import read_encoder

CONTENT = np.random.default_rng(0).bytes(300_000)
QUICK = {"wait": 0.01, "timeout": 10.0}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclasses.dataclass
class Server:
    """State of a local server: its files, its faults, and the requests that it received.

    Attributes:
      url: its address.
      files: path → content.
      ranges: whether it supports range requests.
      drops: number of bytes after which the next responses end prematurely.
      codes: statuses with which the next requests are refused.
      asked: (path, Range or None) of every request.
      log: messages of http.server.
    """

    url: str = ""
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    ranges: bool = True
    drops: list[int] = dataclasses.field(default_factory=list)
    codes: list[int] = dataclasses.field(default_factory=list)
    asked: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    log: list[tuple] = dataclasses.field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    """Responds according to `self.server.state`."""

    def do_GET(self) -> None:
        state: Server = self.server.state
        path, asked = urllib.parse.unquote(self.path), self.headers.get("Range")
        state.asked.append((path, asked))
        assert len(state.asked) < 200, "asked without end"
        content = state.files.get(path)
        if state.codes or content is None:
            return self.send_error(state.codes.pop(0) if state.codes else 404)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and state.ranges else 0
        if start >= len(content) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + state.drops.pop(0) if state.drops else len(content)
        with contextlib.suppress(OSError):
            self.wfile.write(content[start:end])
        return None

    def log_message(self, *message) -> None:
        """Collects what http.server would print."""
        self.server.state.log.append(message)


@pytest.fixture
def server() -> Iterator[Server]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.state = Server(f"http://127.0.0.1:{running.server_port}")
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield running.state
        running.shutdown()
        thread.join(10)


@pytest.fixture
def nowhere() -> str:
    """A URL that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def tgz(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# Single files


def test_a_whole_file(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    server.files["/a/x.bin"] = CONTENT
    path = download(f"{server.url}/a/x.bin", tmp_path / "deep" / "x.bin", sha256=sha256(CONTENT), **QUICK)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["deep/x.bin"]
    assert server.asked == [("/a/x.bin", None)]
    assert "x.bin: 100%" in capsys.readouterr().err


def test_an_empty_file(server: Server, tmp_path: Path):
    server.files["/x.bin"] = b""
    assert download(f"{server.url}/x.bin", tmp_path / "x.bin", **QUICK).read_bytes() == b""


def test_a_connection_that_drops_is_resumed(server: Server, tmp_path: Path):
    server.files["/x.bin"] = CONTENT
    server.drops = [100_000, 0, 50_000]
    download(f"{server.url}/x.bin", tmp_path / "x.bin", sha256=sha256(CONTENT), **QUICK)
    assert [asked for _, asked in server.asked] == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-"]


def test_any_number_of_drops_with_progress(server: Server, tmp_path: Path):
    server.files["/x.bin"] = CONTENT
    server.drops = [20_000] * 14
    download(f"{server.url}/x.bin", tmp_path / "x.bin", sha256=sha256(CONTENT), attempts=2, **QUICK)
    assert len(server.asked) == 15


def test_the_next_call_resumes(server: Server, tmp_path: Path):
    server.files["/x.bin"] = CONTENT
    server.drops = [100_000, 0, 0]
    with pytest.raises(
        FetchError, match=r"ended after 100,000 of 300,000 bytes.*100,000 bytes are kept in .*x\.bin\.part"
    ):
        download(f"{server.url}/x.bin", tmp_path / "x.bin", attempts=3, **QUICK)
    assert names(tmp_path) == ["x.bin.part"]
    download(f"{server.url}/x.bin", tmp_path / "x.bin", sha256=sha256(CONTENT), **QUICK)
    assert server.asked[-1] == ("/x.bin", "bytes=100000-")
    assert names(tmp_path) == ["x.bin"]


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path):
    server.files["/x.bin"] = CONTENT
    server.ranges = False
    server.drops = [100_000]
    download(f"{server.url}/x.bin", tmp_path / "x.bin", sha256=sha256(CONTENT), **QUICK)
    assert [asked for _, asked in server.asked] == [None, "bytes=100000-"]
    # Receiving the same bytes again is not progress.
    server.drops = [100_000] * 50
    with pytest.raises(FetchError, match="ended after 100,000"):
        download(f"{server.url}/x.bin", tmp_path / "y.bin", attempts=3, **QUICK)
    assert len(server.asked) == 2 + 3


def test_a_complete_part_is_used(server: Server, tmp_path: Path):
    server.files["/x.bin"] = CONTENT
    (tmp_path / "x.bin.part").write_bytes(CONTENT)
    download(f"{server.url}/x.bin", tmp_path / "x.bin", sha256=sha256(CONTENT), **QUICK)
    assert server.asked == [("/x.bin", "bytes=300000-")]


def test_a_part_that_is_longer_than_the_file_is_dropped(server: Server, tmp_path: Path):
    server.files["/x.bin"] = CONTENT
    (tmp_path / "x.bin.part").write_bytes(CONTENT + b"more")
    download(f"{server.url}/x.bin", tmp_path / "x.bin", sha256=sha256(CONTENT), **QUICK)
    assert [asked for _, asked in server.asked] == ["bytes=300004-", None]


def test_a_file_with_another_sha256_is_deleted(server: Server, tmp_path: Path):
    server.files["/x.bin"] = CONTENT
    with pytest.raises(FetchError, match=f"expected {'0' * 64} but got {sha256(CONTENT)}. Deleted download"):
        download(f"{server.url}/x.bin", tmp_path / "x.bin", sha256="0" * 64, **QUICK)
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [403, 404, 410])
def test_refusals_are_not_retried(server: Server, tmp_path: Path, code):
    server.codes = [code]
    with pytest.raises(FetchError, match=rf"x\.bin: HTTP {code} ") as raised:
        download(f"{server.url}/x.bin", tmp_path / "x.bin", **QUICK)
    assert len(server.asked) == 1
    assert f"put it at {tmp_path / 'x.bin'}," in str(raised.value)
    assert names(tmp_path) == []


def test_server_errors_are_retried(server: Server, tmp_path: Path):
    server.files["/x.bin"] = CONTENT
    server.codes = [500, 503, 429]
    assert download(f"{server.url}/x.bin", tmp_path / "x.bin", **QUICK).read_bytes() == CONTENT
    server.codes = [500] * 9
    with pytest.raises(FetchError, match="HTTP 500"):
        download(f"{server.url}/x.bin", tmp_path / "y.bin", attempts=3, **QUICK)
    assert len(server.asked) == 4 + 3


def test_a_silent_server_times_out(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.bin"
        with pytest.raises(FetchError, match="timed out"):
            download(url, tmp_path / "x.bin", attempts=2, wait=0.01, timeout=0.2)


@pytest.mark.parametrize("lost", ["refused", "no name"])
def test_offline_explains_which_files_to_copy(nowhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost):
    if lost == "no name":

        def fail(*_, **__):
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

        monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(FetchError, match="no connection") as raised:
        download(f"{nowhere}/a/x.bin", tmp_path / "x.bin", wait=60)  # does not wait
    assert f"get {nowhere}/a/x.bin by other means, put it at {tmp_path / 'x.bin'}, and" in str(raised.value)
    with pytest.raises(FetchError, match="not an http"):
        download(Path(__file__).as_uri(), tmp_path / "x.bin")


def test_a_full_disk_keeps_the_part(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server.files["/x.bin"] = CONTENT
    server.drops = [1000]
    with pytest.raises(FetchError, match="ended after"):
        download(f"{server.url}/x.bin", tmp_path / "x.bin", attempts=1, **QUICK)
    usage = downloading.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloading.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        FetchError, match=r"x\.bin\.part cannot be written: 299,000 bytes are missing .* after 1,000 bytes"
    ):
        download(f"{server.url}/x.bin", tmp_path / "x.bin", **QUICK)
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(downloading.os, "fsync", full)
    with pytest.raises(FetchError, match=r"No space left on device.*resumes after 300,000 bytes"):
        download(f"{server.url}/x.bin", tmp_path / "x.bin", **QUICK)
    assert (tmp_path / "x.bin.part").read_bytes() == CONTENT


def test_an_interrupt_keeps_the_part(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server.files["/x.bin"] = CONTENT
    server.drops = [120_000]

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(downloading.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(f"{server.url}/x.bin", tmp_path / "x.bin", **QUICK)
    assert (tmp_path / "x.bin.part").read_bytes() == CONTENT[:120_000]


# Archives


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def test_unpack_leaves_out_a_single_folder_at_the_top(tmp_path: Path):
    (tmp_path / "a.tgz").write_bytes(tgz({"repo-HEAD/audio/ačiū 1.wav": b"1", "repo-HEAD/meta.csv": b"2"}))
    unpack(tmp_path / "a.tgz", tmp_path / "deep" / "raw")
    assert names(tmp_path / "deep") == ["raw/audio/ačiū 1.wav", "raw/meta.csv"]
    (tmp_path / "b.tgz").write_bytes(tgz({"./yes/1.wav": b"1", "./no/2.wav": b"2"}))
    unpack(tmp_path / "b.tgz", tmp_path / "b")
    assert names(tmp_path / "b") == ["no/2.wav", "yes/1.wav"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"/etc/x": b"1"}, "'/etc/x', which is outside its folder"),
        ({"a/../../x": b"1"}, "is outside its folder"),
        ({"a\\..\\x": b"1"}, "is outside its folder"),
        ({"a": link("a", "/etc/passwd")}, "neither a file nor a folder"),
        ({"a": b"1", "b": link("b", "a", tarfile.LNKTYPE)}, "neither a file nor a folder"),
        ({"a": link("a", "", tarfile.FIFOTYPE)}, "neither a file nor a folder"),
        ({"a": b"0" * 600, "b": b"0" * 600}, "more than 1,000 bytes"),
        ({}, "it is empty"),
    ],
)
def test_bad_archives(tmp_path: Path, members, message):
    (tmp_path / "a.tgz").write_bytes(tgz(members))
    with pytest.raises(FetchError, match=message) as raised:
        unpack(tmp_path / "a.tgz", tmp_path / "raw", most=1000)
    assert str(tmp_path / "a.tgz") in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tgz"]


def test_damaged_archives(tmp_path: Path):
    whole = tgz({f"{i}.bin": np.random.default_rng(i).bytes(700) for i in range(20)})
    damaged = bytearray(whole)
    damaged[-6] ^= 1  # in the check sum
    plain = gzip.decompress(whole)
    cut = gzip.compress(plain[: 512 + 700])
    for content in (
        b"",
        b"<html>not found</html>",
        bytes(damaged),
        cut,
        *(whole[:n] for n in range(3, len(whole), 997)),
    ):
        (tmp_path / "a.tgz").write_bytes(content)
        with pytest.raises(FetchError, match=r"a\.tgz is (damaged|not unpacked: it is empty)"):
            unpack(tmp_path / "a.tgz", tmp_path / "raw")
        assert [p.name for p in tmp_path.iterdir()] == ["a.tgz"]


# Sets


def published(entry: FetchSet, contents: list[bytes]) -> tuple[FetchSet, dict[str, bytes]]:
    """The set with the sha256 of other contents, and these contents under the paths of its files."""
    pairs = list(zip(entry.files, contents, strict=True))
    files = tuple(dataclasses.replace(file, sha256=file.sha256 and sha256(content)) for file, content in pairs)
    return dataclasses.replace(entry, files=files), {urllib.parse.urlsplit(f.url).path: c for f, c in pairs}


@pytest.fixture
def gslm(golden: Path) -> tuple[FetchSet, dict[str, bytes]]:
    """gslm_hubert100, with golden files as the published ones."""
    lm = {f"hubert100_lm/{name}": (golden / "lm" / name).read_bytes() for name in ("checkpoint_best.pt", "dict.txt")}
    hubert = (golden / "hubert" / "hubert_tiny.pt").read_bytes()
    kmeans = (golden / "kmeans" / "km_hubert_layer6_sk1.0.1.bin").read_bytes()
    return published(SETS["gslm_hubert100"], [hubert, kmeans, tgz(lm)])


def test_gslm_is_downloaded_and_converted(server: Server, gslm, golden: Path, tmp_path: Path, capsys):
    entry, server.files = gslm
    server.drops = [100_000]
    out = fetch(entry, tmp_path / "out", base_url=server.url, wait=0.01)
    assert [path for path, _ in server.asked] == [
        "/hubert/hubert_base_ls960.pt",
        "/hubert/hubert_base_ls960.pt",
        "/textless_nlp/gslm/hubert/km100/km.bin",
        "/textless_nlp/gslm/hubert/lm_km100/hubert100_lm.tgz",
    ]
    assert sorted(p.name for p in out.iterdir()) == ["downloads", "fetched.json", "hubert", "kmeans", "unit_lm"]

    config, _, info = read_encoder(out / "hubert")
    assert (config.dim, info["name"]) == (48, "hubert_base_ls960")
    assert info["provenance"]["url"] == "https://dl.fbaipublicfiles.com/hubert/hubert_base_ls960.pt"
    kmeans = load_kmeans(out / "kmeans")
    expected = np.load(golden / "kmeans" / "kmeans_sk1.0.1.npz")["hubert_cluster_centers"]
    np.testing.assert_array_equal(kmeans.centroids, expected)
    assert (kmeans.card["encoder"], kmeans.card["layer"]) == ("hubert_base_ls960", 6)
    assert kmeans.card["provenance"]["sha256"] == entry.files[1].sha256
    lm_config, _, lm_info = read_unit_lm(out / "unit_lm")
    assert (lm_config.dim, lm_config.vocab_size) == (64, 104)
    assert lm_info["provenance"]["url"].endswith("hubert100_lm.tgz")
    assert "the publisher provides none to compare" in capsys.readouterr().out

    asked = len(server.asked)
    assert fetch(entry, out, base_url=server.url) == out
    assert "is in" in capsys.readouterr().out
    shutil.rmtree(out / "kmeans")  # made again from the download
    fetch(entry, out, base_url=server.url)
    assert load_kmeans(out / "kmeans").id == kmeans.id
    assert len(server.asked) == asked


def test_mhubert_has_its_name_and_its_k_means_the_layer(golden: Path, tmp_path: Path, nowhere: str):
    contents = [golden / "hubert" / "hubert_tiny.pt", golden / "kmeans" / "km_hubert_layer6_sk1.0.1.bin"]
    entry, files = published(SETS["mhubert25hz"], [path.read_bytes() for path in contents])
    assert all(file.sha256 for file in SETS["mhubert25hz"].files)
    for path, content in files.items():
        (tmp_path / path.rpartition("/")[2]).write_bytes(content)
    out = fetch(entry, tmp_path / "out", base_url=nowhere, source=tmp_path)
    assert read_encoder(out / "hubert")[2]["name"] == "mhubert_base_25hz"
    assert load_kmeans(out / "kmeans").card["layer"] == 11
    assert load_kmeans(out / "kmeans").card["encoder"] == "mhubert_base_25hz"


def test_files_of_slam_are_kept_with_the_command_that_converts_them(server: Server, tmp_path: Path, capsys):
    entry, server.files = published(SETS["slam"], [b"{}", b"weights"])
    out = fetch(entry, tmp_path / "out", base_url=server.url)
    assert names(out / "downloads") == ["slam/config.json", "slam/model.safetensors"]
    command = f"python -m spjax.convert unit_lm {out}/downloads/slam {out}/unit_lm --kmeans=KM"
    assert command in capsys.readouterr().out
    copied = fetch(entry, tmp_path / "copied", base_url=server.url, source=out / "downloads")
    assert names(copied / "downloads") == ["slam/config.json", "slam/model.safetensors"]
    assert len(server.asked) == 2


def test_files_put_by_hand(gslm, nowhere: str, tmp_path: Path):
    entry, contents = gslm
    out, folder = tmp_path / "out", tmp_path / "by hand"
    folder.mkdir()
    with pytest.raises(FetchError) as raised:
        fetch(entry, out, base_url=nowhere)
    hubert, kmeans, lm = contents
    advice = f"get {nowhere}{hubert} by other means, put it at {out / 'downloads' / 'hubert_base_ls960.pt'}, and"
    assert advice in str(raised.value)
    for name in ("km100.bin", "hubert100_lm.tgz"):  # the other accepted names
        assert f" to {out / 'downloads' / name}" in str(raised.value).split("Also needed:")[1]
    (out / "downloads" / "hubert_base_ls960.pt").write_bytes(contents[hubert])  # where the message says
    (folder / "km.bin").write_bytes(contents[kmeans])
    with pytest.raises(FetchError, match=rf"put it at {out}/downloads/hubert100_lm\.tgz"):
        fetch(entry, out, base_url=nowhere, source=folder)
    assert (out / "kmeans").is_dir()
    (folder / "hubert100_lm.tgz").write_bytes(contents[lm])
    fetch(entry, out, base_url=nowhere, source=folder)
    assert names(folder) == ["hubert100_lm.tgz", "km.bin"]
    assert sorted(p.name for p in out.iterdir()) == ["downloads", "fetched.json", "hubert", "kmeans", "unit_lm"]


def test_a_wrong_file_put_by_hand(gslm, nowhere: str, tmp_path: Path):
    entry, _ = gslm
    for folder in (tmp_path / "by hand", tmp_path / "out" / "downloads"):
        folder.mkdir(parents=True)
        (folder / "hubert_base_ls960.pt").write_bytes(b"something else")
    with pytest.raises(FetchError, match=r"has the sha256 .* Put the right file there"):
        fetch(entry, tmp_path / "out", source=tmp_path / "by hand")
    assert names(tmp_path / "by hand") == ["hubert_base_ls960.pt"]
    with pytest.raises(FetchError, match=r"has the sha256 .* Put the right file there"):
        fetch(entry, tmp_path / "out", base_url=nowhere)
    assert names(tmp_path / "out") == ["downloads/hubert_base_ls960.pt"]
    with pytest.raises(FetchError, match="is not a folder"):
        fetch(entry, tmp_path / "out", source=tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>sign in</html>", "damaged"),
        (tgz({"dict.txt": b"0 1\n"}), "holds 0 files checkpoint_best"),
        (tgz({"a/dict.txt": b"", "dict.txt": b"", "checkpoint_best.pt": b""}), r"holds 2 files dict\.txt"),
        (tgz({"dict.txt": b"0 1\n", "checkpoint_best.pt": b"hello"}), "cannot be read"),
    ],
)
def test_a_file_that_is_not_a_unit_lm_is_renamed(server: Server, tmp_path: Path, content, message):
    (file,) = (file for file in SETS["gslm_hubert100"].files if file.kind == "unit_lm")
    entry, server.files = published(FetchSet("lm", "", (file,)), [content])
    for _ in range(2):  # and downloaded again
        with pytest.raises(FetchError, match=message) as raised:
            fetch(entry, tmp_path, base_url=server.url)
        assert "hubert100_lm.tgz was renamed to hubert100_lm.tgz.bad" in str(raised.value)
    assert names(tmp_path) == ["downloads/hubert100_lm.tgz.bad", "fetched.json"]
    assert len(server.asked) == 2


def test_a_file_with_the_right_sha256_is_kept_whatever_it_is(server: Server, tmp_path: Path):
    entry, server.files = published(SETS["km100"], [b"no pickle"])
    for _ in range(2):
        with pytest.raises(ConvertError, match=r"km100\.bin cannot be read"):
            fetch(entry, tmp_path, base_url=server.url)
    assert len(server.asked) == 1


def test_another_set_in_the_same_place_is_refused(server: Server, golden: Path, tmp_path: Path):
    content = (golden / "kmeans" / "km_sk1.0.1.bin").read_bytes()
    for name in ("km50", "km100"):
        entry, server.files = published(SETS[name], [content])
        if name == "km50":
            fetch(entry, tmp_path, base_url=server.url)
    with pytest.raises(FetchError, match=r"kmeans exists and was not made from .*km100/km\.bin"):
        fetch(entry, tmp_path, base_url=server.url)
    (tmp_path / "fetched.json").write_text("{")
    with pytest.raises(FetchError, match="exists and was not made from"):
        fetch(SETS["km50"], tmp_path, base_url=server.url)


def test_data_sets_are_unpacked(server: Server, tmp_path: Path):
    entry, server.files = published(SETS["esc50"], [tgz({"ESC-50-HEAD/audio/1-1-A-0.wav": b"1"})])
    out = fetch(entry, tmp_path / "esc50", base_url=server.url)
    assert server.asked == [("/karolpiczak/ESC-50/archive/HEAD.tar.gz", None)]
    assert names(out) == ["downloads/esc50.tar.gz", "fetched.json", "raw/audio/1-1-A-0.wav"]
    words = tgz({"./yes/a_nohash_0.wav": b"1", "./no/a_nohash_0.wav": b"1"})
    entry, server.files = published(SETS["gsc"], [words, tgz({"yes/1.wav": b"1", "no/2.wav": b""})])
    out = fetch(entry, tmp_path / "gsc", base_url=server.url)
    assert names(out / "raw") == [
        "speech_commands_test_set_v0.01/no/2.wav",
        "speech_commands_test_set_v0.01/yes/1.wav",
        "speech_commands_v0.01/no/a_nohash_0.wav",
        "speech_commands_v0.01/yes/a_nohash_0.wav",
    ]


@pytest.mark.parametrize("kind", ["discrete_prosody", "discrete_no_prosody"])
def test_pgslm_is_converted_with_its_edges(server: Server, golden: Path, tmp_path: Path, kind):
    contents = [(golden / "pgslm" / name).read_bytes() for name in ("f0_bin.th", f"{kind}.pt")]
    entry, server.files = published(SETS[f"pgslm_{kind}"], contents)
    out = fetch(entry, tmp_path / "out", base_url=server.url)
    downloads = [f"downloads/{kind}_shift_1_1.pt", "downloads/mean_norm_log_f0_seg_bin.th"]
    made = ["fetched.json", "unit_lm/config.json", "unit_lm/model.safetensors"]
    assert names(out) == [*downloads, *made]
    assert [path.rpartition("/")[2] for path, _ in server.asked] == [Path(name).name for name in downloads[::-1]]
    config, _, info = read_unit_lm(out / "unit_lm")
    assert config.prosody is not None
    assert (config.prosody.discrete, config.prosody.f0_input) == (True, kind == "discrete_prosody")
    np.testing.assert_array_equal(config.prosody.f0_edges, np.load(golden / "pgslm" / f"{kind}.npz")["f0_edges"])
    assert info["provenance"]["url"].endswith(f"/pgslm/ulm_checkpoints/{kind}_shift_1_1.pt")
    fetch(entry, out, base_url=server.url)
    assert len(server.asked) == 2
    # Put by hand: the edges are kept, since the LM needs them when it is made again.
    fetch(entry, tmp_path / "copy", source=out / "downloads", base_url=server.url)
    assert names(tmp_path / "copy") == [downloads[1], *made]
    assert read_unit_lm(tmp_path / "copy" / "unit_lm")[2]["hash"] == info["hash"]
    assert len(server.asked) == 2


@pytest.mark.parametrize("kind", ["continuous_prosody", "continuous_no_prosody"])
def test_a_continuous_pgslm_has_no_edges(server: Server, golden: Path, tmp_path: Path, kind):
    entry, server.files = published(SETS[f"pgslm_{kind}"], [(golden / "pgslm" / f"{kind}.pt").read_bytes()])
    out = fetch(entry, tmp_path / "out", base_url=server.url)
    assert len(server.asked) == 1
    config, params, _ = read_unit_lm(out / "unit_lm")
    assert config.prosody is not None
    assert not config.prosody.discrete
    assert params["streams"]["f0"]["kernel"].shape == (1, config.dim)


def test_a_file_that_is_not_a_pgslm_is_renamed(server: Server, golden: Path, tmp_path: Path):
    good = [(golden / "pgslm" / name).read_bytes() for name in ("f0_bin.th", "discrete_prosody.pt")]
    lm = (golden / "lm" / "checkpoint_best.pt").read_bytes()
    for name, contents, message in (
        ("edges", [b"<html>", good[1]], "mean_norm_log_f0_seg_bin.th was renamed"),
        ("other", [lm, good[1]], "holds edges of .* but not of 32.* was renamed"),
        ("model", [good[0], lm], "is a unit LM, not a multi-stream LM.*discrete_prosody_shift_1_1.pt was renamed"),
    ):
        entry, server.files = published(SETS["pgslm_discrete_prosody"], contents)
        for _ in range(2):
            with pytest.raises(FetchError, match=message):
                fetch(entry, tmp_path / name, base_url=server.url)
        assert not (tmp_path / name / "unit_lm").exists()
        entry, server.files = published(SETS["pgslm_discrete_prosody"], good)
        fetch(entry, tmp_path / name, base_url=server.url)  # with the right files
        assert (tmp_path / name / "unit_lm").is_dir()


def test_the_table_is_complete():
    names = {
        *(f"gslm_hubert{n}" for n in (50, 100, 200)),
        *(f"km{n}" for n in (50, 100, 200, 500)),
        "hubert_base_ls960",
        *("mhubert25hz", "slam", "twist_350m", "twist_1.3b", "twist_7b"),
    }
    names |= {f"pgslm_{kind}_{p}" for kind in ("continuous", "discrete") for p in ("prosody", "no_prosody")}
    assert set(SETS) == names | {"gsc", "lt_sc", "ar_sc", "esc50"}
    for entry in SETS.values():
        assert len({file.product for file in entry.files}) == len(entry.files)
        assert len({file.filename for file in entry.files}) == len(entry.files)
        for file in entry.files:
            assert file.kind in fetching._MAKERS
            assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
    assert SETS["km100"].default_out() == Path("~/.cache/spjax/models/km100").expanduser()
    assert SETS["gsc"].default_out() == Path("~/.cache/spjax/data/gsc").expanduser()


def test_command(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--list"])
    listed = capsys.readouterr().out
    for entry in SETS.values():
        assert f"{entry.name}: " in listed
        assert all(file.url in listed and (file.sha256 or "not published") in listed for file in entry.files)
    with pytest.raises(SystemExit, match=r"error: 'km10' is unknown\. Known are gslm_hubert50, "):
        main(["km10"])
    with pytest.raises(SystemExit, match=rf"error: {server.url}/textless_nlp/gslm/hubert/km100/km\.bin: HTTP 404"):
        main(["km100", f"--out={tmp_path}", f"--base-url={server.url}/"])
    server.files["/textless_nlp/gslm/hubert/km100/km.bin"] = CONTENT
    with pytest.raises(SystemExit, match=r"error: .*does not match the known hash"):
        main(["km100", f"--out={tmp_path}", f"--base-url={server.url}"])
    server.files["/karolpiczak/ESC-50/archive/HEAD.tar.gz"] = tgz({"ESC-50-HEAD/meta/esc50.csv": b"1"})
    main(["esc50", f"--out={tmp_path / 'esc50'}", f"--base-url={server.url}"])
    assert (tmp_path / "esc50" / "raw" / "meta" / "esc50.csv").is_file()
    with pytest.raises(SystemExit):
        main([])
    assert "--list shows them all" in capsys.readouterr().err


def test_command_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "fetch", stop)
    with pytest.raises(SystemExit, match="130"):
        main(["km100", f"--out={tmp_path}"])
    assert "resumes" in capsys.readouterr().err


def test_a_custom_set(server: Server, tmp_path: Path):
    server.files["/mine/corpus.tar.gz"] = tgz({"a/1.wav": b"1", "b/1.wav": b"2"})
    entry = FetchSet("mine", "a corpus", (File(f"{server.url}/mine/corpus.tar.gz", "archive", "raw"),))
    assert names(fetch(entry, tmp_path) / "raw") == ["a/1.wav", "b/1.wav"]
