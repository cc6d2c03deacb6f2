"""Encoders: files and arrays to units, single and in batches, and k-means that do not match."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import spjax
from spjax.encoders import acoustic, audio, encoder, prosody
from spjax.encoders.audio import AudioError
from spjax.encoders.encoder import Encoder, encode, load_encoder, speaker_f0
from spjax.encoders.units import expand
from spjax.io import KMeans, StorageError, save_encoder, save_kmeans
from spjax.serving.unit_checks import same_units
from tests.encoders.bad_files import encoded as audio_file
from tests.encoders.hubert_models import MHUBERT, TINY, speechlike, weights
from tests.serving import world

pytestmark = pytest.mark.usefixtures("quick_compile")

LENGTHS = (400, 5500, 16_000, 719)


def waves() -> list[np.ndarray]:
    return [speechlike(n, seed) for seed, n in enumerate(LENGTHS)]


def fitted(features: list[np.ndarray], name: str, layer: int | None, clusters: int = 12) -> KMeans:
    """A k-means whose centroids are random frames."""
    frames = np.concatenate(features)
    chosen = np.random.default_rng(0).choice(len(frames), clusters, replace=False)
    return KMeans(frames[chosen], {"encoder": name, "layer": layer})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny HuBERT under `hubert`, and a k-means for each encoder under `km_<encoder>`."""
    place = tmp_path_factory.mktemp("encoders")
    save_encoder(place / "hubert", TINY, weights(), "tiny")
    for name in ("mfcc", "log_mel", "hubert"):
        loaded = load_encoder(place / name if name == "hubert" else name, layer=2)
        save_kmeans(place / f"km_{name}", fitted(loaded.features(waves()), loaded.name, loaded.layer))
    return place


@pytest.fixture(scope="module", params=["mfcc", "log_mel", "hubert"])
def loaded(request: pytest.FixtureRequest, folder: Path) -> Encoder:
    name = request.param
    return load_encoder(folder / name if name == "hubert" else name, folder / f"km_{name}", layer=2)


@pytest.fixture(scope="module")
def mfcc(folder: Path) -> Encoder:
    return load_encoder("mfcc", folder / "km_mfcc")


def test_what_is_loaded(folder, loaded):
    names = {"mfcc": ("mfcc", None, 160), "log_mel": ("log_mel", None, 160), "tiny": ("tiny", 2, 320)}
    assert (loaded.name, loaded.layer, loaded.hop) == names[loaded.name]
    assert loaded.chunk is None
    assert len(loaded.kmeans.id) == 12


