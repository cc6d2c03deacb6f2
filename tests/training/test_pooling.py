"""Pooled hidden states equal the LM's, independent of batching."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from spjax.data import loader
from spjax.data import plan as planning
from spjax.models import unit_lm
from spjax.models.config import Compute, ProsodyConfig, UnitLMConfig
from spjax.training import masks, pooling, sharding
from spjax.types import Streams
from tests import toy

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("prosody", [None, ProsodyConfig(f0_edges=(-0.2, 0.0, 0.2))], ids=["units", "streams"])
def test_every_layer_returns_the_mean_of_its_hidden_states(
    prosody: ProsodyConfig | None, monkeypatch: pytest.MonkeyPatch
):
    config = UnitLMConfig(vocab_size=104, dim=32, layers=2, heads=2, ffn_dim=64, prosody=prosody)
    lm = toy.tiny_lm(config=config)
    units = toy.unit_set("toy", 6, 0)
    if prosody:
        rng, size = np.random.default_rng(0), len(units.units)
        f0 = rng.normal(size=size).astype(np.float32) / 5
        units = dataclasses.replace(units, durations=rng.integers(1, 9, size).astype(np.int32), f0=f0)
    mesh = sharding.make_mesh()
    weights = masks.unflatten(sharding.layerwise(mesh, masks.flatten(lm)))
    plan = planning.plan(
        units.lengths, seed=0, epoch=0, buckets=(8, 16), shuffle=False, max_rows=4, row_multiple=4, max_tokens=64
    )
    found = pooling.pooled_states(weights, config, units, plan, mesh, Compute())
    assert found.shape == (2, 6, 32)

    # The LM without its final norm, on every utterance without padding.
    plain = unit_lm.layer_norm
    monkeypatch.setattr(unit_lm, "layer_norm", lambda x, w, *eps: x if w is lm["final_norm"] else plain(x, w, *eps))
    for i, length in enumerate(units.lengths):
        batch = loader.make_batch(units, np.asarray([[i]]), int(length))
        tokens = np.concatenate([batch.source, batch.last[:, None]], axis=1)
        streams = None if batch.streams is None else Streams(*(known[:, :-1] for known in batch.streams))
        for layers in (1, 2):
            of = {**lm, "layers": jax.tree.map(lambda leaf: leaf[:layers], lm["layers"])}  # noqa: B023
            cut = dataclasses.replace(config, layers=layers)
            states = unit_lm.hidden_states(of, cut, tokens, streams=streams)
            np.testing.assert_allclose(found[layers - 1, i], states[0, 1:].mean(axis=0), atol=1e-5)
