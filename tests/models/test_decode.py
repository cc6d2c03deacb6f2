"""Decoding: golden predictions of the published code, and scores of all label combinations against numpy."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spjax import vocab
from spjax.convert.fairseq import read_checkpoint
from spjax.models import decode, prompts, verbalizers
from spjax.models.prompts import PromptConfig
from spjax.models.verbalizers import Verbalizer
from spjax.tasks import TASKS, Slot, Task
from tests.golden_data import tiny_lm, tree_of
from tests.models import tiny

STEPS = 150  # limit of the published code


def golden_prompt(golden: Path, name: str, layers: int) -> Any:
    """A prompt of golden/prompt or golden/e2e, as a bank of one."""
    if (file := golden / "prompt" / f"{name}_params.npz").exists():
        return tree_of(dict(np.load(file)), layers)
    tensors = read_checkpoint(golden / "e2e" / f"{name}_prompt_ckpt.pt").tensors
    return tree_of({path: tensor.numpy() for path, tensor in tensors.items()}, layers)


def golden_samples(golden: Path, name: str) -> list[dict[str, str]]:
    file = (
        golden / ("prompt" if (golden / "prompt" / f"{name}_params.npz").exists() else "e2e") / f"{name}_samples.json"
    )
    return list(json.loads(file.read_text()).values())


@pytest.mark.parametrize(
    "names",
    [
        ("a_freq_single", "a2_random_single", "d_freq_multi", "SCR_freq"),
        ("b_linear24_multi", "IC_learnable"),
        ("b1_linear12_single",),
        ("c_inputprompt_freq",),
        ("c1_inputprompt_linear12",),
    ],
    ids=lambda names: "+".join(names),
)
def test_golden_predictions(golden: Path, names: tuple[str, ...]):
    """The published sample.py on single utterances equals our greedy decoding of a mixed batch of prompts."""
    config, lm = tiny_lm(golden)
    banks = [golden_prompt(golden, name, config.layers) for name in names]
    bank = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *banks)
    rule = "verbalizer" not in bank
    outputs = config.vocab_size if rule else bank["verbalizer"].shape[1]
    codes = np.arange(4, outputs, dtype=np.int32)[:, None]
    verbalizer = Verbalizer("identity" if rule else "learnable", codes, codes, outputs, (0, outputs - 4))
    rows = [(n, row) for n, name in enumerate(names) for row in golden_samples(golden, name)]
    if rule:  # the published code prints the source if it exceeds the limit
        rows = [(n, row) for n, row in rows if len(row["src"].split()) <= STEPS]
    units = [[int(unit) for unit in row["src"].removesuffix(" <s>").split()] for _, row in rows]
    batch = tiny.batch(units, max(map(len, units)), prompt_id=[n for n, _ in rows])
    greedy = tiny.jit(functools.partial(decode.greedy, max_steps=STEPS, verbalizer=verbalizer, config=config))
    decoded = np.asarray(greedy(jax.tree.map(jnp.asarray, lm), bank, batch))
    for found, (n, row) in zip(decoded, rows, strict=True):
        # With a fixed verbalizer the published code stops when source and prediction have 150 tokens.
        found = found[: STEPS - len(row["src"].split())] if rule else found
        found = found[: np.argmax([*(found == vocab.EOS), True])]
        assert (found - 4).tolist() == [int(code) for code in row["predict"].split()], (names[n], row["file_name"])


def brute_force(
    lm: Any, bank: Any, c: Any, verbalizer: Verbalizer, units: Any, members: Any, combos: Any
) -> np.ndarray:
    """[B, M], computed for each utterance and label combination separately."""
    plain, banks = tiny.double(lm), tiny.double(bank)
    rows = []
    for utterance, n in zip(units, members, strict=True):
        member = jax.tree.map(lambda a, n=n: a[n], banks)
        rows.append([tiny.answer_score(plain, member, c, verbalizer, utterance, combo) for combo in combos])
    return tiny.log_softmax(np.asarray(rows))


def shared_codes(task: Task) -> Verbalizer:
    """Labels of two slots with the same codes."""
    codes = np.concatenate([np.arange(len(slot.labels)) for slot in task.slots]).astype(np.int32)[:, None] + 4
    return Verbalizer("identity", codes, codes, 24, task.slot_offsets)


def spelled(task: Task) -> Verbalizer:
    """Three steps per label, over two units."""
    codes = np.random.default_rng(0).permutation(list(itertools.product((5, 9), repeat=3)))[: task.num_classes]
    return Verbalizer("random", codes.astype(np.int32), codes.astype(np.int32), 24, task.slot_offsets)


SCORED = {
    "one slot": (2, PromptConfig(length=2), lambda: verbalizers.learnable(tiny.ONE_SLOT, 24), None),
    "three slots": (
        2,
        PromptConfig(length=2, separators=2, steer=True),
        lambda: verbalizers.learnable(tiny.TASK, 24),
        None,
    ),
    "three slots, seen answers, shared codes": (
        2,
        PromptConfig(length=2, deep=False),
        lambda: shared_codes(tiny.TASK),
        [(0, 3, 6), (0, 3, 7), (0, 5, 6), (1, 4, 7), (2, 5, 7)],
    ),
    "spelled over several steps": (1, PromptConfig(length=2), lambda: spelled(tiny.ONE_SLOT), None),
    "two slots, each spelled": (
        1,
        PromptConfig(length=0),
        lambda: spelled(Task("two", (Slot("x", ("a", "b", "c")), Slot("y", ("a", "b", "c", "d", "e"))))),
        None,
    ),
}


@pytest.mark.parametrize("case", SCORED)
def test_scores_of_all_label_combinations(case: str):
    layers, prompt, make, seen = SCORED[case]
    c, verbalizer = tiny.config(layers), make()
    lm, bank = tiny.lm(c), tiny.bank(c, prompt, verbalizer, 2)
    units, members = tiny.utterances(c, (1, 4, 9)), (1, 0, 1)
    tree = decode.label_tree(verbalizer, seen)
    ranges = [range(*pair) for pair in itertools.pairwise(verbalizer.slot_offsets)]
    combos = list(itertools.product(*ranges)) if seen is None else seen
    np.testing.assert_array_equal(tree.combinations, combos)
    score = tiny.jit(functools.partial(decode.score, trees=[tree], config=c))
    found = np.asarray(score(lm, bank, tiny.batch(units, 9, prompt_id=members)))
    expected = brute_force(lm, bank, c, verbalizer, units, members, combos)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-5)
    for slot, (start, labels) in enumerate(zip(verbalizer.slot_offsets, ranges, strict=False)):
        marginal = decode.slot_probabilities(found, tree, verbalizer.slot_offsets)[slot]
        by_hand = np.stack([np.exp(expected)[:, [x[slot] == label for x in combos]].sum(axis=1) for label in labels], 1)
        assert marginal.shape == (3, len(labels)), start
        np.testing.assert_allclose(marginal, by_hand, rtol=0, atol=1e-5)


def test_scores_of_1251_classes():
    """More classes than units: a fixed verbalizer encodes each with two."""
    task = Task("speaker", (Slot("speaker", tuple(f"speaker {i}" for i in range(1251))),))
    c = tiny.config(1, vocab_size=104)
    verbalizer = verbalizers.random(task, 104, seed=0)
    lm, bank = tiny.lm(c), tiny.bank(c, PromptConfig(length=2), verbalizer, 1)
    units = tiny.utterances(c, (6,))
    tree = decode.label_tree(verbalizer, None)
    score = tiny.jit(functools.partial(decode.score, trees=[tree], config=c))
    found = np.asarray(score(lm, bank, tiny.batch(units, 8)))
    assert found.shape == (1, 1251)
    assert verbalizer.steps_per_slot == 2
    expected = brute_force(lm, bank, c, verbalizer, units, (0,), np.arange(1251)[:, None])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(np.exp(found).sum(), 1, rtol=1e-5)


def test_tasks_of_a_mixed_batch_have_the_same_scores_alone():
    """Different labels, slots, combinations and prompt lengths: each row as in a batch of its task."""
    c = tiny.config(2)
    tasks = (tiny.TASK, tiny.ONE_SLOT, Task("two", (Slot("x", ("a", "b")), Slot("y", ("a", "b", "c", "d")))))
    spoken = [verbalizers.learnable(task, 24) for task in tasks]
    trees = [
        decode.label_tree(spoken[0], [(0, 3, 6), (1, 4, 7), (1, 5, 6)]),
        *(decode.label_tree(v, None) for v in spoken[1:]),
    ]
    lengths = (1, 3, 2)
    banks = [tiny.bank(c, PromptConfig(length=n, separators=2), v, 1, n) for n, v in zip(lengths, spoken, strict=True)]
    lm, bank = tiny.lm(c), prompts.join(banks)
    assert bank["key"].shape[2] == 3
    units, members = tiny.utterances(c, (1, 4, 9, 3, 5, 7)), (2, 0, 1, 1, 2, 0)
    mixed = tiny.jit(functools.partial(decode.score, trees=trees, config=c, lengths=lengths))
    found = np.asarray(mixed(lm, bank, tiny.batch(units, 9, prompt_id=members)))
    assert found.shape == (6, 8)
    for n, tree in enumerate(trees):
        mine = [row for row, m in enumerate(members) if m == n]
        alone = tiny.jit(functools.partial(decode.score, trees=[tree], config=c))
        expected = alone(lm, banks[n], tiny.batch([units[row] for row in mine], 9))
        np.testing.assert_allclose(found[mine, : len(tree.combinations)], expected, rtol=0, atol=1e-5)
        assert (found[mine, len(tree.combinations) :] == -np.inf).all()
        # Slicing the joined bank returns each member unchanged.
        back = prompts.part(bank, n, n + 1, spoken[n], PromptConfig(length=lengths[n]))
        jax.tree.map(np.testing.assert_array_equal, back, banks[n])


@pytest.mark.parametrize("constrained", [True, False])
def test_greedy_labels(constrained: bool):
    """Each step as in numpy; constrained, every step is an output of its slot."""
    c, verbalizer = tiny.config(2), verbalizers.learnable(tiny.TASK, 24)
    lm, bank = tiny.lm(c), tiny.bank(c, PromptConfig(length=2, separators=2), verbalizer, 2)
    # Make the specials likely: outputs after the end are ignored, and a decoded separator is fed back as trained.
    bank["verbalizer"] = bank["verbalizer"].at[:, 0].mul(2.0).at[:, vocab.EOS].mul(-2.5)
    units, members = tiny.utterances(c, (1, 3, 4, 5, 6, 7, 8, 9)), (1, 0, 1, 0, 1, 0, 1, 0)
    steps = 3 if constrained else 6
    greedy = functools.partial(decode.greedy, max_steps=steps, verbalizer=verbalizer, config=c, constrained=constrained)
    found = np.asarray(tiny.jit(greedy)(lm, bank, tiny.batch(units, 9, prompt_id=members)))
    plain, banks = tiny.double(lm), tiny.double(bank)
    decoded = set()
    for row, n in enumerate(members):
        member = jax.tree.map(lambda a, n=n: a[n], banks)
        # <s> fed back is the last separator.
        table = {**plain, "embed": plain["embed"].copy()}
        table["embed"][vocab.BOS] = member["sep"][-1]
        answer: list[int] = []
        for step in range(steps):
            state = tiny.hidden(table, member, c, units[row], answer)[-1:]
            scores = tiny.outputs(plain, member, state)[0]
            if constrained:
                scores[~verbalizer.allowed[step]] = -np.inf
            answer.append(vocab.EOS if vocab.EOS in answer else int(scores.argmax()))
        assert found[row].tolist() == answer
        decoded |= set(answer)
    if not constrained:
        assert {vocab.BOS, vocab.EOS} < decoded, "the special cases must occur to be tested"


def test_constrained_greedy_takes_one_step_per_label():
    c, verbalizer = tiny.config(1), verbalizers.learnable(tiny.TASK, 24)
    bank = tiny.bank(c, PromptConfig(), verbalizer, 1)
    with pytest.raises(ValueError, match="takes 3 steps, not 4"):
        decode.greedy(
            tiny.lm(c), bank, tiny.batch([[1]], 4), max_steps=4, verbalizer=verbalizer, config=c, constrained=True
        )


@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_a_label_tree_encodes_its_combinations(slots: int, labels: int, seed: int):
    """The path of a combination from the root feeds back its code; no two nodes have the same prefix."""
    rng = np.random.default_rng(seed)
    task = Task("any", tuple(Slot(str(s), tuple(map(str, range(labels)))) for s in range(slots)))
    verbalizer = verbalizers.random(task, 4 + int(rng.integers(2, 12)), seed % 97)
    chosen = np.stack([rng.integers(s * labels, (s + 1) * labels, 25) for s in range(slots)], axis=1)
    tree = decode.label_tree(verbalizer, chosen)
    assert {tuple(row) for row in tree.combinations.tolist()} == {tuple(row) for row in chosen.tolist()}
    spelling = verbalizer.codes[tree.combinations].reshape(len(tree.combinations), -1)
    np.testing.assert_array_equal(tree.codes, spelling)
    beginnings: list[list[tuple[int, ...]]] = [[()]]
    for feeds, parents in zip(tree.fed_back, tree.parents, strict=True):
        beginnings.append([(*beginnings[-1][up], feed) for feed, up in zip(feeds, parents, strict=True)])
        assert len(set(beginnings[-1])) == len(beginnings[-1])
    for answer, path in enumerate(tree.path):
        for depth, node in enumerate(path):
            assert beginnings[depth][node] == tuple(spelling[answer, :depth])


def test_too_many_combinations_are_refused():
    task = Task("big", tuple(Slot(str(s), tuple(map(str, range(30)))) for s in range(3)))
    verbalizer = verbalizers.learnable(task, 104)
    with pytest.raises(ValueError, match="27000 label combinations are too many"):
        decode.label_tree(verbalizer, None)
    assert len(decode.label_tree(verbalizer, [(0, 30, 60), (1, 30, 60), (0, 30, 60)]).combinations) == 2


def test_all_combinations_of_fsc_are_few_enough():
    tree = decode.label_tree(verbalizers.learnable(TASKS["fsc"], 104), None)
    assert tree.combinations.shape == (6 * 14 * 4, 3)
    assert [len(feeds) for feeds in tree.fed_back] == [6, 6 * 14]  # common prefixes are computed once
