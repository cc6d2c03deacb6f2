"""Pretraining, prompt and comparison jobs with multi-stream LMs, in this process, on toy records with prosody."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

import spjax
from configs import fsc, pretrain_ulm
from spjax import jobs
from spjax.config import parse
from spjax.data.records import read_unit_records
from spjax.encoders import prosody
from spjax.io import packs, unit_lms
from spjax.jobs import comparing, pretraining, prompting, task_data
from spjax.jobs.task_data import read_lm
from spjax.types import Encoded
from tests import toy_prosody
from tests.conftest import Place

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of records with durations and f0."""
    return toy_prosody.write_records(tmp_path_factory.mktemp("records"))


def _pretraining(data: Path, options: str = "backbone=pgslm", **settings: Any) -> ConfigDict:
    config = pretrain_ulm.get_config(options)
    config.tasks, config.data, config.compute.dtype = ("tune", "pace"), str(data), "float32"
    config.update_from_flattened_dict(toy_prosody.SIZES | {k.replace("__", "."): v for k, v in settings.items()})
    return config


def _prompting(data: Path, lm: Path, options: str = "backbone=pgslm", **settings: Any) -> ConfigDict:
    config = toy_prosody.small(options)
    config.data = config.pretraining.data = str(data)
    config.lm = str(lm)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in settings.items()})
    return config


@pytest.fixture(scope="module")
def pretrained(spoken: Path, tmp_path_factory: pytest.TempPathFactory, quick_compile: None) -> Path:
    """Work directory of a multi-stream LM's pretraining."""
    workdir = tmp_path_factory.mktemp("pgslm")
    jobs.run(parse(_pretraining(spoken, pretrain__f0_bins=4)), str(workdir), None, "")
    return workdir


