"""Processes that train together find out at the start whether they were told the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


def agree(told: Mapping[str, Any]) -> None:
    """Compare what this process was told, its code and JAX with those of process 0; nothing for a process alone.

    All processes call it at the same point.

    Args:
      told: what JSON can hold, such as a config or hashes of data; a setting inside is called by its dotted name.

    Raises:
      ValueError: something differs in some process, which says what.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        counts = ", ".join(f"process {n} has {devices[n]}" for n in sorted(devices))
        raise ValueError(f"every process needs as many devices as the others: {counts}")
    mine = json.loads(json.dumps(dict(_dotted({**told, "code": _code(), "jax": jax.__version__}))))
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text))))
    text = np.pad(text[:size], (0, max(size - len(text), 0)))
    first = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(text), np.uint8)))
    differing = [key for key in sorted(mine.keys() | first.keys()) if mine.get(key) != first.get(key)]
    others = np.flatnonzero(multihost_utils.process_allgather(np.asarray(bool(differing))))
    if differing:
        values = ", ".join(f"{key}={_brief(mine.get(key))} (process 0: {_brief(first.get(key))})" for key in differing)
        raise ValueError(
            f"process {jax.process_index()} has {values}: give all processes the same command, code and data"
        )
    if len(others):
        numbers = ", ".join(map(str, others))
        raise ValueError(f"process {numbers} was told something else than process {jax.process_index()}, and says what")


def _code() -> str:
    """sha256 of the package's source files: processes of different releases must not train together."""
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
