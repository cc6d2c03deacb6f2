"""Pretraining: packing is lossless and does not change losses; a toy corpus is learnt; the saved LM loads."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

import spjax
from configs import defaults
from spjax import vocab
from spjax.data.unit_set import UnitSet
from spjax.io import unit_lms
from spjax.models import unit_lm
from spjax.models.config import Compute, ProsodyConfig, UnitLMConfig
from spjax.training import optim, pretrain
from tests import toy
from tests.models import tiny

F32 = Compute()
corpora = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=30), min_size=1, max_size=20)


def _set(units: list[list[int]]) -> UnitSet:
    return UnitSet.of(units, [[0]] * len(units))


def _tokens(piece: pretrain.PackedRows) -> list[int]:
    """Inputs of a piece and its last target."""
    assert (piece.inputs[1:] == piece.targets[:-1]).all()
    return [*piece.inputs.tolist(), int(piece.targets[-1])]


def _piece(tokens: np.ndarray) -> pretrain.PackedRows:
    place = np.arange(len(tokens) - 1)
    return pretrain.PackedRows(tokens[:-1], tokens[1:], np.ones_like(place), place)


@given(units=corpora, width=st.integers(1, 20))
def test_every_token_is_predicted_once(units: list[list[int]], width: int) -> None:
    pieces = pretrain.utterances([_set(units)], width, dedup=False)
    assert all(1 <= len(piece.inputs) <= width for piece in pieces)
    # An utterance's pieces overlap in one token: the last target of one is the first input of the next.
    joined: list[list[int]] = []
    for tokens in map(_tokens, pieces):
        if tokens[0] == vocab.EOS:
            joined.append([vocab.EOS])
        assert joined[-1][-1] == tokens[0]
        joined[-1] += tokens[1:]
    assert joined == [[vocab.EOS, *(u + vocab.UNIT_OFFSET for u in utterance), vocab.EOS] for utterance in units]


@given(units=corpora, width=st.integers(1, 40), seed=st.integers(0, 5))
def test_rows_have_exactly_the_pieces(units: list[list[int]], width: int, seed: int) -> None:
    pieces = pretrain.utterances([_set(units)], width, dedup=False)
    rows = pretrain.pack(pieces, width, seed)
    found = []
    for r in range(len(rows.inputs)):
        filled = rows.segment[r] > 0
        assert filled.tolist() == sorted(filled, reverse=True)  # padding is at the end
        assert filled.any()
        for number in range(1, rows.segment[r].max() + 1):
            where = np.flatnonzero(rows.segment[r] == number)
            assert where.tolist() == list(range(where[0], where[-1] + 1))
            assert rows.position[r, where].tolist() == list(range(len(where)))
            assert (rows.inputs[r, where[1:]] == rows.targets[r, where[:-1]]).all()
            found.append((*rows.inputs[r, where].tolist(), int(rows.targets[r, where[-1]])))
    assert sorted(found) == sorted(map(tuple, map(_tokens, pieces)))


def test_packing_wastes_little() -> None:
    random = np.random.default_rng(0)
    pieces = [_piece(np.arange(n + 1, dtype=np.int32)) for n in random.integers(1, 40, 500)]
    rows = pretrain.pack(pieces, 64, 0)
    assert (rows.segment > 0).mean() > 0.95


def test_equal_sequences_are_used_once() -> None:
    sets = [_set([[1, 2], [3], [1, 2]]), _set([[3], [1]])]
    assert len(pretrain.utterances(sets, 8, dedup=False)) == 5
    kept = pretrain.utterances(sets, 8, dedup=True)
    assert [_tokens(piece) for piece in kept] == [[2, 5, 6, 2], [2, 7, 2], [2, 5, 2]]


@given(count=st.integers(1, 9), size=st.integers(1, 4))
def test_batches_have_every_row_and_the_last_is_padded(count: int, size: int) -> None:
    rows = pretrain.pack([_piece(np.array([2, i + 4, 2])) for i in range(count)], 2, 0)
    parts = list(pretrain.batches(rows, size))
    assert all(part.inputs.shape == (size, 2) for part in parts)
    assert sum(int((part.segment > 0).sum()) for part in parts) == 2 * count


_logits = jax.jit(unit_lm.logits, static_argnums=1)


def _alone(params: dict, sequence: np.ndarray) -> float:
    """Negative log likelihood of a piece from the LM's `logits`, in float64."""
    padded = np.pad(sequence[:-1], (0, 32 - len(sequence)), constant_values=vocab.PAD)
    logits = np.asarray(_logits(params, toy.LM, padded[None]), np.float64)[0, : len(sequence) - 1]
    return sum(np.log(np.exp(row - row[token]).sum()) for row, token in zip(logits, sequence[1:], strict=True))


