"""Comparison of methods: resumable runs, and one table of cost and scores."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import adapters, defaults
from spjax import jobs
from spjax.config import parse
from spjax.evaluation import method_table
from spjax.io import packs
from spjax.jobs import methods, prompting
from spjax.models import verbalizers
from spjax.models.config import UnitLMConfig
from spjax.models.prompts import init_member
from tests import toy
from tests.conftest import Place

pytestmark = pytest.mark.usefixtures("quick_compile")
KEY = jax.random.key(0)
METHODS = {
    "adapters": {"prompt": {"length": 0, "rank": 2}},
    "whole": {"train": {"trainable": ".*"}, "optim": {"lr": 1e-3}},
}


def _config(place: Place, **settings: Any) -> ConfigDict:
    config = defaults.prompt_tuning("")
    config.job = "methods"
    config.tasks = ConfigDict(
        {
            "fsc": {"data": str(place.folder / "runs/units/fsc"), "lm": str(place.folder / "lm")},
            "gsc": {"data": str(place.folder / "nowhere"), "lm": str(place.folder / "lm")},
            "intents": {"data": str(place.folder / "runs/units/gsc"), "lm": "absent"},
        }
    )
    config.methods = ConfigDict(METHODS)
    config.task, config.method = "fsc,gsc,intents", ",".join(METHODS)
    small = {
        "compute.dtype": "float32", "train.seeds": (0,), "train.epochs": 2, "train.buckets": 1, "train.max_rows": 8,
        "prompt.length": 4, "prompt.rank": 0, "prompt.separators": 2, "prompt.steer": True,
    }  # fmt: skip
    config.update_from_flattened_dict(small | {name.replace("__", "."): value for name, value in settings.items()})
    return config


@pytest.fixture(scope="module")
def compared(place: Place, tmp_path_factory: pytest.TempPathFactory, quick_compile: None) -> Path:
    """Workdir of both methods on three tasks, two of which lack units or LM."""
    workdir = tmp_path_factory.mktemp("methods")
    jobs.run(parse(_config(place)), str(workdir), None, "a command")
    return workdir


def _rows(workdir: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads((workdir / "methods.json").read_text())["rows"]
    return {(row["task"], row["method"]): row for row in rows}


def test_the_table_is_read_from_the_runs(compared: Path) -> None:
    rows = _rows(compared)
    for method in METHODS:
        row = rows["fsc", method]
        results = json.loads((compared / "fsc" / method / "seed_0/results.json").read_text())
        assert row["test"] == results["headline"]["mean"]
        assert row["over_utterances"][0] <= row["test"] <= row["over_utterances"][1]
        assert row["trained"] == results["parameters"]["trained"]
        assert (row["seeds"], row["epochs"], row["most_epochs"]) == ([0], [2], [2])
        assert row["step_seconds"] > 0
        assert results["command"] == "a command"
        assert bool(results["baselines"]) == (method == "adapters"), "the first run makes them"
    pack = compared / "fsc/adapters/seed_0/packs/seed_0"
    assert rows["fsc", "adapters"]["stored_bytes"] == sum(file.stat().st_size for file in pack.iterdir())
    assert packs.load_pack(pack).card["parameters"] == rows["fsc", "adapters"]["trained"]
    whole = rows["fsc", "whole"]
    assert whole["whole_lm"]
    assert whole["stored_bytes"] == 4 * whole["trained"]
    # Gradient and two moments of every weight of the LM.
    assert whole["step_bytes"] > rows["fsc", "adapters"]["step_bytes"] + 2 * 4 * (whole["trained"] - 10_000)
    for name in ("n-gram", "linear probe"):
        assert 0 < rows["fsc", name]["test"] <= 1
        assert rows["fsc", name]["trained"] > 0


def test_a_task_that_lacks_something_is_named(compared: Path) -> None:
    rows, page = _rows(compared), (compared / "summary.md").read_text()
    assert rows["gsc", "all"]["absent"] == "missing: no unit records"
    assert rows["intents", "all"]["absent"] == "missing: no unit LM"
    assert "| gsc | all | – | – | – | – | – | missing: no unit records | – | – | – |" in page
    assert "- **fsc**: exact match on 24 test utterances; LM `" in page
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert widths == {12}


def test_finished_runs_are_kept_and_others_are_added(
    place: Place, compared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _rows(compared)
    run, done = prompting.run_prompt_tuning, []

    def counted(config: ConfigDict, workdir: str, *rest: Any) -> Any:
        done.append(Path(workdir).relative_to(compared).as_posix())
        return run(config, workdir, *rest)

    monkeypatch.setattr(prompting, "run_prompt_tuning", counted)
    jobs.run(parse(_config(place, task="fsc", method="adapters", train__seeds=(0, 1))), str(compared), None, "")
    assert done == ["fsc/adapters/seed_1"]
    assert "fsc, adapters, seed 0: finished" in capsys.readouterr().out
    after = _rows(compared)
    found = [json.loads((compared / f"fsc/adapters/seed_{n}/results.json").read_text()) for n in (0, 1)]
    row, scores = after["fsc", "adapters"], [one["headline"]["mean"] for one in found]
    assert (row["seeds"], row["test"]) == ([0, 1], pytest.approx(sum(scores) / 2))
    assert row["half_width_95"] == pytest.approx(
        12.706 * abs(scores[0] - scores[1]) / 2, rel=1e-3
    )  # t quantile of 1 degree of freedom
    assert [bool(one["baselines"]) for one in found] == [True, False]
    assert after["fsc", "whole"] == before["fsc", "whole"], "what was not chosen stays in the table"
    assert after["gsc", "all"]["absent"] == "not run"
    with pytest.raises(ValueError, match=r"seed_0 holds a run with train\.epochs=2 \(now 3\)"):
        jobs.run(parse(_config(place, task="fsc", train__epochs=3)), str(compared), None, "")


def test_runs_of_different_lms_are_refused(compared: Path, tmp_path: Path) -> None:
    for seed, lm in enumerate(("a", "b")):
        place = tmp_path / "fsc/adapters" / f"seed_{seed}"
        place.mkdir(parents=True)
        results = json.loads((compared / "fsc/adapters/seed_0/results.json").read_text())
        results["provenance"]["lm_hash"] = lm
        (place / "results.json").write_text(json.dumps(results))
    runs = {"fsc": {"adapters": method_table.finished_runs(tmp_path / "fsc/adapters")}}
    with pytest.raises(ValueError, match=r"seed_1 has another LM than .*seed_0: remove one"):
        method_table.write(tmp_path, runs, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "fsc,fsc"}, "task is 'fsc,fsc', must be one or more of fsc, gsc, intents"),
        ({"method": "lora"}, "method is 'lora', must be one or more of adapters, whole"),
        ({"methods": ConfigDict({"adapters": {"prompt": {"depth": 1}}, "whole": {}})}, "methods.adapters: .*depth"),
        ({"prompt__dropout": 2.0}, "adapters on fsc: prompt: dropout is 2.0"),
    ],
)
def test_invalid_settings_are_refused_before_anything_runs(
    place: Place, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse(_config(place, **settings))


def test_only_chosen_runs_are_parsed(place: Place) -> None:
    config = _config(place, task="fsc", method="adapters")
    config.tasks.gsc.train = ConfigDict({"epochs": -1})
    config.methods.whole = ConfigDict({"prompt": {"depth": 1}})
    assert [*parse(config).runs["fsc"]] == ["adapters"]


RANK = "--config.prompt.rank has no effect, as all chosen methods have their own prompt.rank: give --config.methods."


@pytest.mark.parametrize(
    ("task", "method", "overrides", "message"),
    [
        ("fsc", "lora", "prompt.rank", f"{RANK}lora.prompt.rank"),
        ("fsc", "speechprompt,lora", "prompt.rank", f"{RANK}lora.prompt.rank"),
        ("fsc", "speechprompt", "prompt.rank", "all chosen methods have their own prompt.rank: leave it out"),
        ("fsc,gsc", "lora", "train.epochs", "give --config.tasks.fsc.train.epochs and --config.tasks.gsc.train.epochs"),
        ("fsc", "lora", "tasks.gsc.lm", "--config.tasks.gsc.lm has no effect: choose gsc too by --config.task=fsc,gsc"),
        ("fsc", "lora", "methods.prompts.optim.lr", "choose prompts too by --config.method=lora,prompts"),
        ("fsc", "lora", "task method train.seeds prompt.dropout tasks.fsc.lm methods.lora.prompt.rank", ""),
        ("fsc", "finetune,lora", "train.trainable", ""),
    ],
)
def test_an_override_without_effect_is_refused(task: str, method: str, overrides: str, message: str) -> None:
    config = adapters.get_config()
    config.task, config.method = task, method
    refused = pytest.raises(ValueError, match=re.escape(message)) if message else contextlib.nullcontext()
    with refused:
        methods.refuse_overrides_without_effect(config, overrides.split())


def test_a_workdir_has_one_job(place: Place, compared: Path) -> None:
    job = _config(place, task="fsc").tasks.fsc
    prompt = defaults.prompt_tuning("fsc")
    prompt.update(job)
    with pytest.raises(ValueError, match=r"job='methods' \(now 'prompt'\)"):
        jobs.run(parse(prompt), str(compared), None, "")


def test_every_method_has_few_parameters() -> None:
    """All but fine-tuning train less than 0.15 M parameters with the LM sizes of our configs."""
    config = adapters.get_config()
    lm = UnitLMConfig(**config.pretraining.lm.to_dict())
    none = np.zeros((0, 2), np.int32)
    verbalizer = verbalizers.make("learnable", toy.TASK, lm.vocab_size, units=none[:, 0], classes=none)
    embed = jnp.zeros((lm.vocab_size, lm.dim))
    for method in set(config.methods) - {"finetune"}:
        prompt = methods.run_of(parse(config), "fsc", method, 0).prompt
        shapes = jax.eval_shape(lambda key, prompt=prompt: init_member(key, prompt, lm, verbalizer, embed), KEY)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 150_000, method
