"""HuBERT against golden vectors of the original; features do not depend on the batch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from spjax.convert.hubert import import_hubert
from spjax.encoders import hubert, transformer
from spjax.io import files
from spjax.models.config import Compute
from spjax.models.hubert_config import HubertConfig
from spjax.training.speed import equations
from spjax.types import Params
from tests.encoders.hubert_models import KINDS, TINY, error, speechlike, weights

FIELD, HOP = 400, 320
WAVES = 7  # of the golden vectors
BASE = HubertConfig()

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def original(golden: Path) -> tuple[HubertConfig, Params, dict[str, np.ndarray]]:
    """The tiny HuBERT of the golden vectors and the original's features of seven waves."""
    made = import_hubert(golden / "hubert" / "hubert_tiny.pt")
    return made.config, made.params, dict(np.load(golden / "hubert" / "hubert_feats.npz"))


def test_golden_layers(original):
    """Every layer of every wave in one padded batch of 401 to 48,000 samples; group norm is measured on the device."""
    config, params, arrays = original
    waves = [arrays[f"wave_{i}"] for i in range(WAVES)]
    padded = np.stack([np.pad(wave, (0, 48000 - len(wave))) for wave in waves])
    lengths = np.asarray([len(wave) for wave in waves])

    @jax.jit  # one program, so that shared layers are computed once
    def every(params: Params, waves: jax.Array, lengths: jax.Array) -> list[jax.Array]:
        return [hubert.features(params, config, waves, lengths, layer) for layer in range(8)]

    for layer, rows in enumerate(every(params, padded, lengths)):
        for i, row in enumerate(np.asarray(rows)):
            assert error(row[: config.frames(lengths[i])], arrays[f"layer{layer}_{i}"]) < 1e-5, (layer, i)


@pytest.mark.parametrize("layer", [1, 6])
def test_golden_extract(original, layer: int):
    config, params, arrays = original
    found = hubert.extract(params, config, [arrays[f"wave_{i}"] for i in range(WAVES)], layer)
    assert max(error(x, arrays[f"layer{layer}_{i}"]) for i, x in enumerate(found)) < 1e-5


@pytest.mark.parametrize("wave", [0, 4, 5])
def test_golden_convolutions_and_projection(original, wave: int):
    config, params, arrays = original
    x = arrays[f"wave_{wave}"][None]
    norm = hubert.ChannelNorm(*(part[None] for part in hubert.channel_norm(params["conv"]["0"]["kernel"], 5, x[0])))
    conv = hubert._convolve(params["conv"], config, x, norm, params["conv_norm"], Compute())
    assert error(np.asarray(conv[0]), arrays[f"conv_{wave}"]) < 1e-5
    normed = hubert.layer_norm(arrays[f"conv_{wave}"], params["project_norm"])
    projected = normed @ params["project"]["kernel"] + params["project"]["bias"]
    assert error(np.asarray(projected), arrays[f"proj_{wave}"]) < 1e-5


def test_golden_of_transformers(original, golden: Path):
    config, params, arrays = original
    theirs = np.load(golden / "hubert" / "hf_layer6.npz")
    found = hubert.extract(params, config, [arrays[f"wave_{i}"] for i in range(WAVES)], 6)
    assert max(error(x, theirs[f"hf_layer6_{i}"]) for i, x in enumerate(found)) < 1e-5


def test_golden_plain_chunks(original):
    config, params, arrays = original
    waves, expected = [arrays["wave_4"], arrays["wave_0"]], arrays["chunk16000_layer6_4"]
    whole = hubert.extract(params, config, waves[:1], 6)[0]
    found, short = hubert.extract(params, config, waves, 6, plain_chunks=True, chunk=16000)
    assert error(found, expected) < 1e-5
    assert len(whole) - len(found) == 2, "a frame is lost at every border"
    assert error(short, arrays["layer6_0"]) < 1e-5, "a wave shorter than a chunk is encoded at once"


# Without reference data


