"""k-means: golden units, nearest centroids, and fits that depend only on the frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spjax.encoders import kmeans
from spjax.encoders.kmeans import assign, assign_frames, fit

CARD = {"encoder": "mfcc", "layer": None}
SMALL = {"batch_frames": 64, "pool_frames": 256}  # several pools and batches for a small corpus


def clouds(frames=3000, clusters=8, dim=5, seed=0):
    """Frames around well separated centres [clusters, dim]."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim)) * 20
    return (centres[rng.integers(clusters, size=frames)] + rng.normal(size=(frames, dim))).astype(np.float32), centres


def distances(features, centroids):
    """[F, C] squared, in float64."""
    return ((features[:, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2).sum(-1)


def inertia(features, centroids):
    return distances(features, centroids).min(1).mean()


def assert_equal_but_for_ties(units, expected, features, centroids):
    ordered = np.sort(distances(features, centroids), 1)
    clear = ordered[:, 1] - ordered[:, 0] > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(units[clear], expected[clear])


@pytest.mark.parametrize("version", ["1.0.1", "0.24.2"])
def test_golden_units(golden: Path, version):
    data = np.load(golden / "kmeans" / f"kmeans_sk{version}.npz")
    units = assign_frames(data["features"], data["cluster_centers"])
    assert units.dtype == np.int32
    assert_equal_but_for_ties(units, data["units"], data["features"], data["cluster_centers"])
    hubert = np.load(golden / "hubert" / "hubert_feats.npz")
    for i in range(7):
        features, centres = hubert[f"layer6_{i}"], data["hubert_cluster_centers"]
        units = np.asarray(assign(features[None], centres))[0]
        assert_equal_but_for_ties(units, data[f"hubert_units_{i}"], features, centres)


@settings(max_examples=30)
@given(
    frames=st.integers(0, 200), clusters=st.integers(1, 40), dim=st.sampled_from([1, 39, 100]), seed=st.integers(0, 99)
)
def test_the_nearest_centroid_is_assigned(frames, clusters, dim, seed):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(frames, dim)).astype(np.float32)
    centroids = rng.normal(size=(clusters, dim)).astype(np.float32)
    units, exact = assign_frames(features, centroids), distances(features, centroids)
    assert units.shape == (frames,)
    chosen = exact[np.arange(frames), units]
    assert (chosen <= exact.min(1, initial=np.inf) + 1e-4).all()


def test_ties_go_to_the_first_centroid():
    centroids = np.array([[5, 5], [1, 0], [-1, 0], [1, 0]], np.float32)
    assert assign_frames(np.array([[0, 0], [0, 3], [2, 0], [-2, 0]], np.float32), centroids).tolist() == [1, 1, 1, 2]


def test_long_features_are_assigned_in_parts():
    features, centres = clouds(frames=40_000, dim=3)
    centroids = centres.astype(np.float32)
    np.testing.assert_array_equal(assign_frames(features, centroids), np.asarray(assign(features, centroids)))


def test_two_thousand_centroids_in_bounded_memory(monkeypatch: pytest.MonkeyPatch):
    """Fitted pool by pool, and assigned in blocks of at most 16 MiB of distances."""
    features, _ = clouds(frames=9000, clusters=3000, dim=3)
    found = fit(iter([features]), 2000, card=CARD, batch_frames=2000, pool_frames=4000)
    assert found.centroids.shape == (2000, 3)
    sizes = []
    jitted = kmeans._jitted_assign
    monkeypatch.setattr(kmeans, "_jitted_assign", lambda x, c: (sizes.append(len(x) * len(c)), jitted(x, c))[1])
    units = assign_frames(features, found.centroids)
    assert_equal_but_for_ties(
        units[:500], distances(features[:500], found.centroids).argmin(1), features[:500], found.centroids
    )
    assert len(sizes) > 1
    assert max(sizes) * 4 <= 16 << 20


def test_features_of_another_encoder_are_refused():
    with pytest.raises(ValueError, match=r"\[4, 39\] do not fit centroids \[8, 768\]"):
        assign_frames(np.zeros((4, 39), np.float32), np.zeros((8, 768), np.float32))


def test_fit_finds_the_clusters():
    features, centres = clouds()
    kmeans = fit([features], 8, card={**CARD, "fitted_on": {"corpus": "toy"}}, **SMALL)
    found = distances(centres, kmeans.centroids)
    assert sorted(found.argmin(1)) == list(range(8))
    assert found.min(1).max() < 0.1
    assert kmeans.card["encoder"] == "mfcc"
    assert kmeans.card["fitted_on"] == {"corpus": "toy", "frames": 3000, "passes": 1, "seed": 0}


def test_fit_is_close_to_lloyds_algorithm():
    from sklearn.cluster import KMeans

    features = np.random.default_rng(0).normal(size=(6000, 6)).astype(np.float32)
    best = KMeans(30, n_init=3, random_state=0).fit(features)
    # Sorted by one dimension: as hard as a corpus that is sorted by speaker.
    ordered = features[np.argsort(features[:, 0])]
    for stream, worse in ((features, 1.05), (ordered, 1.25)):
        kmeans = fit([stream], 30, card=CARD, passes=2, batch_frames=500, pool_frames=3000)
        assert inertia(features, kmeans.centroids) < worse * inertia(features, best.cluster_centers_)


@settings(max_examples=10)
@given(cuts=st.lists(st.integers(0, 1000), max_size=12))
def test_fit_does_not_depend_on_the_streams_chunks(cuts):
    features, _ = clouds(frames=1000)
    whole = fit([features], 8, card=CARD, **SMALL)
    parts = np.split(features, sorted(cuts))
    assert fit(iter(parts), 8, card=CARD, **SMALL).id == whole.id


def test_fit_depends_only_on_seed_and_frames():
    features, _ = clouds(frames=1000)
    ids = [fit([features], 20, seed=seed, card=CARD, **SMALL).id for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    kept = features.copy()
    fit([features], 20, card=CARD, **SMALL)
    np.testing.assert_array_equal(features, kept)


def test_passes_read_the_stream_again():
    features, _ = clouds(frames=1000)
    opened = []

    def stream():
        opened.append(True)
        return iter([features[:300], features[300:]])

    kmeans = fit(stream, 8, passes=3, card=CARD, **SMALL)
    assert len(opened) == 3
    assert kmeans.card["fitted_on"] == {"frames": 1000, "passes": 3, "seed": 0}
    with pytest.raises(ValueError, match="passes=2 over a stream that can be read once"):
        fit(iter([features]), 8, passes=2, card=CARD)


def test_a_stream_of_any_length_takes_bounded_memory():
    alive, most = 0, 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def stream():
        nonlocal alive, most
        rng = np.random.default_rng(0)
        for _ in range(200):
            alive += 1
            most = max(most, alive)
            yield rng.normal(size=(50, 4)).astype(np.float32).view(Counted)

    assert fit(stream, 8, card=CARD, **SMALL).card["fitted_on"]["frames"] == 10_000
    assert most <= 4


def test_every_cluster_has_frames():
    # Two distant frames among thousands of close ones: a poor initialisation leaves clusters empty.
    features = np.concatenate([np.random.default_rng(0).normal(size=(5000, 2)) * 1e-3, [[100, 100], [-100, 100]]])
    kmeans = fit([features.astype(np.float32)], 40, card=CARD, batch_frames=1000)
    assert len(np.unique(kmeans.centroids, axis=0)) == 40
    used = assign_frames(features.astype(np.float32) * 1000, kmeans.centroids * 1000)
    assert len(np.unique(used)) >= 39


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([], "hold no frames"),
        ([np.zeros((0, 3))], "hold no frames"),
        ([np.zeros((4, 3)), np.ones((3, 3))], "hold 7 frames, fewer than clusters"),
        ([np.zeros((50, 3)), np.ones((50, 3))], "hold 2 different ones"),
        ([np.zeros((4, 3)), np.ones((3, 2))], r"after frame 4 have shape \[3, 2\], must be \[frames, 3\]"),
        ([np.zeros(4)], r"have shape \[4\], must be \[frames, D\]"),
        ([np.zeros((4, 3)), np.array([[0, 0, 0], [0, np.nan, 0]])], "frame 5 of the features is NaN"),
        ([np.full((9, 3), np.inf)], "frame 0 of the features is NaN or infinite"),
    ],
)
def test_streams_that_cannot_be_fitted_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        fit(arrays, 8, card=CARD)


@pytest.mark.parametrize("numbers", [{"clusters": 0}, {"clusters": 2, "passes": 0}])
def test_numbers_below_one_are_refused(numbers):
    with pytest.raises(ValueError, match="must be at least 1"):
        fit([np.zeros((9, 2))], card=CARD, **numbers)
