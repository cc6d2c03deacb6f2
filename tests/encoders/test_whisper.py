"""Whisper's encoder against transformers; features do not depend on the batch."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spjax
from spjax.convert.whisper import import_whisper
from spjax.encoders import transformer, whisper
from spjax.encoders.audio import AudioError, read_audio
from spjax.encoders.encoder import load_encoder
from spjax.io import StorageError, read_encoder, save_encoder
from spjax.models.config import Compute
from spjax.models.whisper_config import WhisperConfig
from spjax.types import Params
from tests.conftest import _folder
from tests.encoders import hubert_models
from tests.encoders.bad_files import encoded as audio_file
from tests.encoders.hubert_models import error, save_peer, speechlike
from tests.encoders.whisper_models import TINY, peer, peer_layers, weights

pytestmark = pytest.mark.usefixtures("quick_compile")

SHORT = dataclasses.replace(TINY, positions=50)  # windows of 1 s


@functools.cache
def tiny() -> Params:
    return weights()


# Against transformers


@pytest.mark.parametrize("mels", [80, 128])
def test_the_front_end_equals_transformers(mels: int):
    transformers = pytest.importorskip("transformers", reason="transformers is a test dependency")
    pytest.importorskip("torch", reason="torch is a test dependency")
    extractor = transformers.WhisperFeatureExtractor(feature_size=mels)
    for n in (400, 479, 480, 799, 800, 16_000, 40_001):
        wave = speechlike(n, seed=n)
        found = whisper.log_mel(wave, mels)
        assert (found.dtype, found.shape) == (np.float32, (n // 160, mels))
        exact = extractor._np_extract_fbank_features(wave[None], "cpu")[0].T  # in float64
        assert np.abs(found - exact).max() < 1e-6
        theirs = extractor(wave, sampling_rate=16_000, padding=False, return_tensors="np").input_features[0].T
        assert np.abs(found - theirs).max() < 1e-4
    padded = extractor(wave, sampling_rate=16_000, return_tensors="np").input_features[0].T
    assert np.abs(whisper.log_mel(np.pad(wave, (0, 480_000 - len(wave))), mels) - padded).max() < 1e-4


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random model of transformers, and its encoder imported to a directory."""
    folder, model = tmp_path_factory.mktemp("whisper"), peer(TINY)
    made = import_whisper(save_peer(model, folder / "theirs"))
    assert made.config == TINY
    save_encoder(folder / "ours", made.config, made.params, "tiny")
    return model.encoder, folder / "ours"


def test_every_layer_without_padding(imported: tuple[Any, Path]):
    encoder, directory = imported
    waves = [speechlike(n, seed=n) for n in (480, 799, 16_161)]
    theirs = [peer_layers(encoder, wave, pad=False) for wave in waves]
    config, params, _ = read_encoder(directory)
    for layer in range(TINY.layers + 1):
        assert error(spjax.features(waves[-1], directory, layer), theirs[-1][layer]) < 1e-5
        for found, expected in zip(whisper.extract(params, config, waves, layer), theirs, strict=True):
            assert error(found, expected[layer]) < 1e-5


def test_every_layer_padded_to_30_seconds(imported: tuple[Any, Path]):
    encoder, directory = imported
    wave = speechlike(20_000)
    expected = peer_layers(encoder, wave, pad=True)
    assert len(expected) == TINY.layers + 1
    for layer in range(TINY.layers + 1):
        found = spjax.features(wave, directory, layer, pad_seconds=30)
        assert found.shape == (1500, TINY.dim)
        assert error(found, expected[layer]) < 1e-5


def test_real_weights(tmp_path: Path):
    """Whisper tiny.en on a real recording, padded to 30 s as in Whisper's reference code, and not padded."""
    source, audio = _folder("models", "whisper_tiny_en"), _folder("audio", "lt_sc")
    transformers = pytest.importorskip("transformers", reason="transformers is a test dependency")
    load = pytest.importorskip("safetensors.torch", reason="torch is a test dependency").load_file
    made = import_whisper(source)
    assert (made.config, made.read, made.name) == (WhisperConfig(), 8_208_384, "whisper_tiny_en")
    save_encoder(tmp_path / "w", made.config, made.params, "tiny")
    sizes = transformers.WhisperConfig.from_pretrained(source)
    theirs = transformers.models.whisper.modeling_whisper.WhisperEncoder(sizes).eval()
    state = load(source / "model.safetensors")
    theirs.load_state_dict({name.removeprefix("encoder."): tensor.float() for name, tensor in state.items()})
    path = sorted(audio.glob("dataset/[a-z]*/*.wav"))[0]
    for pad_seconds, layers in ((30, (3,)), (None, (1, 4))):
        expected = peer_layers(theirs, read_audio(path).wave, pad_seconds is not None)
        for layer in layers:
            assert error(spjax.features(path, tmp_path / "w", layer, pad_seconds), expected[layer]) < 1e-4