@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_packed_rows_have_the_losses_of_single_utterances(seed: int) -> None:
    params = toy.tiny_lm(3)
    params["embed"] = params["embed"] * 4  # far from uniform
    pieces = pretrain.utterances([toy.unit_set("fsc", 6, seed)], 48, dedup=False)
    rows = pretrain.pack(pieces, 48, seed)
    assert len(rows.inputs) < len(pieces)  # several share a row
    padded = next(pretrain.batches(rows, 8))
    sums = jax.jit(pretrain.losses, static_argnums=(1, 3))(params, toy.LM, padded, F32)
    assert int(sums.units) == sum(len(piece.inputs) for piece in pieces)
    expected = sum(_alone(params, np.asarray(_tokens(piece))) for piece in pieces)
    assert float(sums.unit) == pytest.approx(expected, rel=1e-5)
    assert sums.segments == sums.duration == sums.f0 == 0


def _spoken(units: list[list[int]], seed: int) -> UnitSet:
    said = tiny.spoken(units, seed)
    durations, f0 = ([[segment[i] for segment in row] for row in said] for i in range(2))
    return UnitSet.of(units, [[0]] * len(units), durations=durations, f0=f0)


@settings(max_examples=5)
@given(seed=st.integers(0, 1000), discrete=st.booleans())
def test_packed_cut_and_padded_rows_of_a_multi_stream_lm_have_the_losses_of_single_pieces(
    seed: int, discrete: bool
) -> None:
    c = tiny.config(2, prosody=ProsodyConfig(discrete=discrete, f0_edges=(-0.1, 0.2) if discrete else ()))
    params, rng = tiny.lm(c), np.random.default_rng(seed)
    units = [rng.integers(0, c.num_units, n).tolist() for n in (1, 3, 5, 14, 2, 30)]  # two are cut
    spoken = _spoken(units, seed)
    pieces = pretrain.utterances([spoken], 12, dedup=False)
    rows = pretrain.pack(pieces, 12, seed)
    assert len(rows.inputs) < len(pieces) > len(units)
    sums = jax.jit(pretrain.losses, static_argnums=(1, 3))
    together = [sums(params, c, part, F32) for part in pretrain.batches(rows, 4)]
    alone = [sums(params, c, next(pretrain.batches(pretrain.pack([piece], 12, 0), 1)), F32) for piece in pieces]
    for name in pretrain.LossSums._fields:
        found, expected = (sum(float(getattr(one, name)) for one in many) for many in (together, alone))
        assert found == pytest.approx(expected, rel=1e-5), name
    # Streams of every segment and end are predicted once, and every unit and end.
    assert sum(int(one.segments) for one in together) == len(spoken.units) + len(units)
    assert sum(int(one.units) for one in together) == len(spoken.units) + len(units)


def test_pieces_of_a_multi_stream_lm_continue_where_the_last_one_ended() -> None:
    (whole,) = pretrain.utterances([_spoken([[5, 6, 7, 8]], 0)], 16, dedup=False)
    pieces = pretrain.utterances([_spoken([[5, 6, 7, 8]], 0)], 4, dedup=False)
    assert whole.inputs.tolist() == [vocab.BOS, 9, 10, 11, 12, vocab.EOS]
    assert whole.targets.tolist() == [9, 10, 11, 12, vocab.EOS, vocab.PAD]
    np.testing.assert_array_equal(whole.streams.duration[1:], whole.stream_targets.duration[:-1])
    np.testing.assert_array_equal(whole.streams.f0[1:], whole.stream_targets.f0[:-1])
    assert whole.streams.f0[0] == vocab.F0_PAD
    for name in ("inputs", "targets", "streams", "stream_targets"):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *(getattr(piece, name) for piece in pieces))
        jax.tree.map(np.testing.assert_array_equal, joined, getattr(whole, name))
    assert [piece.position.tolist() for piece in pieces] == [[0, 1, 2, 3], [0, 1]]


def test_equal_units_with_other_prosody_are_two_sequences() -> None:
    same, other = _spoken([[1, 2], [1, 2]], 0), _spoken([[1, 2]], 9)
    assert len(pretrain.utterances([same.without_streams(), other.without_streams()], 8, dedup=True)) == 1
    assert len(pretrain.utterances([same, other, other], 8, dedup=True)) == 3


def test_noise_changes_units_and_not_prosody() -> None:
    c = tiny.config(2, prosody=ProsodyConfig(f0_edges=(0.0,)))
    params, rows = tiny.lm(c), pretrain.pack(pretrain.utterances([_spoken([[1, 2, 3]] * 9, 1)], 8, False), 8, 0)
    clean = pretrain.losses(params, c, rows, F32)
    noisy = pretrain.losses(params, c, rows, F32, 0.9, jax.random.key(0))
    assert float(clean.unit) != float(noisy.unit)
    assert (int(clean.units), int(clean.segments)) == (int(noisy.units), int(noisy.segments))