@hypothesis.given(st.integers(0, 100_000), st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), min_size=1))
def test_frames_are_those_of_convolution_after_convolution(samples: int, sizes: list[tuple[int, int]]):
    strides, kernels = tuple(stride for stride, _ in sizes[:7]), tuple(stride + more for stride, more in sizes[:7])
    config = HubertConfig(conv_kernels=kernels, conv_strides=strides)
    left = samples
    for kernel, stride in zip(kernels, strides, strict=True):
        left = max(0, (left - kernel) // stride + 1)
    assert config.frames(samples) == left
    assert config.frames(config.field) == 1
    assert config.frames(config.field - 1) == 0
    assert config.frames(config.field + config.hop) == 2


def test_full_size():
    config = HubertConfig()
    assert (config.field, config.hop, config.frames(16000)) == (FIELD, HOP, 49)
    assert sum(math.prod(shape) for shape in config.shapes.values()) == config.num_params == 94_370_816


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 5}, "dim 768 is not a multiple of heads 5"),
        ({"position_groups": 7}, "not a multiple of position_groups 7"),
        ({"conv_strides": (5, 2)}, "7 conv_kernels, but 2 conv_strides"),
        ({"conv_kernels": (10, 3, 3, 3, 3, 2, 1)}, "skip samples"),
        ({"conv_kernels": [10]}, "has the wrong type"),
        ({"layers": 0}, "layers is 0, must be positive integers"),
        ({"dim": True}, "dim is True"),
        ({"pre_norm": 1}, "pre_norm is 1, which has the wrong type"),
        ({"wave_eps": 1}, "wave_eps is 1, which has the wrong type"),
        ({"wave_eps": -1e-7}, "must be 0 or more"),
        ({"buckets": 320, "max_distance": 80}, "buckets 320 must be 4 or more, and less than 4 times max_distance 80"),
        ({"max_distance": 800}, "buckets 0 must be"),
    ],
)
def test_invalid_sizes_are_refused(sizes, message: str):
    with pytest.raises(ValueError, match=message):
        HubertConfig(**sizes)


@functools.cache
def tiny() -> Params:
    return weights()


def test_batched_is_single():
    """Lengths from one frame to four seconds in one padded batch; padding changes nothing."""
    waves = [speechlike(n, seed=n) for n in (400, 720, 20_001, 64_000)]
    lengths = np.asarray([len(wave) for wave in waves])
    padded = np.stack([np.pad(wave, (0, 64_000 - len(wave))) for wave in waves])
    dirty = np.where(np.arange(64_000) < lengths[:, None], padded, 7.0).astype(np.float32)
    run = jax.jit(lambda *args: [hubert.features(tiny(), TINY, *args, layer) for layer in range(3)])
    together, dirtied = run(padded, lengths), run(dirty, lengths)
    packed = hubert.extract(tiny(), TINY, waves, 2, batch_frames=10_000)
    for i, wave in enumerate(waves):
        for layer, alone in enumerate(run(wave[None], lengths[i : i + 1])):
            assert alone.shape[1] == TINY.frames(len(wave))
            for found in (together[layer][i], dirtied[layer][i], *packed[i : i + 1] * (layer == 2)):
                assert error(np.asarray(found[: alone.shape[1]]), np.asarray(alone[0])) < 1e-5


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.lists(st.integers(FIELD, 9000), min_size=1, max_size=9), st.sampled_from([1, 20, 2000]))
def test_extract_keeps_order_and_lengths(lengths: list[int], batch_frames: int):
    waves = [speechlike(n, seed=i) for i, n in enumerate(lengths)]
    found = hubert.extract(tiny(), TINY, waves, 1, batch_frames=batch_frames)
    assert [len(x) for x in found] == [TINY.frames(n) for n in lengths]
    pick = lengths.index(max(lengths))
    assert error(found[pick], hubert.extract(tiny(), TINY, [waves[pick]], 1)[0]) < 1e-5


def test_batches_have_few_shapes_and_limited_frames():
    rng = np.random.default_rng(0)
    lengths = [TINY.frames(n) for n in rng.integers(400, 480_000, 500).tolist()]
    batches = list(transformer.batches(lengths, 2048))
    assert sorted(number for _, batch in batches for number in batch) == list(range(500))
    assert all(frames * len(batch) <= 2048 for frames, batch in batches)
    assert all(lengths[number] <= frames for frames, batch in batches for number in batch)
    assert len({(frames, len(batch)) for frames, batch in batches}) < 60
    padded = sum(frames * len(batch) for frames, batch in batches)
    assert padded < 1.15 * sum(lengths)


