"""Files of every promised kind that 0.1 wrote are read, and give what they gave (tests/golden/make_release.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import spjax
from spjax.data.records import read_unit_records
from spjax.io import banks

RELEASE = Path(__file__).parent / "golden/release_0_1"
ANSWERS = json.loads((RELEASE / "answers.json").read_text())


def test_packs_and_banks_of_0_1_give_the_same_labels_with_its_lm() -> None:
    lm = spjax.load_unit_lm(RELEASE / "lm")
    for pack in (spjax.load_prompt(RELEASE / "pack"), banks.load_bank(RELEASE / "bank")["low"]):
        found = spjax.classify_units(lm, pack, ANSWERS["utterances"])
        assert [answer["labels"] for answer in found] == [answer["labels"] for answer in ANSWERS["labels"]]
        for answer, before in zip(found, ANSWERS["labels"], strict=True):
            for slot, of_slot in before["probabilities"].items():
                assert answer["probabilities"][slot] == pytest.approx(of_slot, abs=1e-6)
    assert set(banks.load_packs(RELEASE / "bank")) == {"low", "prompts"}


@pytest.mark.parametrize("name", ["lm_bfloat16", "lm_streams"])
def test_other_kinds_of_lms_of_0_1_are_read(name: str) -> None:
    described = json.loads((RELEASE / name / "config.json").read_text())
    lm = spjax.load_unit_lm(RELEASE / name)
    assert lm.hash == described["hash"]
    assert (lm.config.prosody is not None) == ("prosody" in described)


def test_an_encoder_and_a_kmeans_of_0_1_give_the_same_units() -> None:
    features = spjax.features(RELEASE / "tone.wav", RELEASE / "encoder", layer=2)
    np.testing.assert_allclose(features[:3], ANSWERS["features"], rtol=1e-5, atol=1e-5)
    encoder = spjax.load_encoder(RELEASE / "encoder", RELEASE / "kmeans", layer=2)
    assert spjax.encode(RELEASE / "tone.wav", encoder).units.tolist() == ANSWERS["units"]


def test_records_of_0_1_are_read_and_checked() -> None:
    counts = {}
    for split in ("train", "valid", "test"):
        units, card = read_unit_records(RELEASE / "records", split)
        counts[split] = len(units)
    assert counts == card.counts == {"train": 24, "valid": 12, "test": 12}
