"""Options of a prompt tuning job, in this process, on toy units and a tiny LM."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

import spjax
from configs import bank, fsc, gsc, pretrain_ulm
from spjax import jobs
from spjax.config import parse
from spjax.data.records import read_unit_records
from spjax.io import packs
from tests import toy
from tests.conftest import Place

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = {
    "compute.dtype": "float32", "train.seeds": (0,), "train.epochs": 3, "train.buckets": 1, "train.max_rows": 8,
    "prompt.length": 4, "prompt.rank": 0, "prompt.separators": 2, "prompt.steer": True, "optim.lr": 3e-2,
    "baselines": False,
}  # fmt: skip
Run = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def run(place: Place, tmp_path: Path) -> Run:
    """Run fsc (or another config) with these settings in a new workdir; returns the workdir and its results."""

    def run(config: ConfigDict | None = None, **settings: Any) -> tuple[Path, dict[str, Any]]:
        config = config or fsc.get_config()
        config.data, config.lm = str(place.folder / "runs" / "units" / config.task), str(place.folder / "lm")
        config.update_from_flattened_dict(SMALL | {key.replace("__", "."): value for key, value in settings.items()})
        workdir = tmp_path / "run"
        jobs.run(parse(config), str(workdir), None, "")
        return workdir, json.loads((workdir / "results.json").read_text())

    return run


@pytest.fixture(scope="module")
def plain(place: Place, tmp_path_factory: pytest.TempPathFactory, quick_compile: None) -> tuple[Path, dict[str, Any]]:
    """A baseline run for comparison."""
    config = fsc.get_config()
    config.data, config.lm = str(place.folder / "runs" / "units" / "fsc"), str(place.folder / "lm")
    config.update_from_flattened_dict(SMALL)
    workdir = tmp_path_factory.mktemp("plain")
    jobs.run(parse(config), str(workdir), None, "")
    return workdir, json.loads((workdir / "results.json").read_text())


def _curve(results: dict[str, Any]) -> list[float]:
    return [point["train_loss"] for point in results["members"][0]["curve"]]


def _pack(workdir: Path) -> packs.PromptPack:
    return packs.load_pack(workdir / "packs" / "seed_0")


def test_a_pack_describes_itself(place: Place, plain: tuple[Path, dict[str, Any]]) -> None:
    workdir, results = plain
    card = _pack(workdir).card
    lm = spjax.load_unit_lm(place.folder / "lm")
    assert card["lm"]["hash"] == lm.hash
    assert (card["task"], card["metric"], card["encoder"], card["layer"], card["kmeans"], card["merged"]) == (
        "fsc", "exact_match", "hubert_base_ls960", 6, "km100", True
    )  # fmt: skip
    assert card["combinations"] == [list(c) for c in toy.COMBINATIONS["fsc"]]
    assert card["parameters"] == results["parameters"]["trained"]
    assert card["results"]["test"]["exact_match"] == results["members"][0]["metrics"]["exact_match"]
    assert card["results"]["test"]["interval_95"] == results["members"][0]["interval_95"]
    assert card["provenance"]["seed"] == 0


def test_the_pack_predicts_what_is_in_the_report(place: Place, plain: tuple[Path, dict[str, Any]]) -> None:
    """Test units through the Python API: labels as in the predictions, accuracy as in the report."""
    workdir, results = plain
    units, _ = read_unit_records(place.folder / "runs/units/fsc", "test")
    answers = spjax.classify_units(
        spjax.load_unit_lm(place.folder / "lm"), _pack(workdir), [units.units_of(i).tolist() for i in range(len(units))]
    )
    task = _pack(workdir).task
    truth = [{slot.name: task.classes[c][1] for slot, c in zip(task.slots, row, strict=True)} for row in units.classes]
    right = [answer["labels"] == true for answer, true in zip(answers, truth, strict=True)]
    assert np.mean(right) == pytest.approx(results["headline"]["mean"])


def test_low_rank_adapters_without_a_prompt(run: Run, place: Place, tmp_path: Path) -> None:
    """Ranks are swept; the pack has its settings, predicts what is in the report, and can be a start with its shape."""
    adapters = {"prompt__length": 0, "prompt__targets": ("value", "query"), "prompt__alpha": 2.0, "optim__lr": 1e-2}
    workdir, results = run(**adapters, sweep={"rank": (1, 3)}, train__epochs=1)
    table = json.loads((workdir / "sweep.json").read_text())
    assert [(one["length"], one["rank"]) for one in table] == [(0, 1), (0, 3)]
    (rank,) = [one["rank"] for one in table if one["taken"]]
    assert "| LoRA rank | learning rate |" in (workdir / "sweep.md").read_text()
    assert results["setting"] == {"LoRA rank": rank, "learning rate": 1e-2}
    pack, lm = _pack(workdir), spjax.load_unit_lm(place.folder / "lm")
    assert pack.card["lora"] == {"rank": rank, "alpha": 2.0, "targets": ["query", "value"]}
    assert "key" not in pack.params
    assert pack.card["parameters"] == results["parameters"]["trained"]
    units, _ = read_unit_records(place.folder / "runs/units/fsc", "test")
    answers = spjax.classify_units(lm, pack, [units.units_of(i).tolist() for i in range(len(units))])
    predicted = [[slot.labels.index(answer["labels"][slot.name]) for slot in pack.task.slots] for answer in answers]
    right = (np.asarray(predicted) + pack.task.slot_offsets[:-1] == units.classes).all(axis=1)
    assert right.mean() == pytest.approx(results["headline"]["mean"])
    config = fsc.get_config()
    config.update_from_flattened_dict(SMALL | {"start_from": str(workdir / "packs" / "seed_0"), "prompt.alpha": 9.0})
    shape = parse(config).prompt
    assert (shape.length, shape.rank, shape.alpha, shape.targets) == (0, rank, 2.0, ("query", "value"))
    config.sweep.rank = (4,)
    with pytest.raises(ValueError, match=r"sweep.rank \(4,\) has no effect, since start_from="):
        parse(config)
    config.sweep.update({"rank": (), "init": ("zeros",)})
    with pytest.raises(ValueError, match=r"sweep.init \('zeros',\) has no effect, since start_from="):
        parse(config)


def test_nothing_to_train_is_refused() -> None:
    config = fsc.get_config()
    config.prompt.rank = 0
    with pytest.raises(ValueError, match=r"prompt.length and prompt.rank are 0, so nothing would be trained"):
        parse(config)


def test_a_sweep_chooses_the_best_on_valid_and_reports_only_it(
    run: Run, plain: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """One setting equals the baseline run and has its numbers; with a learning rate near 0 nothing is learnt."""
    workdir, results = run(sweep={"lr": (1e-6, 3e-2), "length": (2, 4)}, train__seeds=(0, 1))
    table = json.loads((workdir / "sweep.json").read_text())
    assert [(one["length"], one["lr"]) for one in table] == [(2, 1e-6), (2, 3e-2), (4, 1e-6), (4, 3e-2)]
    (taken,) = [one for one in table if one["taken"]]
    assert taken["mean"] == max(one["mean"] for one in table)
    assert taken["lr"] == 3e-2
    assert [member["best_valid"] for member in results["members"]] == pytest.approx(taken["valid"])
    assert results["setting"] == {"prompt length": taken["length"], "learning rate": 0.03}
    assert (results["tried"], results["valid"]["mean"]) == (4, pytest.approx(taken["mean"]))
    assert _pack(workdir).params["key"].shape[1] == taken["length"]
    assert results["parameters"]["trained"] == sum(leaf.size for leaf in _pack(workdir).params.values())
    assert table[3]["valid"][0] == pytest.approx(plain[1]["members"][0]["best_valid"])
    assert f"of 4 settings prompt length {taken['length']}, learning rate 0.03 is best" in capsys.readouterr().out
    assert "| yes |" in (workdir / "sweep.md").read_text()


def test_a_sweep_can_have_any_setting_in_which_members_may_differ(
    run: Run, plain: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The member with the baseline run's settings has its numbers, next to other inits, rates and weight decays."""
    workdir, results = run(sweep={"init": ("normal", "class_means"), "weight_decay": (0.0, 30.0), "noise": (0.1,)})
    table = json.loads((workdir / "sweep.json").read_text())
    assert [(one["init"], one["weight_decay"], one["noise"]) for one in table] == [
        ("normal", 0.0, 0.1), ("normal", 30.0, 0.1), ("class_means", 0.0, 0.1), ("class_means", 30.0, 0.1)
    ]  # fmt: skip
    assert table[0]["valid"] == pytest.approx([plain[1]["members"][0]["best_valid"]])
    (taken,) = [one for one in table if one["taken"]]
    values = {"init": taken["init"], "noise": 0.1, "weight_decay": taken["weight_decay"]}
    assert results["setting"] == {"prompt length": 4, "learning rate": 3e-2, **values}
    assert (
        "| prompt length | learning rate | init | noise | weight_decay | valid |" in (workdir / "sweep.md").read_text()
    )
    listed = f"init {taken['init']}, noise 0.1, weight_decay {taken['weight_decay']:g}"
    assert f"of 4 settings prompt length 4, learning rate 0.03, {listed} is best" in capsys.readouterr().out
    assert listed in (workdir / "summary.md").read_text()


