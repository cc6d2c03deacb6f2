"""Bank and scaling benchmarks at toy size: bank members train as single runs do; every size is measured."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from benchmarks import bank, common, scaling
from configs import defaults

TOY = {"dim": 64, "layers": 1, "units": 6, "prompt": 3, "separators": 2, "dtype": "float32", "out": None}


def test_defaults_are_those_of_the_published_results() -> None:
    parser = argparse.ArgumentParser()
    bank.add_flags(parser)
    args = parser.parse_args([])
    lm, found = defaults.pretraining().lm, defaults.with_prompts(defaults.prompt_tuning("fsc"))
    assert common.lm_config(args) == common.UnitLMConfig(**lm)
    assert (args.prompt, args.separators, args.dtype) == (
        found.prompt.length,
        found.prompt.separators,
        found.compute.dtype,
    )
    assert bank.make_setting(args, common.lm_config(args)).prompt.steer


def test_members_train_in_a_bank_as_alone() -> None:
    args = argparse.Namespace(**TOY, bank=2, batches=(3,), rounds=2)
    results = {}
    for side in bank.SIDES[:2]:
        run = bank.runner(side, args, 3)
        spent = {"seconds": 1.0 + (side == "singles"), "cpu": 3.0}
        results[f"{side}-3"] = [{**run(), **spent} for _ in range(2)]
    results["one-3"] = results["half-3"] = [{"seconds": 0.5, "cpu": 3.0, "compile": 1.0, "utterances": 6}] * 2
    assert all(result["utterances"] == 6 for each in results.values() for result in each)
    assert bank.check_losses(results, 3, "float32") < 1e-4
    losses = np.array([result["losses"] for result in results["bank-3"]])
    assert losses.shape == (2, 2)
    assert np.ptp(losses[0]) > 1e-3  # members have different seeds and utterances
    *_, ratios = bank.tables(results, args)
    assert "| 3 | seconds | 2.00 (2.00–2.00) | 2.00 (2.00–2.00) | 0.50 (0.50–0.50) |" in ratios
    assert "| 3 | CPU seconds | 1.00 (1.00–1.00) | 1.00 (1.00–1.00) | 1.00 (1.00–1.00) |" in ratios
    results["singles-3"][1]["losses"][1] *= 1.1
    with pytest.raises(AssertionError, match="3 utterances a member: losses in the bank and alone differ"):
        bank.check_losses(results, 3, "float32")


def test_half_a_bank_has_every_other_member() -> None:
    args = argparse.Namespace(**TOY, bank=4)
    bank_run, half_run = (bank.runner(side, args, 3) for side in ("bank", "half"))
    for _ in range(2):
        whole, half = bank_run(), half_run()
        assert half["utterances"] == 6
        assert [loss == 0 for loss in half["losses"]] == [False, True, False, True]
        np.testing.assert_allclose(half["losses"][::2], whole["losses"][::2], rtol=1e-4)


def test_training_and_evaluation_are_measured() -> None:
    args = argparse.Namespace(**TOY, batch=2, lengths=(6,), batches=(2,), banks=(1,), rounds=2)
    results = scaling.measure(args)
    assert list(results) == ["training T=6 B=2 N=1", "evaluation T=6 B=2 N=1"]
    for each in results.values():
        assert len(each) == 2
        assert all(result["seconds"] > 0 and result["cpu"] > 0 and result["scratch MiB"] > 0 for result in each)


def test_growth_is_computed_within_a_round() -> None:
    args = argparse.Namespace(units=6, batch=4, lengths=(9,), batches=(4,), banks=(1, 2))
    cpu = {"T=6 B=4 N=1": (1.0, 4.0, 2.0), "T=9 B=4 N=1": (2.0, 12.0, 8.0), "T=6 B=4 N=2": (1.0, 4.0, 2.0)}
    results = {
        f"{work} {size}": [{"seconds": 0.5, "cpu": seconds, "scratch MiB": 3.0} for seconds in each]
        for work in scaling.WORKS
        for size, each in cpu.items()
    }
    length, batch, members = scaling.tables(results, args)
    assert [part.count("\n| ") for part in (length, batch, members)] == [4, 3, 4]
    assert "By T, B = 4, N = 1" in length
    assert "| 9 | 0.500 | 2000.0 | 3.00 (2.00–4.00) | 3 | 0.500" in length
    assert "| 2 | 0.500 | 500.0 | 1.00 (1.00–1.00) | 3 |" in members


def test_invalid_flags_are_refused() -> None:
    assert bank.numbers("2,8") == (2, 8)
    for text in ("", "0", "2,x"):
        with pytest.raises(argparse.ArgumentTypeError, match="not a list of positive integers"):
            bank.numbers(text)
    args = argparse.Namespace(units=6, batch=4, lengths=(6,), batches=(4,), banks=(1, 3))
    with pytest.raises(ValueError, match=r"\[3\] do not divide the 4 utterances"):
        scaling.axes(args)
