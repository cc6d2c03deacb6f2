"""What the page shows of a prompt: units of each label, attributions, similarity."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from spjax import SpeechPrompt
from spjax.models.prompts import PromptConfig
from spjax.serving import explain
from spjax.serving.batcher import Batcher, QueueFullError, as_json
from spjax.serving.limits import Limits
from tests.serving import page_world, world

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def shown(predictor: SpeechPrompt, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = page_world.recording(tmp_path_factory.mktemp("shown") / "a.wav", 0.5)
    with Batcher(predictor, Limits(timeout=600)) as batcher:
        return as_json(batcher.answer(file))


@pytest.mark.parametrize("task", ["order", "shallow"])
def test_every_kind_of_prompt_can_be_explained(predictor: SpeechPrompt, shown: dict[str, Any], task: str):
    rows = explain.label_units(predictor, task)
    assert [(slot, label) for slot, label, _ in rows] == list(predictor.tasks[task].classes)
    assert all("(+" in units for *_, units in rows)
    found = explain.attribution(predictor, task, shown)
    labels = shown["answers"][task]["labels"]
    assert [title.split(", log odds")[0] for title, _ in found.slots] == [
        f"{s}: {label}" for s, label in labels.items()
    ]
    for _, units in found.slots:
        assert [int(unit) for unit, _ in units] == shown["units"]
    shares = [abs(share) for _, units in found.slots for _, share in units]
    assert max(shares) == 1
    assert "log odds" in found.note


def test_only_prompts_in_the_layers_are_compared(predictor: SpeechPrompt):
    headers, rows, note = explain.similarity(predictor)
    assert headers == ["", *(name for name in predictor.tasks if name not in ("shallow", "low"))]
    assert [row[0] for row in rows] == headers[1:]
    assert all(row[1 + n] == "1.00" for n, row in enumerate(rows))
    assert "Random prompts" in note
    model = world.lm()
    alone = {"mood": world.pack(world.TASKS["mood"], model, PromptConfig(length=2, deep=False))}
    headers, rows, note = explain.similarity(SpeechPrompt.load(model, None, alone))
    assert (headers, rows, "at least two tasks" in note) == ([], [], True)


def test_a_quantized_lm_can_be_explained(predictor: SpeechPrompt, shown: dict[str, Any]):
    two = {name: predictor.packs[name] for name in ("rule", "mood")}
    quantized = SpeechPrompt.load(world.lm(), None, two, compute="int8")
    ((title, _),) = explain.attribution(quantized, "mood", shown).slots
    assert title.startswith(f"mood: {shown['answers']['mood']['labels']['mood']}")
    assert "Linear CKA" in explain.similarity(quantized)[2]


def test_only_the_beginning_of_long_utterances_is_explained(predictor: SpeechPrompt, shown: dict[str, Any]):
    long = {**shown, "units": [*range(50)] * 6, "durations": [1] * 300}
    found = explain.attribution(predictor, "mood", long)
    assert len(found.slots[0][1]) == 256
    assert "Only the first 256 units are explained; 44 after them are left out" in found.note


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ({"units": [1, 5000], "durations": [1, 1]}, "the LM has 0..99"),
        ({"units": [], "durations": [1, 1]}, "lists of one length"),
        ({"units": [[1], [2]], "durations": [1, 1]}, "lists of one length"),
        ({"units": ["a"], "durations": [1]}, "lists of one length"),
        ({"units": "units", "durations": [1]}, "lists of one length"),
        ({"units": [1.5, 2], "durations": [1, 1]}, "integers"),
        ({"units": [True, 2], "durations": [1, 1]}, "lists of one length"),
        ({"units": [2**40, 2], "durations": [1, 1]}, "integers"),
        ({"units": [1]}, "not a prediction of this page"),
        ({"answers": {}}, "not a prediction of this page"),
        (["units"], "not a prediction of this page"),
        ("units durations", "not a prediction of this page"),
        (7, "not a prediction of this page"),
    ],
)
def test_other_json_is_refused(predictor: SpeechPrompt, shown: Any, message: str):
    with pytest.raises(ValueError, match=message):
        explain.attribution(predictor, "mood", shown)


def test_without_a_recording_there_is_a_hint(predictor: SpeechPrompt):
    assert explain.attribution(predictor, "mood", None) == ([], "Classify a recording first.")


def test_attributions_run_one_at_a_time_and_few_may_wait():
    running, most = 0, 0

    def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        threading.Event().wait(0.02)
        running -= 1

    async def several() -> list[Any]:
        alone = explain.OneAtATime()
        return await asyncio.gather(*(alone(work) for _ in range(7)), return_exceptions=True)

    refused = [one for one in asyncio.run(several()) if one is not None]
    assert most == 1
    assert len(refused) == 3
    assert all(isinstance(one, QueueFullError) and "try again" in str(one) for one in refused)