def test_a_bank_of_two_tasks_with_members_that_stop(place: Place, tmp_path: Path) -> None:
    """A row per task; the curve of a member ends where it stopped; packs are of the best epoch."""
    config = bank.get_config()
    config.update_from_flattened_dict(SMALL | {"train.epochs": 6, "train.patience": 1, "baselines": False})
    config.data, config.lm = str(place.folder / "runs" / "units"), str(place.folder / "lm")
    config.sweep.update({"lr": (1e-30, 3e-2), "rank": (), "length": (4,)})
    jobs.run(parse(config), str(tmp_path / "bank"), None, "")
    lines = [json.loads(line) for line in (tmp_path / "bank" / "log.jsonl").read_text().splitlines()]
    valid = [line["valid/metric"] for line in lines if "valid/metric" in line]
    assert None in valid[-1], "no member stopped: patience of 1, and a learning rate of nothing"
    page = (tmp_path / "bank" / "summary.md").read_text()
    for task in ("fsc", "gsc"):
        results = json.loads((tmp_path / "bank" / task / "results.json").read_text())
        (row,) = [line for line in page.splitlines() if line.startswith(f"| [{task}]")]
        assert f"prompt length 4, learning rate 0.03 (of 2 tried: [sweep]({task}/sweep.md))" in row
        ends = " to ".join(f"{100 * end:.2f}" for end in results["members"][0]["interval_95"])
        assert f"| {100 * results['valid']['mean']:.2f} | {100 * results['headline']['mean']:.2f} ({ends}) |" in row
        assert f"| {results['parameters']['trained']:,} |" in row
        (member,) = results["members"]
        epochs = [point["epoch"] for point in member["curve"]]
        assert epochs == list(range(1, len(epochs) + 1))
        assert member["best_epoch"] in (epochs[-1], epochs[-1] - 1)
        assert member["best_valid"] == member["curve"][int(member["best_epoch"]) - 1]["valid"]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"lr": (0.0, 1e-2)}, "sweep: lr .* different positive numbers"),
        ({"lr": (float("nan"),)}, "sweep: lr .* different positive numbers"),
        ({"length": (2.5,)}, "sweep: length .* positive integers"),
        ({"length": (4, 4)}, "sweep: length .* different positive integers"),
        ({"length": (0,)}, "sweep: length .* positive integers"),
        ({"init": ("zeros", "random")}, "init is 'random', must be one of"),
        ({"noise": (0.1, 2.0)}, "noise is 2.0, must be in"),
        ({"noise": (-0.1,)}, "sweep: noise .* different numbers of at least 0"),
        ({"lora_dropout": (0.1, 0.2)}, "sweep.lora_dropout .* has no effect where prompt.rank is 0"),
    ],
)
def test_invalid_sweeps_are_refused(run: Run, sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(sweep=sweep)


@pytest.mark.parametrize("kind", ["frequency", "random"])
def test_rule_verbalizers(run: Run, kind: str) -> None:
    workdir, results = run(verbalizer=kind)
    pack = _pack(workdir)
    assert pack.card["verbalizer"]["kind"] == kind
    assert "verbalizer" not in pack.params
    codes = np.asarray(pack.card["verbalizer"]["codes"])
    assert len(np.unique(codes)) == 24  # no two classes share a unit
    assert codes.min() >= 4
    assert _curve(results)[-1] < _curve(results)[0]
    assert results["parameters"]["trained"] == sum(leaf.size for leaf in pack.params.values())


def test_few_shot_limits_the_utterances_of_each_combination(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(few_shot=2)
    assert "fsc: 12 train, 24 valid, 24 test utterances" in capsys.readouterr().out


def test_few_shot_with_several_passes_between_evaluations(run: Run) -> None:
    workdir, results = run(few_shot=2, train__passes=3)
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "valid/metric" in line] == [6, 12, 18]
    assert len(_curve(results)) == 3


def test_a_random_lm_is_a_control(run: Run, place: Place, plain: tuple[Path, dict[str, Any]]) -> None:
    workdir, results = run(random_lm=True)
    assert results["provenance"]["lm_hash"] != plain[1]["provenance"]["lm_hash"]
    assert plain[1]["provenance"]["lm_hash"] == spjax.load_unit_lm(place.folder / "lm").hash
    assert not (workdir / "packs").exists()  # a prompt pack is bound to an LM, and this LM is nowhere saved


def test_the_lm_can_be_fine_tuned(run: Run) -> None:
    workdir, results = run(train__trainable=".*")
    assert results["parameters"]["frozen"] == 0
    assert results["parameters"]["trained"] > toy.LM.num_params
    assert not (workdir / "packs").exists()  # a prompt pack is bound to an LM, and this LM is nowhere saved
    assert _curve(results)[-1] < _curve(results)[0]


def test_no_pack_is_saved_if_any_weight_of_the_lm_is_trained(run: Run) -> None:
    workdir, _ = run(train__trainable="prompt/.*|lm/final_norm/scale", train__epochs=1)
    assert not (workdir / "packs").exists()


def test_a_run_starts_from_a_pack(run: Run, plain: tuple[Path, dict[str, Any]]) -> None:
    workdir, results = run(start_from=str(plain[0] / "packs" / "seed_0"))
    assert _curve(results)[0] < _curve(plain[1])[0] * 0.8
    assert _pack(workdir).card["verbalizer"] == _pack(plain[0]).card["verbalizer"]


def test_a_pack_determines_the_shape_in_the_report(run: Run, plain: tuple[Path, dict[str, Any]]) -> None:
    _, results = run(start_from=str(plain[0] / "packs" / "seed_0"), prompt__length=9, verbalizer="frequency")
    assert results["config"]["prompt"]["length"] == 4
    assert results["config"]["verbalizer"] == "learnable"


def test_a_pack_of_another_task_gives_its_prompt_and_no_verbalizer(
    run: Run, plain: tuple[Path, dict[str, Any]]
) -> None:
    workdir, results = run(gsc.get_config(), start_from=str(plain[0] / "packs" / "seed_0"), train__epochs=2)
    assert _pack(workdir).params["verbalizer"].shape == (16, 104)
    assert [slot["name"] for slot in _pack(workdir).card["slots"]] == ["command"]
    assert results["metric"] == "accuracy"


def test_results_of_another_config_are_refused(run: Run) -> None:
    import shutil

    workdir, _ = run(baselines=True, train__epochs=1)
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(ValueError, match=r"holds a run with few_shot=0 \(now 2\)"):
        run(few_shot=2, baselines=True, train__epochs=1)
    (workdir / "config.json").write_text('{"few')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        run(few_shot=2, baselines=True, train__epochs=1)


def test_baselines_are_scored_on_the_same_utterances(run: Run, place: Place) -> None:
    workdir, _ = run(baselines=True, max_length=10, overlength="drop", train__epochs=1, train__seeds=(0, 1))
    baselines = json.loads((workdir / "baselines.json").read_text())
    units, _ = read_unit_records(place.folder / "runs/units/fsc", "train")
    assert list(baselines) == ["ngram", "probe"]
    for baseline in baselines.values():
        assert baseline["train_utterances"] == (units.lengths <= 10).sum() < 96
    results = json.loads((workdir / "results.json").read_text())
    assert results["baselines"] == baselines
    beside = _pack(workdir).card["results"]["baselines"]
    assert beside == {kind: {split: one[split] for split in ("valid", "test")} for kind, one in baselines.items()}
    assert 0 <= results["ensemble"]["headline"] <= 1


def test_a_pack_of_another_lm_is_refused_as_start(run: Run, tmp_path: Path, plain: tuple[Path, dict[str, Any]]) -> None:
    pack = _pack(plain[0])
    card = {**pack.card, "lm": {**pack.card["lm"], "hash": "0" * 64}}
    packs.save_pack(tmp_path / "other", pack.params, card)
    with pytest.raises(packs.StorageError, match="was trained with the unit LM of hash 0000"):
        run(start_from=str(tmp_path / "other"))


def test_shallow_prompts(run: Run) -> None:
    workdir, results = run(prompt__deep=False)
    assert set(_pack(workdir).params) == {"input", "sep", "sep_deep", "verbalizer"}
    assert _pack(workdir).params["input"].shape == (4, 32)
    assert _curve(results)[-1] < _curve(results)[0]


def test_the_published_protocol_stops_early(run: Run) -> None:
    workdir, results = run(reference=True)
    pack, lines = _pack(workdir), [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    assert {name: leaf.shape for name, leaf in pack.params.items()} == {
        "key": (2, 5, 32), "value": (2, 5, 32), "sep": (1, 32), "verbalizer": (28, 104)
    }  # fmt: skip
    losses = [round(line["valid/loss"][0], 3) for line in lines if "valid/loss" in line]
    assert len(losses) < 300
    assert losses[-1] >= min(losses[:-1])  # no better, the first time
    assert all(b < a for a, b in itertools.pairwise(losses[:-1]))
    assert results["members"][0]["best_epoch"] == len(losses) - 1
    assert pack.card["provenance"]["reference"] is True
    used = results["config"]
    assert (used["prompt"]["length"], used["train"]["epochs"], used["loss"]["kind"]) == (5, 300, "reference")
    assert used == {k: v for k, v in json.loads((workdir / "config.json").read_text()).items() if k != "inputs"}


def test_one_slot(run: Run) -> None:
    workdir, results = run(gsc.get_config(), train__epochs=2)
    assert results["metric"] == "accuracy"
    assert list(results["slots"]) == ["command"]
    assert _pack(workdir).card["combinations"] == [[0], [3], [11]]


def test_all_combinations_can_be_decoded(run: Run) -> None:
    workdir, _ = run(combinations="all", train__epochs=1)
    assert _pack(workdir).card["combinations"] is None


def test_utterances_over_the_limit_are_counted_and_cut_only_if_requested(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"\d+ of 96 utterances have more than max_length=8 units"):
        run(max_length=8)
    run(max_length=8, overlength="cut", train__epochs=1)
    assert "units, the longest 14: cut" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"combinations": "some"}, "combinations is 'some', must be seen or all"),
        ({"verbalizer": "rule"}, "verbalizer is 'rule', must be one of learnable"),
        ({"train__select": "f1"}, "select is 'f1'"),
        ({"train__trainable": "prompts"}, "trainable='prompts' matches no parameter"),
        ({"loss__kind": "mean"}, "kind is 'mean'"),
        ({"optim__decay": "linear"}, "decay is 'linear'"),
        ({"compute__dtype": "float16"}, "compute dtype is 'float16'"),
        ({"job": "serve"}, "config.job is 'serve', must be prompt, pretrain, compare or methods"),
        ({"overlength": "shorten", "max_length": 8}, "overlength is 'shorten', must be error, cut or drop"),
        ({"start_from": "nowhere"}, "nowhere/card.json does not exist"),
        ({"train__epochs": 0}, "train: epochs is 0, must be at least 1"),
        ({"train__sampling": 1.5}, r"train: sampling is 1\.5, must be in \[0, 1\]"),
        ({"train__seeds": (2**40,)}, "train: seeds .* different integers in"),
        ({"train__patience": -1}, "patience is -1"),
        ({"train__trainable": "["}, r"trainable '\[' is not a regular expression"),
        ({"optim__clip": -1.0}, "clip is -1.0, must be finite and at least 0"),
        ({"optim__clip": float("nan")}, "clip is nan, must be finite and at least 0"),
        ({"optim__lr": float("nan")}, "lr nan must be positive"),
        ({"optim__lr": float("inf")}, "lr inf must be positive"),
        ({"prompt__sep_scale": float("nan")}, "sep_scale is nan, must be finite and at least 0"),
        ({"optim__b2": 1.5}, "b2 is 1.5"),
        ({"loss__noise": 2.0}, "loss: noise is 2.0"),
        ({"model_parallel": 0}, "model_parallel=0 must be at least 1"),
        ({"weight_shards": -1}, "weight_shards=-1 at least 0"),
        ({"max_length": -5}, "fsc, train: max_length is -5"),
        ({"max_length": 1, "overlength": "drop"}, "fsc, train: no utterance has at most max_length=1"),
        ({"few_shot": -2}, "few_shot is -2"),
    ],
)
def test_invalid_settings_are_refused_before_training(run: Run, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**settings)