@pytest.mark.parametrize("chunk", [32000, 32321])
def test_overlapped_chunks_agree_away_from_the_ends(chunk: int):
    """Everything but attention is exact there, and attention differs little if distant frames matter little."""
    wave = speechlike(90_000)
    near, deaf = (jax.tree.map(np.copy, tiny()) for _ in range(2))
    for layer in range(2):
        near["layers"][str(layer)]["query"] = jax.tree.map(np.zeros_like, near["layers"][str(layer)]["query"])
        deaf["layers"][str(layer)]["out"] = jax.tree.map(np.zeros_like, deaf["layers"][str(layer)]["out"])
    differences = {}
    for name, params, layer in (("input", tiny(), 0), ("deaf", deaf, 2), ("near", near, 2), ("tiny", tiny(), 2)):
        whole = hubert.extract(params, TINY, [wave], layer)[0]
        # Half an overlap, 10 frames, exceeds half of the tiny positional convolution, 6 frames.
        chunked = hubert.extract(params, TINY, [wave], layer, chunk=chunk, overlap=6400)[0]
        assert chunked.shape == whole.shape
        differences[name] = error(chunked, whole)
    assert differences["input"] < 1e-5
    assert differences["deaf"] < 1e-5
    assert 1e-5 < differences["near"] < differences["tiny"], "only attention differs"
    ends = hubert.extract(deaf, TINY, [wave], 2, chunk=chunk, overlap=0)[0]
    assert error(ends, whole) > 1e-2, "without an overlap the ends differ"
    apart = hubert.extract(tiny(), TINY, [wave], 2, plain_chunks=True, chunk=chunk)[0]
    assert len(apart) < len(whole)


def test_chunks_cover_every_frame_once_with_context_on_either_side():
    kernel = tiny()["conv"]["0"]["kernel"]
    for samples, chunk, overlap in itertools.product((9000, 40_000, 40_321, 99_999), (8000, 12_345), (0, 1000, 4000)):
        wave = np.arange(samples, dtype=np.float32)
        pieces = list(hubert._overlapped(TINY, kernel, 0, wave, chunk, overlap))
        kept = []
        for piece in pieces:
            start = int(piece.data[0][0]) // HOP
            kept += range(start + piece.first, start + piece.last)
            assert piece.samples <= chunk
            room = overlap // HOP // 2
            assert piece.first >= room or start == 0
            assert TINY.frames(piece.samples) - piece.last >= room or start + piece.last == TINY.frames(samples)
        assert kept == list(range(TINY.frames(samples)))
        assert len({piece.samples for piece in pieces}) == 1, "one shape"


@pytest.mark.parametrize("kind", ["hubert", "wavlm_large"])
def test_segments_and_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch, kind: str):
    config = dataclasses.replace(TINY, **KINDS[kind])
    params = weights(config)
    waves = np.stack([speechlike(50_000), np.pad(speechlike(20_000, 1), (0, 30_000))])
    lengths = np.asarray([50_000, 20_000])

    def run() -> np.ndarray:
        return np.asarray(jax.jit(lambda: hubert.features(params, config, waves, lengths, 2))())

    whole = run()
    monkeypatch.setattr(hubert, "_SEGMENT", 50)
    monkeypatch.setattr(transformer, "QUERIES", 50)
    blocked = run()
    assert error(blocked[0], whole[0]) < 1e-5
    assert error(blocked[1, : TINY.frames(20_000)], whole[1, : TINY.frames(20_000)]) < 1e-5


