"""A pack's README.md: valid YAML front matter, valid tables, and a working example."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, reject
from hypothesis import strategies as st

from spjax.io import StorageError, load_pack, make_card, save_pack, save_unit_lm
from spjax.io.pack_readme import with_licence
from spjax.io.packs import PromptPack, readme
from spjax.models.config import UnitLMConfig
from spjax.packs import describe
from spjax.tasks import Slot, Task
from tests import toy

PACK = Path(__file__).parent / "pack_version_1"


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_pack_has_a_readme(tmp_path: Path):
    load_pack(PACK).save(tmp_path / "pack")
    assert {path.name for path in (tmp_path / "pack").iterdir()} == {"card.json", "prompt.safetensors", "README.md"}
    text = (tmp_path / "pack" / "README.md").read_text(encoding="utf-8")
    found = front(text)
    assert (found["library_name"], found["pipeline_tag"]) == ("spjax", "audio-classification")
    assert {"spjax", "speech-units", "prompt-tuning"} <= set(found["tags"])
    assert found["metrics"] == ["exact_match"]
    assert "license" not in found
    (result,) = found["model-index"][0]["results"]
    assert result["dataset"] == {"name": "toy", "type": "toy", "split": "test"}
    assert result["metrics"] == [{"type": "exact_match", "name": "exact match", "value": 0.875}]
    for line in (
        "| colour | red, dark blue | 2 |",
        "| unit LM (hash) | abc |",
        "| unit LM (sizes) | vocab size 30, dim 8, layers 2, heads 2, ffn dim 12 |",
        "| speech encoder | hubert_base_ls960 |",
        "| k-means (id) | 0123456789ab |",
        "| metric | test split |",
        "| exact match | 87.50 % |",
        "| accuracy | 93.75 % |",
        "Allowed combinations of labels: the 2 of the training data.",
    ):
        assert line in text.splitlines(), line
    assert "2 virtual positions in every layer, 1 separator," in text


def test_low_rank_adapters_are_named():
    pack = load_pack(PACK)
    lora = {"rank": 4, "alpha": 8.0, "targets": ["query", "value"]}
    both = readme(PromptPack(pack.params, {**pack.card, "lora": lora}))
    assert "2 virtual positions in every layer, low-rank adapters of query, value (rank 4, alpha 8), 1 sep" in both
    assert "lora" in front(both)["tags"]
    alone = {name: leaf for name, leaf in pack.params.items() if name not in ("key", "value")}
    text = readme(PromptPack(alone, {**pack.card, "lora": lora}))
    assert "(spjax): low-rank adapters of query, value (rank 4, alpha 8), 1 separator" in text
    assert "A trained adapter of" in text


def test_only_recorded_results_are_listed():
    pack = load_pack(PACK)
    card = {
        **pack.card,
        "results": {"valid": {"headline": 0.5, "exact_match": 0.5}, "test": {"eer": 0.25}, "note": "x"},
    }
    text = readme(PromptPack(pack.params, card))
    assert "| metric | valid split | test split |" in text
    assert "| exact match | 50.00 % | – |" in text
    assert "| EER | – | 25.00 % |" in text
    assert [r["dataset"]["split"] for r in front(text)["model-index"][0]["results"]] == ["valid"]
    bare = {**card, "results": {}, "encoder": None, "layer": None, "kmeans": None, "merged": None, "combinations": None}
    text = readme(PromptPack(pack.params, bare))
    assert "model-index" not in front(text)
    assert "None are recorded" in text
    assert "| k-means (id) | unknown |" in text
    assert "combinations of labels: all." in text


def test_a_score_has_its_interval_and_baselines(tmp_path: Path):
    results = {
        "valid": {"headline": 0.5},
        "test": {"headline": 0.75, "exact_match": 0.75, "interval_95": [0.5, 1.0]},
        "baselines": {"ngram": {"valid": 0.25, "test": 0.5}, "probe": {"test": 0.625}},
    }
    old = load_pack(PACK)
    pack = PromptPack(old.params, {**old.card, "results": results}).save(tmp_path / "pack")
    assert load_pack(tmp_path / "pack").card["results"] == results
    for line in (
        "| metric | valid split | test split |",
        "| exact match | – | 75.00 % |",
        "| exact match, 95 % interval over utterances | – | 50.00 to 100.00 % |",
        "| exact match of the n-gram baseline | 25.00 % | 50.00 % |",
        "| exact match of the linear probe baseline | – | 62.50 % |",
    ):
        assert line in readme(pack).splitlines(), line
    assert f"of {pack.card['parameters']} parameters" in readme(pack)
    found = "valid 50.00 %, test 75.00 % (50.00 to 100.00), n-gram valid 25.00 %, n-gram test 50.00 %"
    assert f"results  exact match: {found}" in describe("p", pack)
    assert "results  exact match: test 87.50 %\n" in describe("old", old), "of an older spjax, which says none of it"


@pytest.mark.parametrize("odd", [[], "x", {"ngram": {"test": "high"}}, {"ngram": None}])
def test_invalid_baselines_are_left_out(odd: object):
    pack = load_pack(PACK)
    results = {**pack.card["results"], "baselines": odd}
    assert "baseline" not in readme(PromptPack(pack.params, {**pack.card, "results": results}))


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(name=words, labels=st.lists(words, min_size=1, max_size=4, unique=True), slot=words, split=words)
def test_any_text_gives_valid_front_matter_and_tables(name, labels, slot, split):
    try:
        task = Task(name, (Slot(slot, tuple(labels)),))
    except ValueError:  # blank labels, and some that look alike, are refused
        reject()
    codes = np.arange(len(labels))[:, None] + 4
    card = make_card(
        task, kind="learnable", codes=codes, feeds=codes, outputs=len(labels) + 4, config=toy.LM, lm_hash="h",
        results={split: {"headline": 0.5}},
    )  # fmt: skip
    text = readme(PromptPack({"input": np.zeros((3, 32), np.float32), "sep": np.zeros((2, 32), np.float32)}, card))
    (result,) = front(text)["model-index"][0]["results"]
    assert result["dataset"] == {"name": name, "type": name, "split": split}
    table = text.split("## Labels\n\n")[1].split("\n\n")[0].split("\n")
    assert [len(re.findall(r"(?<!\\)\|", line.replace("\\\\", ""))) for line in table] == [4, 4, 4]
    assert "3 virtual positions at the input, 2 separators," in text


def test_many_labels_are_counted_not_listed(tmp_path: Path):
    task = Task("speakers", (Slot("speaker", tuple(f"id{n}" for n in range(1251))),))
    units = np.arange(1251)
    codes = np.stack([units % 100, units // 100], axis=1) + 4
    card = make_card(task, kind="random", codes=codes, feeds=codes, outputs=104, config=toy.LM, lm_hash="h")
    text = readme(PromptPack({"input": np.zeros((3, 32), np.float32), "sep": np.zeros((1, 32), np.float32)}, card))
    assert "id59 … and 1,191 more (`card.json`) | 1251 |" in text
    assert len(text) < 6000


@pytest.mark.usefixtures("quick_compile")
def test_its_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    config = UnitLMConfig(vocab_size=20, dim=8, layers=2, heads=2, ffn_dim=12)
    identity = save_unit_lm(tmp_path / "lm", config, toy.tiny_lm(config=config))
    task = Task("one", (Slot("word", ("yes", "no")),))
    card = make_card(
        task, kind="identity", codes=[[4], [5]], feeds=[[4], [5]], outputs=20, config=config, lm_hash=identity
    )
    save_pack(tmp_path / "pack", {"input": np.ones((3, 8), np.float32), "sep": np.ones((1, 8), np.float32)}, card)
    monkeypatch.chdir(tmp_path)
    text = (tmp_path / "pack" / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    exec(compile(example, "README.md", "exec"), {})
    assert "'labels': {'word': " in capsys.readouterr().out


def test_the_licence_is_set_by_its_author():
    text = readme(load_pack(PACK))
    mit = with_licence(text, "mit")
    assert front(mit) == {**front(text), "license": "mit"}
    assert "# license" not in mit.split("---\n")[1]
    assert front(with_licence(mit, "cc-by-nc-4.0"))["license"] == "cc-by-nc-4.0"
    assert mit.split("---\n", 2)[2] == text.split("---\n", 2)[2]
    with pytest.raises(StorageError, match="is not a licence identifier such as"):
        with_licence(text, "mit\ntags: [x]")
    with pytest.raises(StorageError, match="no front matter"):
        with_licence("# Hello\n", "mit")