def test_an_lm_of_other_units_is_refused(
    run: Run, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    from spjax.io import unit_lms

    other = dataclasses.replace(toy.LM, vocab_size=54)
    monkeypatch.setattr(unit_lms, "read_unit_lm", lambda _: (other, toy.tiny_lm(config=other), {"hash": "x"}))
    with pytest.raises(ValueError, match=r"lm has 50 units, .*fsc has 100"):
        run()
    # An imported LM knows only some of what identifies its units.
    known = {"units": {"encoder": "mhubert_base_25hz", "layer": 11, "vocabulary": 100}}
    lm = (toy.LM, toy.tiny_lm(), {"hash": "x", "provenance": known})
    monkeypatch.setattr(unit_lms, "read_unit_lm", lambda _: lm)
    with pytest.raises(ValueError, match=r"lm uses units of encoder mhubert_base_25hz, layer 11, .* of encoder "):
        run()


def test_the_pretraining_card_has_the_provenance_of_an_lm(place: Place, tmp_path: Path) -> None:
    config = pretrain_ulm.get_config()
    config.data = str(place.folder / "runs" / "units")
    config.update_from_flattened_dict(
        {"lm.dim": 32, "lm.layers": 2, "lm.heads": 2, "lm.ffn_dim": 64, "pretrain.epochs": 1, "pretrain.rows": 8}
    )
    jobs.run(parse(config), str(tmp_path), None, "")
    provenance = json.loads((tmp_path / "lm" / "config.json").read_text())["provenance"]
    assert provenance["data"].keys() == {"fsc", "gsc"}
    assert len(provenance["data"]["fsc"]["train_sha256"][0]) == 64
    assert provenance["config"]["pretrain"]["epochs"] == 1
    assert provenance["valid"]["fsc/perplexity"] > 1
