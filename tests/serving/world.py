"""Random prompt packs of several shapes on a tiny LM, for tests that batching does not change predictions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from spjax.io import PromptPack, make_card
from spjax.io.unit_lms import unit_lm_hash
from spjax.models import prompts, verbalizers
from spjax.models.config import ProsodyConfig, UnitLMConfig
from spjax.models.prompts import PromptConfig
from spjax.serving.load import UnitLM
from spjax.tasks import Slot, Task
from spjax.types import Encoded
from tests.models import tiny

PLAIN = UnitLMConfig(vocab_size=104, dim=16, layers=1, heads=2, ffn_dim=24)
SPOKEN = UnitLMConfig(
    vocab_size=104, dim=16, layers=1, heads=2, ffn_dim=24,
    prosody=ProsodyConfig(max_duration=5, f0_edges=(-0.2, 0.0, 0.3), interpolate_f0=True),
)  # fmt: skip
LEARNED = dataclasses.replace(PLAIN, positions="learned", max_positions=100)  # 36 units, and 64 labels
DEEPER = dataclasses.replace(PLAIN, layers=3)
DEEP = PromptConfig(length=3, separators=2, steer=True)
TASKS = {
    "word": Task("word", (Slot("word", ("yes", "no", "stop", "go")),)),
    "mood": Task("mood", (Slot("mood", ("glad", "sad")),)),
    "order": Task("order", (Slot("do", ("on", "off", "up")), Slot("what", ("lamp", "heat"))), "exact_match"),
}


def lm(config: UnitLMConfig = PLAIN, seed: int = 0) -> UnitLM:
    params = tiny.lm(config, seed)
    return UnitLM(config, params, unit_lm_hash(params, config.prosody))


def pack(
    task: Task,
    model: UnitLM,
    prompt: PromptConfig = DEEP,
    kind: str = "learnable",
    seed: int = 0,
    combinations: Sequence[Sequence[int]] | None = None,
    **units: Any,
) -> PromptPack:
    vocabulary = model.config.vocab_size
    verbalizer = (verbalizers.learnable if kind == "learnable" else verbalizers.identity)(task, vocabulary)
    params = prompts.member(tiny.bank(model.config, prompt, verbalizer, 1, seed), 0)
    # The prompt must not dominate: predictions must differ between utterances.
    soft = {"verbalizer": 0.1, "sep": 0.05, "sep_deep": 0.3}
    params = {name: leaf * np.float32(soft.get(name, 1)) for name, leaf in params.items()}
    card = make_card(
        task, kind=kind, codes=verbalizer.codes, feeds=verbalizer.fed_back, outputs=verbalizer.outputs,
        config=model.config, lm_hash=model.hash, combinations=combinations, lora=prompt.lora,
        **units,
    )  # fmt: skip
    return PromptPack(params, card)


def packs(model: UnitLM) -> dict[str, PromptPack]:
    """Four packs of one shape (labels, prompt lengths and low-rank adapters differ), and three of others."""
    low = PromptConfig(length=0, separators=2, steer=True, rank=3, alpha=1.5)
    both = dataclasses.replace(DEEP, length=1, rank=1, alpha=2.0, targets=("value", "ffn_in"))
    longer = PromptConfig(length=5, separators=2, steer=True)
    return {
        "word": pack(TASKS["word"], model),
        "mood": pack(TASKS["mood"], model, longer, seed=1),
        "low": pack(TASKS["word"], model, low, seed=5),
        "both": pack(TASKS["mood"], model, both, seed=6),
        "order": pack(TASKS["order"], model, seed=2, combinations=[(0, 3), (1, 3), (1, 4), (2, 4)]),
        "rule": pack(TASKS["word"], model, kind="identity", seed=3),
        "shallow": pack(TASKS["mood"], model, PromptConfig(length=2, deep=False), seed=4),
    }


def utterances(model: UnitLM, lengths: Sequence[int], seed: int = 0) -> list[Any]:
    units = tiny.utterances(model.config, lengths, seed)
    if model.config.prosody is None:
        return units
    streams = [np.asarray(one, float).T for one in tiny.spoken(units, seed)]
    return [
        Encoded(np.asarray(row, np.int32), duration.astype(np.int32), f0.astype(np.float32))
        for row, (duration, f0) in zip(units, streams, strict=True)
    ]


def shares(answer: dict[str, Any]) -> np.ndarray:
    """All probabilities of a task, in label order."""
    return np.asarray(list(itertools.chain.from_iterable(p.values() for p in answer["probabilities"].values())))
