"""The multi-stream LM: golden pGSLM outputs, and prompted batches against numpy (tests/models/tiny.py)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spjax import vocab
from spjax.convert.pgslm import import_pgslm
from spjax.data.unit_set import UnitSet
from spjax.models import decode, prompted_lm, streams, unit_lm, verbalizers
from spjax.models.config import Compute, ProsodyConfig, UnitLMConfig
from spjax.models.prompts import PromptConfig
from spjax.training import losses, pretrain
from spjax.types import Params, Streams
from tests.golden_data import relative
from tests.models import tiny

KINDS = tuple(f"{kind}_{inputs}" for kind in ("discrete", "continuous") for inputs in ("prosody", "no_prosody"))
F32 = Compute()
EDGES = (-0.4, -0.1, 0.05, 0.05, 0.3)
INPUTS = [(True, True), (True, False), (False, True), (False, False)]
PROSODIES = {
    f"{'discrete' if discrete else 'continuous'}, {inputs}": ProsodyConfig(
        discrete, *inputs, 20, EDGES if discrete else ()
    )
    for discrete, inputs in itertools.product((True, False), INPUTS)
    if discrete or inputs in ((True, True), (False, True))  # disabled inputs are the same in both
}
LENGTHS, MEMBERS = (1, 2, 5, 9, 16, 12), (0, 2, 1, 1, 2, 0)


# ---- golden


def _golden(golden: Path, kind: str) -> tuple[UnitLMConfig, Params, dict[str, np.ndarray], pretrain.PackedRows]:
    """The imported LM, fairseq's outputs, and its batch in our format: raw streams, our unit tokens."""
    config, params, _ = import_pgslm(golden / "pgslm" / f"{kind}.pt", golden / "pgslm" / "f0_bin.th")
    found = dict(np.load(golden / "pgslm" / f"{kind}.npz"))
    # All four have the same utterances; the continuous ones keep raw values.
    raw = np.load(golden / "pgslm" / "continuous_prosody.npz")
    ours = np.r_[np.arange(100) + vocab.UNIT_OFFSET, :4]  # by fairseq's token: <s> is 100, <pad> 101 ...
    live = found["src_tokens"] != 101
    f0 = np.where(raw["f0_src"] == -5, vocab.F0_PAD, raw["f0_src"]).astype(np.float32)
    f0[:, 1] = vocab.F0_BOS
    rows = pretrain.PackedRows(
        inputs=ours[found["src_tokens"]],
        targets=np.where(found["mask"], vocab.PAD, ours[found["target"]]),
        segment=live.astype(np.int32),
        position=np.broadcast_to(np.arange(live.shape[1]), live.shape),
        streams=Streams(raw["dur_src"].astype(np.int32), f0),
        stream_targets=Streams(
            raw["dur_target"].astype(np.int32),
            np.where(raw["f0_mask"], vocab.F0_BOS, raw["f0_target"]).astype(np.float32),
        ),
    )
    return config, params, found, rows


@pytest.mark.parametrize("kind", KINDS)
def test_golden_outputs_and_losses(golden: Path, kind: str):
    config, params, found, rows = _golden(golden, kind)
    hidden = unit_lm.hidden_states(params, config, rows.inputs, streams=rows.streams)
    unit = np.asarray(unit_lm.unembed(params, hidden))
    np.testing.assert_array_equal(unit, unit_lm.logits(params, config, rows.inputs, streams=rows.streams))
    others = streams.heads(params, hidden, F32)
    live = rows.segment > 0
    for name, ours in {"token": np.roll(unit, -4, axis=-1), "duration": others.duration, "f0": others.f0}.items():
        assert ours.shape == found[f"out_{name}"].shape
        assert relative(np.asarray(ours)[live], found[f"out_{name}"][live]) < 1e-5, name
    sums = pretrain.losses(params, config, rows, F32)
    for name, ours in {"token": sums.unit, "dur": sums.duration, "f0": sums.f0}.items():
        assert float(ours) == pytest.approx(float(found[f"{name}_loss"]), rel=1e-5), name
    total = sums.unit + 0.5 * sums.duration + 0.5 * sums.f0
    assert float(total) == pytest.approx(float(found["loss"]), rel=1e-5)
    assert int(sums.units) == int((~found["mask"]).sum())
    assert int(sums.segments) == int((~found["dur_mask"]).sum()) == int((~found["f0_mask"]).sum())


@pytest.mark.parametrize("kind", ["discrete_prosody", "discrete_no_prosody"])
def test_golden_symbols(golden: Path, kind: str):
    config, _, found, rows = _golden(golden, kind)
    assert config.prosody is not None
    symbols = streams.symbols(config.prosody, rows.streams)
    np.testing.assert_array_equal(symbols.duration, found["dur_src"])
    np.testing.assert_array_equal(symbols.f0, found["f0_src"])


