"""Check at the start that all processes of a run have the same config, data, code and JAX version."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


def agree(values: Mapping[str, Any]) -> None:
    """Compare values, source code and JAX version of this process with those of process 0.

    A collective operation: all processes must call it at the same point. Does nothing in a single process.

    Args:
      values: JSON-serialisable, such as a config or data hashes; messages name nested values by dotted keys.

    Raises:
      ValueError: a value differs from process 0's in this process (names it) or in another one, or processes have
        different numbers of devices.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        counts = ", ".join(f"process {n} has {devices[n]}" for n in sorted(devices))
        raise ValueError(f"all processes must have the same number of devices: {counts}")
    mine = json.loads(json.dumps(dict(_dotted({**values, "code": _code(), "jax": jax.__version__}))))
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text))))
    text = np.pad(text[:size], (0, max(size - len(text), 0)))
    first = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(text), np.uint8)))
    differing = [key for key in sorted(mine.keys() | first.keys()) if mine.get(key) != first.get(key)]
    others = np.flatnonzero(multihost_utils.process_allgather(np.asarray(bool(differing))))
    if differing:
        listed = ", ".join(f"{key}={_brief(mine.get(key))} (process 0: {_brief(first.get(key))})" for key in differing)
        raise ValueError(
            f"process {jax.process_index()} has {listed}: give all processes the same command, code and data"
        )
    if len(others):
        numbers = ", ".join(map(str, others))
        raise ValueError(f"process {numbers} has other settings than process {jax.process_index()}: see its message")


def _code() -> str:
    """sha256 of the package's source files, since different releases must not train together."""
    package = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