@pytest.fixture(scope="module")
def tuned(spoken: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work directory of a prompt job on it."""
    workdir = tmp_path_factory.mktemp("tuned")
    jobs.run(parse(_prompting(spoken, pretrained / "lm")), str(workdir), None, "")
    return workdir


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


# ---- units of the LM and of the records

NAMES = ("encoder", "layer", "kmeans", "merged", "vocabulary")


def test_records_of_other_units_than_those_of_the_lm_are_refused(
    spoken: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dict(zip(NAMES, ("wavlm", 9, "km9", True, 100), strict=True))
    monkeypatch.setattr(task_data, "made_by", lambda card: made)
    with pytest.raises(ValueError, match=r"the LM .*lm uses units of encoder .*, .* of encoder wavlm, .*--config\.lm"):
        jobs.run(parse(_prompting(spoken, pretrained / "lm")), str(tmp_path), None, "")


def test_pretraining_on_tasks_of_different_units_is_refused(
    spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "made_by", lambda card: {"layer": 6 if card.task.name == "tune" else 7})
    with pytest.raises(ValueError, match=r"task tune uses units of layer 6, .*pace of layer 7\. Pretrain on tasks"):
        jobs.run(parse(_pretraining(spoken)), str(tmp_path), None, "")


# ---- pretraining


def test_edges_of_f0_are_fitted_on_the_train_sets_of_all_tasks(spoken: Path, pretrained: Path) -> None:
    f0 = np.concatenate([read_unit_records(spoken / name, "train")[0].f0 for name in ("tune", "pace")])
    expected = prosody.f0_edges(f0, 4)
    assert len(expected) == 3
    config, _, info = unit_lms.read_unit_lm(pretrained / "lm")
    assert config.prosody.f0_edges == expected
    assert _json(pretrained / "config.json")["inputs"]["f0_edges"] == list(expected)
    assert info["provenance"]["data"].keys() == {"tune", "pace"}
    assert info["provenance"]["config"]["lm"]["prosody"]["f0_input"] is True


def test_every_stream_is_reported(pretrained: Path, spoken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    valid = _json(pretrained / "lm" / "config.json")["provenance"]["valid"]
    assert {
        f"{task}/{what}" for task in ("tune", "pace") for what in ("perplexity", "duration_loss", "f0_loss")
    } <= set(valid)
    shutil.rmtree(pretrained / "lm")
    jobs.run(parse(_pretraining(spoken, pretrain__f0_bins=4)), str(pretrained), None, "")
    printed = capsys.readouterr().out
    for what in ("perplexity", "duration loss", "f0 loss"):
        assert f"{what} tune " in printed


def test_a_run_is_continued_to_the_same_lm_and_no_other(pretrained: Path, spoken: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pretrained, tmp_path / "copy")
    shutil.rmtree(copy / "lm")
    jobs.run(parse(_pretraining(spoken, pretrain__f0_bins=4)), str(copy), None, "")
    assert unit_lms.read_unit_lm(copy / "lm")[2]["hash"] == unit_lms.read_unit_lm(pretrained / "lm")[2]["hash"]
    for settings, message in (
        ({"pretrain__f0_bins": 5}, r"pretrain\.f0_bins=4 \(now 5\)"),
        ({"pretrain__f0_bins": 4, "lm__prosody__f0_input": False}, r"lm\.prosody\.f0_input=True \(now False\)"),
        ({"pretrain__f0_bins": 4, "options": "backbone=gslm"}, r"lm\.prosody=True \(now False\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jobs.run(parse(_pretraining(spoken, **settings)), str(copy), None, "")


def test_given_edges_are_kept(spoken: Path, tmp_path: Path) -> None:
    edges = (-0.25, 0.0, 0.25)
    jobs.run(parse(_pretraining(spoken, lm__prosody__f0_edges=edges, pretrain__epochs=1)), str(tmp_path), None, "")
    assert unit_lms.read_unit_lm(tmp_path / "lm")[0].prosody.f0_edges == edges
    assert "f0_edges" not in _json(tmp_path / "config.json")["inputs"]


def test_a_continuous_lm_has_no_edges(spoken: Path, tmp_path: Path) -> None:
    jobs.run(parse(_pretraining(spoken, lm__prosody__discrete=False, pretrain__epochs=1)), str(tmp_path), None, "")
    config = unit_lms.read_unit_lm(tmp_path / "lm")[0]
    assert (config.prosody.discrete, config.prosody.f0_edges) == (False, ())


def test_a_unit_lm_is_the_same_with_and_without_prosody_in_the_records(spoken: Path, tmp_path: Path) -> None:
    from spjax.data.write_records import Utterance, write_unit_records

    for name, task in toy_prosody.TASKS.items():
        bare = {}
        for split in ("train", "valid", "test"):
            units, _ = read_unit_records(spoken / name, split)
            bare[split] = [Utterance(units.ids[i], units.units_of(i), units.classes[i]) for i in range(len(units))]
        write_unit_records(tmp_path / "bare" / name, task, bare)
    hashes = set()
    for place in (spoken, tmp_path / "bare"):
        workdir = tmp_path / place.name / "run"
        jobs.run(parse(_pretraining(place, "", pretrain__epochs=1)), str(workdir), None, "")
        hashes.add(unit_lms.read_unit_lm(workdir / "lm")[2]["hash"])
    assert len(hashes) == 1


# ---- prompts


def test_the_report_has_the_backbone(tuned: Path) -> None:
    results = _json(tuned / "tune" / "results.json")
    assert results["provenance"]["backbone"] == "pGSLM (multi-stream LM), discrete, input units and durations and f0"
    assert "- backbone: pGSLM" in (tuned / "tune" / "summary.md").read_text()


def test_a_pack_predicts_what_is_in_the_report(spoken: Path, pretrained: Path, tuned: Path) -> None:
    lm = spjax.load_unit_lm(pretrained / "lm")
    pack = packs.load_pack(tuned / "pace" / "packs" / "seed_1")
    units, card = read_unit_records(spoken / "pace", "test")
    spans = [slice(units.offsets[i], units.offsets[i + 1]) for i in range(len(units))]
    encoded = [Encoded(units.units[s], units.durations[s], units.f0[s]) for s in spans]
    labels = [card.task.classes[c][1] for c in units.classes[:, 0]]
    right = [
        a["labels"]["pace"] == label for a, label in zip(spjax.classify_units(lm, pack, encoded), labels, strict=True)
    ]
    assert np.mean(right) == _json(tuned / "pace" / "results.json")["headline"]["values"][1]


def test_a_random_multi_stream_lm_has_a_different_hash(spoken: Path, pretrained: Path) -> None:
    lm = read_lm(parse(_prompting(spoken, pretrained / "lm", random_lm=True)))
    config, _, info = unit_lms.read_unit_lm(pretrained / "lm")
    assert lm.config == config
    assert lm.hash == unit_lms.unit_lm_hash(lm.params, config.prosody) != info["hash"]
    assert read_lm(parse(_prompting(spoken, pretrained / "lm"))).hash == info["hash"]


# ---- records without prosody


def test_records_without_prosody_are_refused(place: Place, pretrained: Path, tmp_path: Path) -> None:
    records = place.folder / "runs" / "units"
    message = r"units/fsc has no durations and no f0, .* with --f0 of data_pipelines.extract \(imported unit text"
    pretraining = _pretraining(records)
    pretraining.tasks = ("fsc",)
    with pytest.raises(ValueError, match=message):
        jobs.run(parse(pretraining), str(tmp_path / "ulm"), None, "")
    config = fsc.get_config("backbone=pgslm")
    config.data, config.lm = str(records / "fsc"), str(pretrained / "lm")
    with pytest.raises(ValueError, match=message):
        jobs.run(parse(config), str(tmp_path / "prompts"), None, "")
    assert not list(tmp_path.rglob("checkpoints"))


# ---- comparisons


def _comparison(data: Path, **settings: Any) -> ConfigDict:
    config = toy_prosody.get_config()
    config.data = config.pretraining.data = str(data)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in settings.items()})
    return config


@pytest.fixture(scope="module")
def compared(spoken: Path, tmp_path_factory: pytest.TempPathFactory, quick_compile: None) -> Path:
    """Work directory of a comparison."""
    workdir = tmp_path_factory.mktemp("compared")
    jobs.run(parse(_comparison(spoken, baselines=True)), str(workdir), None, "a command")
    return workdir


def test_a_comparison_measures_the_gain_of_prosody(compared: Path) -> None:
    found = _json(compared / "comparison.json")
    assert found["baseline"] == "plain"
    for task in ("tune", "pace"):
        result = found["tasks"][task]
        assert result["variants"].keys() == {"plain", "told"}
        gain = result["variants"]["told"]["gain"]
        assert gain["mean"] > 0.15
        assert gain["over_utterances"]["excludes_zero"]
        assert 0 < result["ngram"] < 1  # computed by the baseline variant only
        for name in ("plain", "told"):
            results = _json(compared / name / task / "results.json")
            assert results["headline"]["mean"] == result["variants"][name]["mean"]
            assert results["command"] == "a command"
            assert results["provenance"]["backbone"].startswith("GSLM (unit LM)" if name == "plain" else "pGSLM")
    assert "[told](told/summary.md)" in (compared / "summary.md").read_text()
    lms = [unit_lms.read_unit_lm(comparing.lm_place(str(compared), name))[0] for name in ("plain", "told")]
    assert lms[0].prosody is None
    assert len(lms[1].prosody.f0_edges) == 3
    assert not (compared / "told" / "tune" / "baselines.json").exists()


def test_a_finished_comparison_trains_nothing_again(
    spoken: Path, compared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _json(compared / "comparison.json")
    (compared / "comparison.json").unlink()
    monkeypatch.setattr(prompting, "run_prompt_tuning", lambda *_: pytest.fail("trained again"))
    jobs.run(parse(_comparison(spoken, baselines=True)), str(compared), None, "")
    assert _json(compared / "comparison.json") == before
    assert "variant 2 of 2, told: pGSLM (multi-stream LM), discrete" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stopped_comparison_resumes(
    spoken: Path, compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prompting.run_prompt_tuning
    done: list[str] = []

    def stopping(config: ConfigDict, workdir: str, *rest: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(Path(workdir).name)
        return run(config, workdir, *rest)

    monkeypatch.setattr(prompting, "run_prompt_tuning", stopping)
    with pytest.raises(KeyboardInterrupt):
        jobs.run(parse(_comparison(spoken)), str(tmp_path), None, "")
    assert done == ["plain"]
    assert not (tmp_path / "comparison.json").exists()
    lm = (tmp_path / "told" / "ulm" / "lm" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(prompting, "run_prompt_tuning", lambda c, w, *r: [done.append(Path(w).name), run(c, w, *r)])
    jobs.run(parse(_comparison(spoken)), str(tmp_path), None, "")
    assert done == ["plain", "told"]
    assert (tmp_path / "told" / "ulm" / "lm" / "model.safetensors").stat().st_mtime_ns == lm
    found, whole = (_json(folder / "comparison.json")["tasks"] for folder in (tmp_path, compared))
    for task in ("tune", "pace"):
        assert found[task]["variants"] == whole[task]["variants"]


def test_another_comparison_in_the_work_directory_is_refused_before_anything_runs(
    spoken: Path, compared: Path, tmp_path: Path
) -> None:
    before = (compared / "config.json").read_text()
    with pytest.raises(ValueError, match=r"holds a run with train\.epochs=3 \(now 4\)"):
        jobs.run(parse(_comparison(spoken, train__epochs=4)), str(compared), None, "")
    with pytest.raises(ValueError, match=r"ulm holds a run with pretrain\.epochs=6 \(now 3\)"):
        jobs.run(parse(_comparison(spoken, pretraining__pretrain__epochs=3)), str(compared), None, "")
    finer = _comparison(spoken, variants__told__pretraining__pretrain__f0_bins=5)
    with pytest.raises(ValueError, match=r"told\.pretraining\.pretrain\.f0_bins=4 \(now 5\)"):
        jobs.run(parse(finer), str(compared), None, "")
    assert (compared / "config.json").read_text() == before
    other = toy_prosody.write_records(tmp_path / "records", train=40)
    with pytest.raises(ValueError, match=r"plain holds a run with inputs\.units="):
        jobs.run(parse(_comparison(other)), str(compared), None, "")


def test_a_comparison_and_a_prompt_job_do_not_share_a_work_directory(spoken: Path, compared: Path) -> None:
    before = (compared / "config.json").read_text(), (compared / "summary.md").read_text()
    job = comparing.variant_of(parse(_comparison(spoken)), "plain", str(compared))
    with pytest.raises(ValueError, match="holds a run with job='compare'"):
        jobs.run(job, str(compared), None, "")
    assert before == ((compared / "config.json").read_text(), (compared / "summary.md").read_text())


def test_packs_missing_after_a_stop_are_written(spoken: Path, compared: Path, tmp_path: Path) -> None:
    """Packs are written last: the results exist, a pack does not."""
    own = tmp_path / "compared"
    shutil.copytree(compared, own)
    (lost, *_) = sorted((own / "told").rglob("packs/seed_*"))
    shutil.rmtree(lost)
    jobs.run(parse(_comparison(spoken)), str(own), None, "")
    assert (lost / "card.json").exists()
    original = compared / lost.relative_to(own)
    assert (lost / "prompt.safetensors").read_bytes() == (original / "prompt.safetensors").read_bytes()


def _changed(**variants: Any) -> Callable[[ConfigDict], None]:
    def change(config: ConfigDict) -> None:
        config.variants = ConfigDict({"plain": {}, **variants})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(baseline="other"), "baseline is 'other', the variants are plain, told"),
        (_changed(), "the variants are plain: give at least two"),
        (_changed(**{"a/b": {}}), "variant 'a/b' is not a valid directory name"),
        (_changed(b={"optim": {"lrr": 0.1}}), r"variants\.b: .*lrr"),
        (_changed(b={"train": {"epochs": "many"}}), r"variants\.b: .*cannot be cast"),
        (_changed(b={"train": 3}), r"variants\.b: "),
        (_changed(b={"pretraining": 3}), r"variants\.b: "),
        (_changed(b={"train": {"seeds": (5,)}}), r"variants\.b: train\.seeds must be the same for all"),
        (_changed(b={"lm": "x", "task": "y"}), r"variants\.b: lm, task must be the same for all"),
        (_changed(speech={}), "variant 'speech' is not a valid directory name"),
        (_changed(b={"train": {"epochs": 0}}), r"variants\.b: train: epochs is 0"),
        (_changed(b={"pretraining": {"lm": {"prosody": {"f0": True}}}}), r"variants\.b: .*\"f0\""),
        (_changed(b={"pretraining": {"lm": {"prosody": {"max_duration": 0}}}}), r"variants\.b: .*max_duration is 0"),
        (_changed(b={"pretraining": {"lm": {"dim": 33}}}), r"variants\.b: unit LM: dim 33"),
        (lambda config: config.update(data="told"), "'told' would be written to .*told, the directory of the records"),
    ],
)
def test_invalid_variants_are_refused(
    spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[ConfigDict], None], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = _comparison(spoken)
    change(config)
    with pytest.raises(ValueError, match=message):
        jobs.run(parse(config), ".", None, "")
    assert not list(tmp_path.iterdir())
