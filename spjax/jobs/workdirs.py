"""A job's work directory: whose it is, what JSON it holds, and what is told while it is filled."""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from spjax.storage import files, places
from spjax.training import sharding
from spjax.training.agreement import agree

# What a run may be continued with another value of: none changes a number. Data and LM are known by their hashes.
_FREE = re.compile(
    r"data|lm|baselines|pretraining\..*|model_parallel|weight_shards|.*\.(checkpoint_every|eval_rows|profile)"
)
_MADE = ("checkpoints", "results.json", "baselines.json", "lm", "comparison.json", "methods.json")


def refuse_another(workdir: str, config: ConfigDict, inputs: dict[str, Any], flag: str = "--workdir") -> None:
    """Raise ValueError where WORKDIR holds what came of another config, other data or another LM.

    Args:
      workdir: may be absent.
      config: of the job that is to go on there.
      inputs: what identifies its data and LM, as far as known.
      flag: by which the user gives another place.
    """
    path = os.path.join(workdir, "config.json")
    if not there(path) or not any(there(os.path.join(workdir, name)) for name in _MADE):
        return
    old, new = settings_of(read_json(path)), settings_of(json.loads(json.dumps({**config.to_dict(), "inputs": inputs})))
    differing = [k for k in sorted(old.keys() & new.keys()) if old[k] != new[k] and not _FREE.fullmatch(k)]
    if differing:
        told = ", ".join(f"{key}={old[key]!r} (now {new[key]!r})" for key in differing)
        raise ValueError(f"{workdir} holds a run with {told}: use another {flag}, or remove this one to start again")


def claim(workdir: str, config: ConfigDict, inputs: dict[str, Any], flag: str = "--workdir") -> None:
    """Write WORKDIR/config.json: the config, what identifies data and LM, and the launch where there are several hosts.

    Raises:
      ValueError: as `refuse_another`; or several processes have different inputs, or do not share WORKDIR.
    """
    agree(inputs)
    refuse_another(workdir, config, inputs, flag)
    path = os.path.join(workdir, "config.json")
    content = {**config.to_dict(), "inputs": inputs}
    if jax.process_count() == 1:
        write_json(path, content)
        return
    from jax.experimental import multihost_utils

    # By its number, which no earlier launch had, each tells the file from one that it finds on a disk of its own.
    number = multihost_utils.broadcast_one_to_all(np.frombuffer(os.urandom(8), np.uint8))
    launch = bytes(np.asarray(number, np.uint8)).hex()
    sharding.first_does(path, lambda: write_json(path, {**content, "launch": launch}))
    for _ in range(SEEN_WITHIN):
        if there(path) and read_json(path).get("launch") == launch:
            return
        time.sleep(1)
    raise ValueError(
        f"{path}, which process 0 wrote, is not to be seen by process {jax.process_index()}: give a --workdir on "
        "storage that all processes share, such as gs://"
    )


SEEN_WITHIN = 30  # seconds after which what one machine wrote to shared storage is surely seen by the others


def override(config: ConfigDict, settings: dict[str, Any]) -> None:
    """Change settings of a locked config, in place.

    Raises:
      ValueError: it has no such setting, or the value is of another type.
    """
    try:
        config.update(settings)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error.args[0])) from error


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all; its directory is made."""
    files.write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: str) -> Any:
    """The content of a JSON file.

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
    """Whether a directory is there whole: in a bucket, once it holds `known_by`, the file that is written last."""
    return there(os.path.join(directory, known_by) if places.is_remote(directory) else directory)


def say(text: str) -> None:
    """Print a line, once where several processes do the same."""
    if jax.process_index() == 0:
        print(text, flush=True)


def settings_of(tree: dict[str, Any]) -> dict[str, Any]:
    """Every setting by its dotted name. Configs of other releases lack some; an LM without prosody is another LM."""
    flat = _dotted(tree)
    if "lm.dim" in flat:
        flat["lm.prosody"] = "lm.prosody.discrete" in flat
    return flat


def _dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