@pytest.fixture(scope="module")
def mhubert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mHuBERT of 25 frames a second under `encoder`, and its k-means under `kmeans`."""
    place, config = tmp_path_factory.mktemp("mhubert"), dataclasses.replace(TINY, **MHUBERT)
    save_encoder(place / "encoder", config, weights(config), "mhubert_base_25hz")
    loaded = load_encoder(place / "encoder", layer=2)
    save_kmeans(place / "kmeans", fitted(loaded.features([speechlike(32_000)]), loaded.name, 2))
    return place


def test_f0_has_the_frames_of_an_encoder_with_longer_frames(mhubert: Path):
    loaded = load_encoder(mhubert / "encoder", mhubert / "kmeans", layer=2)
    assert (loaded.hop, loaded.center, loaded.least) == (640, 360, 720)
    assert len(spjax.features(speechlike(16_000), mhubert / "encoder", layer=2)) == 24
    for n in (720, 1359, 1360, 16_321):
        wave = speechlike(n)
        assert len(loaded.log_f0(wave)) == len(loaded.features([wave])[0]) == (n - 720) // 640 + 1
    late = np.zeros(32_000, np.float32)
    late[16_000:] = 0.1 * np.sin(2 * np.pi * 150 * np.arange(16_000) / 16_000)
    assert abs(np.flatnonzero(np.isfinite(loaded.log_f0(late)))[0] - 25) <= 1
    chunked = dataclasses.replace(loaded, chunk=16_000)
    assert len(chunked.log_f0(late)) == 2 * 24


def test_a_recording_shorter_than_a_frame_is_refused_by_name(mhubert: Path, tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(audio_file(speechlike(500), 16_000, subtype="FLOAT"))
    assert len(audio.read_audio(tmp_path / "a.wav").wave) == 500
    with pytest.raises(AudioError, match=r"a\.wav is too short: 500 samples at 16000 Hz, at least 720 are needed"):
        audio.read_audio(tmp_path / "a.wav", least=load_encoder(mhubert / "encoder", layer=2).least)


def test_units_of_25_and_50_frames_a_second_are_not_mixed(mhubert: Path, folder: Path):
    """By the k-means, which names encoder and layer; by the pack, which names its k-means too."""
    with pytest.raises(ValueError, match=r"was fitted on mhubert_base_25hz layer 2.*the encoder gives tiny layer 2"):
        load_encoder(folder / "hubert", mhubert / "kmeans", layer=2)
    with pytest.raises(ValueError, match=r"was fitted on tiny layer 2.*gives mhubert_base_25hz layer 2"):
        load_encoder(mhubert / "encoder", folder / "km_hubert", layer=2)
    with pytest.raises(ValueError, match=r"was fitted on mhubert_base_25hz layer 2.*gives mhubert_base_25hz layer 1"):
        load_encoder(mhubert / "encoder", mhubert / "kmeans", layer=1)
    model = world.lm(world.SPOKEN)
    slow = load_encoder(mhubert / "encoder", mhubert / "kmeans", layer=2)
    fast = load_encoder(folder / "hubert", folder / "km_hubert", layer=2)
    made = {"encoder": slow.name, "layer": 2, "kmeans": slow.kmeans.id, "merged": True}
    packs = {"mood": world.pack(world.TASKS["mood"], model, **made)}
    assert same_units(packs, slow, model.config)
    predictor = spjax.SpeechPrompt.load(model, slow, packs)
    short, whole = predictor.encode([speechlike(500), speechlike(16_000)], rate=16_000)
    assert isinstance(short, AudioError)
    assert "utterance 0 is too short: 500 samples" in str(short)
    assert sum(whole.durations) == 24
    with pytest.raises(StorageError, match=r"uses units of encoder mhubert_base_25hz, kmeans .*, this encoder of"):
        same_units(packs, fast, model.config)
    for changed in ({"layer": 11}, {"kmeans": "0" * 12}, {"encoder": "hubert_base_ls960"}):
        packs = {"mood": world.pack(world.TASKS["mood"], model, **{**made, **changed})}
        with pytest.raises(StorageError, match=f"uses units of {next(iter(changed))} {next(iter(changed.values()))}"):
            same_units(packs, slow, model.config)


def test_units_are_the_nearest_centroids(loaded):
    for features, units in zip(loaded.features(waves()), loaded.units(waves()), strict=True):
        distance = ((features[:, None].astype(np.float64) - loaded.kmeans.centroids) ** 2).sum(-1)
        best = np.sort(distance, 1)
        clear = best[:, 1] - best[:, 0] > 1e-4
        assert (units.dtype, units.shape) == (np.int32, (len(features),))
        assert (units == distance.argmin(1))[clear].all()


def test_frames_follow_the_hop(loaded):
    for wave, units in zip(waves(), loaded.units(waves()), strict=True):
        assert len(units) == (len(wave) - 400) // loaded.hop + 1 == len(loaded.log_f0(wave))


def test_batching_does_not_change_units(loaded):
    together = loaded.units(waves())
    backwards = loaded.units(waves()[::-1])[::-1]
    alone = [loaded.units([wave])[0] for wave in waves()]
    for found in zip(together, backwards, alone, strict=True):
        assert found[0].tolist() == found[1].tolist() == found[2].tolist()
    assert loaded.units([]) == []


def test_encode_is_units_merged(loaded):
    wave = speechlike(16_000, 5)
    frames = loaded.units([wave])[0]
    merged = encode(wave, loaded, rate=16_000)
    assert (merged.units[1:] != merged.units[:-1]).all()
    assert expand(merged.units, merged.durations).tolist() == frames.tolist()
    assert merged.f0 is None
    plain = encode(wave, loaded, rate=16_000, merge=False)
    assert plain.units.tolist() == frames.tolist()
    assert plain.durations.tolist() == [1] * len(frames)
    for found in (merged, plain):
        assert (found.units.dtype, found.durations.dtype) == (np.int32, np.int32)


def test_a_file_and_its_samples_give_the_same(mfcc, tmp_path):
    wave = speechlike(24_000, 3)
    path = tmp_path / "a.wav"
    path.write_bytes(audio_file(wave, 48_000, subtype="FLOAT"))
    expected = encode(wave, mfcc, rate=48_000)
    stereo = np.stack([wave, wave])
    for found in (
        encode(path, mfcc),
        encode(str(path), mfcc),
        encode(audio.read_audio(path), mfcc),
        encode(stereo, mfcc, rate=48_000),
        encode(stereo.T, mfcc, rate=48_000),
    ):
        assert found.units.tolist() == expected.units.tolist()
        assert found.durations.tolist() == expected.durations.tolist()
    assert expected.durations.sum() == acoustic.frames(8000, acoustic.MFCC)


@pytest.mark.parametrize("merge", [True, False])
def test_f0_is_less_the_utterance_s_mean(loaded, merge):
    hz = np.repeat([120.0, 180.0], 8000)
    voice = (0.1 * sum(np.sin(2 * np.pi * k * np.cumsum(hz) / 16_000) / k for k in range(1, 10))).astype(np.float32)
    found = encode(np.concatenate([voice, np.zeros(8000)]), loaded, rate=16_000, merge=merge, f0=True)
    assert (found.f0.dtype, found.f0.shape) == (np.float32, found.units.shape)
    pitch = np.repeat(found.f0, found.durations)
    half = np.log(180 / 120) / 2
    seconds = (np.arange(len(pitch)) * loaded.hop + 200) / 16_000
    if not merge:  # a merged segment may contain the jump
        assert np.allclose(pitch[(seconds > 0.05) & (seconds < 0.45)], -half, atol=0.02)
        assert np.allclose(pitch[(seconds > 0.55) & (seconds < 0.95)], half, atol=0.02)
        assert (pitch[seconds > 1.06] == 0).all()
    assert 0 < np.abs(found.f0).max() < half + 0.02


def test_f0_is_less_the_speaker_s_mean_if_given(loaded):
    def voice(hz: float) -> audio.Audio:
        phase = 2 * np.pi * hz * np.arange(16_000) / 16_000
        return audio.prepare(0.1 * sum(np.sin(k * phase) / k for k in range(1, 10)), 16_000)

    silence = audio.prepare(np.r_[0.1, np.zeros(15_999)], 16_000)
    mean = speaker_f0([voice(120), voice(180), silence], loaded)
    assert mean == pytest.approx(np.log([120, 180]).mean(), abs=0.01)
    found = encode(voice(180), loaded, f0=True, speaker_f0=mean).f0
    assert np.median(found[found != 0]) == pytest.approx(np.log(180 / 120) / 2, abs=0.02)
    assert abs(np.median(encode(voice(180), loaded, f0=True).f0)) < 0.01
    with pytest.raises(ValueError, match="none of 1 recordings has a voiced frame"):
        speaker_f0([silence], loaded)


@pytest.mark.parametrize("wrong", [[], [0.1, 0.2], ["a.wav", "b.wav"], (np.zeros(800), 16_000)])
def test_a_list_is_refused(mfcc, wrong):
    with pytest.raises(ValueError, match=r"is not an utterance: give one file or array a call"):
        encode(wrong, mfcc, rate=16_000)


def test_rates_that_are_missing_or_too_many(mfcc, tmp_path):
    with pytest.raises(ValueError, match="the array's sample rate is missing"):
        encode(speechlike(8000), mfcc)
    with pytest.raises(ValueError, match="rate 16000 is given, but the audio has its own"):
        encode(tmp_path / "a.wav", mfcc, rate=16_000)
    with pytest.raises(AudioError, match="does not exist"):
        encode(tmp_path / "a.wav", mfcc)
    with pytest.raises(AudioError, match="has the sample rate 0"):
        encode(speechlike(8000), mfcc, rate=0)


def test_an_encoder_without_kmeans_gives_features_only():
    bare = load_encoder("mfcc")
    assert bare.features([speechlike(400)])[0].shape == (1, 26)
    with pytest.raises(ValueError, match="encoder mfcc has no k-means"):
        encode(speechlike(8000), bare, rate=16_000)


@pytest.mark.parametrize(
    ("encoder_", "layer", "kmeans", "theirs", "ours"),
    [
        ("mfcc", 6, "km_log_mel", "log_mel, 80 features", "mfcc, 26 features"),
        ("hubert", 2, "km_mfcc", "mfcc, 26 features", "tiny layer 2, 24 features"),
        ("mfcc", 6, "km_hubert", "tiny layer 2, 24 features", "mfcc, 26 features"),
        ("hubert", 1, "km_hubert", "tiny layer 2, 24 features", "tiny layer 1, 24 features"),
        ("hubert", 2, "km_narrow", "tiny layer 2, 20 features", "tiny layer 2, 24 features"),
        ("hubert", 2, "km_other", "base layer 2, 24 features", "tiny layer 2, 24 features"),
    ],
)
def test_a_kmeans_of_another_encoder_is_refused(folder, encoder_, layer, kmeans, theirs, ours):
    centroids = np.eye(5, 24, dtype=np.float32)
    save_kmeans(folder / "km_narrow", KMeans(centroids[:, :20], {"encoder": "tiny", "layer": 2}))
    save_kmeans(folder / "km_other", KMeans(centroids, {"encoder": "base", "layer": 2}))
    with pytest.raises(ValueError, match="was fitted on") as refused:
        load_encoder(folder / "hubert" if encoder_ == "hubert" else encoder_, folder / kmeans, layer=layer)
    assert f"{kmeans} was fitted on {theirs} a frame; the encoder gives {ours} a frame." in str(refused.value)


def test_missing_encoders(folder, tmp_path):
    with pytest.raises(ValueError, match="neither mfcc nor log_mel nor tiny nor the directory of a HuBERT"):
        load_encoder("mffc")
    with pytest.raises(StorageError, match=r"config\.json does not exist"):
        load_encoder(tmp_path)
    with pytest.raises(StorageError, match=r"card\.json does not exist"):
        load_encoder("mfcc", tmp_path)
    for layer in (0, 3, -1, True, "2"):
        with pytest.raises(ValueError, match="has layers 1 to 2"):
            load_encoder(folder / "hubert", layer=layer)


def test_plain_chunks_lose_the_same_frames_of_features_and_pitch(folder, monkeypatch):
    monkeypatch.setattr(encoder, "PLAIN_CHUNK", 8000)
    plain = load_encoder(folder / "hubert", folder / "km_hubert", layer=2, plain_chunks=True)
    whole = load_encoder(folder / "hubert", folder / "km_hubert", layer=2)
    wave = speechlike(16_300, 2)  # the last chunk is too short for a frame
    assert [len(loaded.units([wave])[0]) for loaded in (plain, whole)] == [48, 50]
    monkeypatch.setattr(prosody, "log_f0", lambda wave, hop: np.zeros((len(wave) - 400) // hop + 1, np.float32))
    assert plain.log_f0(wave).shape == (48,)
    found = encode(wave, plain, rate=16_000, f0=True)
    assert found.durations.sum() == 48
    assert found.f0.shape == found.units.shape


def test_the_shortest_utterance(loaded):
    for n in (400, 401, 719, 720):
        found = encode(speechlike(n), loaded, rate=16_000, f0=True)
        assert found.durations.sum() == (n - 400) // loaded.hop + 1


def test_units_of_the_reference(golden, tmp_path):
    """An imported checkpoint of the original and its k-means give the original's units."""
    from spjax.convert.hubert import import_hubert

    imported = import_hubert(golden / "hubert" / "hubert_tiny.pt")
    save_encoder(tmp_path / "hubert", imported.config, imported.params, "golden")
    with (
        np.load(golden / "kmeans" / "kmeans_sk1.0.1.npz") as kmeans,
        np.load(golden / "hubert" / "hubert_feats.npz") as hubert,
    ):
        centroids = kmeans["hubert_cluster_centers"].astype(np.float32)
        save_kmeans(tmp_path / "kmeans", KMeans(centroids, {"encoder": "golden", "layer": 6}))
        loaded = load_encoder(tmp_path / "hubert", tmp_path / "kmeans")
        chosen = (0, 1, 5, 6)
        for number, units in zip(chosen, loaded.units([hubert[f"wave_{number}"] for number in chosen]), strict=True):
            features = hubert[f"layer6_{number}"].astype(np.float64)
            distance = np.sort(((features[:, None] - centroids) ** 2).sum(-1), 1)
            clear = distance[:, 1] - distance[:, 0] > 1e-4
            assert (units == kmeans[f"hubert_units_{number}"])[clear].all()
            assert clear.mean() > 0.9


