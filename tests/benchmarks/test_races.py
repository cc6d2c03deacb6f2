"""Benchmark harness: sides do equal work, ratios are taken within a round, FLOPs are correct, errors name a side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np
import pytest

from benchmarks import common, decoding, matmul_peak, training_step

SMALL = argparse.Namespace(batch=3, units=7, layers=3, dim=64)


@pytest.fixture(scope="module")
def job() -> common.Job:
    return common.make_job(SMALL)


def torch_needed() -> None:
    pytest.importorskip("torch", reason="PyTorch is a benchmark-only dependency (the extra bench)")


def test_the_job_is_the_same_in_every_process(job: common.Job) -> None:
    again = common.make_job(SMALL)
    assert np.array_equal(job.lm["layers"]["ffn_out"]["kernel"], again.lm["layers"]["ffn_out"]["kernel"])
    assert np.array_equal(job.units, again.units)
    counted = sum(np.size(leaf) for layer in job.lm["layers"].values() for leaf in layer.values())
    counted += job.lm["embed"].size + 2 * 64
    assert counted == job.config.num_params


@pytest.mark.slow
def test_both_sides_have_equal_losses(job: common.Job) -> None:
    torch_needed()
    sides = [training_step.runner(side, job) for side in (*training_step.PEERS, *training_step.OURS)]
    losses = np.array([[run()["loss"] for _ in range(4)] for run in sides])
    assert np.ptp(losses[0]) > 1e-4  # the parameters change
    float32, bfloat16 = losses[[0, 1, 4]], losses[[2, 3, 5]]
    np.testing.assert_allclose(float32, losses[:1].repeat(3, 0), rtol=1e-5)
    np.testing.assert_allclose(bfloat16, losses[:1].repeat(3, 0), rtol=2e-2)


def test_both_sides_predict_the_same(job: common.Job) -> None:
    torch_needed()
    want = decoding.runner("peer-float32", job)()["labels"]
    assert decoding.runner("ours-float32", job)()["labels"][: len(want)] == want
    assert np.shape(want) == (decoding.PEER_UTTERANCES, decoding.LABELS)


def test_the_scored_combinations_are_fluent_speech_commands() -> None:
    found = decoding.combinations()
    assert len(set(found)) == len(found) == 31
    offsets = common.FSC.slot_offsets
    assert all(offsets[k] <= ids[k] < offsets[k + 1] for ids in found for k in range(3))


def test_the_peers_flops_agree_with_torch(job: common.Job) -> None:
    torch_needed()
    from torch.utils.flop_counter import FlopCounterMode

    run = training_step.runner("peer-bfloat16", job)  # explicit attention, so that the counter sees each product
    with FlopCounterMode(display=False) as counter:
        run()
    tokens = SMALL.units + 5
    want = common.peer_training_flops(job.config, SMALL.batch, tokens)
    # Ours counts only the causal half of attention, and no verbalizer.
    rest = 3 * job.config.layers * 2 * SMALL.batch * (tokens + 5) ** 2 * 64
    verbalizer = 3 * 2 * SMALL.batch * (tokens + 5) * 104 * 28
    assert abs(counter.get_total_flops() - want - rest - verbalizer) < 0.001 * want


def test_floors_are_below_the_reference() -> None:
    full = common.lm_config(argparse.Namespace(layers=12, dim=1024))
    assert full.num_params == 151_263_232
    floor, whole = common.training_floor_flops(full, 32, 55, 5), common.peer_training_flops(full, 32, 55)
    # A step is two passes over 151 M weights for all but the last layer's rows: a lower bound of the floor.
    assert 0.8 < floor / whole < 0.9
    assert floor > 0.9 * 2 * 2 * 32 * 55 * full.num_params * 11 / 12
    assert 2 * 53 * full.num_params * 11 / 12 < common.decoding_floor_flops(full, 50, 3) < 2 * 55 * full.num_params


def fake(body: str) -> list[str]:
    return [sys.executable, "-c", f"from benchmarks import common; import time, sys\n{body}"]


def test_sides_alternate_and_are_timed() -> None:
    quick = fake("common.serve(lambda: print('noise') or {'utterances': 2, 'at': time.monotonic()})")
    slow = fake("common.serve(lambda: time.sleep(.05) or {'utterances': 1, 'at': time.monotonic()})")
    results = common.race({"quick": quick, "slow": slow}, rounds=2)
    a, b = results["quick"], results["slow"]
    assert a[0]["at"] < b[0]["at"] < b[1]["at"] < a[1]["at"]  # the order is reversed in every other round
    assert all(0.05 <= result["seconds"] < 0.1 for result in b)  # only one of two runs is timed
    assert all(result["seconds"] < 0.05 for result in a)
    assert common.cost({"seconds": 3.0, "utterances": 2}) == 1.5


def test_a_side_that_ends_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"side 'broken' ended with code 3"):
        common.race({"broken": fake("sys.exit(3)")}, rounds=1)


def test_ratios_are_taken_within_a_round() -> None:
    assert common.ratio([2.0, 40.0, 9.0], [1.0, 10.0, 3.0]) == (3.0, 2.0, 4.0)
    runs: Callable[[list[float]], list[common.Result]] = lambda times: [{"seconds": t, "utterances": 1} for t in times]  # noqa: E731
    results = {
        "ours-float32": runs([1.0, 1.0, 1.0]),
        "peer-float32": runs([3.0, 3.0, 9.0]),
        "peer-float32-onednn": runs([2.0, 2.0, 2.0]),
    }
    text = common.goals(results, [("ours-float32", "float32", 2.5)])
    assert "2.00 (2.00–2.00) missed | peer-float32-onednn | 3.00 (3.00–9.00)" in text


def test_different_losses_are_an_error() -> None:
    results = {side: [{"loss": 1.0}] for side in (*training_step.PEERS, *training_step.OURS)}
    training_step.check_losses(results)
    results["ours-float32"] = [{"loss": 1.01}]
    with pytest.raises(AssertionError, match="ours-float32: the loss differs"):
        training_step.check_losses(results)


@pytest.mark.parametrize("side", matmul_peak.SIDES)
def test_matmul_rates(side: str) -> None:
    if side.startswith("torch"):
        torch_needed()
    found = matmul_peak.runner(side, rows=64, dim=64)()
    assert found["peak"] == max(found["rates"].values()) > 0
    assert len(found["rates"]) == (6 if side.startswith("jax") else 3)
