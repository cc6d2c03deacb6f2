"""Headers that contradict the contents, in every container; several recordings in a file; channels that cancel."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from spjax.encoders.audio import AudioError, prepare, read_audio, read_stream
from spjax.encoders.flac import _CRC8, _crc, _flac_header
from spjax.encoders.framed import _ogg_sum
from tests.encoders.bad_files import encoded, noise, wav
from tests.encoders.recordings import ape, by_av, id3, pages, put, whole

FAULTS = Path(__file__).resolve().parents[3] / "shared" / "faults"
KINDS = [
    *("WAV", "RF64", "W64", "AIFF", "CAF", "AU", "NIST", "FLAC", "WAV float", "WAV extensible", "WAV GSM", "WAV ADPCM"),
    *("WAV MP3", "BW64", "CAF ALAC", "Ogg Vorbis", "Ogg Opus", "MP3", "MP3 no Xing", "M4A", "M4A moov first"),
    *("MP4 fragmented", "M4A ALAC", "MOV", "MOV PCM", "CAF ALAC of libav", "WebM", "WebM live", "Matroska", "ADTS"),
]
LOSE_NOTHING = ("CAF ALAC", "CAF ALAC of libav", "M4A", "M4A ALAC", "MOV", "MOV PCM")  # when the last byte is cut off
WITH_FIELD = ("RF64", "BW64", "AIFF", "CAF", "W64", "AU")


def read(data: bytes, *crop: float):
    return read_stream(io.BytesIO(data), "it", *crop)


def refused(data: bytes) -> str:
    with pytest.raises(AudioError) as error:
        read(data)
    assert str(error.value).startswith("it ")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_kind_is_made():
    assert set(whole()) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files(kind):
    audio = read(whole()[kind])
    assert 32_000 <= len(audio.wave) <= 34_000
    assert not audio.repairs
    assert np.corrcoef(audio.wave[4000:5000], read(whole()[kind], 0.25, 0.5).wave[:1000])[0, 1] > 0.99
    assert len(read(whole()[kind], 0.25, 0.5).wave) == 8000
    with pytest.raises(AudioError, match="is outside it"):
        read(whole()[kind], 1.9, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_files_are_refused(kind):
    data = whole()[kind]
    for share in (0.02, 0.1, 0.37, 0.6, 0.85, 0.99):
        refused(data[: int(len(data) * share)])
    if kind not in LOSE_NOTHING:
        refused(data[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_two_recordings_in_a_file_are_refused_or_both_are_read(kind):
    data = whole()[kind]
    if kind in ("ADTS", "MP3 no Xing"):  # there is no sign of where the second begins
        assert len(read(data + data).wave) == pytest.approx(2 * len(read(data).wave), abs=2400)
    else:
        assert "several recordings" in refused(data + data)


JOINED = ("WAV", "RF64", "W64", "AIFF", "CAF", "AU", "FLAC", "Ogg Opus", "MP3", "M4A", "WebM", "ADTS", "WAV GSM")


@pytest.mark.parametrize("kind", [*JOINED, "NIST", "MP4 fragmented", "WAV MP3"])
def test_a_recording_of_another_kind_after_one(kind):
    for other in JOINED:
        for between in (b"", bytes(1), bytes(16), id3(100), b"TAG" + bytes(125)):
            if other != kind or kind != "ADTS" or between:
                refused(whole()[kind] + between + whole()[other])


def test_a_recording_after_one_of_unknown_length():
    for kind, value in (("AU", 0xFFFFFFFF), ("CAF", 2**64 - 1), ("WAV", 0xFFFFFFFF), ("AIFF", 0)):
        place, form, _ = fields()[kind]
        data = put(whole()[kind], place, form, value)
        for other in (data, whole()["M4A"], whole()["FLAC"]):
            assert "several recordings" in refused(data + bytes(10) + other)
        assert np.array_equal(read(data + TAG).wave, read(data).wave)


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF"])
def test_a_second_chunk_of_samples_is_refused(kind):
    data = whole()[kind]
    first = {"AIFF": b"SSND", "W64": b"data\xf3"}.get(kind, b"data")
    again = data[data.index(first) :]
    assert "several recordings" in refused(data + again)
    if kind != "W64":
        between = b"LIST" + (b"\0\0\0\4" if kind == "AIFF" else b"\4\0\0\0") + b"INFO"
        assert "several recordings" in refused(data + between + again)


def test_sizes_of_samples_that_contradict_each_other():
    data = whole()["WAV"]
    for bits in (8, 24, 32):
        assert f"its header says {bits} bits a sample" in refused(put(data, 34, "<H", bits))
    for place, form, value in ((32, "<H", 4), (28, "<I", 7), (34, "<H", 12)):  # two of three fields agree
        assert len(read(put(data, place, form, value)).wave) == 32_000


@pytest.mark.parametrize("blank", [0, 1])
def test_tags_and_zeros_after_flac(blank):
    data, whole_one = whole()["FLAC"], read(whole()["FLAC"]).wave
    id3v1 = b"TAG" + (bytes(125) if blank else b"title".ljust(124) + b"\1")
    for tag in (bytes(5000), bytes(300_000), id3v1, ape(b"hello"), ape(b"hello") + id3v1):
        audio = read(data + tag)
        assert np.array_equal(audio.wave, whole_one)
        assert audio.repairs == ()
        assert "cut off" in refused(data[: len(data) // 2] + tag)


def fields() -> dict[str, tuple[int, str, int]]:
    """Container → position of the length field of its samples, its struct format, and extra bytes that it counts."""
    made = whole()
    chunks = {kind: (made[kind].index(b"data") + 4, "<I", 0) for kind in KINDS if kind.startswith("WAV")}
    wide = {kind: (made[kind].index(b"ds64") + 16, "<Q", 0) for kind in ("RF64", "BW64")}
    others = {"AIFF": (made["AIFF"].index(b"SSND") + 4, ">I", 8), "CAF": (made["CAF"].index(b"data") + 4, ">Q", 4)}
    return {**chunks, **wide, **others, "W64": (0x60, "<Q", 24), "AU": (8, ">I", 0)}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("WAV") or kind in WITH_FIELD])
def test_a_wrong_length_field_is_repaired(kind):
    data, (place, form, extra) = whole()[kind], fields()[kind]
    (right,) = struct.unpack_from(form, data, place)
    expected = read(data).wave
    by_one = [right - 1] if kind == "WAV" else []
    for value in (0, (right - extra) // 2 + extra, right - 44, *by_one, right + 44, 0x7FFFFFFF, 0xFFFFFFFF):
        if kind == "AU" and value == 0xFFFFFFFF:
            continue  # the format's value for unknown
        audio = read(put(data, place, form, value))
        assert np.array_equal(audio.wave, expected), value
        assert "read to the end" in audio.repairs[0]
        assert len(audio.repairs) == 1


def test_a_length_of_rf64_in_either_place():
    data = whole()["RF64"]
    place, wide = data.index(b"data") + 4, data.index(b"ds64") + 16
    for short, value in ((64_000, 0), (64_000, 64_000), (64_000, 2**63), (32_000, 64_000), (0, 64_000)):
        audio = read(put(put(data, place, "<I", short), wide, "<Q", value))
        assert np.array_equal(audio.wave, read(data).wave)
        assert bool(audio.repairs) == (short != 64_000)


def test_lengths_that_may_be_unknown():
    for kind, value in (("AU", 0xFFFFFFFF), ("CAF", 2**64 - 1)):
        place, form, _ = fields()[kind]
        audio = read(put(whole()[kind], place, form, value))
        assert (len(audio.wave), audio.repairs) == (32_000, ())


def with_total(data: bytes, total: int) -> bytes:
    fields = int.from_bytes(data[18:26], "big") >> 36 << 36 | total
    return data[:18] + fields.to_bytes(8, "big") + data[26:]


@pytest.mark.parametrize("total", [0, 1, 16_000, 31_999])
def test_flac_of_an_unknown_or_wrong_length(total):
    data = with_total(whole()["FLAC"], total)
    audio = read(data)
    assert np.array_equal(audio.wave, read(whole()["FLAC"]).wave)
    assert bool(audio.repairs) == bool(total)
    assert np.array_equal(read(data, 1.0, 0.5).wave, audio.wave[16_000:24_000])
    refused(data[: len(data) // 2])
    assert "promises 32001 samples, 32000 are there" in refused(with_total(data, 32_001))


def test_missing_or_repeated_flac_frames():
    data = whole()["FLAC"]
    heads = re.finditer(rb"\xff\xf8", data)
    places = [one.start() for one in heads if _flac_header(data[one.start() : one.start() + 16], 4096) is not None]
    assert len(places) == 8
    frames = [data[a:b] for a, b in zip(places, [*places[1:], len(data)], strict=True)]
    head = data[: places[0]]
    for total in (0, 32_000):
        start = with_total(head, total)
        assert np.array_equal(read(start + b"".join(frames)).wave, read(data).wave)
        for wrong in (frames[1:], frames[:3] + frames[4:], frames[:4] + frames[3:], frames + frames, frames[::-1]):
            assert re.search("a frame begins with sample|promises 32000 samples", refused(start + b"".join(wrong)))


def test_samples_that_look_like_a_flac_frame():
    head = bytes.fromhex("fff8c90805")  # of frame 5: 4,096 samples a frame
    head += bytes([_crc(head, _CRC8, 8)])
    assert _flac_header(head + bytes(10), 4096) == (20_480, 24_576)
    samples = np.random.default_rng(0).integers(-32_768, 32_767, 32_000).astype(">i2")  # such noise is stored verbatim
    samples[1000:1003] = np.frombuffer(head, ">i2")
    data = encoded(samples.astype(np.int16), kind="FLAC")
    assert head in data
    assert len(read(data).wave) == 32_000


def test_an_ogg_stream_without_a_valid_end():
    for kind in ("Ogg Vorbis", "Ogg Opus"):
        *first, last = pages(whole()[kind])
        for granule in (0, 2**64 - 1, 10**9, 2**62):
            page = put(put(last, 6, "<Q", granule), 22, "<I", 0)
            assert "Correct the crop" not in refused(b"".join(first) + put(page, 22, "<I", _ogg_sum(page)))
        assert "cut off" in refused(b"".join(first))
        assert "several recordings" in refused(whole()[kind] + whole()["Ogg Opus"])


def test_a_vbri_header_is_not_decoded():
    data = whole()["MP3 no Xing"]
    length = data.index(data[:2], 4)
    for frames in (58, 59, 20):
        vbri = b"VBRI" + struct.pack(">HHHIIHHHH", 1, 0, 100, len(data) + length, frames, 0, 0, 0, 0)
        audio = read((data[:4] + bytes(32) + vbri).ljust(length, b"\0") + data)
        assert np.array_equal(audio.wave, read(data).wave)
        assert bool(audio.repairs) == (frames == 20)
    refused((data[:4] + bytes(32) + vbri.replace(b"\0\x14", b"\0\x3a")).ljust(length, b"\0") + data[: 20 * length])


def test_a_wrong_number_of_frames_in_an_mp3():
    data = whole()["MP3"]
    place = max(data.find(b"Xing"), data.find(b"Info")) + 8
    for value in (0, 29, 59, 2**32 - 1):
        audio = read(put(data, place, ">I", value))
        assert np.array_equal(audio.wave, read(data).wave)
        assert "are there: read to the end" in audio.repairs[0]


def test_an_mp3_without_a_frame_count_is_read_to_the_end():
    """libsndfile assumes that all frames are like the first, and would read a fifth of this file."""
    sound = noise(8, rate=44_100)
    sound[44_100 * 4 :] *= 1e-4
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 44_100, 1, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5) as mp3:
        mp3.write(sound)
    data = file.getvalue()
    place = max(data.find(b"Xing"), data.find(b"Info"))
    first = data.index(data[:2], 4)
    for without in (data[first:], data[: place + 7] + b"\0" + data[place + 8 :]):
        assert len(read(without).wave) == pytest.approx(128_500, abs=700)
        assert len(read(without, 3.0, 0.5).wave) == 8000
        refused(without[: len(without) // 2])


@pytest.mark.parametrize("kind", ["M4A", "M4A moov first"])
def test_a_box_whose_length_is_wrong(kind):
    data = whole()[kind]
    place = data.index(b"mdat") - 4
    for value in (8, 2000, 20_000, 2**32 - 1):
        audio = read(put(data, place, ">I", value))
        assert np.array_equal(audio.wave, read(data).wave)
        assert audio.repairs == ("the length of a box is wrong, all samples are there",)


LIST = b"LIST" + struct.pack("<I", 6) + b"abcdef"
TAG = b"TAG" + bytes(125)
AFTER = {
    "chunk": LIST,
    "chunks": LIST + b"id3 " + struct.pack("<I", 5) + b"abcde\0" + b"junk" + struct.pack("<I", 0),
    "big chunk": b"zzzz" + struct.pack("<I", 200_000) + noise(10).tobytes()[:200_000],
    "zeros": bytes(1000),
    "id3v1": TAG,
    "id3v2": id3(300, b"\1" * 300),
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("kind", ["WAV", "WAV MP3", "RF64"])
def test_chunks_after_samples_are_not_decoded(kind, after):
    audio = read(whole()[kind] + AFTER[after])
    assert np.array_equal(audio.wave, read(whole()[kind]).wave)
    assert not audio.repairs


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF", "CAF", "AU", "NIST"])
def test_bytes_after_samples_are_noted(kind):
    for after in (b"abc", b"\1\2\3\4\5\6", b"a few words\n" * 50, np.random.default_rng(3).bytes(5000)):
        audio = read(whole()[kind] + after)
        assert np.array_equal(audio.wave[:32_000], read(whole()[kind]).wave)
        assert len(audio.wave) == 32_000 + len(after) // 2
        assert "read to the end" in audio.repairs[0]


@pytest.mark.parametrize("kind", ["WAV", "WAV float", "WAV extensible", "WAV ADPCM", "WAV GSM", "AIFF"])
@pytest.mark.parametrize("more", [2, 8, 42, 44, 45])
def test_a_length_that_includes_later_chunks(kind, more):
    data, (place, form, _) = whole()[kind], fields()[kind]
    (right,) = struct.unpack_from(form, data, place)
    after = (LIST if form == "<I" else b"ANNO\0\0\0\6abcdef") * 3
    for outer in (0, 0xFFFFFFFF, len(data)):
        audio = read(put(put(data, 4, form, outer), place, form, right + more) + after)
        assert np.array_equal(audio.wave, read(data).wave)
        assert "read to the end" in audio.repairs[0]


def test_gsm_of_an_odd_number_of_bytes():
    data = encoded(noise(0.2)[:2880], 8000, subtype="GSM610")  # 9 blocks of 65 bytes, and a padding byte
    assert data[-1:] == b"\0"
    for one in (data, data[:-1]):
        assert len(read(one).wave) == 5760


def test_chunks_after_samples_of_unknown_length():
    data = whole()["WAV"]
    for value in (0, 0xFFFFFFFF, 0x7FFFFFFF):
        for after in (LIST + LIST, b"id3 " + struct.pack("<I", 310) + id3(300, b"\1" * 300)):
            audio = read(put(data, 40, "<I", value) + after)
            assert np.array_equal(audio.wave, read(data).wave)
            assert "64000 are there" in audio.repairs[0]


TEXTS = (b"Info this", b"Xing\0\0\0\x0f" * 20, b"VBRI" * 9, b"\xff\xfb\x90\x64" * 200, b"fLaC\0\0\0\x22" * 9, b"TAG")


@pytest.mark.parametrize("kind", KINDS)
def test_tags_of_every_kind_around_a_recording(kind):
    data, expected = whole()[kind], read(whole()[kind]).wave
    for text in TEXTS:
        lyrics = b"LYRICSBEGIN" + text + b"%06dLYRICS200" % (len(text) + 11)
        first = b"TAG" + text.ljust(125)[:125]
        for before in (id3(900, b"\0" + text), id3(900, text, footer=True) + id3(30), ape(text)):
            assert np.array_equal(read(before + data).wave, expected)
        more = b"TAG+" + bytes(223) + first
        for after in (first, more, ape(text), ape(text, header=False) + first, lyrics + first, id3(900, text)):
            audio = read(data + after)
            assert np.array_equal(audio.wave, expected)
            assert audio.repairs == ()
    if kind not in LOSE_NOTHING:
        for after in (first, ape(text), lyrics):
            refused(id3(70_000, text * 9) + data[:-1] + after)


@pytest.mark.parametrize("kind", ["MP3", "MP3 no Xing", "ADTS", "FLAC"])
@pytest.mark.parametrize(
    "tags",
    [id3(300, b"Xing" * 20), id3(70_000, b"Info\0\1" * 900), id3(50, footer=True), id3(10) + id3(900) + bytes(77)],
    ids=["text", "cover", "footer", "several"],
)
def test_tags_before_a_recording(kind, tags):
    data = whole()[kind]
    assert np.array_equal(read(tags + data).wave, read(data).wave)
    if kind != "FLAC":
        assert np.array_equal(read(tags + data + TAG).wave, read(data).wave)
    refused((tags + data)[: -len(data) // 3])
    refused(tags[:-10])
    assert np.array_equal(read(bytes(9) + data).wave, read(data).wave)


def test_only_tags():
    for data in (id3(10), id3(10) + TAG, ape(b"a"), id3(10) + ape(b"a") + TAG, id3(5, footer=True), TAG):
        assert "holds no samples: it has nothing but tags" in refused(data)


def test_a_recording_after_another_in_an_mp3():
    data = whole()["MP3 no Xing"]
    assert "several recordings" in refused(data + id3(20) + data)
    assert "several recordings" in refused(data + whole()["MP3"])
    assert np.array_equal(read(data + id3(20)).wave, read(data).wave)


def test_damage_within_frames_and_pages_is_refused():
    for kind in ("MP3", "MP3 no Xing", "ADTS", "Ogg Vorbis", "Ogg Opus", "FLAC"):
        data = bytearray(whole()[kind])
        middle = len(data) // 2
        data[middle : middle + 700] = bytes(700)
        refused(bytes(data))
    data = whole()["Ogg Opus"]
    pages = [i for i in range(len(data)) if data[i : i + 4] == b"OggS"]
    assert "several" not in refused(data[: pages[2]] + data[pages[3] :])  # a page is missing


def test_streams_of_a_video():
    audio = read(by_av("matroska", "aac", streams=2))
    assert audio.repairs == ("2 audio streams: took the first",)
    assert len(read(by_av("mp4", "aac", video=True)).wave) >= 32_000
    assert "holds no audio stream" in refused(by_av("mp4", "aac", streams=0, video=True))
    assert "holds no audio stream" in refused(by_av("matroska", "aac", streams=0, video=True))


@pytest.mark.parametrize("kind", ["MP4 fragmented", "WebM live"])
def test_a_missing_or_repeated_fragment_is_noted(kind):
    if kind == "WebM live":
        data, mark = by_av("webm", "libopus", 48_000, {"live": "1", "cluster_time_limit": "300"}), b"\x1fC\xb6u"
    else:
        options = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "300000"}
        data, mark = by_av("mp4", "aac", options=options), b"moof"
    places = [match.start() - (4 if mark == b"moof" else 0) for match in re.finditer(re.escape(mark), data)]
    first, second = places[2:4]
    assert not read(data).repairs
    assert "parts are missing or repeated" in read(data[:first] + data[second:]).repairs[0]
    twice = read(data[:second] + data[first:])
    assert np.array_equal(twice.wave, read(data).wave) or "parts are missing or repeated" in twice.repairs[0]


def test_the_ffmpeg_program_is_not_needed(tmp_path):
    path = tmp_path / "a.m4a"
    path.write_bytes(whole()["M4A"])
    code = "import sys; from spjax.encoders.audio import read_audio; print(len(read_audio(sys.argv[1]).wave))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": str(root)}
    )
    assert int(done.stdout) >= 32_000, done.stderr


class Counted(io.BytesIO):
    """Counts the bytes that are read from it, with repetitions."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


