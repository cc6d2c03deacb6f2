"""Bank and scaling benchmarks at toy size: members learn in a bank as alone; every size is measured and reported."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from benchmarks import bank, common, scaling
from configs import defaults

TOY = {"dim": 64, "layers": 1, "units": 6, "prompt": 3, "separators": 2, "dtype": "float32", "out": None}


def test_defaults_are_what_the_results_are_made_with() -> None:
    parser = argparse.ArgumentParser()
    bank.add_flags(parser)
    args = parser.parse_args([])
    lm, found = defaults.pretraining().lm, defaults.prompt_tuning("fsc")
    assert common.lm_config(args) == common.UnitLMConfig(**lm)
    assert (args.prompt, args.separators, args.dtype) == (
        found.prompt.length,
        found.prompt.separators,
        found.compute.dtype,
    )
    assert bank.make_setting(args, common.lm_config(args)).prompt.steer


def test_members_learn_in_a_bank_as_alone() -> None:
    args = argparse.Namespace(**TOY, bank=2, batches=(3,), rounds=2)
    results = {}
    for side in bank.SIDES[:2]:
        run = bank.runner(side, args, 3)
        spent = {"seconds": 1.0 + (side == "singles"), "cpu": 3.0}
        results[f"{side}-3"] = [{**run(), **spent} for _ in range(2)]
    results["one-3"] = [{"seconds": 0.5, "cpu": 3.0, "compile": 1.0, "utterances": 6}] * 2
    assert all(result["utterances"] == 6 for each in results.values() for result in each)
    assert bank.check_losses(results, 3, "float32") < 1e-4
    losses = np.array([result["losses"] for result in results["bank-3"]])
    assert losses.shape == (2, 2)
    assert np.ptp(losses[0]) > 1e-3  # members have their own seeds and utterances
    *_, ratios = bank.tables(results, args)
    assert "| 3 | seconds | 2.00 (2.00–2.00) | 2.00 (2.00–2.00) |" in ratios
    assert "| 3 | CPU seconds | 1.00 (1.00–1.00) | 1.00 (1.00–1.00) |" in ratios
    results["singles-3"][1]["losses"][1] *= 1.1
    with pytest.raises(AssertionError, match="3 utterances a member: losses in the bank and alone differ"):
        bank.check_losses(results, 3, "float32")


def test_every_size_is_measured_and_reported() -> None:
    args = argparse.Namespace(**TOY, batch=2, lengths=(9,), batches=(2,), banks=(1,), rounds=1)
    results = scaling.measure(args)
    sizes = ("T=6 B=2 N=1", "T=9 B=2 N=1")
    assert set(results) == {f"{work} {size}" for work in scaling.WORKS for size in sizes}
    assert all(len(each) == 1 and each[0]["seconds"] > 0 for each in results.values())
    longer, base = (results[f"training T={units} B=2 N=1"][0]["scratch MiB"] for units in (9, 6))
    assert longer > base
    length, batch, members = scaling.tables(results, args)
    assert [part.count("\n| ") for part in (length, batch, members)] == [4, 3, 3]
    assert "1.00 (1.00–1.00)" in batch


def test_flags_that_make_no_sense_are_refused() -> None:
    assert bank.numbers("2,8") == (2, 8)
    for text in ("", "0", "2,x"):
        with pytest.raises(argparse.ArgumentTypeError, match="no list of positive integers"):
            bank.numbers(text)
    args = argparse.Namespace(units=6, batch=4, lengths=(6,), batches=(4,), banks=(1, 3))
    with pytest.raises(ValueError, match=r"\[3\] do not divide the 4 utterances"):
        scaling.axes(args)
