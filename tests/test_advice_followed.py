"""Advice of the data commands, fetch, inside and serve works: after doing what a message says, the command succeeds."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipelines import builders, extract, fit_kmeans, leaks
from data_pipelines.clips import Clip
from data_pipelines.listing import list_recordings
from data_pipelines.splits import stratified
from spjax import fetch, inside, serve
from spjax.data.write_records import Utterance, write_unit_records
from spjax.models.config import ProsodyConfig, UnitLMConfig
from spjax.tasks import TASKS, Slot, Task
from tests.models import tiny

Command = Callable[[list[str]], None]


class _Done(Exception):  # noqa: N818 - no error
    """Raised after the point of the error."""


def refusal(command: Command, words: list[str]) -> str:
    """The message that a command exits with."""
    with pytest.raises(SystemExit) as left:
        command(words)
    assert str(left.value.code).startswith("error: "), left.value.code
    return str(left.value.code)


def follow(command: Command, words: list[str], flag: str, *mended: list[str]) -> None:
    """The error of `words` names `flag`, and the advised command works."""
    assert flag in refusal(command, words)
    for some in mended:
        command(some)


# ---- data sets: the same flags and messages in leaks, fit_kmeans and extract


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `words` (a folder per class) and CSV files of it."""
    monkeypatch.chdir(tmp_path)
    rows = {name: [] for name in ("plain", "crops", "source", "twice", "parts", "quote", "other")}
    for number in range(24):
        path = Path("words", ("no", "yes")[number % 2], f"{number}.wav")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"recording {number}".encode())
        label = path.parent.name
        split = ("train", "train", "train", "train", "valid", "test")[number // 2 % 6]
        rows["plain"].append(f"{path},{label}")
        rows["crops"].append(f"{path},{label},0.{number},1")
        rows["source"].append(f"{path},{label},film {number // 2}")
        rows["twice"] += [f"{path},{label},{split},{second},1" for second in (0, 1)]
        rows["parts"].append(f"{path},{label},{('train_set', 'test_set')[number // 2 % 2]}")
        rows["quote"].append(f'{path},{label},"said {number}\nin two lines"')
        rows["other"].append(f"{path},{label},{('a', 'b')[number // 2 % 2]}")
    heads = {"plain": "word", "crops": "word,start,duration", "source": "word,source"}
    heads |= {"twice": "word,split,start,duration", "parts": "word,part", "quote": "word,said", "other": "word,x"}
    for name, some in rows.items():
        Path(f"{name}.csv").write_text("\n".join([f"path,{heads[name]}", *some, ""]))
    return tmp_path


PLAIN = "--manifest=plain.csv"


@pytest.mark.parametrize(
    ("words", "flag", "mended"),
    [
        (["--folders=words", "--labels=word"], "--labels is valid only with --manifest", [["--folders=words"]]),
        (["--folders=words", "--crops"], "leave it out", [["--folders=words"], ["--manifest=crops.csv", "--crops"]]),
        (
            ["--task=esperanto", "--raw=words"],
            "give your own data by --manifest or --folders",
            [[PLAIN], ["--folders=words"]],
        ),
        (["--manifest=words"], "--folders a folder", [["--folders=words"]]),
        (["--folders=plain.csv"], "--manifest takes a CSV", [[PLAIN]]),
        (
            ["--manifest=crops.csv"],
            "give --crops; if not, select the label columns, such as --labels=word",
            [["--manifest=crops.csv", "--crops"], ["--manifest=crops.csv", "--labels=word"]],
        ),
        (
            ["--manifest=source.csv"],
            "give --source=source; if not, select the label columns, such as --labels=word",
            [["--manifest=source.csv", "--source=source"], ["--manifest=source.csv", "--labels=word"]],
        ),
        (
            ["--manifest=twice.csv", "--labels=word"],
            "if they are crops in seconds, give --crops",
            [["--manifest=twice.csv", "--labels=word", "--crops"]],
        ),
        ([PLAIN, "--crops"], "leave --crops out", [[PLAIN]]),
        (["--manifest=parts.csv"], "select the label columns by --labels", [["--manifest=parts.csv", "--labels=part"]]),
        (["--manifest=quote.csv"], "give --text=said", [["--manifest=quote.csv", "--text=said"]]),
        ([PLAIN, "--out=splits", "--no-files"], "leave --no-files out", [[PLAIN, "--out=splits"]]),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) and isinstance(value[0], str) else "",
)
def test_a_data_set_given_as_advised_is_read(data: Path, words: list[str], flag: str, mended: list[list[str]]) -> None:
    follow(leaks.main, words, flag, *mended)


def test_label_columns_in_a_note_can_be_given(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leaks.main(["--manifest=other.csv"])
    assert "label columns: word, x; if not all of these are labels, select the labels by --labels" in (
        capsys.readouterr().err
    )
    leaks.main(["--manifest=other.csv", "--labels=word"])
    assert "--labels" not in capsys.readouterr().err


def test_written_splits_are_read_with_their_root(data: Path) -> None:
    leaks.main([PLAIN, "--out=splits"])
    follow(leaks.main, ["--splits=splits"], "--splits needs --raw", ["--splits=splits", "--raw=."])
    for flag in ("--name=mine", "--metric=accuracy"):
        follow(
            leaks.main,
            ["--splits=splits", "--raw=.", flag],
            "is valid only with --manifest or --folders: leave it out",
            ["--splits=splits", "--raw=."],
            [PLAIN, flag],
        )


def test_the_root_of_a_known_data_set_is_given_by_raw(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = TASKS["gsc"].slots[0].labels

    def clips(raw: Path, protocol: str) -> dict[str, list[Clip]]:
        found = [Clip(path, path, (labels[i % 2],)) for i, path in enumerate(list_recordings(raw).files)]
        return stratified(found, {"train": 0.8, "test": 0.2}, 0)

    monkeypatch.setitem(builders.CLIPS, "gsc", clips)
    follow(leaks.main, ["--task=gsc"], "--task needs --raw", ["--task=gsc", "--raw=words"])
    follow(leaks.main, ["--task=gsc", "--raw=word"], "point to its root with --raw", ["--task=gsc", "--raw=words"])


# ---- extraction and its k-means, in this process


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`words`, with recordings this time, and `bad`, with a file that is not audio; `km`, a k-means."""
    folder = tmp_path_factory.mktemp("spoken")
    rng = np.random.default_rng(0)
    for number in range(24):
        path = folder / "words" / ("no", "yes")[number % 2] / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(3200), 16000)
    shutil.copytree(folder / "words", folder / "bad")
    (folder / "bad" / "no" / "30.wav").write_bytes(b"nothing that can be heard")
    fit_kmeans.main([f"--folders={folder / 'words'}", f"--out={folder / 'km'}", *MFCC, "--clusters=4"])
    return folder


MFCC = ("--encoder=mfcc",)
HERE = ("--workers=0", *MFCC)  # starts no workers


def test_what_extraction_advises_works(spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common = [*HERE, f"--kmeans={spoken / 'km'}"]
    words, bad = f"--folders={spoken / 'words'}", f"--folders={spoken / 'bad'}"
    follow(
        extract.main,
        [*common, bad, "--out=a"],
        "skip such files by --on-error=skip",
        [*common, bad, "--out=a", "--on-error=skip"],
    )
    follow(
        extract.main,
        [*common, words, "--out=a"],
        "choose another directory, or replace its records with --overwrite of data_pipelines.extract",
        [*common, words, "--out=a", "--overwrite"],
    )
    for folder in (spoken / "words", spoken):  # never the recordings, nor a folder that holds them
        held = "no, yes" if folder.name == "words" else "bad, km, words"
        replaced = [*common, words, f"--out={folder}", "--overwrite"]
        assert f"{folder} has files other than unit records ({held}) and is not replaced" in refusal(
            extract.main, replaced
        )
    follow(
        extract.main,
        [*common, words, "--out=b", "--runner=FnApiRunner"],
        "set the workers of FnApiRunner by its own option, after --",
    )
    local = [f"--kmeans={spoken / 'km'}", *MFCC]
    assert "--workers=-1: give 0 or more, or leave it out" in refusal(
        extract.main, [*local, words, "--out=b", "--workers=-1"]
    )
    options = ["--", "--direct_num_workers=2"]
    assert "name it by --runner" in refusal(extract.main, [*local, words, "--out=b", *options])
    monkeypatch.setattr(extract, "extract", _done)
    for flags in (["--workers=1"], [], ["--runner=FnApiRunner", *options]):
        with pytest.raises(_Done):
            extract.main([*local, words, "--out=b", *flags])


def _done(*_: object, **__: object) -> None:
    raise _Done


def test_what_fitting_a_kmeans_advises_works(spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = f"--folders={spoken / 'words'}"
    shutil.copytree(spoken / "km", "km")
    other = [words, "--out=km", *MFCC, "--clusters=5"]
    said = refusal(fit_kmeans.main, other)
    assert "clusters: 4, now 5" in said
    assert "replace it (--overwrite), or use it by --kmeans of data_pipelines.extract" in said
    extract.main([words, "--out=a", "--kmeans=km", *HERE])
    fit_kmeans.main([*other, "--overwrite"])
    # the same for extraction, which keeps its own
    extract.main([words, "--out=b", "--clusters=4", *HERE])
    again = [words, "--out=b", "--clusters=5", *HERE, "--overwrite"]
    shutil.rmtree("b")
    follow(extract.main, again[:-1], "(--overwrite)", again)


def test_a_data_set_without_train_is_extracted_with_a_given_kmeans(
    spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    leaks.main([f"--folders={spoken / 'words'}", "--out=splits"])
    card = json.loads(Path("splits/splits.json").read_text())
    card["sha256"] = {"test": card["sha256"]["test"]}
    Path("splits/splits.json").write_text(json.dumps(card))
    data = ["--splits=splits", f"--raw={spoken / 'words'}", "--out=a", *MFCC]
    assert "--kmeans of data_pipelines.extract" in refusal(fit_kmeans.main, data)
    follow(
        extract.main,
        [*data, "--clusters=2", "--workers=0"],
        "give an existing k-means by --kmeans",
        [*data, f"--kmeans={spoken / 'km'}", "--workers=0"],
    )


# ---- fetch


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the file of data set "esc50", which is tiny here; nothing is downloaded."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        info = tarfile.TarInfo("esc50/a.wav")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"a"))
    folder = tmp_path / "by hand"
    folder.mkdir()
    (folder / "esc50.tar.gz").write_bytes(packed.getvalue())
    (file,) = fetch.SETS["esc50"].files
    file = dataclasses.replace(file, sha256=hashlib.sha256(packed.getvalue()).hexdigest())
    monkeypatch.setitem(fetch.SETS, "esc50", dataclasses.replace(fetch.SETS["esc50"], files=(file,)))
    monkeypatch.chdir(tmp_path)
    return folder


def test_what_fetch_advises_works(published: Path, nowhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        fetch.main([])
    assert "--list shows them all" in capsys.readouterr().err
    fetch.main(["--list"])
    assert "esc50: ESC-50" in capsys.readouterr().out
    named = re.search("Known are (.*)\\.", refusal(fetch.main, ["esc-50"]))
    assert named is not None
    assert "esc50" in named[1].split(", ")
    common = ["esc50", "--out=out", f"--base-url={nowhere}"]
    get = re.search(
        r"get (\S+) by other means, put it at (\S+), and give the same command", refusal(fetch.main, common)
    )
    assert get is not None
    content = (published / "esc50.tar.gz").read_bytes()
    Path(get[2]).parent.mkdir(parents=True, exist_ok=True)
    Path(get[2]).write_bytes(content)
    fetch.main(common)
    assert Path("out/raw/a.wav").read_bytes() == b"a"
    # a product of another file
    Path("other/raw").mkdir(parents=True)
    source = ["esc50", f"--from={published}"]
    taken = [*source, "--out=other"]
    follow(fetch.main, taken, "Choose another --out, or remove it", [*source, "--out=third"])
    shutil.rmtree("other/raw")
    fetch.main(taken)
    # a wrong file
    (published / "esc50.tar.gz").write_bytes(b"another")
    assert "Put the right file there" in refusal(fetch.main, [*source, "--out=fourth"])
    (published / "esc50.tar.gz").write_bytes(content)
    fetch.main([*source, "--out=fourth"])
    follow(fetch.main, ["esc50", "--out=fifth", "--from=by"], "--from=by is not a folder", [*source, "--out=fifth"])


@pytest.fixture
def nowhere() -> str:
    """A URL that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


# ---- inside and serve


def test_utterances_that_inside_advises_are_read(tmp_path: Path) -> None:
    def read(flag: str, config: UnitLMConfig = LM) -> list[int]:
        options = inside._parser().parse_args(["--lm=lm", "--packs=packs", f"--out={tmp_path / 'out'}", flag])
        return inside._utterances(options, config, {})[1][0][1].units.tolist()

    with pytest.raises(ValueError, match="must be integers separated by spaces"):
        read("--units=3,4")
    assert read("--units=3 4") == [3, 4]
    with pytest.raises(ValueError, match="give --data"):
        read("--units=3 4", STREAMS)
    one = Utterance("a", [3, 4], [0])
    task = Task("one", (Slot("word", ("no", "yes")),))
    write_unit_records(tmp_path / "units", task, {"test": [one]}, vocabulary=20)
    with pytest.raises(ValueError, match=r"extract the recordings with --f0 of data_pipelines\.extract"):
        read(f"--data={tmp_path / 'units'}", STREAMS)
    voiced = one._replace(durations=[1, 2], f0=[0.1, 0.2])  # as from --f0 (test_extract_f0)
    write_unit_records(tmp_path / "streams", task, {"test": [voiced]}, vocabulary=20)
    assert read(f"--data={tmp_path / 'streams'}", STREAMS) == [3, 4]


LM = tiny.config(2)
STREAMS = dataclasses.replace(LM, prosody=ProsodyConfig(discrete=False))


def test_what_serve_advises_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address and the limits, which are checked before anything is loaded."""

    def follow(flag: str, advice: str, *mended: str) -> None:
        assert advice in refusal(serve.main, [*common, flag])
        for some in mended:
            with pytest.raises(_Done):
                serve.main([*common, *some.split()])

    pytest.importorskip("uvicorn", reason="uvicorn is in the extra serve")
    common = ["--lm=lm", "--encoder=mfcc", "--kmeans=km", "--packs=packs", "--port=0"]
    monkeypatch.setattr(serve, "_take_signals", lambda: None)
    monkeypatch.setattr(serve, "load_predictor", _done)
    follow("--max-mb=0", "--max-mb is 0: give a number of megabytes above 0", "--max-mb=0.5")
    for flag in ("--max-seconds", "--timeout"):
        follow(f"{flag}=0", "give a number of seconds above 0", f"{flag}=0.5")
    follow("--queue=0", "give a whole number, 1 or more", "--queue=1")
    follow("--port=70000", "give 1 to 65535, or 0 for any free port", "--port=0")
    hosts = ("--host=127.0.0.1", "--host=0.0.0.0")
    follow("--host=192.0.2.1", "give 127.0.0.1 (only this machine), 0.0.0.0 (all that can reach it)", *hosts)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        follow(f"--port={port}", "give another --port (0: any free port)", "--port=0")
    with pytest.raises(_Done):  # the other program has ended
        serve.main([*common, f"--port={port}"])

    def denied(*_: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "bind", denied)
        said = refusal(serve.main, [*common, "--port=80"])
    assert "give a --port from 1024 on" in said
