"""Encoding benchmark: both sides compute equal features, and the minimum FLOPs agree with PyTorch's counter."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from benchmarks import common, encoding
from spjax.models.hubert_config import HubertConfig

SMALL = argparse.Namespace(batch=2, seconds=0.7, dim=64, conv_dim=32)


def peer_needed() -> None:
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"{package} is the other side of the race")


def test_both_sides_compute_equal_features() -> None:
    peer_needed()
    found = {side: np.asarray(encoding.runner(side, SMALL)()["features"]) for side in (*encoding.OURS, *encoding.PEERS)}
    want = found["peer-float32"]
    assert want.shape[1] == 8
    assert 0.3 < want.std() < 3
    for side, features in found.items():
        apart = np.abs(features - want).max()
        assert apart < (1e-4 if "float32" in side else 0.3), side
        assert (apart > 1e-4) == ("bfloat16" in side), f"{side} is of the precision that it says"


def test_the_floor_agrees_with_torch() -> None:
    peer_needed()
    from torch.utils.flop_counter import FlopCounterMode

    run = encoding.runner("peer-float32", SMALL)
    with FlopCounterMode(display=False) as counter:
        run()
    config = encoding.config_of(SMALL)
    frames = config.frames(11200)
    attention = config.layers * 4 * frames**2 * config.dim  # fused, which the counter does not see
    dropped = 2 * config.position_width * config.dim * (config.dim // config.position_groups)  # the peer's last frame
    floor = encoding.floor_flops(config, 11200) - attention + dropped
    assert counter.get_total_flops() == SMALL.batch * floor


def test_the_floor_at_full_size() -> None:
    floor = encoding.floor_flops(HubertConfig(layers=6), 16000)
    assert 9e9 < floor < 10e9, "conv stack about 4.9, six layers about 4.2, position 0.5 GFLOP a second of speech"


def test_different_features_are_an_error() -> None:
    runs = {side: [{"features": [[1.0, 2.0]]}] for side in (*encoding.OURS, *encoding.PEERS)}
    encoding.check_features(runs)
    runs["ours-float32"] = [{"features": [[1.0, 2.01]]}]
    with pytest.raises(AssertionError, match="ours-float32: features differ"):
        encoding.check_features(runs)


def test_the_job_is_the_same_in_every_process() -> None:
    (config, params, waves), (_, again, waves_again) = encoding.make_job(SMALL), encoding.make_job(SMALL)
    assert np.array_equal(params["position"]["kernel"], again["position"]["kernel"])
    assert np.array_equal(waves, waves_again)
    assert waves.shape == (2, 11200)
    assert config.layers == encoding.LAYER
    assert common.cost({"seconds": 2.0, "utterances": len(waves)}) == 1.0
