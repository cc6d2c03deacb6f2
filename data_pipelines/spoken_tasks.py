"""Nine tasks on synthesised speech: labels, and random text, language and speaking style of utterances.

In six tasks the label is in the words, the voice or the sound. In three it is in prosody: "melody" (question or
statement), "emphasis" (on which word) and "style" (slow or fast, flat or lively). There, one voice says the same words
once with every label, with equal phonemes, so that neither words nor voice reveal the label. (Units may reveal a
little: slow speech has more of them.) Rate and pitch vary between utterances as in the other tasks, unless the label
sets them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from spjax.tasks import Slot, Task


class Line(NamedTuple):
    """Parameters of an utterance.

    Attributes:
      labels: of the task's slots.
      text: text or SSML for espeak.say; "" for noise alone.
      language: language and accent, by the engine's name.
      gender: of the voice; "" for either.
      snr: bounds of the signal-to-noise ratio in dB.
      rate, range: bounds of the fields of espeak.Manner; the upper one is exclusive.
    """

    labels: tuple[str, ...]
    text: str = ""
    language: str = "en-us"
    gender: str = ""
    snr: tuple[float, float] = (20.0, 40.0)
    rate: tuple[int, int] = (140, 200)
    range: tuple[int, int] = (35, 66)


def _list(text: str) -> tuple[str, ...]:
    return tuple(one.strip() for one in text.split(","))


_COMMANDS = _list("yes, no, up, down, left, right, on, off, stop, go")
_OTHERS = _list(
    "bed, bird, cat, dog, happy, house, marvin, sheila, tree, zero, one, two, three, four, five, six, seven, eight, "
    "nine, bread, river, table, yellow, music, paper, window, apple, garden, orange, letter, morning"
)
_WHERE = ("kitchen", "bedroom", "washroom")
_INTENTS: tuple[tuple[str, str, str], ...] = (
    *((action, "lights", place) for action in ("activate", "deactivate") for place in ("none", *_WHERE)),
    *((action, thing, "none") for action in ("activate", "deactivate") for thing in ("music", "lamp")),
    *((action, "heat", place) for action in ("increase", "decrease") for place in ("none", *_WHERE)),
    *((action, "volume", "none") for action in ("increase", "decrease")),
    *(("bring", thing, "none") for thing in ("newspaper", "juice", "socks", "shoes")),
    *(("bring", thing, "bedroom") for thing in ("socks", "shoes", "newspaper")),
    *(("bring", thing, "kitchen") for thing in ("juice", "newspaper")),
)
_PHRASES = {
    "activate": ("turn on the {0}", "switch on the {0}", "{0} on", "put the {0} on", "start the {0}"),
    "deactivate": ("turn off the {0}", "switch off the {0}", "{0} off", "put the {0} out", "stop the {0}"),
    "increase": ("turn up the {0}", "raise the {0}", "more {0}", "increase the {0}", "{0} up"),
    "decrease": ("turn down the {0}", "lower the {0}", "less {0}", "decrease the {0}", "{0} down"),
    "bring": ("bring me the {0}", "get me my {0}", "fetch the {0}", "go get the {0}", "bring my {0}"),
}
_PLACES = {"increase": "in", "decrease": "in", "activate": "in", "deactivate": "in", "bring": "from"}
_LANGUAGES = {
    "german": "de", "english": "en-us", "spanish": "es", "french": "fr", "italian": "it", "dutch": "nl",
    "lithuanian": "lt", "russian": "ru",
}  # fmt: skip
_ACCENTS = {
    "american": "en-us", "british": "en-gb-x-rp", "caribbean": "en-029", "lancastrian": "en-gb-x-gbclan",
    "scottish": "en-gb-scotland",
}  # fmt: skip
_WHO = _list(
    "my father, the girl, her brother, our teacher, the farmer, a dancer, the doctor, that woman, the driver, his uncle"
)
_DOES = _list("took, heard about, asked for, walked past, bought, forgot, carried, turned over, laughed at")
_WHAT = _list(
    "the water, a new car, the last letter, the old house, a warm bath, the garden path, another dance, the north road,"
    "a hot coffee, the market, thirty birds, a better idea, the first class, an early start, the corner shop, the park"
)
_MARKS = {"question": "?", "statement": "."}
# Not <emphasis>: the engine pauses before it and reduces vowels around it, which would change the units of the words.
# No full stop after a tag, since the engine reads it aloud.
_STRESSED = '<prosody rate="85%" pitch="+35%">{}</prosody>'
_SLOW, _FAST, _FLAT, _LIVELY = (110, 136), (190, 231), (0, 16), (80, 100)
_STYLES = {
    "slow_flat": (_SLOW, _FLAT), "slow_lively": (_SLOW, _LIVELY),
    "fast_flat": (_FAST, _FLAT), "fast_lively": (_FAST, _LIVELY),
}  # fmt: skip


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _commands(rng: np.random.Generator) -> list[Line]:
    word = _pick(rng, [*_COMMANDS, "_unknown_"])
    return [Line((word,), _pick(rng, _OTHERS) if word == "_unknown_" else word)]


def _intents(rng: np.random.Generator) -> list[Line]:
    action, thing, place = _INTENTS[int(rng.integers(len(_INTENTS)))]
    where = "" if place == "none" else f" {_PLACES[action]} the {place}"
    return [Line((action, thing, place), _pick(rng, _PHRASES[action]).format(thing) + where)]


def _language(rng: np.random.Generator) -> list[Line]:
    name = _pick(rng, list(_LANGUAGES))
    number = str(int(10 ** rng.uniform(1, 3)))  # digits are a text in every language
    return [Line((name,), number, _LANGUAGES[name])]


def _sentence(rng: np.random.Generator) -> tuple[str, str, str]:
    return _pick(rng, _WHO), _pick(rng, _DOES), _pick(rng, _WHAT)


def _gender(rng: np.random.Generator) -> list[Line]:
    gender = _pick(rng, ["female", "male"])
    return [Line((gender,), " ".join(_sentence(rng)), "en-us", gender)]


def _accent(rng: np.random.Generator) -> list[Line]:
    name = _pick(rng, list(_ACCENTS))
    return [Line((name,), " ".join(_sentence(rng)), _ACCENTS[name])]


def _voice_activity(rng: np.random.Generator) -> list[Line]:
    if rng.random() < 0.5:
        return [Line(("background",))]
    text = " ".join(_sentence(rng))
    return [Line(("speech",), text, _pick(rng, list(_LANGUAGES.values())), snr=(3.0, 25.0))]


def _melody(rng: np.random.Generator) -> list[Line]:
    text = " ".join(_sentence(rng))
    return [Line((melody,), text + mark) for melody, mark in _MARKS.items()]


def _emphasis(rng: np.random.Generator) -> list[Line]:
    who, does, what = (part.split() for part in _sentence(rng))
    words = [*who, *does, *what]
    heads = {"subject": len(who) - 1, "verb": len(who), "object": len(words) - 1}
    return [
        Line((label,), f"<speak>{' '.join([*words[:head], _STRESSED.format(words[head]), *words[head + 1 :]])}</speak>")
        for label, head in heads.items()
    ]


def _style(rng: np.random.Generator) -> list[Line]:
    text = " ".join(_sentence(rng))
    return [Line((style,), text, rate=rate, range=width) for style, (rate, width) in _STYLES.items()]


def _slot(name: str, labels: Sequence[str]) -> tuple[Slot, ...]:
    return (Slot(name, tuple(labels)),)


_DRAW: dict[str, tuple[Task, Callable[[np.random.Generator], list[Line]]]] = {
    task.name: (task, draw)
    for task, draw in (
        (Task("commands", _slot("command", [*_COMMANDS, "_unknown_"])), _commands),
        (
            Task(
                "intents",
                tuple(
                    Slot(name, tuple(dict.fromkeys(intent[slot] for intent in _INTENTS)))
                    for slot, name in enumerate(("action", "object", "location"))
                ),
                metric="exact_match",
            ),
            _intents,
        ),
        (Task("language", _slot("language", sorted(_LANGUAGES))), _language),
        (Task("gender", _slot("gender", ["female", "male"])), _gender),
        (Task("accent", _slot("accent", sorted(_ACCENTS))), _accent),
        (Task("voice_activity", _slot("sound", ["background", "speech"])), _voice_activity),
        (Task("melody", _slot("melody", list(_MARKS))), _melody),
        (Task("emphasis", _slot("emphasis", ["subject", "verb", "object"])), _emphasis),
        (Task("style", _slot("style", list(_STYLES))), _style),
    )
}
TASKS: dict[str, Task] = {name: task for name, (task, _) in _DRAW.items()}


def lines(name: str, rng: np.random.Generator) -> list[Line]:
    """Draws the next utterances of one voice for a task: one line, or the same words with every label."""
    _, draw = _DRAW[name]
    return draw(rng)