def test_the_public_api():
    assert spjax.encode is encode
    assert spjax.load_encoder is load_encoder
    assert spjax.Encoder is Encoder
    with pytest.raises(AttributeError, match="no attribute 'decode'"):
        _ = spjax.decode
    assert all(hasattr(spjax, name) for name in spjax.__all__)


def test_features_alone_need_no_jax():
    """A worker that only computes MFCC should start quickly."""
    code = (
        "import sys, numpy as np; from spjax.encoders import acoustic, audio, units, prosody; "
        "acoustic.features(np.random.default_rng(0).normal(size=800).astype('f4'), acoustic.MFCC); "
        "print('jax' in sys.modules, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_an_encoder_can_be_changed_by_replace(mfcc):
    other = dataclasses.replace(mfcc, kmeans=None)
    assert (other.name, other.kmeans, mfcc.kmeans is None) == ("mfcc", None, False)


def test_a_lowpass_is_part_of_an_encoder(folder, tmp_path):
    """Waves that are equal below 4 kHz give equal features; a k-means of the full band belongs to another encoder."""
    time = np.arange(16_000) / 16_000
    low = np.sin(2 * np.pi * 300 * time) * np.linspace(0.1, 1, 16_000)
    low = low.astype(np.float32)
    both = low + 0.3 * np.sin(2 * np.pi * 6000 * time).astype(np.float32)
    narrow = load_encoder("log_mel", lowpass=4000)
    assert narrow.name == "log_mel_lowpass_4000"
    a, b = narrow.features([low, both])
    assert np.abs(a - b)[5:-5, :40].mean() < 0.05
    with pytest.raises(
        ValueError, match="was fitted on mfcc, 26 features a frame; the encoder gives mfcc_lowpass_4000"
    ):
        load_encoder("mfcc", folder / "km_mfcc", lowpass=4000)
    save_kmeans(tmp_path / "km", fitted(narrow.features(waves()), narrow.name, None))
    assert len(encode(low, load_encoder("log_mel", tmp_path / "km", lowpass=4000), rate=16_000).units) > 0
    for wrong in (100, "a"):
        with pytest.raises(ValueError, match=r"lowpass is .* Hz, must be in 500"):
            load_encoder("mfcc", lowpass=wrong)


@pytest.mark.parametrize("wrong", ["mfcc", None])
def test_bad_encoders_are_refused(wrong):
    with pytest.raises(ValueError, match="must be an Encoder: give load_encoder"):
        encode(np.ones(800), wrong, rate=16_000)


def test_missing_audio_is_refused(mfcc):
    with pytest.raises(ValueError, match="audio is None"):
        encode(None, mfcc)
