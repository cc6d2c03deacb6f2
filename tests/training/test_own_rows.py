"""The rows that a process reads depend on the positions of its devices in the mesh."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spjax.training import sharding


def _mesh(process_of: np.ndarray) -> Any:
    """A mesh (data, shard, model) of fake devices with these process indices."""
    devices = np.empty(process_of.shape, object)
    devices.flat = [SimpleNamespace(process_index=int(number)) for number in process_of.flat]
    return SimpleNamespace(devices=devices, shape=dict(zip(("data", "shard", "model"), process_of.shape, strict=True)))


def _squares(side: int) -> np.ndarray:
    """Process indices of a slice of side × side chips, 2 × 2 per host, row by row."""
    x, y = np.divmod(np.arange(side * side), side)
    return x // 2 * (side // 2) + y // 2


@pytest.mark.parametrize(
    ("process_of", "own", "runs"),
    [
        (np.repeat([0, 1], 4).reshape(8, 1, 1), [[0, 1, 2, 3], [4, 5, 6, 7]], 8),
        (np.repeat([0, 1], 4).reshape(2, 2, 2), [[0, 1], [2, 3]], 4),
        (np.asarray([0, 1, 2, 3]).reshape(2, 1, 2), [[0], [0], [1], [1]], 2),  # a layer spans processes
        (_squares(4).reshape(16, 1, 1), [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]], 16),
    ],
)
def test_every_process_reads_the_rows_that_its_devices_compute(
    monkeypatch: pytest.MonkeyPatch, process_of: np.ndarray, own: list[list[int]], runs: int
) -> None:
    for process, expected in enumerate(own):
        monkeypatch.setattr(sharding.jax, "process_index", lambda process=process: process)
        assert sharding.local_shards(_mesh(process_of)) == (expected, runs)
