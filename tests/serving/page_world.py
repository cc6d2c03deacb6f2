"""A tiny but complete predictor for tests of the page, from speech to predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from spjax import SpeechPrompt
from spjax.encoders.encoder import load_encoder
from spjax.io import KMeans, save_kmeans
from spjax.tasks import Slot, Task
from tests.encoders.hubert_models import speechlike
from tests.serving import world

NASTY = Task(
    "places",
    (
        Slot("where", tuple(f"the room on floor {n}, behind the long corridor" for n in range(12))),
        Slot("<i>what</i>", ("<img src=x onerror=alert(1)>", "a & b", "${value}")),
    ),
)


def predictor(folder: Path) -> SpeechPrompt:
    """MFCC with 50 units, an LM of one layer, random packs; one has labels that would run as HTML if not escaped."""
    features = np.concatenate(load_encoder("mfcc").features([speechlike(16_000, seed) for seed in range(3)]))
    drawn = features[np.random.default_rng(0).choice(len(features), 50, replace=False)]
    save_kmeans(folder / "km", KMeans(drawn, {"encoder": "mfcc", "layer": None}))
    model = world.lm()
    packs = {**world.packs(model), "rooms & <b>places</b>": world.pack(NASTY, model, seed=7)}
    del packs["both"]  # five tasks are enough for the page, and fit on a phone's screen
    return SpeechPrompt.load(model, load_encoder("mfcc", folder / "km"), packs)


def recording(path: Path, seconds: float = 1.0, seed: int = 0) -> Path:
    """A WAV file of speech-like noise."""
    soundfile.write(path, speechlike(int(16_000 * seconds), seed), 16_000)
    return path
