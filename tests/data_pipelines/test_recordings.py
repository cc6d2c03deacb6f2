"""`--folders`, `--manifest` and `--raw` of spjax.main: what a job is made of recordings, without training it."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from data_pipelines.source import Source
from data_pipelines.sources import source_of
from spjax import fetch, jobs, predict
from spjax.config import parse
from spjax.data.records import load_card
from spjax.io import KMeans, files, save_kmeans, save_unit_lm
from spjax.io.encoders import save_encoder
from spjax.models import prompts, verbalizers
from spjax.models.config import UnitLMConfig
from spjax.tasks import TASKS
from tests import toy
from tests.conftest import Place
from tests.data_pipelines import corpus
from tests.encoders.hubert_models import TINY, weights


def classes(folder: Path, *names: str, clips: int = 5, ending: str = "wav", start: int = 0) -> Path:
    """Recordings in a folder a class."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(start, start + clips):
            soundfile.write(folder / name / f"{i}.{ending}", corpus.tone(2 * i + number, 0.3, 16_000), 16_000)
    return folder


def planned(name: str, workdir: Path, settings: dict[str, Any] | None = None, **flags: Any) -> tuple[Any, Source]:
    """The settings of a command as its job gets them, and the source of its records."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.lock()
    config.update_from_flattened_dict(settings or {})
    job: Any = parse(config)
    given = {flag.replace("_", "-"): os.fspath(v) if isinstance(v, Path) else v for flag, v in flags.items()}
    source = source_of(job, str(workdir), given, settings or {})
    return source.job, source


def made(name: str, workdir: Path, settings: dict[str, Any] | None = None, **flags: Any) -> Any:
    """As `planned`, and the records are made."""
    config, source = planned(name, workdir, settings, **flags)
    source.make(config.task, config.data)
    return config


def test_a_folder_a_class_becomes_units_of_the_lm_that_goes_with_spjax(tmp_path: Path) -> None:
    config = made("own", tmp_path / "run", folders=classes(tmp_path / "my words", "yes !", "nein, ü日", ending="flac"))
    assert (config.task, config.lm, config.data) == ("my_words", "tiny", str(tmp_path / "run/units/my_words"))
    card = load_card(config.data)
    assert [(slot.name, slot.labels) for slot in card.task.slots] == [("label", ("nein, ü日", "yes !"))]
    assert card.counts == {"train": 6, "valid": 2, "test": 2}


def test_a_csv_is_taken_in_the_same_way(tmp_path: Path) -> None:
    folder = classes(tmp_path / "words", "yes", "no")
    lines = [f"words/{name}/{i}.wav,{name},x" for name in ("yes", "no") for i in range(5)]
    (tmp_path / "my.csv").write_text("\n".join(["path,word,note", *lines, ""]))
    config = made("own", tmp_path / "run", manifest=tmp_path / "my.csv", labels="word")
    assert config.task == "my"
    assert [slot.name for slot in load_card(config.data).task.slots] == ["word"]
    rooted = [line.removeprefix("words/") for line in lines]
    (tmp_path / "rooted.csv").write_text("\n".join(["path,word,note", *rooted, ""]))
    planned("own", tmp_path / "run", manifest=tmp_path / "rooted.csv", labels="word", raw=folder)


def test_few_recordings_are_gone_through_more_often(tmp_path: Path) -> None:
    few, many = classes(tmp_path / "few", "a", "b", clips=3), classes(tmp_path / "many", "a", "b", clips=60)
    passes = [planned("own", tmp_path / "run", folders=folder)[0].train.passes for folder in (few, many)]
    assert passes[0] > passes[1] >= 1
    assert planned("own", tmp_path / "run", {"train.epochs": 2}, folders=few)[0].train.passes > passes[0]
    assert planned("own", tmp_path / "run", {"train.passes": 3}, folders=few)[0].train.passes == 3


def test_a_task_of_a_known_name_is_not_compared_with_published_results(tmp_path: Path) -> None:
    assert planned("own", tmp_path / "run", folders=classes(tmp_path / "gsc", "a", "b"))[0].task == "gsc_own"


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda folder: None, False),
        (lambda folder: classes(folder, "a", clips=1, start=9), True),
        (lambda folder: (folder / "a" / "3.wav").unlink(), True),
        (lambda folder: shutil.move(folder / "a" / "3.wav", folder / "b" / "33.wav"), True),
        (lambda folder: shutil.copy(folder / "b" / "3.wav", folder / "a" / "3.wav"), True),
    ],
    ids=["nothing", "added", "removed", "moved", "replaced"],
)
def test_records_of_other_recordings_are_never_used(tmp_path: Path, change: Any, refused: bool) -> None:
    folder, run = classes(tmp_path / "words", "a", "b"), tmp_path / "run"
    made("own", run, folders=folder)
    change(folder)
    if not refused:
        planned("own", run, folders=folder)
        return
    with pytest.raises(ValueError, match=r"units of other recordings or splits .* split otherwise since: use another"):
        planned("own", run, folders=folder)
    planned("own", tmp_path / "other", folders=folder)
    shutil.rmtree(run)
    planned("own", run, folders=folder)


def test_records_of_another_encoder_are_never_used(tmp_path: Path) -> None:
    folder = classes(tmp_path / "words", "a", "b", clips=12)
    made("own", tmp_path / "run", folders=folder)
    for encoder in ("log_mel", "mfcc"):
        with pytest.raises(ValueError, match=r"holds units that were made otherwise \(.*: use another --workdir"):
            planned("own", tmp_path / "run", folders=folder, encoder=encoder)
    config = made("own", tmp_path / "mfcc", folders=folder, encoder="mfcc")
    assert config.lm == f"{config.data}-ulm/lm"  # pretrained there
    assert (config.pretraining.tasks, config.pretraining.data) == ((config.task,), os.path.dirname(config.data))
    planned("own", tmp_path / "mfcc", folders=folder, encoder="mfcc")


def test_a_file_that_is_no_recording_is_named_or_skipped(tmp_path: Path) -> None:
    folder = classes(tmp_path / "words", "a", "b")
    (folder / "a" / "7.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a/7.wav is empty .* by --on-error=skip"):
        made("own", tmp_path / "run", folders=folder)
    config = made("own", tmp_path / "run", folders=folder, on_error="skip")
    assert sum(load_card(config.data).counts.values()) == 10
    assert "7.wav" in Path(f"{config.data}-refused.jsonl").read_text()


def test_what_cannot_be_split_is_told_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every label is 'a': give at least two"):
        planned("own", tmp_path / "run", folders=classes(tmp_path / "one", "a"))
    with pytest.raises(ValueError, match="'a' has fewer than 3 clips"):
        planned("own", tmp_path / "run", folders=classes(tmp_path / "two", "a", "b", clips=2))


def test_records_to_pretrain_on_are_in_a_folder_of_the_task(raw: Path) -> None:
    settings = {"data": "elsewhere/records/"}
    with pytest.raises(ValueError, match=r"--config\.data=elsewhere/records must end in /fsc"):
        planned("fsc", Path("run"), settings, raw=raw, encoder="mfcc")
    config, _ = planned("fsc", Path("run"), {"data": "elsewhere/fsc/"}, raw=raw, encoder="mfcc")
    assert config.lm == "elsewhere/fsc-ulm/lm"
    assert planned("fsc", Path("run"), settings, raw=raw, encoder="tiny")[0].data == "elsewhere/records"


@pytest.mark.parametrize(
    ("config", "flags", "said"),
    [
        ("own", {}, "give --folders=DIR, a folder a class, or --manifest=CSV"),
        ("own", {"units": "words"}, "give --folders=DIR, a folder a class, or --manifest=CSV"),
        ("own", {"raw": "words"}, "this config for recordings of your own: give --folders=DIR"),
        ("own", {"folders": "words", "units": "words"}, "--units and --folders both say where the units come from"),
        ("own", {"folders": "words", "manifest": "my.csv"}, "--folders and --manifest both say"),
        ("own", {"folders": "words", "labels": "x"}, "--labels is valid only with --manifest"),
        ("own", {"folders": "words", "kmeans": "km"}, "--kmeans=km belongs to an encoder"),
        ("own", {"folders": "nowhere"}, "nowhere does not exist: correct the path"),
        ("own", {"folders": "."}, "--workdir=run is inside --folders=., where every folder is a class"),
        ("fsc", {"folders": "words"}, "is for the task fsc: give --config=configs/own.py without"),
        ("fsc", {"encoder": "tiny"}, "--encoder is for recordings: give --folders, --manifest or --raw too"),
        ("fsc", {"raw": "words"}, "point to its root with --raw"),
        ("demo", {"folders": "words"}, "this config makes its own records"),
        ("bank", {"raw": "words"}, "--raw is for a config of one task"),
        ("pretrain_ulm", {"raw": "words"}, "--raw is for a config of one task"),
        ("esd_emotion", {"raw": "words"}, r"task esd_emotion comes as units, .* give their folder by --units=DIR"),
        ("fsc", {"units": "nowhere"}, "--units=nowhere is no folder"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, flags: dict[str, str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    classes(tmp_path / "words", "a", "b", clips=3)
    with pytest.raises(ValueError, match=said):
        planned(config, Path("run"), **flags)


# ---- a data set that spjax knows


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data set fsc, in small; the home directory is empty."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    corpus.fsc_tree(tmp_path / "raw")
    return tmp_path / "raw"


def publish() -> Path:
    """Random models where `spjax.fetch` puts the published ones."""
    home = fetch.SETS["gslm_hubert100"].default_out()
    save_encoder(home / "hubert", TINY, weights(), fetch.ENCODER)
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((100, TINY.dim)).astype(np.float32)
    save_kmeans(home / "kmeans", KMeans(centroids, {"encoder": fetch.ENCODER, "layer": 2}))
    params = files.unflatten({path: rng.standard_normal(shape) for path, shape in toy.LM.shapes.items()})
    save_unit_lm(home / "unit_lm", toy.LM, jax.tree.map(np.float32, params))
    return home


@pytest.mark.parametrize(
    ("settings", "flags"), [({}, {"encoder": "tiny"}), ({"lm": "tiny"}, {})], ids=["encoder", "lm"]
)
def test_encoder_and_lm_of_one_name_go_together(raw: Path, settings: dict[str, str], flags: dict[str, str]) -> None:
    config = made("fsc", Path("run"), settings, raw=raw, **flags)
    assert (config.lm, config.data) == ("tiny", "runs/units/fsc")
    assert load_card(config.data).counts == {"train": 24, "valid": 8, "test": 8}
    planned("fsc", Path("run"), settings, raw=raw, **flags)
    with pytest.raises(FileNotFoundError, match="fetch gslm_hubert100"):
        planned("fsc", Path("run"), raw=raw)


def test_published_models_that_cannot_be_had_are_named_with_their_places(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(url: str, *_: object, **__: object) -> None:
        raise fetch.FetchError(f"{url}: no connection. Or get it by other means.")

    monkeypatch.setattr(fetch, "download", offline)
    with pytest.raises(FileNotFoundError) as error:
        planned("fsc", Path("run"), raw=raw)
    home = fetch.SETS["gslm_hubert100"].default_out()
    for file in fetch.SETS["gslm_hubert100"].files:
        assert f"{file.url}\n    to {home / 'downloads' / file.filename}\n" in str(error.value)
    assert "python -m spjax.fetch gslm_hubert100 --out=DIR" in str(error.value)
    assert "--encoder=tiny" in str(error.value)
    assert not Path("runs").exists()


def test_published_models_get_an_adapter_of_less_than_150_000_numbers(raw: Path) -> None:
    gslm = UnitLMConfig(vocab_size=104, dim=1024, layers=12, heads=16, ffn_dim=4096)
    home = publish()
    config, _ = planned("fsc", Path("run"), raw=raw)
    assert config.lm == str(home / "unit_lm")
    shape, verbalizer = config.prompt, verbalizers.learnable(TASKS["fsc"], gslm.vocab_size)
    member = jax.eval_shape(
        lambda rng: prompts.init_member(rng, shape, gslm, verbalizer, jnp.zeros((104, 1024))), jax.random.key(0)
    )
    assert 98_304 < sum(leaf.size for leaf in member.values()) < 150_000
    mine = {"prompt.length": 5, "prompt.rank": 0, "optim.lr": 1e-2}
    config, _ = planned("fsc", Path("run"), mine, raw=raw)
    assert (config.prompt.length, config.prompt.rank, config.optim.lr) == (5, 0, 1e-2)


# ---- to the end


def test_the_last_line_is_a_command_for_a_recording_of_the_best_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config, source = planned("own", Path("my run"), folders=classes(Path("my words"), "yes", "nein ü"))
    source.make(config.task, config.data)
    members = [{"seed": 3, "best_valid": 0.5}, {"seed": 4, "best_valid": 0.7}]
    Path("my run/packs/seed_4").mkdir(parents=True)
    Path("my run/results.json").write_text(json.dumps({"lower_is_better": False, "members": members}))
    source.finish()
    options = predict._parser().parse_args(command(capsys.readouterr().out.splitlines()[-1]))
    assert (options.lm, options.encoder, options.packs) == ("tiny", "tiny", ["my run/packs/seed_4"])
    assert [Path(file).is_file() for file in options.files] == [True]


SMALL = {"compute.dtype": "float32", "train.epochs": 2, "train.buckets": 1, "train.seeds": (0,)}


def last_line(
    name: str, workdir: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str], **flags: Any
) -> str:
    """Run the job, and return the last line that is printed."""
    config, source = planned(name, workdir, settings, **flags)
    jobs.run(config, str(workdir), source.make, "command")
    source.finish()
    return capsys.readouterr().out.strip().splitlines()[-1]


def command(line: str) -> list[str]:
    """The arguments of spjax.predict that a job's last line gives."""
    python, module, name, *words = shlex.split(line.removeprefix("to try it: "))
    assert (python, module, name) == ("python", "-m", "spjax.predict")
    return words