# Without reference data


def test_full_size():
    config = WhisperConfig()
    shapes = config.shapes
    assert sum(math.prod(shape) for shape in shapes.values()) == config.num_params == 8_208_384
    assert (config.hop, config.frames(16_000), config.frames(480_000), config.frames(400)) == (320, 50, 1500, 1)
    large = WhisperConfig(mels=128, dim=1280, layers=32, heads=20, ffn_dim=5120)
    assert sum(math.prod(shape) for shape in large.shapes.values()) == large.num_params == 636_968_960


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 5}, "dim 384 is not a multiple of heads 5"),
        ({"layers": 0}, "layers is 0, must be a positive integer"),
        ({"mels": True}, "mels is True"),
        ({"positions": 1500.0}, "positions is 1500.0"),
    ],
)
def test_invalid_sizes_are_refused(sizes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        WhisperConfig(**sizes)


def test_batched_is_single():
    """Spectra of odd and even lengths in one padded batch; padding changes nothing."""
    spectra = [whisper.log_mel(speechlike(n, seed=n), TINY.mels) for n in (480, 800, 32_000)]
    lengths = np.asarray([len(spectrum) for spectrum in spectra])
    padded = np.stack([np.pad(spectrum, ((0, 200 - len(spectrum)), (0, 0))) for spectrum in spectra])
    dirty = np.where(np.arange(200)[:, None] < lengths[:, None, None], padded, 7.0).astype(np.float32)
    run = jax.jit(lambda *args: [whisper.features(tiny(), TINY, *args, layer) for layer in (0, 3)])
    together, dirtied = run(padded, lengths), run(dirty, lengths)
    for i, spectrum in enumerate(spectra):
        for layer, alone in enumerate(run(spectrum[None], lengths[i : i + 1])):
            assert alone.shape[1] == (len(spectrum) + 1) // 2
            for found in (together[layer][i], dirtied[layer][i]):
                assert error(np.asarray(found[: alone.shape[1]]), np.asarray(alone[0])) < 1e-5


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.lists(st.integers(400, 9000), min_size=1, max_size=9), st.sampled_from([1, 20, 2000]))
def test_extract_keeps_order_and_lengths(lengths: list[int], batch_frames: int):
    waves = [speechlike(n, seed=i) for i, n in enumerate(lengths)]
    found = whisper.extract(tiny(), TINY, waves, 1, batch_frames=batch_frames)
    assert [len(x) for x in found] == [TINY.frames(n) for n in lengths]
    pick = lengths.index(max(lengths))
    assert error(found[pick], whisper.extract(tiny(), TINY, [waves[pick]], 1)[0]) < 1e-5


@pytest.mark.parametrize("samples", [15_999, 16_000, 16_160, 40_321])
def test_longer_waves_are_encoded_in_windows(samples: int):
    """Every frame once, from a window that has it near its middle; a wave that fits the positions is one window."""
    params = weights(SHORT)
    wave = speechlike(samples)
    found = whisper.extract(params, SHORT, [wave, wave[:8000]], 2)
    assert len(found[0]) == SHORT.frames(samples)
    assert len(found[1]) == 25
    spectrum, run = whisper.log_mel(wave, SHORT.mels), jax.jit(whisper.features, static_argnums=(1, 4))
    end = 0
    for start, first, last in transformer.windows(SHORT.frames(samples), 50, 16):
        part = spectrum[2 * start : 2 * start + 100]
        alone = np.asarray(run(params, SHORT, part[None], np.asarray([len(part)]), 2)[0])
        assert error(found[0][start + first : start + last], alone[first:last]) < 1e-5
        assert (start + first, len(alone)) == (end, min(50, SHORT.frames(samples)))
        end = start + last
    assert end == SHORT.frames(samples)


