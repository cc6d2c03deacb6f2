"""The unit LM against outputs of fairseq for a tiny model with random weights."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spjax import vocab
from spjax.models import unit_lm
from spjax.models.config import Compute
from tests.golden_data import relative, tiny_lm


@pytest.fixture(scope="module")
def lm(golden: Path):
    return tiny_lm(golden)


@pytest.fixture(scope="module")
def expected(golden: Path):
    return dict(np.load(golden / "lm" / "lm_logits.npz"))


def real(expected) -> np.ndarray:
    return np.arange(expected["tokens"].shape[1]) < expected["lengths"][:, None]


def test_logits(lm, expected):
    config, params = lm
    found = np.asarray(jax.jit(unit_lm.logits, static_argnums=1)(params, config, expected["tokens"]))
    assert relative(found[real(expected)], expected["logits"][real(expected)]) < 1e-5
    assert relative(found[real(expected)], expected["logits_f64"][real(expected)]) < 1e-5


def test_logits_in_bfloat16_are_close(lm, expected):
    config, params = lm
    half = Compute("bfloat16")
    found = np.asarray(jax.jit(unit_lm.logits, static_argnums=(1, 3))(params, config, expected["tokens"], half))
    assert found.dtype == np.float32
    assert 1e-5 < relative(found[real(expected)], expected["logits"][real(expected)]) < 3e-2


def test_hidden_states_layer_by_layer(lm, expected):
    config, params = lm
    tokens = expected["tokens"]
    length = tokens.shape[1]
    table = unit_lm.sinusoids(vocab.FIRST_POSITION + length, config.dim)[vocab.FIRST_POSITION :]
    x = unit_lm.embed_tokens(params, tokens) + table
    assert relative(np.asarray(x)[real(expected)], expected["hidden_0"][real(expected)]) < 1e-5
    block = unit_lm.Block(config, Compute())
    empty = jax.tree.map(lambda a: a[0], unit_lm.empty_prefix(config))
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    run = jax.jit(lambda weights, x: block.apply({"params": weights}, (x,), empty, causal, length)[0])
    for layer in range(config.layers):
        x = run(jax.tree.map(lambda a, i=layer: a[i], params["layers"]), x)
        after = expected[f"hidden_{layer + 1}"]
        assert relative(np.asarray(x)[real(expected)], after[real(expected)]) < 1e-5, f"layer {layer}"


def test_1300_tokens(golden: Path, lm):
    config, params = lm
    expected = np.load(golden / "lm" / "lm_logits_long.npz")
    found = jax.jit(unit_lm.logits, static_argnums=1)(params, config, expected["tokens"])
    assert relative(np.asarray(found)[:, -16:], expected["logits_last16"]) < 1e-5


def test_sinusoids(golden: Path):
    expected = np.load(golden / "lm" / "sinusoid.npz")["weights"]
    found = unit_lm.sinusoids(*expected.shape)
    assert found.dtype == np.float32
    assert not found[vocab.PAD].any()
    # At row 1,399 float32 angles have an error of 6e-5: only the same rounding gives the same table.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
