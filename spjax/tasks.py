"""Task definitions: slots, their labels, and a metric; one row of `TASKS` each."""

from __future__ import annotations

import dataclasses
import unicodedata

METRICS = {"accuracy": "accuracy", "exact_match": "exact match", "eer": "EER", "weighted_f1": "weighted F1"}
LONGEST_LABEL = 1000  # characters
LOWER_IS_BETTER = frozenset({"eer"})
# Baselines reported beside a score: name in results.json and in a pack's card → displayed name.
BASELINES = {"ngram": "n-gram", "probe": "linear probe"}


@dataclasses.dataclass(frozen=True)
class Slot:
    """One thing to predict about an utterance: a name and its labels, in class order."""

    name: str
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError(f"slot {self.name!r} has no labels")
        twice = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twice:
            raise ValueError(f"slot {self.name!r} has the labels {twice} twice: labels of a slot must differ")
        seen: dict[str, str] = {}  # displayed form (accents composed, no invisible characters or outer spaces) → label
        for label in self.labels:
            if not label.strip():
                raise ValueError(f"slot {self.name!r:.40} has a blank label: give it text")
            if len(label) > LONGEST_LABEL:
                raise ValueError(
                    f"slot {self.name!r:.40} has a label of {len(label)} characters: {LONGEST_LABEL} at most"
                )
            shown = "".join(c for c in unicodedata.normalize("NFC", label) if unicodedata.category(c) != "Cf")
            twin = seen.setdefault(" ".join(shown.split()), label)
            if twin != label:
                raise ValueError(f"slot {self.name!r:.40}: labels {twin!a:.60} and {label!a:.60} look alike")


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task with K slots. Class ids number the labels of all slots in order (C classes in all).

    Two slots may have the same label ("none" of object and of location): they are different classes.
    """

    name: str
    slots: tuple[Slot, ...]
    metric: str = "accuracy"  # one of METRICS

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"task {self.name!r}: unknown metric {self.metric!r}; known are {', '.join(METRICS)}")
        sizes = [len(slot.labels) for slot in self.slots]
        if self.metric == "eer" and sizes != [2]:
            raise ValueError(f"task {self.name!r}: eer is defined for a single slot of two labels, not {sizes}")

    @property
    def num_classes(self) -> int:
        """C, over all slots."""
        return sum(len(slot.labels) for slot in self.slots)

    @property
    def slot_offsets(self) -> tuple[int, ...]:
        """First class id of each slot, and C at the end: K + 1 numbers."""
        offsets = [0]
        for slot in self.slots:
            offsets.append(offsets[-1] + len(slot.labels))
        return tuple(offsets)

    @property
    def classes(self) -> tuple[tuple[str, str], ...]:
        """(slot name, label) of every class id."""
        return tuple((slot.name, label) for slot in self.slots for label in slot.labels)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_DM_SC = _words("one two three four five six seven eight nine close up down previous next in out left right home")
_LT_SC = "ne ačiū stop įjunk išjunk į_viršų į_apačią į_dešinę į_kairę startas pauzė labas iki unknown silence"

_AR40 = """
    backward cancel close digit direction disable down eight enable enter five forward four left move next nine no ok
    one open options previous receive record right rotate send seven six start stop three two undo up yes zero
"""  # and "zoom in", "zoom out"

_VCTK = """
    225 226 227 228 229 230 231 232 233 234 236 237 238 239 240 241 243 244 245 246 247 248 249 250 251 252 253 254
    255 256 257 258 259 260 261 262 263 264 265 266 267 268 269 270 271 272 273 274 275 276 277 278 279 280 281 282
    283 284 285 286 287 288 292 293 294 295 297 298 299 300 301 302 303 304 305 306 307 308 310 311 312 313 314 316
    317 318 323 326 329 330 333 334 335 336 339 340 341 343 345 347 351 360 361 362 363 364 374 376
"""  # without 315, who has few utterances

_ESC50 = """
    dog rooster pig cow frog cat hen insects sheep crow
    rain sea_waves crackling_fire crickets chirping_birds water_drops wind pouring_water toilet_flush thunderstorm
    crying_baby sneezing clapping breathing coughing footsteps laughing brushing_teeth snoring drinking_sipping
    door_wood_knock mouse_click keyboard_typing door_wood_creaks can_opening washing_machine vacuum_cleaner clock_alarm
    clock_tick glass_breaking helicopter chainsaw siren car_horn engine train church_bells airplane fireworks hand_saw
"""  # in the order of the data set's class numbers, 0 to 49

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "fsc",
            (
                Slot("action", ("change language", "activate", "deactivate", "increase", "decrease", "bring")),
                Slot(
                    "object",
                    _words(
                        "none music lights volume heat lamp newspaper juice socks Chinese Korean English German shoes"
                    ),
                ),
                Slot("location", _words("none kitchen bedroom washroom")),
            ),
            metric="exact_match",
        ),
        Task(
            "gsc",
            (Slot("command", _words("yes no up down left right on off stop go _unknown_ _silence_")),),
        ),
        Task("grabo", (Slot("command", tuple(f"recording{number}" for number in range(1, 37))),)),
        Task("lt_sc", (Slot("command", _words(_LT_SC)),)),
        Task("ar_sc", (Slot("command", _words("add back cancel delete confirm continue 0 1 2 3 4 5 6 7 8 9")),)),
        # dm_sc follows the paper, which drops six of the words; dm_sc19 is the complete data set
        Task("dm_sc", (Slot("command", _words("one two three four five six seven eight nine up down left right")),)),
        Task("dm_sc19", (Slot("command", _DM_SC),)),
        Task("voxforge", (Slot("language", _words("de en es fr it ru")),)),
        # The EER of two labels does not depend on their order; in its literature, bona fide is the positive class.
        Task("asvspoof", (Slot("origin", ("bonafide", "spoof")),), metric="eer"),
        Task("iemocap", (Slot("emotion", _words("neu hap ang sad")),)),
        Task(
            "accentdb",
            (Slot("accent", _words("american australian bangla british indian malayalam odiya telugu welsh")),),
        ),
        Task("easycall", (Slot("severity", _words("0 1 2 3 4 5")),)),
        Task("mustard", (Slot("sarcasm", ("false", "true")),), metric="weighted_f1"),
        Task("mustardpp", (Slot("sarcasm", ("0", "1")),), metric="weighted_f1"),
        Task("vox1_gender", (Slot("gender", ("m", "f")),)),
        Task("vox1_speaker", (Slot("speaker", tuple(f"id{number}" for number in range(10001, 11252))),)),
        Task("vad", (Slot("activity", ("speech", "background")),)),
        Task("esc50", (Slot("sound", _words(_ESC50)),)),
        Task("ar40", (Slot("command", (*_words(_AR40), "zoom in", "zoom out")),)),
        Task("esd_emotion", (Slot("emotion", _words("neutral angry happy sad surprise")),)),
        Task("esd_speaker", (Slot("speaker", tuple(f"{number:04d}" for number in range(11, 21))),)),
        Task("vctk_gender", (Slot("gender", ("Female", "Male")),)),
        # accents of five speakers or more
        Task("vctk_accent", (Slot("accent", _words("English American Scottish Irish Canadian NorthernIrish")),)),
        Task("vctk_speaker", (Slot("speaker", tuple(f"p{number}" for number in _words(_VCTK))),)),
    )
}
