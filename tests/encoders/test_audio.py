"""Reading audio: every format, rate and sample type gives the same sound; every kind of bad file is refused by name."""

from __future__ import annotations

import io
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from spjax.encoders import audio
from spjax.encoders.audio import MIN_SAMPLES, SAMPLE_RATE, AudioError, prepare, read_audio
from spjax.io import places
from tests.encoders.bad_files import contents, encoded, make_bad_files, noise, wav

LOSSY = {"OGG", "MP3"}


def tone(hz: float = 440.0, rate: int = SAMPLE_RATE, seconds: float = 0.5, level: float = 0.5) -> np.ndarray:
    return level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def likeness(found: np.ndarray, expected: np.ndarray) -> float:
    """Correlation of two waves, without their ends."""
    n = min(len(found), len(expected))
    return float(np.corrcoef(found[400 : n - 400], expected[400 : n - 400])[0, 1])


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_bad_files(tmp_path_factory.mktemp("bad"))


def test_there_are_at_least_20_kinds(bad_files):
    assert len(bad_files) >= 20
    assert len(set(bad_files.values())) == len(bad_files)


@pytest.mark.parametrize("kind", [*contents(), "missing", "directory", "broken link", "pipe", "forbidden"])
def test_every_kind_of_bad_file_is_refused_by_name(bad_files, kind):
    if kind not in bad_files:
        pytest.skip(f"{kind!r} cannot be made here")
    with pytest.raises(AudioError) as refused:
        read_audio(bad_files[kind])
    assert str(bad_files[kind]) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "is empty (0 bytes)"),
        ("text", "is no audio"),
        ("UTF-16 text", "it is text in UTF-16"),
        ("UTF-16 text, the other way round", "it is text in UTF-16"),
        ("no samples", "holds no samples"),
        ("header only", "is cut off: its header promises 16044 bytes, 44 are there"),
        ("last sample missing", "promises 16044 bytes, 16042 are there"),
        ("cut off flac", "is cut off or damaged"),
        ("cut off mp3", "is cut off: its header promises"),
        ("numpy array", "it is a NumPy array"),
        ("image", "it is an image (PNG)"),
        ("large file pointer", "git lfs pull"),
        ("silent", "every sample is 0."),
        ("constant", "every sample is 0.25"),
        ("too short at its rate", "1000 samples at 48000 Hz are 333 at 16000 Hz"),
        ("nan", "holds NaN samples, the first at 0.062 s"),
        ("infinite", "holds infinite samples, the first at 0.062 s"),
        ("integers as floats", "Divide by"),
        ("rate 10", "has the sample rate 10;"),
        ("missing", "does not exist"),
        ("directory", "is a directory"),
        ("pipe", "is not a regular file"),
    ],
)
def test_messages(bad_files, kind, says):
    with pytest.raises(AudioError) as refused:
        read_audio(bad_files[kind])
    assert says in str(refused.value)


@pytest.mark.parametrize("path", ["", "a\0b.wav", "x" * 5000 + ".wav"])
def test_an_impossible_name_is_refused(path):
    with pytest.raises(AudioError):
        read_audio(path)


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(noise()))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # file permissions do not bind root, who runs tests in containers
    with pytest.raises(AudioError, match=r"a\.wav cannot be read \(Permission denied\)"):
        read_audio(path)


@pytest.mark.parametrize("cut", [1, 20, 43, 44, 45, 1000, 16043])
def test_a_wav_cut_anywhere_is_refused(tmp_path, cut):
    path = tmp_path / "cut.wav"
    path.write_bytes(encoded(noise())[:cut])
    with pytest.raises(AudioError):
        read_audio(path)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.995])
