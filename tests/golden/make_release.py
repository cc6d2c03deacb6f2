"""Write tests/golden/release_0_1: files of every promised kind, as the last commit before 0.2 (68bba03) writes them.

    git worktree add --detach OLD 68bba03 && cd OLD && PYTHONPATH=. python THIS OUT

tests/test_release.py reads them with the present code. They are made of random weights and made-up units.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import jax
import numpy as np
from spjax.storage import encoders, files, kmeans_store, unit_lms

import spjax
from spjax.models import unit_lm
from spjax.models.config import ProsodyConfig, UnitLMConfig
from spjax.models.hubert_config import HubertConfig
from tests import toy

LM = UnitLMConfig(vocab_size=104, dim=16, layers=2, heads=2, ffn_dim=32)
HUBERT = HubertConfig(
    conv_dim=8, conv_kernels=(80, 4), conv_strides=(80, 4), dim=16, layers=2, heads=2, ffn_dim=32, position_width=8,
    position_groups=2,
)  # fmt: skip
UNITS = [[5, 7, 20, 33], [1, 8, 21], [60, 2, 8, 70, 21, 90]]
FLAGS = (
    "compute.dtype=float32", "train.seeds=(0,)", "train.epochs=2", "train.buckets=1", "train.max_rows=8",
    "baselines=False", "prompt.length=2", "prompt.separators=2", "optim.lr=3e-2",
)  # fmt: skip


def main(out: Path) -> None:
    """Make everything in `out`, which must not exist."""
    out.mkdir(parents=True)
    weights = jax.device_get(unit_lm.init(jax.random.key(0), LM))
    unit_lms.save_unit_lm(out / "lm", LM, weights, {"source": "random"})
    unit_lms.save_unit_lm(out / "lm_bfloat16", LM, weights, bfloat16=True)
    streams = UnitLMConfig(**{**vars(LM), "prosody": ProsodyConfig()})
    unit_lms.save_unit_lm(out / "lm_streams", streams, jax.device_get(unit_lm.init(jax.random.key(1), streams)))

    tones = np.sin(np.cumsum(np.linspace(0.05, 0.6, 8000))) * 0.5
    with wave.open(str(out / "tone.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((tones * 32767).astype("<i2").tobytes())
    random = np.random.default_rng(0)
    shapes = encoders.hubert_shapes(HUBERT)
    leaves = {path: random.normal(0, 0.3, shape).astype(np.float32) for path, shape in shapes.items()}
    encoders.save_encoder(out / "encoder", HUBERT, files.unflatten(leaves), "tiny_hubert")
    features = spjax.features(out / "tone.wav", out / "encoder", layer=2)
    centroids = features[random.permutation(len(features))[:12]].astype(np.float32)
    kmeans_store.save_kmeans(out / "kmeans", kmeans_store.KMeans(centroids, {"encoder": "tiny_hubert", "layer": 2}))

    text = toy.write_text(out / "text", train=24, held_out=12)
    for name, rank in (("low", 2), ("prompts", 0)):
        flags = [f"--config.{flag}" for flag in (*FLAGS, f"data={out}/records", f"lm={out}/lm", f"prompt.rank={rank}")]
        train = ["-m", "spjax.main", "--config=configs/fsc.py", f"--units={text}", f"--workdir={out / name}", *flags]
        subprocess.run([sys.executable, *train], check=True)
    shutil.copytree(out / "low/packs/seed_0", out / "pack")
    merge = ["merge", *(f"{name}={out / name}/packs/seed_0" for name in ("low", "prompts")), f"--out={out / 'bank'}"]
    subprocess.run([sys.executable, "-m", "spjax.packs", *merge], check=True)
    for name in ("text", "low", "prompts"):
        shutil.rmtree(out / name)

    lm = spjax.load_unit_lm(out / "lm")
    encoder = spjax.load_encoder(out / "encoder", out / "kmeans", layer=2)
    answers = {
        "utterances": UNITS,
        "units": spjax.encode(out / "tone.wav", encoder).units.tolist(),
        "features": np.asarray(features[:3]).tolist(),
        "labels": spjax.classify_units(lm, spjax.load_prompt(out / "pack"), UNITS),
    }
    (out / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