def test_hostile_headers_are_read_in_linear_time():
    for data in (
        b"RIFF\xff\xff\xff\x7fWAVE" + b"abcd\0\0\0\0" * 500_000,
        b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + wav(b"")[20:36] + b"data\0\0\0\0" + b"LIST\0\0\0\0" * 500_000 + b"x" * 9,
        b"\0\0\0\x08ftyp" + b"\0\0\0\x08free" * 500_000,
        b"caff\0\1\0\0" + b"free" + bytes(8) + (b"free" + bytes(8)) * 300_000,
        whole()["FLAC"][:42] + b"\xff\xf8" * 2_000_000,
        b"\x1aE\xdf\xa3\x80\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" + b"\xec\x80" * 1_000_000,
        id3(0) * 400_000,
        b"OggS" + bytes(23) + b"OggS" * 100_000,
    ):
        file = Counted(data)
        with contextlib.suppress(AudioError):
            read_stream(file, "it")
        assert file.count < 30 * len(data)


@pytest.mark.parametrize(
    ("channels", "taken"),
    [
        ((1, -1), 0),
        ((0.5, -0.6), 1),
        ((1, -0.9), 0),
        ((1, -1, 0), 0),
        ((0.5, -0.5, 0.7, -0.7), 2),
        ((1, 0), None),
        ((1, 1), None),
        ((1, -0.2), None),
        ((1, 0, 0, 0, 0, 0), None),
    ],
)
def test_channels_that_cancel(tmp_path, channels, taken):
    sound = noise(0.5) * np.array(channels)
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(sound, subtype="FLOAT"))
    sound = sound.astype(np.float32)
    for audio in (read_audio(path), prepare(sound, 16_000), prepare(sound.T, 16_000)):
        if taken is None:
            assert np.array_equal(audio.wave, sound.mean(axis=1))
            assert not audio.repairs
        else:
            assert np.array_equal(audio.wave, sound[:, taken])
            assert audio.repairs == (f"channels cancel: took the loudest, {taken + 1} of {len(channels)}",)