def test_golden_utterance_from_its_segments(golden: Path):
    """From the first utterance's units, durations and Hz to fairseq's batch."""
    _, _, found, rows = _golden(golden, "continuous_prosody")
    enabled = found["raw_f0"][:-1]
    f0 = np.where(enabled > 0, np.log(np.where(enabled > 0, enabled, 1)) - found["raw_speaker_logf0_mean"], 0)
    spoken = UnitSet.of([found["raw_code"][:-1]], [[0]], durations=[found["raw_dur"][:-1]], f0=[f0])
    (ours,) = pretrain.utterances([spoken], 64, dedup=False)
    size = len(ours.inputs)
    assert size == found["src_lengths"][0]
    for name, expected in rows._asdict().items():
        for mine, theirs in zip(jax.tree.leaves(getattr(ours, name)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(mine, theirs[0, :size], rtol=1e-5, atol=1e-6, err_msg=name)


# ---- prompted, against numpy


@pytest.mark.parametrize("which", PROSODIES)
def test_mixed_batch_equals_each_utterance_alone(which: str):
    c, prompt = tiny.config(2, prosody=PROSODIES[which]), PromptConfig(length=3, separators=2, steer=True)
    verbalizer = verbalizers.learnable(tiny.TASK, 24)
    lm, bank = tiny.lm(c), tiny.bank(c, prompt, verbalizer, 3)
    units = tiny.utterances(c, LENGTHS)
    segments, feeds = (
        tiny.spoken(units),
        np.random.default_rng(1).integers(vocab.UNIT_OFFSET, c.vocab_size, (len(units), 2)),
    )

    @tiny.jit
    def run(batch, feeds):
        state = prompted_lm.run(lm, bank, batch, feeds, config=c, queries=5)
        return state, prompted_lm.outputs(lm, bank, state.hidden, batch.prompt_id)

    state, scores = run(tiny.spoken_batch(tiny.batch(units, 19, prompt_id=MEMBERS, fill=9), segments), feeds)
    plain, members = tiny.double(lm), [jax.tree.map(lambda a, n=n: a[n], tiny.double(bank)) for n in range(3)]
    for row, n in enumerate(MEMBERS):
        expected = tiny.hidden(plain, members[n], c, units[row], feeds[row], segments[row])
        assert relative(state.hidden[row], expected) < 1e-5, f"utterance of {LENGTHS[row]} units"
        assert relative(scores[row], tiny.outputs(plain, members[n], expected)) < 1e-5
    # Disabled inputs have no effect; enabled ones have.
    for name in ("f0", "duration"):
        louder = [[(d + 3 * (name == "duration"), x + 0.2 * (name == "f0")) for d, x in row] for row in segments]
        other, _ = run(tiny.spoken_batch(tiny.batch(units, 19, prompt_id=MEMBERS, fill=9), louder), feeds)
        enabled = getattr(c.prosody, f"{name}_input")
        assert (relative(other.hidden, state.hidden) > 1e-4) == enabled, name


@pytest.mark.parametrize("which", ["discrete, (True, True)", "continuous, (True, True)"])
def test_decoding_by_cached_steps_equals_one_pass(which: str):
    c = tiny.config(2, prosody=PROSODIES[which])
    verbalizer = verbalizers.learnable(tiny.TASK, 24)
    lm, bank = tiny.lm(c), tiny.bank(c, PromptConfig(length=2), verbalizer, 1)
    units = tiny.utterances(c, (1, 7, 4))
    segments, tree = tiny.spoken(units, 3), decode.label_tree(verbalizer, None)
    batch = tiny.spoken_batch(tiny.batch(units, 8), segments)
    score = tiny.jit(lambda batch: decode.score(lm, bank, batch, [tree], config=c))
    found = score(batch)
    plain, member = tiny.double(lm), jax.tree.map(lambda a: a[0], tiny.double(bank))
    for row in range(3):
        each = [
            tiny.answer_score(plain, member, c, verbalizer, units[row], one, segments[row]) for one in tree.combinations
        ]
        np.testing.assert_allclose(found[row], tiny.log_softmax(np.asarray(each)), atol=2e-4)
    greedy = tiny.jit(
        lambda batch: decode.greedy(lm, bank, batch, max_steps=3, verbalizer=verbalizer, config=c, constrained=True)
    )(batch)
    for row in range(3):
        feeds: list[int] = []
        for step in range(3):
            states = tiny.hidden(plain, member, c, units[row], feeds, segments[row])[-1:]
            outputs = np.where(verbalizer.allowed[step], tiny.outputs(plain, member, states)[0], -np.inf)
            assert int(greedy[row, step]) == outputs.argmax()
            feeds.append(
                int(verbalizer.fed_back.reshape(-1)[list(verbalizer.codes.reshape(-1)).index(outputs.argmax())])
            )


def test_gradients_of_prompts_agree_with_differences():
    """Directional derivative of the prompt tuning loss along a random direction of all trained parameters."""
    c, prompt = tiny.config(2, prosody=PROSODIES["discrete, (True, True)"]), PromptConfig(length=2, separators=2)
    verbalizer = verbalizers.learnable(tiny.TASK, 24)
    lm, bank = tiny.lm(c), tiny.bank(c, prompt, verbalizer, 1)
    units = tiny.utterances(c, LENGTHS)
    batch = tiny.spoken_batch(tiny.batch(units, 16, tiny.random_classes(tiny.TASK, 6)), tiny.spoken(units))

    @jax.jit
    def loss(bank):
        return losses.member_losses(
            lm,
            bank,
            batch,
            None,
            loss=losses.LossConfig(),
            prompt=prompt,
            verbalizers=[verbalizer],
            config=c,
            compute=F32,
        )[0]

    grads = jax.grad(loss)(bank)
    rng = np.random.default_rng(0)
    change = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), bank)
    moved = lambda size: float(loss(jax.tree.map(lambda a, b: a + size * b, bank, change)))  # noqa: E731
    slope = sum(float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(change), strict=True))
    assert slope == pytest.approx((moved(1e-3) - moved(-1e-3)) / 2e-3, rel=2e-2)