@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "NIST"])
def test_a_part_of_a_file_is_refused(tmp_path, kind, share):
    path = tmp_path / "share"
    whole = encoded(noise(2.0), kind=kind)
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(AudioError):
        read_audio(path)


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("WAV", "PCM_U8"),
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "PCM_32"),
        ("WAV", "FLOAT"),
        ("WAV", "DOUBLE"),
        ("WAV", "ALAW"),
        ("WAV", "ULAW"),
        ("WAVEX", "PCM_16"),
        ("RF64", "PCM_16"),
        ("W64", "PCM_16"),
        ("FLAC", "PCM_S8"),
        ("FLAC", "PCM_16"),
        ("FLAC", "PCM_24"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
        ("AIFF", "PCM_16"),
        ("AIFF", "FLOAT"),
        ("AU", "PCM_16"),
        ("AU", "ULAW"),
        ("NIST", "PCM_16"),
        ("CAF", "PCM_16"),
    ],
)
def test_formats(tmp_path, kind, subtype):
    sound = tone() + tone(1000, level=0.2)
    path = tmp_path / "a.bin"  # the format is detected from the contents
    path.write_bytes(encoded(sound, kind=kind, subtype=subtype))
    wave, rate, _ = read_audio(path)
    assert (wave.dtype, wave.ndim, rate) == (np.float32, 1, SAMPLE_RATE)
    assert wave.flags.c_contiguous
    assert len(wave) == len(sound)
    assert likeness(wave, sound) > 0.99
    if kind not in LOSSY and "LAW" not in subtype:
        assert np.abs(wave - sound).max() < (0.01 if "8" in subtype else 1e-4)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_averaged(tmp_path, channels):
    levels = np.linspace(0.2, 0.8, channels)
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(tone()[:, None] * levels, subtype="FLOAT"))
    assert np.allclose(read_audio(path).wave, tone() * levels.mean(), atol=1e-6)


def test_more_channels_than_samples(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(noise(channels=6)[:5]))
    with pytest.raises(AudioError, match="5 samples at 16000 Hz"):
        read_audio(path)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_rates(tmp_path, rate):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(tone(1000, rate), rate))
    wave, source, _ = read_audio(path)
    assert source == rate
    assert abs(len(wave) - SAMPLE_RATE // 2) <= 1
    assert np.abs(wave - tone(1000)[: len(wave)])[400:-400].max() < 1e-3


@pytest.mark.parametrize("rate", [8_000, 48_000])
def test_resampling_keeps_the_band(rate):
    wave = prepare(tone(1000, rate, 2.0), rate).wave
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) / (len(wave) / 4)
    assert np.argmax(spectrum) == 2000  # bins of 0.5 Hz
    assert abs(spectrum.max() - 0.5) < 0.001
    spectrum[1990:2011] = 0
    assert spectrum.max() < 0.5e-3  # 60 dB below


def test_resampling_removes_aliases():
    before = tone(9000, 48_000, 2.0)
    wave = prepare(before + tone(100, 48_000, 2.0, level=1e-9), 48_000).wave
    inside = wave[1600:-1600]
    assert 20 * np.log10(np.abs(inside).max() / np.abs(before).max()) < -60


@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [
        ("int8", 128, 0.01),
        ("int16", 2**15, 1e-4),
        (">i2", 2**15, 1e-4),
        ("int32", 2**31, 1e-6),
        ("float16", 1, 1e-3),
        ("float32", 1, 1e-7),
        ("float64", 1, 1e-7),
        (">f4", 1, 1e-7),
    ],
)
def test_sample_types(dtype, scale, tolerance):
    assert np.abs(prepare((tone() * scale).astype(dtype), SAMPLE_RATE).wave - tone()).max() < tolerance


def test_unsigned_bytes_are_centred_on_128():
    samples = (np.rint(tone() * 128) + 128).astype(np.uint8)
    wave = prepare(samples, SAMPLE_RATE).wave
    assert np.abs(wave - tone()).max() < 0.01
    assert abs(wave.mean()) < 0.001


def test_full_scale_is_one():
    for dtype in ("int8", "int16", "int32"):
        limits = np.iinfo(dtype)
        wave = prepare(np.tile([limits.min, 0], 400).astype(dtype), SAMPLE_RATE).wave
        assert (wave.min(), wave.max()) == (-1, 0)


def test_the_longer_axis_is_time():
    stereo = np.stack([tone(), 0.5 * tone()])
    expected = prepare(0.75 * tone(), SAMPLE_RATE).wave
    for array in (stereo, stereo.T, np.asfortranarray(stereo), (stereo * 0.75 / 0.75)[:, ::-1][:, ::-1]):
        assert np.allclose(prepare(array, SAMPLE_RATE).wave, expected, atol=1e-6)
    for array in (tone()[None], tone()[:, None]):
        assert np.allclose(prepare(array, SAMPLE_RATE).wave, tone(), atol=1e-6)


