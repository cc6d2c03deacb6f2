"""Published results on the same tasks, shown next to ours. Splits are those of the papers, if stated."""

from __future__ import annotations

# Task metric by system: SpeechPrompt v2 with its two backbones; "+": learnable verbalizer.
_COLUMNS = ("prior work", "GSLM", "GSLM+", "pGSLM", "pGSLM+")
_TABLE: dict[str, tuple[float | None, ...]] = {
    "gsc": (0.986, 0.945, 0.946, 0.943, 0.947),
    "grabo": (0.989, 0.924, 0.927, 0.175, 0.196),
    "lt_sc": (0.918, 0.932, 0.955, 0.909, 0.795),
    "ar_sc": (0.989, 0.997, 1.000, 0.856, 0.926),
    "dm_sc": (0.935, 0.743, 0.825, 0.744, 0.231),
    "fsc": (0.997, 0.972, 0.973, 0.981, 0.982),
    "voxforge": (0.998, 0.909, 0.942, 0.818, 0.804),
    "asvspoof": (0.025, 0.185, 0.135, 0.131, 0.183),
    "iemocap": (0.792, 0.421, 0.443, 0.499, 0.502),
    "easycall": (None, 0.763, 0.780, 0.838, 0.832),
    "accentdb": (0.995, 0.789, 0.834, 0.865, 0.871),
    "mustard": (0.646, 0.551, 0.778, 0.744, 0.787),
    "mustardpp": (0.652, 0.740, 0.752, 0.527, 0.582),
    "vox1_gender": (None, 0.862, 0.873, 0.916, 0.862),  # prior work reports F1, .983
    "vox1_speaker": (0.948, None, 0.009, None, 0.003),
    "vad": (0.988, 0.966, 0.969, 0.983, 0.981),
    "esc50": (0.970, 0.090, 0.375, 0.203, 0.270),
}
_V1 = {"fsc": 0.984, "gsc": 0.9516}  # SpeechPrompt v1, HuBERT-100


def published(task: str) -> tuple[tuple[str, float], ...]:
    """(system, value of the task's metric) of every published result; () for tasks not in the papers."""
    row = zip(_COLUMNS, _TABLE.get(task, ()), strict=False)
    named = [(name if name == "prior work" else f"SpeechPrompt v2, {name}", value) for name, value in row]
    named += [("SpeechPrompt v1", _V1.get(task))]
    return tuple((name, value) for name, value in named if value is not None)