@pytest.mark.parametrize("offset", [0, 0.5])
def test_the_group_norm_is_measured_alike_on_host_and_device(offset: float):
    wave, kernel = speechlike(30_000) + np.float32(offset), tiny()["conv"]["0"]["kernel"]
    windows = np.lib.stride_tricks.sliding_window_view(wave.astype(np.float64), 10)[::5]
    exact = windows @ kernel[:, 0].astype(np.float64)
    host = hubert.channel_norm(kernel, 5, wave)
    np.testing.assert_allclose(host.mean, exact.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(host.scale, 1 / np.sqrt(exact.var(0) + 1e-5), rtol=1e-6)
    padded = jnp.asarray(np.pad(wave, (0, 5000)))[None]
    device = hubert._measure(tiny(), TINY, padded, jnp.asarray([30_000]))
    np.testing.assert_allclose(device.mean[0], host.mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(device.scale[0], host.scale, rtol=1e-4)


def test_silence_has_features():
    found = hubert.extract(tiny(), TINY, [np.zeros(8000, np.float32), np.full(8000, 0.25, np.float32)], 2)
    assert all(np.isfinite(x).all() for x in found)


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.zeros(399, np.float32), "wave 1 has 399 samples.*at least 400"),
        (np.zeros(0, np.float32), "wave 1 has 0 samples"),
        (np.zeros(4000), r"wave 1 is float64 \[4000\], must be float32"),
        (np.zeros((2, 4000), np.float32), r"float32 \[2, 4000\], must be float32 \[samples\]"),
        (np.full(4000, np.nan, np.float32), "wave 1 holds NaN"),
    ],
)
def test_bad_waves_are_refused(wave: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        hubert.extract(tiny(), TINY, [np.zeros(500, np.float32), wave], 1)


def test_invalid_settings_are_refused():
    wave = np.zeros(500, np.float32)
    for settings, message in (
        ({"layer": 3}, "layer 3 does not exist; give 1 to 2"),
        ({"layer": -1}, "layer -1"),
        ({"layer": 1, "chunk": 399}, "chunk 399 must be 400 or more"),
        ({"layer": 1, "overlap": 900_000}, "overlap 900000 must be between 0 and half"),
        ({"layer": 1, "batch_frames": 0}, "batch_frames 0"),
    ):
        with pytest.raises(ValueError, match=message):
            hubert.extract(tiny(), TINY, [wave], **settings)
    with pytest.raises(ValueError, match="waves of 300 samples"):
        hubert.features(tiny(), TINY, jnp.zeros((1, 300)), jnp.asarray([300]), 1)
    assert hubert.extract(tiny(), TINY, [], 1) == []


def test_bfloat16_is_close():
    wave = speechlike(16000)
    exact, near = (hubert.extract(tiny(), TINY, [wave], 2, compute=Compute(d))[0] for d in ("float32", "bfloat16"))
    assert near.dtype == np.float32
    assert 1e-4 < error(near, exact) < 0.2


# Cost


def shapes(config: HubertConfig, layers: int) -> Params:
    kept = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, shape in config.shapes.items()
        if not path.startswith("layers/") or int(path.split("/")[1]) < layers
    }
    return files.unflatten(kept)


def lowered_args(layers: int, config: HubertConfig = BASE) -> tuple[Params, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    waves = jax.ShapeDtypeStruct((2, 32000), jnp.float32)
    return shapes(config, layers), waves, jax.ShapeDtypeStruct((2,), jnp.int32)


def flops(layer: int) -> float:
    run = jax.jit(lambda params, waves, lengths: hubert.features(params, HubertConfig(), waves, lengths, layer))
    return run.lower(*lowered_args(12)).cost_analysis()["flops"]


def test_no_layer_is_run_beyond_the_requested_one():
    """Each layer costs the same, and the first ones do not depend on the weights of later ones."""
    one, two, six = flops(1), flops(2), flops(6)
    assert abs((six - two) / (4 * (two - one)) - 1) < 0.01
    params, waves, lengths = lowered_args(6)
    assert jax.eval_shape(lambda *a: hubert.features(a[0], HubertConfig(), *a[1:], 6), params, waves, lengths)
    assert sorted(hubert.place(tiny(), 1)["layers"]) == ["0"]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
    ("kind", "layer", "frames"), [("hubert", 6, 99), ("mhubert_25hz", 1, 49), ("wavlm_large", 1, 99)]
)
def test_full_size_lowers_for(platform: str, kind: str, layer: int, frames: int):
    """float32 products stay float32 where the hardware would round them."""
    large = {"dim": 1024, "layers": 24, "heads": 16, "ffn_dim": 4096} if kind.endswith("large") else {}
    config = HubertConfig(**large, **KINDS[kind])
    run = jax.jit(lambda params, waves, lengths: hubert.features(params, config, waves, lengths, layer))
    exported = export.export(run, platforms=[platform])(*lowered_args(layer, config))
    assert exported.platforms == (platform,)
    assert exported.out_avals[0].shape == (2, frames, config.dim)
    kinds = ("dot_general", "conv_general_dilated")
    products = [
        e for e, _ in equations(run.trace(*lowered_args(layer, config)).jaxpr.jaxpr) if e.primitive.name in kinds
    ]
    assert len(products) > 8 * layer
    highest = jax.lax.Precision.HIGHEST
    assert all(e.params["precision"] in (highest, (highest, highest)) for e in products)
