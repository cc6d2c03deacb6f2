"""Hashes of cards: fields that affect predictions are covered in every directory; others may be edited."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spjax.io import (
    StorageError,
    files,
    load_kmeans,
    load_pack,
    make_card,
    read_encoder,
    read_unit_lm,
    save_encoder,
    save_kmeans,
    save_pack,
    save_unit_lm,
)
from spjax.io.banks import load_bank, save_bank
from spjax.io.kmeans_store import KMeans
from spjax.models.config import ProsodyConfig, UnitLMConfig
from spjax.packs import main
from spjax.tasks import Slot, Task
from tests.encoders import whisper_models
from tests.encoders.hubert_models import TINY, weights

LM = UnitLMConfig(vocab_size=30, dim=8, layers=2, heads=2, ffn_dim=12)
TASK = Task("toy", (Slot("colour", ("red", "blue")), Slot("size", ("none", "small", "large"))), "exact_match")


def _pack(place: Path, seed: int = 0, task: Task = TASK) -> None:
    codes = np.arange(task.num_classes)[:, None] + 4
    card = make_card(
        task,
        kind="frequency",
        codes=codes,
        feeds=codes,
        outputs=30,
        config=LM,
        lm_hash="abc",
        encoder="h",
        layer=6,
        kmeans="k",
        merged=True,
        combinations=[[0, 2], [1, 3]],
    )
    rng = np.random.default_rng(seed)
    shapes = {"key": (2, 3, 8), "value": (2, 3, 8), "sep": (1, 8)}
    save_pack(place, {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}, card)


def _bank(place: Path) -> None:
    for seed in range(2):
        _pack(place.with_name(f"member{seed}"), seed)
    save_bank(place, {f"m{seed}": load_pack(place.with_name(f"member{seed}")) for seed in range(2)})


def _lm(place: Path, prosody: ProsodyConfig | None = None) -> None:
    config = UnitLMConfig(vocab_size=20, dim=8, layers=2, heads=2, ffn_dim=12, prosody=prosody)
    shapes = config.shapes
    save_unit_lm(place, config, files.unflatten({name: np.ones(shape, np.float32) for name, shape in shapes.items()}))


def _streams(place: Path) -> None:
    _lm(place, ProsodyConfig(f0_edges=(0.0, 0.5)))


def _hubert(place: Path) -> None:
    save_encoder(place, TINY, weights(), "tiny", {"source": "mine"})


def _whisper(place: Path) -> None:
    save_encoder(place, whisper_models.TINY, whisper_models.weights(), "tiny", {"source": "mine"})


def _kmeans(place: Path) -> None:
    card = {"encoder": "tiny", "layer": 2, "fitted_on": {}, "provenance": {}}
    save_kmeans(place, KMeans(np.arange(6, dtype=np.float32).reshape(3, 2), card))


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], str]] = {
    "pack": (_pack, load_pack, "card.json"),
    "bank": (_bank, load_bank, "bank.json"),
    "lm": (_lm, read_unit_lm, "config.json"),
    "streams": (_streams, read_unit_lm, "config.json"),
    "hubert": (_hubert, read_encoder, "config.json"),
    "whisper": (_whisper, read_encoder, "config.json"),
    "kmeans": (_kmeans, load_kmeans, "card.json"),
}


def swap(values: list[Any]) -> None:
    values[0], values[1] = values[1], values[0]


def member(change: Callable[[Any], object]) -> Callable[[Any], object]:
    return lambda card: change(card["members"][0]["card"])


DECIDES = [
    ("pack", lambda c: swap(c["slots"][0]["labels"])),
    ("pack", lambda c: c["slots"][1]["labels"].__setitem__(0, "nothing")),
    ("pack", lambda c: c["slots"][0].update(name="color")),
    ("pack", lambda c: swap(c["verbalizer"]["codes"])),
    ("pack", lambda c: swap(c["verbalizer"]["feeds"])),
    ("pack", lambda c: c["verbalizer"].update(kind="random")),
    ("pack", lambda c: c.update(combinations=None)),
    ("pack", lambda c: c["combinations"].pop()),
    ("pack", lambda c: c["lm"].update(hash="abd")),
    ("pack", lambda c: c["lm"].update(heads=4)),
    ("pack", lambda c: c.update(encoder="other")),
    ("pack", lambda c: c.update(layer=7)),
    ("pack", lambda c: c.update(kmeans="l")),
    ("pack", lambda c: c.update(merged=False)),
    ("pack", lambda c: c.update(card_hash="0" * 64)),
    ("bank", member(lambda c: swap(c["slots"][0]["labels"]))),
    ("bank", member(lambda c: c.update(combinations=None))),
    ("bank", lambda c: swap(c["members"])),
    ("lm", lambda c: c.update(heads=4)),
    ("streams", lambda c: c.update(heads=4)),
    ("hubert", lambda c: c.update(heads=4)),
    ("hubert", lambda c: c.update(name="other")),
    ("hubert", lambda c: c["conv_strides"].__setitem__(0, 4)),
    ("whisper", lambda c: c.update(heads=4)),
    ("whisper", lambda c: c.update(name="other")),
    ("kmeans", lambda c: c.update(encoder="other")),
    ("kmeans", lambda c: c.update(layer=3)),
    ("kmeans", lambda c: c.update(layer=None)),
]


@pytest.mark.parametrize(("kind", "change"), DECIDES)
def test_edits_that_affect_predictions_are_refused(tmp_path: Path, kind: str, change):
    make, load, name = KINDS[kind]
    make(tmp_path / "x")
    card = json.loads((tmp_path / "x" / name).read_text())
    before = copy.deepcopy(card)
    change(card)
    assert card != before
    (tmp_path / "x" / name).write_text(json.dumps(card))
    with pytest.raises(StorageError, match=rf"{name}.* (was altered|one of the two was altered)") as raised:
        load(tmp_path / "x")
    assert str(tmp_path / "x") in str(raised.value)
    with pytest.raises(SystemExit, match="altered"):  # `refresh` does not accept the edit
        main(["refresh", str(tmp_path / "x")])


FREE = [
    (
        "pack",
        {"results": {"test": {"headline": 1.0}}, "provenance": {"by": "me"}, "task": "mine", "metric": "accuracy"},
    ),
    ("pack", {"licence": "cc-by-4.0", "description": "for a robot"}),
    ("lm", {"provenance": {"source": "elsewhere"}}),
    ("streams", {"provenance": {}}),
    ("hubert", {"provenance": {}}),
    ("kmeans", {"provenance": {"a": 1}, "fitted_on": {"corpus": "x"}}),
]


@pytest.mark.parametrize(("kind", "changes"), FREE)
def test_other_fields_may_be_edited(tmp_path: Path, kind: str, changes: dict[str, Any]):
    make, load, name = KINDS[kind]
    make(tmp_path / "x")
    card = json.loads((tmp_path / "x" / name).read_text())
    (tmp_path / "x" / name).write_text(json.dumps({**card, **changes}))
    load(tmp_path / "x")


def age(path: Path) -> None:
    """Makes a card as an older release wrote it."""
    card = json.loads(path.read_text())
    del card["card_hash"]
    card["version"] = 2 if "prosody" in card else 1
    for one in card.get("members", ()):
        del one["card"]["card_hash"]
        one["card"]["version"] = 1
    path.write_text(json.dumps(card))


@pytest.mark.parametrize("kind", KINDS)
def test_older_cards_load_with_one_warning_and_are_refreshed(tmp_path: Path, kind: str, caplog, capsys):
    make, load, name = KINDS[kind]
    make(tmp_path / "x")
    written = json.loads((tmp_path / "x" / name).read_text())
    age(tmp_path / "x" / name)
    load(tmp_path / "x")
    load(tmp_path / "x")
    (note,) = caplog.messages
    main(note.partition("spjax.packs ")[2].partition("`")[0].split())  # the command in the warning
    assert json.loads((tmp_path / "x" / name).read_text()) == written
    caplog.clear()
    load(tmp_path / "x")
    assert not caplog.records


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_without_its_hash_is_refused(tmp_path: Path, kind: str):
    make, load, name = KINDS[kind]
    make(tmp_path / "x")
    path = tmp_path / "x" / name
    card = json.loads(path.read_text())
    del card["card_hash"]
    path.write_text(json.dumps(card))
    with pytest.raises(StorageError, match="card_hash"):
        load(tmp_path / "x")


def test_old_packs_get_their_hash_on_their_way_through_a_bank(tmp_path: Path):
    _pack(tmp_path / "old")
    written = json.loads((tmp_path / "old" / "card.json").read_text())
    age(tmp_path / "old" / "card.json")
    main(["merge", f"a={tmp_path / 'old'}", "--out", str(tmp_path / "bank")])
    main(["split", str(tmp_path / "bank"), "--out", str(tmp_path / "split")])
    assert json.loads((tmp_path / "split" / "a" / "card.json").read_text()) == written


@pytest.mark.parametrize("kind", ["lm", "hubert"])
@pytest.mark.parametrize("layers", [10**9, 10**18, -1, 0, True, 2.0, "2", None])
def test_absurd_sizes_are_refused(tmp_path: Path, kind: str, layers: Any):
    make, load, name = KINDS[kind]
    make(tmp_path / "x")
    card = json.loads((tmp_path / "x" / name).read_text())
    (tmp_path / "x" / name).write_text(json.dumps({**card, "layers": layers}))
    with pytest.raises(StorageError, match="layer"):
        load(tmp_path / "x")


LABELS = [
    (["red", "red "], "look alike"),
    (["red", "re\u200bd"], "look alike"),
    (["caf\u00e9", "cafe\u0301"], "look alike"),
    (["red", ""], "has a blank label"),
    (["red", " "], "has a blank label"),
    (["red", "x" * 1_000_000], "label of 1000000 characters"),
]


@pytest.mark.parametrize(("labels", "message"), LABELS, ids=range(len(LABELS)))
def test_labels_that_cannot_be_told_apart_are_refused(tmp_path: Path, labels: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        Slot("colour", tuple(labels))
    _pack(tmp_path / "pack")
    path = tmp_path / "pack" / "card.json"
    card = json.loads(path.read_text())
    card["slots"][0]["labels"] = labels
    path.write_text(json.dumps(card))
    with pytest.raises(StorageError, match=message) as raised:
        load_pack(tmp_path / "pack")
    assert len(str(raised.value)) < 1000


def test_similar_labels_are_accepted(tmp_path: Path):
    _pack(
        tmp_path / "pack", task=Task("t", (Slot("a", ("Red", "red")), Slot("b", ("none", "n\u00f6ne"))), "exact_match")
    )
    assert load_pack(tmp_path / "pack").task.slots[0].labels == ("Red", "red")


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every part of a card, to the first two of equal parts."""
    yield path
    inner = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value[:2]))
        if isinstance(value, list)
        else []
    )
    for key, part in inner:
        yield from paths(part, (*path, key))


