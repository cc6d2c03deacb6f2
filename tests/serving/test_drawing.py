"""HTML of the page: units at the right place and width, labels escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from spjax.evaluation.inside import Attribution, Similarity
from spjax.serving import drawing
from spjax.tasks import Slot, Task

TAGS = {"div", "h3", "p", "span", "i", "b", "svg", "polygon", "rect", "line", "text", "title"}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td", "small"}
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
LABELS = st.lists(
    TEXT | st.sampled_from(["<img src=x onerror=alert(1)>", "</div>", '"&quot;']), min_size=2, unique=True
)


class Page(HTMLParser):
    """Parses HTML; checks that elements are closed in order, and collects text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, "all is closed"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag in TAGS, f"{tag} is none of ours"
        assert not any(name.startswith("on") for name, _ in attrs)
        self.elements.append((tag, dict(attrs)))
        if not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str, kind: str = "") -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag and kind in attributes.get("class", "")]


def prediction(labels: list[str], shares: np.ndarray) -> dict[str, Any]:
    probabilities = {label: float(share) for label, share in zip(labels, shares, strict=True)}
    return {"labels": {"what": labels[0]}, "probabilities": {"what": probabilities}}


@hypothesis.given(TEXT, LABELS)
def test_labels_and_tasks_are_escaped(task: str, labels: list[str]):
    page = Page(drawing.answers({task: prediction(labels, np.full(len(labels), 1 / len(labels)))}))
    text = "".join(page.text)
    assert task in text
    assert labels[0] in text
    assert len(page.of("div", "bar")) == min(drawing.TOP, len(labels))


def test_the_most_probable_labels_are_shown_and_the_predicted_one_first():
    labels = [f"label {n}" for n in range(9)]
    shares = np.array([0.1, 0.3, 0.01, 0.2, 0.02, 0.15, 0.03, 0.14, 0.05])
    page = Page(drawing.answers({"task": prediction(labels, shares)}))
    shown = [text for text in page.text if text.startswith("label")]
    assert shown == ["label 0", "label 1", "label 3", "label 5", "label 7"]
    assert [bar["style"] for bar in page.of("b")] == [f"width:{p:.1f}%" for p in (10, 30, 20, 15, 14)]
    assert "and 4 more" in page.text
    assert len(page.of("div", "bar best")) == 1


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.data(), st.sampled_from([160, 320]))
def test_units_are_as_wide_as_their_durations(data: st.DataObject, hop: int):
    durations = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=40))
    units = data.draw(st.lists(st.integers(0, 999), min_size=len(durations), max_size=len(durations)))
    samples = data.draw(st.sampled_from([0, 500, hop * sum(durations) + 80, 2 * hop * sum(durations)]))
    wave = np.random.default_rng(0).normal(size=samples).astype(np.float32)
    page = Page(drawing.utterance(wave, units, durations, hop))
    widths = [int(svg["width"]) for svg in page.of("svg")]
    assert sum(widths) == 10 * sum(durations)
    assert max(widths) <= 240, "a long silence wraps"
    edges = np.cumsum([0, *durations]) * hop / 16_000
    titles = [text for text in page.text if text.startswith("unit ")]
    assert titles == [
        f"unit {unit}: {a:.2f} to {b:.2f} s" for unit, a, b in zip(units, edges[:-1], edges[1:], strict=True)
    ]
    assert len(page.of("text", "number")) == len(page.of("line", "edge")) == len(units)
    fills = {svg["fill"] for svg in page.of("rect")}
    assert len(fills) == len(set(units)), "a colour for each unit"
    points = " ".join(polygon["points"] for polygon in page.of("polygon"))
    ys = [float(y) for y in re.findall(r",(\S+)", points)]
    assert all(-1 <= y <= 65 for y in ys), "the waveform stays in its place"