def test_channels_that_nearly_cancel():
    left = noise(0.5)[:, 0].astype(np.float32)
    hiss = np.random.default_rng(5).normal(0, 1e-5, len(left)).astype(np.float32)
    assert np.array_equal(prepare(np.stack([left, hiss - left]), 16_000).wave, left)
    # An offset is not sound
    assert prepare(np.stack([left + 0.5, 0.3 - left]), 16_000).repairs
    assert not prepare(np.stack([left + 0.5, left - 0.5]), 16_000).repairs
    # a delayed copy, other sounds, a gap
    assert not prepare(np.stack([left[:-8], -left[8:]]), 16_000).repairs
    assert not prepare(noise(0.5, channels=12), 16_000).repairs
    left[5] = np.nan
    with pytest.raises(AudioError, match="NaN"):
        prepare(np.stack([left, -left]), 16_000)
    with pytest.raises(AudioError, match="is silent"):
        prepare(np.zeros((8000, 2)), 16_000)


def test_known_faults():
    if not (FAULTS / "01-header-short").is_dir():
        pytest.skip("faulty files are not beside this checkout (../shared/faults)")
    for name in ("half", "zero", "minus44"):
        audio = read_audio(FAULTS / "01-header-short" / f"{name}.wav")
        assert len(audio.wave) == 37_074
        assert audio.repairs
    for name in ("03-cut-containers/cut.m4a", "03-cut-containers/cut.w64", "09-mp3/bigid3_cut.mp3"):
        with pytest.raises(AudioError, match="is cut off"):
            read_audio(FAULTS / name)
    assert len(read_audio(FAULTS / "03-cut-containers" / "full.m4a").wave) > 37_000
    assert not read_audio(FAULTS / "09-mp3" / "noart_noxing_comment_info.mp3").repairs
    path = FAULTS / "07-opposite-phase" / "opposite_noisy.wav"
    samples, _ = soundfile.read(path, dtype="float32")
    assert np.array_equal(read_audio(path).wave, samples[:, np.square(samples).sum(0).argmax()])