# ---- pieces


def test_a_unit_lm_has_no_streams_and_is_unchanged():
    c = tiny.config(2)
    assert streams.init(jax.random.key(0), c) == {}
    assert float(streams.embed({}, c, None)) == 0
    assert c.opener == vocab.EOS
    assert c.first_position == vocab.FIRST_POSITION
    assert unit_lm.init(jax.random.key(0), c).keys() == {"embed", "layers", "final_norm"}


@pytest.mark.parametrize("which", PROSODIES)
def test_sizes(which: str):
    c = tiny.config(2, prosody=PROSODIES[which])
    shapes = jax.eval_shape(lambda: unit_lm.init(jax.random.key(0), c))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == c.num_params
    published = UnitLMConfig(prosody=ProsodyConfig(f0_edges=tuple(np.linspace(-1, 1, 31).tolist())))
    assert published.prosody is not None
    assert published.prosody.symbols == (25, 36)
    assert published.first_position == 102


def test_a_multi_stream_lm_without_streams_is_refused():
    c = tiny.config(2, prosody=PROSODIES["discrete, (True, True)"])
    with pytest.raises(ValueError, match="durations and f0 besides units"):
        unit_lm.logits(tiny.lm(c), c, np.asarray([[0, 5]]))


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(-3, 3, width=32)), min_size=1, max_size=8))
def test_symbols_are_clipped_durations_and_counts_of_edges(segments: list[tuple[int, float]]):
    prosody = PROSODIES["discrete, (True, True)"]
    duration, f0 = (np.asarray(column) for column in zip(*segments, strict=True))
    found = streams.symbols(prosody, Streams(duration.astype(np.int32), f0.astype(np.float32)))
    assert found.duration.tolist() == [min(d, 20) for d, _ in segments]
    assert found.f0.tolist() == [sum(np.float32(x) > np.float32(edge) for edge in EDGES) for _, x in segments]


def test_columns_without_targets_have_no_loss():
    prosody = PROSODIES["discrete, (True, True)"]
    outputs = Streams(jnp.ones((1, 3, 25)), jnp.ones((1, 3, 10)))
    targets = Streams(np.asarray([[0, 3, 0]]), np.asarray([[vocab.F0_BOS, 0.2, vocab.F0_BOS]], np.float32))
    found = streams.losses(prosody, outputs, targets)
    np.testing.assert_allclose(found.duration, [[0, np.log(25), 0]], rtol=1e-5)
    np.testing.assert_allclose(found.f0, [[0, np.log(10), 0]], rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"f0_edges": (0.2, 0.1)}, "ascending"),
        ({"f0_edges": (float("nan"),)}, "finite"),
        ({"f0_edges": ("x",)}, "finite"),
        ({"discrete": False, "f0_edges": (0.1,)}, "continuous"),
        ({"max_duration": 0}, "max_duration is 0"),
        ({"f0_input": 1}, "f0_input is 1"),
    ],
)
def test_invalid_prosody_is_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ProsodyConfig(**wrong)