@pytest.mark.parametrize("kind", KINDS)
def test_any_invalid_value_in_a_card_is_refused_with_a_message(tmp_path: Path, kind: str):
    make, load, name = KINDS[kind]
    make(tmp_path / "x")
    card = json.loads((tmp_path / "x" / name).read_text())
    for path in paths(card):
        if not path or path[-1] == "task" or {"provenance", "results", "fitted_on"} & set(path):
            continue
        for value in (None, -1, 10**18, "x" * 100_000, "\ud800", [[[]]], {"a": 1}):
            changed = copy.deepcopy(card)
            part = changed
            for key in path[:-1]:
                part = part[key]
            if part[path[-1]] == value:
                continue
            part[path[-1]] = value
            (tmp_path / "x" / name).write_text(json.dumps(changed))
            with pytest.raises(StorageError) as raised:
                load(tmp_path / "x")
            assert len(str(raised.value)) < 2000


BAD_JSON = [
    (lambda text: text.replace('"layer": 6', '"layer": NaN'), "holds NaN"),
    (lambda text: text.replace('"layer": 6', '"layer": -Infinity'), "holds -Infinity"),
    (lambda text: text.replace('"layer": 6', '"layer": 6, "layer": 6'), "the key 'layer' occurs twice"),
    (lambda text: "[" * 100_000, "nested too deep|Expecting value"),
    (lambda text: "", "Expecting value"),
    (lambda text: "\x00" * 20, "Expecting value"),
    (lambda text: text.replace('"layer": 6', '"layer": ' + "9" * 5000), "is not valid JSON"),
]


@pytest.mark.parametrize(("change", "message"), BAD_JSON, ids=range(len(BAD_JSON)))
def test_invalid_json_is_refused(tmp_path: Path, change, message: str):
    _pack(tmp_path / "pack")
    path = tmp_path / "pack" / "card.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(StorageError, match=message):
        load_pack(tmp_path / "pack")


def test_a_card_with_a_byte_order_mark_is_read(tmp_path: Path):
    _pack(tmp_path / "pack")
    path = tmp_path / "pack" / "card.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_pack(tmp_path / "pack").task == TASK
