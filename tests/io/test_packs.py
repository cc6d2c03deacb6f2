"""Prompt packs: round trip bit for bit, bound to one LM, refused if card and tensors do not match."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spjax.io import StorageError, check_pack, load_pack, make_card, save_pack
from spjax.models.config import UnitLMConfig
from spjax.models.low_rank import TARGETS
from spjax.tasks import TASKS, Slot, Task

LM = UnitLMConfig(vocab_size=30, dim=8, layers=2, heads=2, ffn_dim=12)
TASK = Task("toy", (Slot("colour", ("red", "dark blue")), Slot("size", ("none", "small", "large"))), "exact_match")


LORA = {"rank": 2, "alpha": 3.0, "targets": ["query", "ffn_out"]}


def low_rank(lora, seed=0):
    """Leaves of low-rank adapters of LM."""
    rng, sizes = np.random.default_rng(seed), {"ffn_in": (8, 12), "ffn_out": (12, 8)}
    shapes = {}
    for target in lora["targets"]:
        rows, columns = sizes.get(target, (8, 8))
        shapes |= {f"{target}_a": (2, lora["rank"], rows), f"{target}_b": (2, lora["rank"], columns)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def card(learnable=True, task=TASK, **changes):
    classes = np.arange(task.num_classes)[:, None] + 4
    outputs = task.num_classes + 4 if learnable else LM.vocab_size
    kind = "learnable" if learnable else "frequency"
    lora = changes.pop("lora", None)
    made = make_card(
        task, kind=kind, codes=classes, feeds=classes, outputs=outputs, config=LM, lm_hash="abc", lora=lora
    )  # fmt: skip
    return {**made, **changes}


def prompt(learnable=True, seed=0, length=3):
    rng = np.random.default_rng(seed)
    shapes = {"key": (2, length, 8), "value": (2, length, 8), "sep": (1, 8)}
    if learnable:
        shapes["verbalizer"] = (9, 30)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def bits(shape):
    """float32 arrays of any finite bit pattern, with negative zeros and subnormal numbers."""
    return hnp.arrays(np.float32, shape, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


@st.composite
def prompts(draw):
    """(tree, learnable, lora) of every shape a prompt may have."""
    lora = draw(st.none() | st.builds(
        lambda rank, alpha, targets: {"rank": rank, "alpha": alpha, "targets": [t for t in TARGETS if t in targets]},
        st.integers(1, 3), st.floats(0.1, 100) | st.integers(1, 64), st.sets(st.sampled_from(TARGETS), min_size=1),
    ))  # fmt: skip
    length, separators = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    shapes = {"sep": (separators, 8)}
    if lora is None or draw(st.booleans()):
        shapes |= {"input": (length, 8)} if draw(st.booleans()) else dict.fromkeys(("key", "value"), (2, length, 8))
    if draw(st.booleans()):
        shapes["sep_deep"] = (2, separators, 8)
    learnable = draw(st.booleans())
    if learnable:
        shapes["verbalizer"] = (9, 30)
    tree = {name: draw(bits(shape)) for name, shape in shapes.items()}
    return tree | (low_rank(lora, length) if lora else {}), learnable, lora


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=prompts(), text=st.text(max_size=20))
def test_round_trip_bit_for_bit(tmp_path: Path, made, text):
    params, learnable, lora = made
    described = card(learnable, lora=lora, results={"note": text, "accuracy": 0.1 + 0.2}, combinations=[[0, 2], [1, 4]])
    saved = save_pack(tmp_path / "pack", params, described)
    pack = load_pack(tmp_path / "pack")
    assert pack.card == saved.card
    assert pack.card["results"] == {"note": text, "accuracy": 0.1 + 0.2}
    assert pack.card["parameters"] == sum(array.size for array in params.values())
    assert pack.task == TASK
    assert pack.card.get("lora") == lora
    assert pack.card["version"] == (3 if lora else 2), "what has no adapters can be read by a version that knows none"
    assert pack.scale == (lora["alpha"] / lora["rank"] if lora else 1)
    assert pack.params.keys() == params.keys()
    for name, array in pack.params.items():
        assert array.dtype == np.float32
        assert array.tobytes() == params[name].tobytes()
        assert array.shape == params[name].shape


def test_fsc_full_size_counts_126816(tmp_path: Path):
    task, config = TASKS["fsc"], UnitLMConfig()
    codes = np.arange(24)[:, None] + 4
    described = make_card(task, kind="learnable", codes=codes, feeds=codes, outputs=28, config=config, lm_hash="x")
    deep = np.zeros((12, 5, 1024), np.float32)
    params = {
        "key": deep,
        "value": deep,
        "sep": np.zeros((1, 1024), np.float32),
        "verbalizer": np.zeros((28, 104), np.float32),
    }
    pack = save_pack(tmp_path / "pack", params, described)
    assert pack.card["parameters"] == 126_816
    assert sum(p.stat().st_size for p in (tmp_path / "pack").iterdir()) < 600_000


def test_only_its_own_lm_is_accepted(tmp_path: Path):
    pack = save_pack(tmp_path / "pack", prompt(), card())
    check_pack(pack, "abc", LM)
    with pytest.raises(StorageError, match="'toy' was trained with the unit LM of hash abc, this one's is abd"):
        check_pack(pack, "abd", LM)
    with pytest.raises(StorageError, match="of dim 8, this one has dim 16"):
        check_pack(pack, "abc", UnitLMConfig(vocab_size=30, dim=16, layers=2, heads=2, ffn_dim=12))
    with pytest.raises(StorageError, match="of layers 2, heads 2, this one has layers 3, heads 4"):
        check_pack(pack, "abc", UnitLMConfig(vocab_size=30, dim=8, layers=3, heads=4, ffn_dim=12))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"key": np.zeros((3, 3, 8), np.float32)}, r"key has shape \[3, 3, 8\], must be \[2, 3, 8\]"),
        ({"value": np.zeros((2, 4, 8), np.float32)}, r"value has shape \[2, 4, 8\], must be \[2, 3, 8\]"),
        ({"key": np.zeros((1, 2, 3, 8), np.float32)}, "key has shape"),
        ({"sep": np.zeros((1, 9), np.float32)}, r"sep has shape \[1, 9\], must be \[1, 8\]"),
        ({"sep": np.zeros((0, 8), np.float32)}, r"sep has shape \[0, 8\], must be \[1, 8\]"),
        ({"sep_deep": np.zeros((2, 2, 8), np.float32)}, r"sep_deep has shape \[2, 2, 8\], must be \[2, 1, 8\]"),
        ({"sep": np.zeros((1, 8))}, "sep is float64"),
        ({"value": None}, "lacks value"),
        ({"verbalizer": None}, "lacks verbalizer"),
        ({"verbalizer": np.zeros((9, 104), np.float32)}, r"must be \[9, 30\]"),
        ({"input": np.zeros((3, 8), np.float32)}, "has unexpected key, value"),
        ({"bias": np.zeros(3, np.float32)}, "has unexpected bias"),
        (low_rank(LORA), "has unexpected ffn_out_a, ffn_out_b, query_a, query_b"),
    ],
)
def test_prompts_that_do_not_fit_their_card_are_not_saved(tmp_path: Path, params, message):
    tree = {name: array for name, array in {**prompt(), **params}.items() if array is not None}
    with pytest.raises(StorageError, match=message):
        save_pack(tmp_path / "pack", tree, card())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, "rank is 0, must be a positive integer"),
        ({"rank": 2.0}, "lora.rank is 2.0, must be int"),
        ({"rank": True}, "lora.rank is True, must be int"),
        ({"rank": 3}, r"query_a has shape \[2, 2, 8\], must be \[2, 3, 8\]"),
        ({"alpha": 0}, "alpha is 0, must be a positive number"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"alpha": "8"}, "lora.alpha is '8', must be int or float"),
        ({"targets": []}, "must be one or more of query, key"),
        ({"targets": ["ffn_out", "query"]}, "in this order"),
        ({"targets": ["query", "query"]}, "in this order"),
        ({"targets": ["query", 3]}, "in this order"),
        ({"targets": ["query", ["ffn_out"]]}, "in this order"),
        ({"targets": ["query"]}, "has unexpected ffn_out_a, ffn_out_b"),
        ({"targets": ["query", "key", "ffn_out"]}, "lacks key_a, key_b"),
        ({"more": 1}, "must have the fields rank, alpha, targets"),
    ],
)
def test_adapters_that_do_not_fit_their_card_are_not_saved(tmp_path: Path, lora, message):
    with pytest.raises(StorageError, match=message):
        save_pack(tmp_path / "pack", prompt() | low_rank(LORA), card(lora={**LORA, **lora}))


def test_alpha_is_covered_by_the_cards_hash(tmp_path: Path):
    save_pack(tmp_path / "pack", prompt() | low_rank(LORA), card(lora=LORA))
    file = tmp_path / "pack" / "card.json"
    described = json.loads(file.read_text())
    described["lora"]["alpha"] = 4.0
    file.write_text(json.dumps(described))
    with pytest.raises(StorageError, match=r"card\.json was altered"):
        load_pack(tmp_path / "pack")


def _changed(path: str, value):
    def change(described):
        *parents, last = path.split(".")
        node = described
        for parent in parents:
            node = node[int(parent) if parent.isdigit() else parent]
        if value is KeyError:
            del node[last]
        else:
            node[int(last) if last.isdigit() else last] = value

    return change


def test_the_block_of_an_lm_is_in_the_card(tmp_path: Path):
    """An adapter of a gated LM with shared key heads has other shapes than one of GSLM's sizes."""
    block = {"activation": "swiglu", "kv_heads": 1, "ffn_bias": False}
    config = dataclasses.replace(LM, **block)
    lora = {"rank": 2, "alpha": 4.0, "targets": ["key", "ffn_gate"]}
    classes = [[c] for c in range(4, 9)]
    made = make_card(
        TASK, kind="frequency", codes=classes, feeds=classes, outputs=30, config=config, lm_hash="abc", lora=lora
    )  # fmt: skip
    assert made["version"] == 4
    assert made["lm"]["block"] == block
    shapes = {"sep": (1, 8), "key_a": (2, 2, 8), "key_b": (2, 2, 4), "ffn_gate_a": (2, 2, 8)}
    shapes["ffn_gate_b"] = (2, 2, config.ffn_dim)
    tree = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_pack(tmp_path / "pack", tree, made)
    assert load_pack(tmp_path / "pack").card["lm"] == made["lm"]
    assert "kv heads 1, ffn bias False, activation swiglu" in (tmp_path / "pack" / "README.md").read_text()
    with pytest.raises(StorageError, match=r"key_b has shape \[2, 2, 4\], must be \[2, 2, 8\]"):
        save_pack(tmp_path / "x", tree, {**made, "lm": {**made["lm"], "block": {**block, "kv_heads": 2}}})
    for wrong, message in (({"activation": "relu"}, "must be kernels of the LM"), ({"gates": 2}, "block is")):
        with pytest.raises(StorageError, match=message):
            save_pack(tmp_path / "x", tree, {**made, "lm": {**made["lm"], "block": wrong}})