@given(n=st.integers(400, 900), channels=st.integers(1, 6), first=st.booleans(), seed=st.integers(0, 9))
def test_any_array_of_noise_becomes_its_mean(n, channels, first, seed):
    samples = np.random.default_rng(seed).uniform(-1, 1, (n, channels)).astype(np.float32)
    wave, rate, _ = prepare(samples.T if first else samples, SAMPLE_RATE)
    assert (wave.shape, wave.dtype, rate) == ((n,), np.float32, SAMPLE_RATE)
    assert np.allclose(wave, samples.mean(1), atol=1e-6)


def test_the_array_is_not_modified():
    samples = tone().astype(np.float32)
    before = samples.copy()
    for rate in (16_000, 48_000):
        prepare(samples, rate)
        assert (samples == before).all()


def test_jax_arrays_and_whole_float_rates():
    import jax.numpy as jnp

    wave, rate, _ = prepare(jnp.asarray(tone(rate=8000), jnp.float32), 8000.0)
    assert (len(wave), rate, type(rate)) == (8000, 8000, int)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        ([0.1] * 500, "is a list"),
        ("a.wav", "Read a file with read_audio"),
        (None, "is a NoneType"),
        (np.array(["a"] * 500), "holds <U1"),
        (np.array([object()] * 500), "holds object"),
        (np.ones(500, bool), "holds bool"),
        (np.ones(500, complex), "holds complex128"),
        (np.arange(500), "holds int64"),
        (np.ones((2, 3, 500)), "has shape [2, 3, 500]"),
        (np.float32(1), "has shape []"),
        (np.ones((500, 500)), "is ambiguous"),
        (np.ones((500, 80)), "over 64 channels"),
        (np.zeros(0), "no samples"),
        (np.zeros((0, 2)), "no samples"),
        (np.zeros(500), "is silent: every sample is 0"),
        (np.full((500, 2), 7, np.int16), "is silent"),
        (tone()[: MIN_SAMPLES - 1], "too short: 399 samples"),
        (np.ones((1, 1)), "too short: 1 samples"),
        (np.where(np.arange(8000) == 5, np.nan, tone()), "NaN"),
        (np.where(np.arange(8000) == 5, -np.inf, tone()), "infinite"),
        (tone() * 1e300, "infinite"),
        (tone() * 32768, "Divide by"),
    ],
)
def test_arrays_that_are_refused(array, says):
    with pytest.raises(AudioError) as refused:
        prepare(array, SAMPLE_RATE)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "rate", [0, -16_000, 999, 1_000_001, 16_000.5, float("nan"), float("inf"), True, "16000", None]
)
def test_implausible_rates_are_refused(rate):
    with pytest.raises(AudioError, match="has the sample rate"):
        prepare(tone(), rate)


def test_the_shortest_utterance_is_legal():
    for rate in (8_000, 16_000, 44_100, 48_000):
        assert len(prepare(noise(0.025, rate=rate)[:, 0], rate).wave) >= MIN_SAMPLES


def test_quiet_noise_is_legal():
    samples = np.zeros(8000, np.int16)
    samples[::2] = 1
    assert prepare(samples, SAMPLE_RATE).wave.max() == np.float32(2**-15)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_a_crop_equals_that_part_of_the_file(tmp_path, kind, rate):
    path = tmp_path / "a"
    path.write_bytes(encoded(noise(3.0, rate=rate), rate, kind=kind))
    samples, _ = soundfile.read(path, dtype="float32")
    expected = prepare(samples[round(1.25 * rate) : round(1.75 * rate)], rate).wave
    found = read_audio(path, 1.25, 0.5).wave
    assert len(found) == SAMPLE_RATE // 2
    assert np.allclose(found, expected, atol=1e-3 if kind == "MP3" else 1e-6)
    assert np.allclose(read_audio(path, 2.5).wave, prepare(samples[round(2.5 * rate) :], rate).wave, atol=1e-3)


def test_a_crop_does_not_read_the_rest(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(noise(20.0)))
    read = []
    original = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda self, frames=-1, *rest, **named: read.append(frames) or original(self, frames, *rest, **named),
    )
    read_audio(path, 15.0, 0.5)
    assert read == [8000]


