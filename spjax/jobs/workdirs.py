"""Work directories of jobs: config.json, JSON files and console output."""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any

import jax
import numpy as np

from spjax import config
from spjax.io import files, places
from spjax.training import sharding
from spjax.training.multihost_check import agree
from spjax.types import Json

# Settings that may change when a run is resumed, since they do not affect results. Data and LM are compared by hash.
_MAY_CHANGE = re.compile(
    r"data|lm|baselines|pretraining\..*|model_parallel|weight_shards|.*\.(checkpoint_every|eval_rows|profile)"
)
_MADE = ("checkpoints", "results.json", "baselines.json", "lm", "comparison.json", "methods.json")


def refuse_another(workdir: str, settings: Json, inputs: Json, flag: str = "--workdir") -> None:
    """Raise ValueError if WORKDIR has results of other settings, other data or another LM.

    Args:
      workdir: may be absent.
      settings: of the job, as `config.to_dict`.
      inputs: identity of its data and LM, as far as known.
      flag: flag with which the user can give another directory.
    """
    path = os.path.join(workdir, "config.json")
    if not there(path) or not any(there(os.path.join(workdir, name)) for name in _MADE):
        return
    old, new = settings_of(read_json(path)), settings_of(json.loads(json.dumps({**settings, "inputs": inputs})))
    differing = [k for k in sorted(old.keys() & new.keys()) if old[k] != new[k] and not _MAY_CHANGE.fullmatch(k)]
    if differing:
        listed = ", ".join(f"{key}={old[key]!r} (now {new[key]!r})" for key in differing)
        raise ValueError(f"{workdir} holds a run with {listed}: use another {flag}, or remove this one to start again")


def claim(workdir: str, settings: Json, inputs: Json, flag: str = "--workdir") -> None:
    """Write WORKDIR/config.json: settings and identity of data and LM; with several processes also a launch id.

    Raises:
      ValueError: as `refuse_another`; or processes have different inputs, or do not share WORKDIR.
    """
    agree(inputs)
    refuse_another(workdir, settings, inputs, flag)
    path = os.path.join(workdir, "config.json")
    content = {**settings, "inputs": inputs}
    if jax.process_count() == 1:
        write_json(path, content)
        return
    from jax.experimental import multihost_utils

    # A random launch id distinguishes the file of process 0 from an old one on a disk that is not shared.
    number = multihost_utils.broadcast_one_to_all(np.frombuffer(os.urandom(8), np.uint8))
    launch = bytes(np.asarray(number, np.uint8)).hex()
    sharding.on_process_zero(path, lambda: write_json(path, {**content, "launch": launch}))
    for _ in range(SEEN_WITHIN):
        if there(path) and read_json(path).get("launch") == launch:
            return
        time.sleep(1)
    raise ValueError(
        f"process {jax.process_index()} cannot see {path}, which process 0 wrote: give a --workdir on "
        "storage that all processes share, such as gs://"
    )


SEEN_WITHIN = 30  # seconds to wait for a file that another machine wrote to shared storage


def write_json(path: str, content: Json) -> None:
    """Write a JSON file atomically; creates its directory."""
    files.write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: str) -> Any:
    """Read a JSON file.

    Raises:
      ValueError: it is damaged.
    """
    try:
        return json.loads(places.at(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it") from error


def there(place: str) -> bool:
    """Whether a file or directory exists, here or in a bucket."""
    return places.at(place).exists()


def whole(directory: str, known_by: str) -> bool:
    """Whether a directory exists and is complete: in a bucket, if it has `known_by`, the file that is written last."""
    return there(os.path.join(directory, known_by) if places.is_remote(directory) else directory)


def say(text: str) -> None:
    """Print a line, on process 0 only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def settings_of(tree: Json) -> Json:
    """Flatten settings to dotted names, with "lm.prosody" as a boolean, so that configs can be compared."""
    flat = config.flat(tree)
    if "lm.dim" in flat:
        flat["lm.prosody"] = "lm.prosody.discrete" in flat
    return flat