def test_the_waveform_is_over_its_units():
    wave = np.zeros(3200, np.float32)
    wave[1720:] = np.sin(np.arange(1480))  # frame 10 is centred on sample 1800, and starts half a hop before
    page = Page(drawing.utterance(wave, [1, 2], [10, 10], 160))
    heights = []
    for polygon in page.of("polygon"):
        ys = np.array([float(y) for y in re.findall(r",(\S+)", polygon["points"])])
        heights.append(np.ptp(ys))
    assert heights[0] < 2 or heights[0] < heights[1]
    assert heights[1] > 50
    assert Page(drawing.utterance(wave * 0, [1], [20], 160)).of("polygon"), "silence is a line"


def test_a_long_utterance_is_drawn_in_part_with_a_note():
    many = 4000
    page = Page(drawing.utterance(np.zeros(many * 160, np.float32), [5] * many, [1] * many, 160))
    assert len(page.of("svg")) == 2500
    assert "4000 units, 4000 frames of 10 ms; the first 25.0 s are drawn" in page.text


def test_a_verbalizer_names_its_units_by_label():
    task = Task("t", (Slot("what", ("<b>on</b>", "off")), Slot("where", ("here", "there"))))
    weights = np.zeros((4, 104), np.float32)
    weights[0, [4 + 71, 4 + 12]] = (0.5, 0.25)
    weights[1, 2] = 1  # a special, not a unit
    page = Page(drawing.verbalizer(task, weights))
    assert page.text.index("71") < page.text.index("12")
    assert {"+0.50", "+0.25", "</s>", "<b>on</b>", "–"} <= set(page.text)
    assert len(page.of("tr")) == 5


def test_similarity_is_a_table_of_all_pairs():
    alike = np.array([[[1, 0.25], [0.25, 1]]], np.float32)
    page = Page(drawing.similarity(["a", "<b>"], Similarity(alike, alike, np.full((2, 1), 0.1, np.float32))))
    assert [text for text in page.text if re.fullmatch(r"\d\.\d\d", text)] == ["1.00", "0.25", "0.25", "1.00"]
    assert "Random prompts: 0.10" in "".join(page.text)


def test_files_are_rows_that_name_each_file_once():
    long = "a" * 200 + ".wav"
    table = [
        ["<b>.wav", "task", "slot", "on", 0.5, ""],
        ["<b>.wav", "task", "other", "off", 0.25, ""],
        [long, "", "", "", None, "no <i>audio"],
    ]
    page = Page(drawing.rows(table))
    assert page.text.count("<b>.wav") == 1
    assert {"50.0 %", "25.0 %", "no <i>audio"} <= set(page.text)
    assert page.of("th")[-1]["title"] == long
    assert max(map(len, page.text)) < 100, "a long name leaves room for the rest"
    assert len(page.of("tr")) == 4
    cut = Page(drawing.rows(table * 10, most=4))
    assert len(cut.of("tr")) == 5
    assert "4 of 30 rows are shown, the CSV has all." in cut.text


def test_an_empty_table():
    task = Task("t", (Slot("what", ("on", "off")),))
    values = np.array([[-1e-9]], np.float32)
    found = Attribution(np.array([7]), np.array([0]), values, np.array([-1e-9]), np.array([-0.0]))
    assert "-0.0" not in drawing.attribution(task, found)


@pytest.mark.parametrize("left", [0, 7])
def test_attributions_colour_each_unit(left: int):
    task = Task("t", (Slot("what", ("on", "off")),))
    values = np.array([[0.5, -0.25, 0]], np.float32)
    found = Attribution(np.array([7, 8, 9]), np.array([1]), values, np.array([1.0]), np.array([0.75]))
    page = Page(drawing.attribution(task, found, left))
    chips = page.of("span", "chip")[:3]
    assert [chip["title"] for chip in chips] == ["+0.500", "-0.250", "+0.000"]
    assert "217, 95, 2, 0.80" in chips[0]["style"]
    assert "31, 120, 210, 0.40" in chips[1]["style"]
    assert "what: off" in page.text
    assert ("7 after them are left out" in "".join(page.text)) == bool(left)