def test_crops_at_the_end(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(noise(1.0)))
    assert len(read_audio(path, 0.5, 0.505).wave) == 8000  # lists of crops are rounded
    for start, duration in ((0.5, 0.52), (1.0, None), (1.0, 0.1), (5.0, None)):
        with pytest.raises(AudioError, match=r"a\.wav lasts 1 s; the crop from"):
            read_audio(path, start, duration)
    with pytest.raises(AudioError, match="too short"):
        read_audio(path, 0.99)


@pytest.mark.parametrize(
    ("start", "duration"), [(-0.1, None), (0, 0), (0, -1), (float("nan"), None), (0, float("nan")), (0, float("inf"))]
)
def test_invalid_crops(tmp_path, start, duration):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(noise(1.0)))
    with pytest.raises(AudioError, match="the crop of"):
        read_audio(path, start, duration)


def test_a_silent_crop_of_a_good_file_is_refused(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(np.vstack([noise(1.0), np.zeros((16_000, 1))])))
    read_audio(path)
    with pytest.raises(AudioError, match="silent"):
        read_audio(path, 1.2, 0.5)


def test_headers_written_to_a_pipe(tmp_path):
    data = encoded(noise())[44:]
    for promised in (0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFF000):
        path = tmp_path / "stream.wav"
        path.write_bytes(wav(data, promised=promised))
        assert len(read_audio(path).wave) == 8000


def test_other_chunks_are_skipped(tmp_path):
    good = encoded(noise())
    extra = b"LIST" + struct.pack("<I", 5) + b"abcde\0"
    path = tmp_path / "a.wav"
    path.write_bytes(good[:36] + extra + good[36:] + extra[:-4])  # the last chunk, after the audio, is cut off
    assert len(read_audio(path).wave) == 8000


REMOTE = {"gs://bucket/a.wav": encoded(noise(), kind="FLAC"), "gs://bucket/b.wav": b""}


class Bucket:
    """The part of a remote path's interface that is used here."""

    def __init__(self, path: str):
        self.path = path

    def exists(self) -> bool:
        return self.path in REMOTE

    is_file = exists

    def is_dir(self) -> bool:
        return self.path == "gs://bucket"

    def open(self, mode: str) -> io.BytesIO:
        assert mode == "rb"
        return io.BytesIO(REMOTE[self.path])


def test_remote_files(monkeypatch):
    remote = epath.Path("gs://bucket/a.wav")
    monkeypatch.setattr(places.epath, "Path", Bucket)
    assert len(read_audio("gs://bucket/a.wav", 0.1, 0.2).wave) == 3200
    assert len(read_audio(remote).wave) == 8000
    for path, says in (("/b.wav", "b.wav is empty"), ("", "is a directory"), ("/c.wav", "c.wav does not exist")):
        with pytest.raises(AudioError, match=says):
            read_audio("gs://bucket" + path)


def test_real_recordings(tmp_path):
    folder = Path(__file__).resolve().parents[3] / "shared" / "audio"
    if not folder.is_dir():
        pytest.skip("recordings are not beside this checkout (../shared/audio)")
    paths = sorted(folder.rglob("*.wav"))
    for path in paths[:: max(1, len(paths) // 60)]:
        wave, rate, _ = read_audio(path)
        assert len(wave) == pytest.approx(soundfile.info(path).duration * SAMPLE_RATE, abs=1)
        assert rate == soundfile.info(path).samplerate
    copied = shutil.copy(paths[0], tmp_path / "ąčęė ž (1).wav")
    assert (read_audio(copied).wave == read_audio(paths[0]).wave).all()


@pytest.mark.parametrize("hertz", [1000, 3500.5, 4000])
def test_a_lowpass_removes_only_what_is_above_it(hertz: float) -> None:
    time = np.arange(16_000) / 16_000
    low, high = (np.sin(2 * np.pi * factor * hertz * time).astype(np.float32) for factor in (0.5, 1.3))
    kept = audio.lowpass(low + high, hertz)
    assert kept.shape == low.shape
    inner = slice(800, -800)
    assert np.abs(kept - low)[inner].max() < 1e-2
    assert np.abs(audio.lowpass(high, hertz)[inner]).max() < 1e-3
    assert len(audio.lowpass(low[:400], hertz)) == 400
    with pytest.raises(ValueError, match="lowpass is 100 Hz, must be in 500"):
        audio.lowpass(low, 100)