def test_silence_has_features():
    found = whisper.extract(tiny(), TINY, [np.zeros(8000, np.float32), np.full(8000, 0.25, np.float32)], 3)
    assert all(np.isfinite(x).all() for x in found)


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.zeros(399, np.float32), "wave 1 has 399 samples.*at least 400"),
        (np.zeros(4000), r"wave 1 is float64 \[4000\], must be float32"),
        (np.full(4000, np.nan, np.float32), "wave 1 holds NaN"),
    ],
)
def test_bad_waves_are_refused(wave: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        whisper.extract(tiny(), TINY, [np.zeros(500, np.float32), wave], 1)


def test_invalid_settings_are_refused():
    for layer in (4, -1):
        with pytest.raises(ValueError, match=f"layer {layer} does not exist; give 1 to 3"):
            whisper.extract(tiny(), TINY, [], layer)
    with pytest.raises(ValueError, match="a spectrum of 101 steps; there are positions for 100"):
        whisper.features(weights(SHORT), SHORT, jnp.zeros((1, 101, 16)), jnp.asarray([101]), 1)
    assert whisper.extract(tiny(), TINY, [], 1) == []


def test_bfloat16_is_close():
    exact, near = (
        whisper.extract(tiny(), TINY, [speechlike(16_000)], 3, compute=Compute(dtype))[0]
        for dtype in ("float32", "bfloat16")
    )
    assert near.dtype == np.float32
    assert 1e-4 < error(near, exact) < 0.2


# spjax.features


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    save_encoder(folder / "whisper", SHORT, weights(SHORT), "tiny")
    save_encoder(folder / "hubert", hubert_models.TINY, hubert_models.weights(), "tiny")
    return {name: folder / name for name in ("whisper", "hubert")}


@pytest.mark.parametrize(("name", "frames", "padded"), [("whisper", 25, 100), ("hubert", 24, 99), ("mfcc", 48, 198)])
def test_features_of_files_and_arrays(
    directories: dict[str, Path], tmp_path: Path, name: str, frames: int, padded: int
):
    wave, encoder = speechlike(8000), directories.get(name, name)
    found = spjax.features(wave, encoder, layer=2)
    assert (found.dtype, len(found)) == (np.float32, frames)
    (tmp_path / "a.wav").write_bytes(audio_file(wave, 16_000, subtype="FLOAT"))
    for audio in (tmp_path / "a.wav", str(tmp_path / "a.wav"), wave.astype(np.float64), read_audio(tmp_path / "a.wav")):
        np.testing.assert_array_equal(spjax.features(audio, str(encoder), layer=2), found)
    assert len(spjax.features(wave, encoder, layer=2, pad_seconds=2)) == padded
    for unchanged in (0.3, np.float32(0.5)):  # not longer than the wave
        np.testing.assert_array_equal(spjax.features(wave, encoder, layer=2, pad_seconds=unchanged), found)
    if name != "mfcc":
        assert spjax.features(wave, encoder, layer=np.int64(0)).shape == found.shape


def test_invalid_arguments_of_features(directories: dict[str, Path], tmp_path: Path):
    wave, whisper_ = speechlike(8000), directories["whisper"]
    for pad in (0, -1, math.nan, math.inf, 3601, "30", True):
        with pytest.raises(ValueError, match="pad_seconds is"):
            spjax.features(wave, whisper_, 2, pad_seconds=pad)  # type: ignore[arg-type]
    for layer in (4, -1, True, "2", None):
        with pytest.raises(ValueError, match="has layers 0 to 3"):
            spjax.features(wave, whisper_, layer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither mfcc nor log_mel nor tiny nor the directory"):
        spjax.features(wave, tmp_path / "absent")
    with pytest.raises(StorageError, match=r"config\.json is missing"):
        spjax.features(wave, tmp_path)
    for audio, message in (
        (wave[:300], "too short"),
        (np.full(8000, np.nan), "NaN"),
        (tmp_path / "absent.wav", "does not exist"),
        (list(wave), "is a list"),
    ):
        with pytest.raises(AudioError, match=message):
            spjax.features(audio, whisper_, 2)
    with pytest.raises(ValueError, match="plain_chunks is for the others"):
        load_encoder(whisper_, layer=2, plain_chunks=True)


def test_pitch_has_the_frames_of_the_features(directories: dict[str, Path]):
    """As many values as frames, and frame t is centred on sample 320 t."""
    loaded = load_encoder(directories["whisper"], layer=2)
    assert (loaded.hop, loaded.center, load_encoder("mfcc").center) == (320, 0, 200)
    for n in (400, 479, 480, 799, 800, 16_000, 20_321):
        wave = speechlike(n)
        assert len(loaded.log_f0(wave)) == len(loaded.features([wave])[0])
    late = np.zeros(32_000, np.float32)
    late[16_000:] = 0.1 * np.sin(2 * np.pi * 150 * np.arange(16_000) / 16_000)
    voiced = np.flatnonzero(np.isfinite(loaded.log_f0(late)))
    assert abs(voiced[0] - 50) <= 2