BAD_CARDS = [
    ("version", 9, "version 9, but this spjax reads up to 4"),
    ("format", "spjax-unit-lm", "is a unit LM, not a"),
    ("task", KeyError, "must have the fields"),
    ("metric", 3, "card.metric is 3, must be str"),
    ("merged", "yes", "card.merged is 'yes', must be bool or null"),
    ("layer", True, "card.layer is True"),
    ("slots", [], "slots are named"),
    ("slots.0.labels", ["red", "red"], "twice"),
    ("slots.0.labels", ["red", 3], "must be strings"),
    ("slots.1.labels", ["none"], "5 rows for 3 classes"),
    ("verbalizer.kind", "magic", "'magic'"),
    ("verbalizer.kind", "frequency", "has the 30 outputs of the LM, not 9"),
    ("verbalizer.codes.1", [9], "codes hold 9, outside 0..8"),
    ("verbalizer.codes.1", [4], "'red' and 'dark blue' of slot 'colour' have the same code"),
    ("verbalizer.codes.1", [5, 6], "differ in length"),
    ("verbalizer.feeds.2", [30], "feeds hold 30, outside 0..29"),
    ("verbalizer.feeds", [[4, 4]] * 5, "1 codes but 2 feeds"),
    ("lm.heads", 3, "not a multiple of heads 3"),
    ("lm.hash", "", "hash is empty"),
    ("lm.dim", KeyError, "card.lm must have the fields"),
    ("combinations", [[0, 1]], r"combination \[0, 1\]"),
    ("combinations", [[0]], r"combination \[0\]"),
    ("combinations", [], "null allows all"),
    ("parameters", 7, "card.json was altered"),
    ("hash", "0", "card.json was altered"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_CARDS, ids=[f"{p}={v!r:.20}" for p, v, _ in BAD_CARDS])
def test_cards_that_do_not_fit_are_refused(tmp_path: Path, path, value, message):
    save_pack(tmp_path / "pack", prompt(), card())
    file = tmp_path / "pack" / "card.json"
    described = json.loads(file.read_text())
    _changed(path, value)(described)
    file.write_text(json.dumps(described))
    with pytest.raises(StorageError, match=message) as raised:
        load_pack(tmp_path / "pack")
    assert str(tmp_path / "pack") in str(raised.value)
    if path not in ("parameters", "hash", "version", "format"):
        with pytest.raises(StorageError, match=message):
            save_pack(tmp_path / "again", prompt(), described)


def test_labels_of_different_slots_may_have_equal_codes(tmp_path: Path):
    described = copy.deepcopy(card(learnable=False))
    described["verbalizer"]["codes"][2] = described["verbalizer"]["codes"][0]
    save_pack(tmp_path / "pack", prompt(learnable=False), described)
    assert load_pack(tmp_path / "pack").card["verbalizer"]["codes"][2] == [4]


def test_truncated_and_altered_packs_are_refused(tmp_path: Path):
    save_pack(tmp_path / "pack", prompt(), card())
    file = tmp_path / "pack" / "prompt.safetensors"
    content = file.read_bytes()
    for length in (0, 7, 60, len(content) - 4):
        file.write_bytes(content[:length])
        with pytest.raises(StorageError, match=r"prompt\.safetensors is truncated or damaged"):
            load_pack(tmp_path / "pack")
    file.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(StorageError, match="one of the two was altered"):
        load_pack(tmp_path / "pack")
    with pytest.raises(StorageError, match="does not exist"):
        load_pack(tmp_path / "absent")


def test_arrays_from_jax_are_saved(tmp_path: Path):
    import jax.numpy as jnp

    params = {name: jnp.asarray(array) for name, array in prompt().items()}
    pack = save_pack(tmp_path / "pack", params, card())
    assert all(isinstance(array, np.ndarray) for array in pack.params.values())
    np.testing.assert_array_equal(load_pack(tmp_path / "pack").params["key"], prompt()["key"])