def test_noise_changes_units_only_and_never_the_targets() -> None:
    params, rows = toy.tiny_lm(), pretrain.pack(pretrain.utterances([toy.unit_set("fsc", 8, 0)], 32, False), 32, 0)
    clean = pretrain.losses(params, toy.LM, rows, F32)
    some = pretrain.losses(params, toy.LM, rows, F32, 0.5, jax.random.key(0))
    again = pretrain.losses(params, toy.LM, rows, F32, 0.5, jax.random.key(0))
    other = pretrain.losses(params, toy.LM, rows, F32, 0.5, jax.random.key(1))
    assert int(clean.units) == int(some.units)
    assert float(some.unit) == float(again.unit) != float(other.unit)
    assert float(clean.unit) not in (float(some.unit), float(other.unit))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """A tiny LM trained on a corpus in which every unit u is followed by u + 1."""
    folder = tmp_path_factory.mktemp("pretrained")
    random = np.random.default_rng(0)
    sets = [
        _set([[(start + i) % 20 for i in range(random.integers(3, 12))] for start in random.integers(0, 20, n)])
        for n in (200, 30)
    ]
    config = pretrain.PretrainConfig(epochs=8, row_length=32, rows=8, checkpoint_every=100)
    params, history = pretrain.pretrain(
        toy.LM, config, optim.OptimConfig(lr=1e-2, weight_decay=0.1), F32,
        train=sets[:1], valid={"count": sets[1]}, workdir=str(folder),
    )  # fmt: skip
    unit_lms.save_unit_lm(folder / "lm", toy.LM, params, {"valid": history[-1]})
    return folder, history


def test_valid_perplexity_falls(pretrained: tuple[Path, list[dict]]) -> None:
    _, history = pretrained
    perplexity = [line["count/perplexity"] for line in history]
    assert perplexity[0] < 104
    # Each unit determines the next one: only the first unit, one of 20, and the end are uncertain.
    assert perplexity[-1] < 4
    assert perplexity[-1] < perplexity[0] / 5
    assert history[-1]["count/perplexity"] == pytest.approx(math.exp(history[-1]["nll"]))


def test_the_saved_lm_loads_and_has_learnt(pretrained: tuple[Path, list[dict]]) -> None:
    lm = spjax.load_unit_lm(pretrained[0] / "lm")
    assert lm.config == toy.LM
    logits = lm.logits(np.array([[vocab.EOS, 4 + 7, 4 + 8]]))
    assert logits.shape == (1, 3, 104)
    assert logits[0, 1:].argmax(axis=1).tolist() == [4 + 8, 4 + 9]


@pytest.mark.parametrize("family", ["llama", *(pytest.param(x, marks=pytest.mark.slow) for x in ("qwen2", "opt"))])
def test_every_family_learns(family: str, tmp_path: Path) -> None:
    """The corpus of `pretrained`, in its successor's block: perplexity falls likewise, and the LM is read back."""
    random = np.random.default_rng(0)
    data = _set([[(start + i) % 20 for i in range(random.integers(3, 12))] for start in random.integers(0, 20, 200)])
    sizes = defaults.of_family(
        ConfigDict({"vocab_size": 24, "dim": 32, "layers": 1, "heads": 4, "ffn_dim": 64}), family
    )
    lm = UnitLMConfig(**sizes.to_dict())
    run = pretrain.PretrainConfig(epochs=6, row_length=32, rows=8, checkpoint_every=1000)
    params, history = pretrain.pretrain(
        lm, run, optim.OptimConfig(lr=1e-2), F32, train=[data], valid={"count": data}, workdir=str(tmp_path / "run")
    )
    assert history[-1]["count/perplexity"] < 6
    unit_lms.save_unit_lm(tmp_path / "lm", lm, params)
    assert unit_lms.read_unit_lm(tmp_path / "lm")[0] == lm


def test_rows_must_be_divisible_by_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        pretrain.sharding, "make_mesh", lambda *_: SimpleNamespace(shape={"data": 2, "shard": 1, "model": 1})
    )
    run = pretrain.PretrainConfig(rows=3)
    with pytest.raises(ValueError, match="rows=3 must be a multiple of the 2 devices"):
        pretrain.pretrain(toy.LM, run, optim.OptimConfig(), F32, train=[_set([[1]])], valid={}, workdir=str(tmp_path))


def test_labels_are_not_used(tmp_path: Path) -> None:
    units, classes = toy.utterances("toy", 12, 0)
    run = pretrain.PretrainConfig(epochs=1, row_length=16, rows=8)
    runs = []
    for name, labels in (("a", classes), ("b", classes[::-1])):
        data = UnitSet.of(units, labels)
        runs.append(
            pretrain.pretrain(
                dataclasses.replace(toy.LM, layers=1), run, optim.OptimConfig(), F32,
                train=[data], valid={"toy": data}, workdir=str(tmp_path / name),
            )
        )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, runs[0][0], runs[1][0])


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"rows": 0}, {"row_length": -1}, {"noise": 1.0}])
def test_invalid_settings_are_refused(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"pretrain: {name} is "):
        pretrain.PretrainConfig(**wrong)
