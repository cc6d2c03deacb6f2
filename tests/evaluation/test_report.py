"""Files of the report parse back to the members' predictions."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from spjax.evaluation import metrics, outcome, report
from spjax.evaluation.metrics import mean_interval, wilson_interval
from spjax.tasks import TASKS, Slot, Task

FSC = TASKS["fsc"]
ODD = Task("odd", (Slot("a | b/c", ("į viršų", "$x_1$", "ne|iki", "停止")),))
WIDE = Task("speaker", (Slot("speaker", tuple(f"id{i}" for i in range(1251))),))
SPOOF = Task("spoof", (Slot("kind", ("bonafide", "spoof")),), metric="eer")


def member_of(task: Task, seed: int, n: int = 40, noise: float = 3.0) -> outcome.Member:
    rng = np.random.default_rng(seed)
    true, predicted, probabilities = [], [], []
    for k, slot in enumerate(task.slots):
        size = len(slot.labels)
        answer = np.arange(n) % size
        p = np.exp(noise * rng.normal(size=(n, size)) + 5 * np.eye(size)[answer])
        p /= p.sum(1, keepdims=True)
        true.append(answer + task.slot_offsets[k])
        predicted.append(p.argmax(1) + task.slot_offsets[k])
        probabilities.append(p.astype(np.float32))
    curve = [outcome.CurvePoint(e, 2.0**-e, 1 - 0.5**e) for e in range(1, 5)]
    answers = outcome.Predictions(
        [f"ä/{i}.wav" for i in range(n)], np.stack(true, 1).astype(np.int32), np.stack(predicted, 1), probabilities
    )
    return outcome.Member(seed, best_epoch=4, best_valid=0.9375, curve=curve, predictions=answers)


def strict(path: Path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("task", [FSC, ODD, SPOOF], ids=lambda task: task.name)
def test_files_parse_back(tmp_path, task):
    members = [member_of(task, seed) for seed in (3, 1, 2)]
    returned = report.write_report(tmp_path / "work", task=task, members=members)
    results = strict(tmp_path / "work" / "results.json")
    assert results == returned
    assert results["slots"] == {slot.name: list(slot.labels) for slot in task.slots}
    values = [one["metrics"]["headline"] for one in results["members"]]
    assert results["headline"]["values"] == values
    assert (results["headline"]["mean"], results["headline"]["half_width_95"]) == pytest.approx(mean_interval(values))
    for member, written in zip(members, results["members"], strict=True):
        assert (written["seed"], written["best_epoch"], written["utterances"]) == (member.seed, 4, 40)
        answers = member.predictions
        back = outcome.read_predictions(tmp_path / "work" / written["predictions"], task)
        assert list(back.ids) == list(answers.ids)
        np.testing.assert_array_equal(back.true, answers.true)
        np.testing.assert_array_equal(back.predicted, answers.predicted)
        for was, wrote in zip(answers.probabilities, back.probabilities, strict=True):
            np.testing.assert_allclose(wrote, was, rtol=1e-5)
        assert metrics.score(task, back.true, back.predicted, back.probabilities) == pytest.approx(written["metrics"])
    for plot in results["plots"].values():
        image = imread(tmp_path / "work" / plot)
        assert min(image.shape[:2]) > 200
        assert image[..., :3].std() > 0.01  # the plot is not empty
    left_over = [file.name for file in (tmp_path / "work").rglob(".*")]
    assert not left_over


def test_single_run_interval_is_the_wilson_interval(tmp_path):
    member = member_of(FSC, 0)
    right = int((member.predictions.true == member.predictions.predicted).all(1).sum())
    results = report.write_report(tmp_path, task=FSC, members=[member])
    assert results["members"][0]["interval_95"] == pytest.approx(wilson_interval(right, 40))
    assert results["headline"]["half_width_95"] is None
    assert "one seed, so no interval" in (tmp_path / "summary.md").read_text()
    assert report.write_report(tmp_path, task=SPOOF, members=[member_of(SPOOF, 0)])["members"][0]["interval_95"] is None


def test_summary_has_all_results(tmp_path):
    ngram = {
        "chosen": "joint",
        "variants": {
            "per_slot": {"valid": {"headline": 0.851}, "test": {"headline": 0.979}},
            "joint": {"valid": {"headline": 0.873}, "test": {"headline": 0.982}},
        },
    }
    probe = {"chosen": "joint", "variants": {"joint": ngram["variants"]["joint"]}, "layer": 3}
    members = [member_of(FSC, seed) for seed in (0, 1)]
    results = report.write_report(
        tmp_path,
        task=FSC,
        members=members,
        baselines={"ngram": ngram, "probe": probe},
        ensemble=members[0].predictions,
        parameters={"trained": 126816, "frozen": 151263232},
        config={"lr": np.float32(0.5), "path": Path("x"), "nested": {"sizes": (1, np.int64(2))}, "nan": float("nan")},
        provenance={"encoder": "hubert_base_ls960"},
        comparisons=[("random frozen LM", 0.5)],
        command="python -m spjax.main --config=configs/fsc.py",
    )
    text = (tmp_path / "summary.md").read_text()
    head = results["headline"]
    for part in (
        f"# fsc: exact match {100 * head['mean']:.2f} %",
        f"± {100 * head['half_width_95']:.2f} (mean of 2 seeds",
        "test split, 40 utterances",
        f"| ensemble of the 2 seeds | {100 * results['members'][0]['metrics']['exact_match']:.2f} |",
        "| n-gram, per slot | 97.90 |",
        "| n-gram, joint (chosen on valid) | 98.20 |",
        "| linear probe of layer 3, joint (chosen on valid) | 98.20 |",
        "| random frozen LM | 50.00 |",
        "- trained: 126,816",
        "- encoder: hubert_base_ls960",
        "python -m spjax.main --config=configs/fsc.py",
    ):
        assert part in text
    for plot in results["plots"].values():
        assert f"({plot})" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {3, 9}  # two tables, none of their rows torn
    assert results["config"] == {"lr": 0.5, "path": "x", "nested": {"sizes": [1, 2]}, "nan": None}


def test_a_bank_has_a_row_per_task(tmp_path):
    baselines = {name: {"chosen": "joint", "variants": {}, "test": x} for name, x in (("ngram", 0.25), ("probe", 0.2))}
    setting = {"prompt length": 24, "learning rate": 0.01}
    bank = [
        report.write_report(
            tmp_path / task.name, task=task, members=[member_of(task, seed) for seed in (0, 1)], baselines=one,
            parameters=counts, setting=setting, tried=tried,
        )
        for task, one, counts, tried in ((FSC, baselines, {"trained": 111456}, 9), (SPOOF, None, None, 1))
    ]  # fmt: skip
    assert report.write_overview(tmp_path, bank) == str(tmp_path / "summary.md")
    _, _, fsc, spoof = (line for line in (tmp_path / "summary.md").read_text().splitlines() if line.startswith("|"))
    head = bank[0]["headline"]
    side = "level" if abs(head["mean"] - 0.25) <= head["half_width_95"] else "above"
    assert [part.strip() for part in fsc.split("|")[1:-1]] == [
        "[fsc](fsc/summary.md)",
        "exact match",
        "prompt length 24, learning rate 0.01 (of 9 tried: [sweep](fsc/sweep.md))",
        "111,456",
        "93.75 ± 0.00",
        f"{100 * head['mean']:.2f} ± {100 * head['half_width_95']:.2f}",
        "40",
        "25.00",
        "20.00",
        f"{100 * head['mean'] - 25:+.2f} ({side})",
    ]
    assert "(lower is better) | prompt length 24, learning rate 0.01 | – | 93.75" in spoof
    assert spoof.endswith("| 40 | – | – | – |")
    assert (
        "\nPrompt length 24, learning rate 0.01 (of 9 tried: [sweep](sweep.md)).\n"
        in (tmp_path / "fsc" / "summary.md").read_text()
    )
    assert "\nPrompt length 24, learning rate 0.01.\n" in (tmp_path / "spoof" / "summary.md").read_text()


def test_confusions_are_counted_over_all_seeds(tmp_path):
    task = Task("t", (Slot("s", ("a", "b", "c")),))
    true, certain = np.array([[0], [0], [1], [2]]), np.eye(3)
    runs = [np.array([[0], [1], [1], [2]]), np.array([[1], [1], [1], [0]])]
    members = [
        outcome.Member(
            seed,
            1,
            0.5,
            [outcome.CurvePoint(1, 1, 0.5)],
            outcome.Predictions(list("wxyz"), true, run, [certain[run[:, 0]]]),
        )
        for seed, run in enumerate(runs)
    ]
    results = report.write_report(tmp_path, task=task, members=members)
    assert results["confusions"]["s"] == [
        {"true": "a", "predicted": "b", "count": 3, "share_of_true": 0.75},
        {"true": "c", "predicted": "a", "count": 1, "share_of_true": 0.5},
    ]
    assert "- a predicted as b: 3 (75.00 % of that label)" in (tmp_path / "summary.md").read_text()


def test_many_classes_and_a_perfect_run(tmp_path):
    results = report.write_report(tmp_path, task=WIDE, members=[member_of(WIDE, 0)])
    image = imread(tmp_path / results["plots"]["speaker"])
    assert max(image.shape) < 3000  # only the most frequent confusions
    results = report.write_report(tmp_path, task=WIDE, members=[member_of(WIDE, 0, noise=0)])
    assert results["headline"]["mean"] == 1
    assert results["confusions"]["speaker"] == []
    assert "speaker: none" in (tmp_path / "summary.md").read_text()


def test_equal_runs_write_equal_bytes(tmp_path):
    for name in "ab":
        report.write_report(tmp_path / name, task=ODD, members=[member_of(ODD, 5)])
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_diverged_curve_is_plotted(tmp_path):
    curve = [outcome.CurvePoint(1, float("nan"), 0.1), outcome.CurvePoint(2, float("inf"), float("nan"))]
    report.write_report(tmp_path, task=ODD, members=[dataclasses.replace(member_of(ODD, 0), curve=curve)])
    assert strict(tmp_path / "results.json")["members"][0]["curve"][1] == {
        "epoch": 2,
        "train_loss": None,
        "valid": None,
    }


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    report.write_report(tmp_path, task=ODD, members=[member_of(ODD, 0)])
    before = (tmp_path / "results.json").read_bytes()

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(report.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        report.write_report(tmp_path, task=ODD, members=[member_of(ODD, 1)])
    assert (tmp_path / "results.json").read_bytes() == before
    assert not list(tmp_path.rglob(".*"))


def test_refuses_members_that_do_not_fit(tmp_path):
    member = member_of(FSC, 7)
    with pytest.raises(ValueError, match="at least one member"):
        report.write_report(tmp_path, task=FSC, members=[])
    with pytest.raises(ValueError, match="share a seed"):
        report.write_report(tmp_path, task=FSC, members=[member, member])
    with pytest.raises(ValueError, match=r"member of seed 7: classes_true"):
        report.write_report(tmp_path, task=TASKS["gsc"], members=[member])
    short = dataclasses.replace(member.predictions, ids=["one"])
    with pytest.raises(ValueError, match="seed 7: 1 ids for 40"):
        report.write_report(tmp_path, task=FSC, members=[dataclasses.replace(member, predictions=short)])
    assert not list(tmp_path.iterdir())


def test_damaged_predictions_name_file_and_line(tmp_path):
    results = report.write_report(tmp_path, task=ODD, members=[member_of(ODD, 0)])
    path = tmp_path / results["members"][0]["predictions"]
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(gzip.compress(b"".join(lines[:2]) + b'{"id": "x"}\n'))
    with pytest.raises(ValueError, match=r"seed_0\.jsonl\.gz, line 3"):
        outcome.read_predictions(path, ODD)
