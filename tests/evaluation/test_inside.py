"""Verbalizer weights, similarities and attributions against known or independently computed results."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from spjax.data.unit_set import UnitSet
from spjax.data.write_records import Utterance, write_unit_records
from spjax.evaluation import inside, inside_plots
from spjax.inside import main
from spjax.io import make_card, save_pack, save_unit_lm, unit_lm_hash
from spjax.io.banks import save_bank
from spjax.io.packs import PromptPack
from spjax.models import verbalizers
from spjax.models.config import ProsodyConfig, UnitLMConfig
from spjax.models.prompts import PromptConfig, member
from spjax.tasks import Slot, Task
from spjax.types import Params
from tests.models import tiny

TASK = Task("two", (Slot("do", ("go", "stop", "turn")), Slot("where", ("in", "out"))))
LM = tiny.config(2)  # 20 units, D = 16, 2 layers
PNG = b"\x89PNG\r\n"

pytestmark = pytest.mark.usefixtures("quick_compile")


def pack(
    task: Task = TASK, kind: str = "learnable", length: int = 3, seed: int = 0, c: UnitLMConfig = LM
) -> PromptPack:
    """A random prompt, not saved."""
    verbalizer = verbalizers.make(kind, task, c.vocab_size, units=np.arange(6), classes=np.asarray([[0]]))
    params = member(tiny.bank(c, PromptConfig(length=length), verbalizer, 1, seed), 0)
    card = make_card(
        task, kind=kind, codes=verbalizer.codes, feeds=verbalizer.fed_back, outputs=verbalizer.outputs, config=c,
        lm_hash=unit_lm_hash(jax.device_get(tiny.lm(c)), c.prosody),
    )  # fmt: skip
    return PromptPack(params, card)


def with_params(made: PromptPack, **changed: np.ndarray) -> PromptPack:
    return dataclasses.replace(made, params={**made.params, **changed})


def utterance(units) -> UnitSet:
    return UnitSet.of([units], np.zeros((1, 1)))


# Verbalizers


def test_a_verbalizer_that_copies_a_unit_has_its_weight():
    matrix = np.zeros((TASK.num_classes + 4, LM.vocab_size), np.float32)
    units = [7, 0, 19, 3, 3]
    for c, unit in enumerate(units):
        matrix[4 + c, 4 + unit] = 1
    matrix += np.linspace(-1, 1, LM.vocab_size, dtype=np.float32)  # common to all labels, so without effect
    weights = inside.verbalizer_weights(with_params(pack(), verbalizer=matrix))
    assert weights.shape == (5, LM.vocab_size)
    top = inside.top_tokens(weights, 3)
    assert [found[0][0] for found in top[:3]] == [4 + unit for unit in units[:3]]
    np.testing.assert_allclose([found[0][1] for found in top[:3]], 2 / 3, atol=1e-6)
    np.testing.assert_allclose(
        weights[3:], 0, atol=1e-6
    )  # both labels of the slot copy unit 3, which does not separate them
    assert [inside.symbol(token) for token in (0, 2, 4, 23)] == ["<s>", "</s>", "0", "19"]


def test_a_fixed_verbalizer_has_the_weights_of_its_code():
    made = pack(kind="identity")
    weights = inside.verbalizer_weights(made)
    assert np.argwhere(weights).tolist() == [[c, 4 + c] for c in range(5)]
    assert inside.top_tokens(weights) == [[(4 + c, 1.0)] for c in range(5)]
    many = Task("many", (Slot("s", tuple(map(str, range(30)))),))
    one_hot = inside.verbalizer_weights(pack(many, kind="identity"))
    assert set(one_hot.sum(axis=1)) <= {1.0, 2.0}
    assert one_hot[29, 4 + 9] == one_hot[29, 4 + 1] == 1  # 29 = 9 + 1 · 20, with 20 units


def test_subtracting_the_mean_of_a_slot_changes_no_prediction():
    made = pack()
    logits = np.random.default_rng(0).normal(size=LM.vocab_size)
    raw, centred = made.params["verbalizer"][4:] @ logits, inside.verbalizer_weights(made) @ logits
    for slot in (slice(0, 3), slice(3, 5)):
        np.testing.assert_allclose(tiny.log_softmax(raw[slot]), tiny.log_softmax(centred[slot]), atol=1e-5)


# Similarity


def test_identical_prompts_are_similar_in_any_order_of_positions():
    one = pack(length=4)
    turned = with_params(one, key=one.params["key"][:, ::-1], value=3 * one.params["value"][:, [2, 0, 3, 1]])
    found = inside.prompt_similarity(tiny.lm(LM), [one, turned])
    np.testing.assert_allclose(found.key, 1, atol=1e-5)
    np.testing.assert_allclose(found.value, 1, atol=1e-5)


def test_prompts_without_a_common_direction_are_not_similar():
    lm = {"layers": {name: {"kernel": jnp.broadcast_to(jnp.eye(16), (2, 16, 16))} for name in ("key", "value")}}
    basis = np.broadcast_to(np.eye(16, dtype=np.float32), (2, 16, 16))
    a, b = (with_params(pack(), key=basis[:, part], value=basis[:, part]) for part in (slice(0, 3), slice(3, 8)))
    half = with_params(pack(), key=basis[:, 2:4], value=basis[:, 0:2])
    found = inside.prompt_similarity(lm, [a, b, half])
    np.testing.assert_allclose(found.key[:, 0, 1], 0, atol=1e-7)
    np.testing.assert_allclose(found.key[:, 0, 2], 1 / 6**0.5, atol=1e-6)  # 3 and 2 directions share one
    np.testing.assert_allclose(found.value[:, 0, 2], 2 / 6**0.5, atol=1e-6)
    assert 0.1 < found.chance.mean() < 0.4  # 5 random directions of 16: about 5 / 16


@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_similarity_is_symmetric_and_between_0_and_1(lengths, seed):
    made = [pack(length=n, seed=seed + i) for i, n in enumerate(lengths)]
    found = inside.prompt_similarity(tiny.lm(LM), made, draws=2)
    for part in (found.key, found.value):
        assert part.shape == (2, len(made), len(made))
        np.testing.assert_array_equal(part, np.swapaxes(part, 1, 2))
        np.testing.assert_array_equal(part[:, np.eye(len(made), dtype=bool)], 1)
        assert (part >= 0).all()
        assert (part <= 1 + 1e-6).all()


def test_only_deep_prompts_are_compared():
    made = pack()
    shallow = dataclasses.replace(made, params={"input": np.zeros((3, 16), np.float32), "sep": made.params["sep"]})
    with pytest.raises(ValueError, match="'two' has no deep prompt"):
        inside.prompt_similarity(tiny.lm(LM), [made, shallow])
    with pytest.raises(ValueError, match="no packs"):
        inside.prompt_similarity(tiny.lm(LM), [])


# Attributions


def odds(
    params: Params, made: PromptPack, units, classes, rows: np.ndarray, c: UnitLMConfig, segments=None
) -> np.ndarray:
    """Log odds of labels in numpy (float64), with unit embeddings `rows` [U, D]."""
    verbalizer = verbalizers.from_card(made.card["verbalizer"], made.task)
    with_rows = {**params, "embed": np.concatenate([params["embed"], rows])}
    codes, feeds = verbalizer.codes[list(classes)].reshape(-1), verbalizer.fed_back[list(classes)].reshape(-1)
    places = [c.num_units + i for i in range(len(units))]
    prompt = tiny.double(made.params)
    states = tiny.hidden(with_rows, prompt, c, places, feeds[:-1], segments)[len(prompt["sep"]) :]
    outputs = tiny.outputs(params, prompt, states)
    found = np.zeros(verbalizer.num_slots)
    for step, code in enumerate(codes):
        others = [o for o in np.flatnonzero(verbalizer.allowed[step]) if o != code]
        if others:
            found[step // verbalizer.steps_per_slot] += outputs[step, code] - np.log(
                np.exp(outputs[step, others]).sum()
            )
    return found


@pytest.mark.parametrize("case", ["learnable", "two steps a label", "multi-stream"])
def test_attributions_are_integrated_gradients_and_complete(case: str):
    c = tiny.config(2, prosody=ProsodyConfig(f0_edges=(-0.2, 0.1)) if case == "multi-stream" else None)
    task = Task("many", (Slot("s", tuple(map(str, range(30)))),)) if case == "two steps a label" else TASK
    made = pack(task, "identity" if case == "two steps a label" else "learnable", c=c)
    classes = [23] if case == "two steps a label" else [2, 3]
    units, segments = [5, 17, 5, 0, 11, 8], None
    split = utterance(units)
    if case == "multi-stream":
        (segments,) = tiny.spoken([units])
        split = UnitSet.of([units], [[0, 3]], durations=[[d for d, _ in segments]], f0=[[f for _, f in segments]])
    found = inside.attribute(tiny.lm(c), c, made, split, classes, steps=32)
    assert found.units.tolist() == units
    assert found.classes.tolist() == classes
    fine = inside.attribute(tiny.lm(c), c, made, split, classes, steps=512)  # the path is not smooth, due to ReLU
    assert fine.gap < 0.01
    np.testing.assert_allclose(fine.values, found.values, atol=0.1)

    lm = tiny.double(tiny.lm(c))
    rows = lm["embed"][np.asarray(units) + 4]
    at = lambda x: odds(lm, made, units, classes, x, c, segments)  # noqa: E731
    np.testing.assert_allclose(found.score, at(rows), atol=2e-4)
    np.testing.assert_allclose(found.empty, at(0 * rows), atol=2e-4)
    # The same points with central differences along each unit's embedding.
    expected, eps = np.zeros_like(found.values, np.float64), 1e-5
    for unit in (1, 5):
        own = np.zeros_like(rows)
        own[unit] = rows[unit]
        for x, weight in zip(*np.polynomial.legendre.leggauss(32), strict=True):
            way = (x + 1) / 2 * rows
            expected[:, unit] += weight / 2 * (at(way + eps * own) - at(way - eps * own)) / (2 * eps)
        np.testing.assert_allclose(found.values[:, unit], expected[:, unit], atol=1e-3)


def test_a_unit_that_decides_alone_gets_the_full_attribution():
    lm = dict(tiny.lm(LM))
    lm["embed"] = (
        lm["embed"].at[4:].set(0).at[4 + 9].set(tiny.lm(LM)["embed"][4 + 9])
    )  # all units but 9 have zero embeddings
    made = pack()
    found = inside.attribute(lm, LM, made, utterance([1, 2, 9, 3, 0, 7]), [0, 4], steps=512)
    np.testing.assert_array_equal(np.delete(found.values, 2, axis=1), 0)
    np.testing.assert_allclose(found.values[:, 2], found.score - found.empty, atol=0.01)
    assert np.abs(found.values[:, 2]).min() > 0.01
    silent = inside.attribute(lm, LM, made, utterance([1, 2, 3, 3, 0, 7]), [0, 4])
    np.testing.assert_array_equal(silent.values, 0)


def test_the_default_is_the_models_prediction_and_padding_changes_nothing():
    made = pack()
    units = np.random.default_rng(1).integers(0, 20, 16).tolist()
    lm, verbalizer = tiny.double(tiny.lm(LM)), verbalizers.from_card(made.card["verbalizer"], TASK)
    scores = {
        (a, b): tiny.answer_score(lm, tiny.double(made.params), LM, verbalizer, units, (a, b))
        for a in range(3)
        for b in (3, 4)
    }
    full = inside.attribute(tiny.lm(LM), LM, made, utterance(units), steps=8)
    assert tuple(full.classes) == max(scores, key=scores.__getitem__)
    allowed = dataclasses.replace(made, card={**made.card, "combinations": [list(min(scores, key=scores.__getitem__))]})
    only = inside.attribute(tiny.lm(LM), LM, allowed, utterance(units), steps=8)
    assert tuple(only.classes) == min(scores, key=scores.__getitem__)
    longer = UnitSet.of([units, [3] * 40], np.zeros((2, 1))).take(np.asarray([0]))
    np.testing.assert_array_equal(inside.attribute(tiny.lm(LM), LM, made, longer, steps=8).values, full.values)


def test_a_slot_of_one_label_has_nothing_to_decide():
    made = pack(Task("sure", (Slot("only", ("this",)), Slot("where", ("a", "b", "c", "d")))))
    found = inside.attribute(tiny.lm(LM), LM, made, utterance([1, 2, 3]), [0, 3], steps=8)
    np.testing.assert_array_equal(found.values[0], 0)
    assert np.abs(found.values[1]).max() > 0


@pytest.mark.parametrize(
    ("split", "classes", "message"),
    [
        (utterance([]), None, "got 1 with 0"),
        (UnitSet.of([[1], [2]], [[0], [0]]), None, "one utterance with units, got 2"),
        (utterance([1, 20]), None, r"units 1\.\.20 must be in 0\.\.19"),
        (utterance([1]), [0], r"classes \[0\] must be one of each slot; the slots start at \[0, 3\]"),
        (utterance([1]), [3, 3], "must be one of each slot"),
    ],
)
def test_invalid_attributions_are_refused(split, classes, message):
    with pytest.raises(ValueError, match=message):
        inside.attribute(tiny.lm(LM), LM, pack(), split, classes)


# Plots and the command


def test_plots_of_every_size_are_drawn():
    many = Task("many", (Slot("s", tuple(f"$label {n}$" for n in range(80))),))
    assert inside_plots.verbalizer("many", many, np.zeros((80, 24), np.float32)).startswith(PNG)
    one = inside.prompt_similarity(tiny.lm(LM), [pack()], draws=2)
    assert inside_plots.similarity(["alone"], one).startswith(PNG)
    for count in (1, 130):
        values = np.random.default_rng(0).normal(size=(2, count)).astype(np.float32)
        found = inside.Attribution(np.arange(count), np.asarray([0, 3]), values, values.sum(axis=1), np.zeros(2))
        assert inside_plots.attribution("said", TASK, found).startswith(PNG)


def test_units_are_drawn_under_their_waveform():
    units, durations, hop = [7, 8, 7, 9, 8], [30, 1, 60, 2, 27], 320  # 120 frames: three lines of 50
    wave = np.zeros(120 * hop + 40, np.float32)
    wave[40 + 91 * hop :] = np.sin(np.arange(29 * hop))  # the last two units; frame 0 begins at sample 40
    image = imread(io.BytesIO(inside_plots.utterance(wave, units, durations, hop)))
    assert image.shape == (3 * 144, 1152, 4)
    assert image[-1, -1, 3] == 0, "it is transparent"
    colours: dict[int, set[bytes]] = {}
    start = 0
    for unit, duration in zip(units, durations, strict=True):
        for frame in range(start, start + duration):
            row, column = int(144 * (frame // 50 + 0.63)), int(1152 * (frame % 50 + 0.1) / 50)
            colours.setdefault(unit, set()).add(image[row, column].tobytes())
        start += duration
    assert all(len(found) == 1 for found in colours.values()), "each frame has its unit's colour"
    assert len({found.pop() for found in colours.values()}) == 3
    opaque = [(image[144 * row : 144 * row + 80, int(1152 * a / 50) : int(1152 * b / 50), 3] > 0.5).sum()
              for row, a, b in ((0, 0, 50), (1, 0, 40), (1, 42, 50), (2, 0, 20))]  # fmt: skip
    assert max(opaque[:2]) < 5_000, "silence is a thin line"
    assert min(opaque[2:]) > 5_000


def test_only_the_beginning_of_a_long_utterance_is_drawn():
    frames = inside_plots.UTTERANCE_FRAMES + 1000
    image = imread(io.BytesIO(inside_plots.utterance(np.zeros(0, np.float32), [5, 6], [frames - 500, 500], 160)))
    assert image.shape[0] == 144 * inside_plots.UTTERANCE_FRAMES // 50


def test_the_command_writes_plots_and_a_summary(tmp_path: Path, capsys):
    lm = jax.device_get(tiny.lm(LM))
    save_unit_lm(tmp_path / "lm", LM, lm)
    bank = {"a": pack(), "b_c": pack(seed=1)}
    bank = {name: save_pack(tmp_path / "packs" / name, one.params, one.card) for name, one in bank.items()}
    save_bank(tmp_path / "bank", bank)
    flags = ["--units=3 17 4 4", "--steps=4"]
    main([f"--lm={tmp_path / 'lm'}", f"--packs={tmp_path / 'bank'}", f"--out={tmp_path / 'out'}", *flags])
    text = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    plots = {path.name for path in (tmp_path / "out").glob("*.png")}
    wanted = ["verbalizer-a", "verbalizer-b_c", "similarity", "attribution-0", "attribution-1"]
    assert plots == {f"{name}.png" for name in wanted}
    assert all(f"]({plot})" in text for plot in plots)
    assert all((tmp_path / "out" / plot).read_bytes().startswith(PNG) for plot in plots)
    assert "| do | go | `" in text
    assert "## the units given, predicted by b_c" in text
    assert "Linear CKA" in text


def test_records_of_other_units_are_refused(tmp_path: Path):
    save_unit_lm(tmp_path / "lm", LM, jax.device_get(tiny.lm(LM)))
    one = pack()
    save_pack(tmp_path / "pack", one.params, {**one.card, "encoder": "mfcc", "kmeans": "0123456789ab"})
    utterances = {split: [Utterance(split, np.arange(4), [0, 3])] for split in ("train", "valid", "test")}
    made = {"vocabulary": 20, "layer": 0}
    flags = [f"--lm={tmp_path / 'lm'}", f"--packs={tmp_path / 'pack'}", f"--out={tmp_path / 'out'}", "--steps=2"]
    write_unit_records(tmp_path / "same", TASK, utterances, encoder="mfcc", kmeans="0123456789ab", **made)
    main([*flags, f"--data={tmp_path / 'same'}"])
    write_unit_records(tmp_path / "other", TASK, utterances, encoder="log_mel", kmeans="ba9876543210", **made)
    with pytest.raises(SystemExit, match=r"'two' uses units of encoder mfcc, .*other of encoder log_mel"):
        main([*flags, f"--data={tmp_path / 'other'}"])


def test_the_command_refuses_what_does_not_fit(tmp_path: Path):
    save_unit_lm(tmp_path / "lm", LM, jax.device_get(tiny.lm(LM)))
    other = pack()
    save_pack(tmp_path / "pack", other.params, {**other.card, "lm": {**other.card["lm"], "hash": "0" * 64}})
    with pytest.raises(SystemExit, match="pack, two: prompt pack 'two' was trained with the unit LM of hash 000"):
        main([f"--lm={tmp_path / 'lm'}", f"--packs={tmp_path / 'pack'}", f"--out={tmp_path / 'out'}"])
    save_pack(tmp_path / "pack", other.params, other.card)
    for units, message in (
        ("3 x", "must be integers separated by spaces"),
        ("3 99", r"units 3\.\.99"),
        (f"3 {10**20}", r"units 3\.\.10+ must be in 0\.\.19"),
        ("", "one utterance with units"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(
                [
                    f"--lm={tmp_path / 'lm'}",
                    f"--packs={tmp_path / 'pack'}",
                    f"--out={tmp_path / 'out'}",
                    f"--units={units}",
                ]
            )
    for flag in ("--steps=0", "--utterances=-1"):
        with pytest.raises(SystemExit, match="2"):  # from the argument parser
            main([f"--lm={tmp_path / 'lm'}", f"--packs={tmp_path / 'pack'}", f"--out={tmp_path / 'out'}", flag])
    assert not (tmp_path / "out").exists()