def answered(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command of the last line prints."""
    with pytest.raises(SystemExit) as end:
        predict.main([*command(line), "--compilation-cache="])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_from_a_folder_to_a_pack_a_report_and_an_answer(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an LM that compiles in a moment; `test_main_recordings` has the one that goes with spjax."""
    monkeypatch.chdir(tmp_path)
    folder = classes(Path("my words"), "yes", "nein ü")
    settings = SMALL | {"lm": str(place.folder / "lm")}
    line = last_line("own", Path("my run"), settings, capsys, folders=folder, encoder="tiny")
    results = json.loads(Path("my run/results.json").read_text())
    assert results["baselines"].keys() == {"ngram", "probe"}
    assert results["parameters"]["trained"] > 0
    assert "'my words/" in line
    assert re.search(r"my words/.*\.wav +my_words +label: (yes|nein ü) \(", answered(line, capsys))
    again = last_line("own", Path("my run"), settings, capsys, folders=folder, encoder="tiny")
    assert again == line


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_from_a_known_data_set_and_published_models_to_an_answer(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = publish()
    line = last_line("fsc", Path("run"), SMALL, capsys, raw=raw)
    card = load_card("runs/units/fsc")
    assert (card.encoder, card.layer, card.counts["train"]) == (fetch.ENCODER, 2, 24)
    assert f"--lm={home / 'unit_lm'} --encoder={home / 'hubert'} --kmeans={home / 'kmeans'} --layer=2" in line
    assert re.search(r"fsc +action: .*object: .*location: ", answered(line, capsys))
    shutil.rmtree(home / "hubert")  # it has done its work
    assert last_line("fsc", Path("run"), SMALL, capsys, raw=raw) == line
