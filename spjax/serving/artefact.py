"""Export tasks as StableHLO programs (jax.export) with weights and labels, and the code that loads them."""

from __future__ import annotations

import hashlib
import itertools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from spjax import vocab
from spjax.io import files
from spjax.models import decode
from spjax.models.config import UnitLMConfig
from spjax.serving.frozen import KINDS
from spjax.serving.scoring import Bank, Shape
from spjax.types import Batch, Params, Streams

FORMAT = "spjax-served"
VERSION = 2  # since 2 the card holds the hashes of the other files and of itself
PLATFORMS = ("cpu", "cuda", "tpu")

LOADER = """\
import functools, hashlib, io, json, pathlib
import jax, jax.export, numpy as np

HERE = pathlib.Path(DIRECTORY)
CARD = json.loads((HERE / "card.json").read_text("utf-8"))

def check(data, sha256, file):
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{HERE / file} was altered. Take the directory from its source again.")
    return data

def read(file):
    return check((HERE / file).read_bytes(), CARD["files"][file], file)

sealed = {name: value for name, value in CARD.items() if name not in ("card_hash", "version")}
check(json.dumps(sealed, sort_keys=True, separators=(",", ":")).encode(), CARD["card_hash"], "card.json")

@functools.cache
def weights(file):  # bfloat16 is stored as uint16
    arrays = np.load(io.BytesIO(read(file))).values()
    return [jax.device_put(a.view(jax.numpy.bfloat16) if a.dtype == np.uint16 else a) for a in arrays]

@functools.cache
def program(file):
    return jax.jit(jax.export.deserialize(bytearray(read(file))).call)

def check_utterance(utterance):  # the programs do not check their inputs
    units, most = np.asarray(utterance[0]), CARD["lm"]["vocab_size"] - 4  # without special tokens
    if len(utterance) != len(CARD["inputs"]) or {np.size(one) for one in utterance} != {units.size} or not units.size:
        raise ValueError(f"an utterance is {' and as many '.join(CARD['inputs'])}, at least one of each")
    if units.dtype.kind not in "iu" or units.min() < 0 or units.max() >= most:
        raise ValueError(f"units must be integers from 0 to {most - 1}")
    return len(utterance[0])

def answer(task, utterances):
    spec = CARD["tasks"][task]
    bank, longest = CARD["banks"][spec["bank"]], max(map(check_utterance, utterances), default=0)
    fitting = [p for p in bank["programs"] if p[0] >= len(utterances) and p[1] >= longest]
    if not fitting:
        raise ValueError(f"no program takes {len(utterances)} utterances of up to {longest} units: give less")
    rows, columns, file = fitting[0]
    inputs = [np.zeros((rows, columns), dtype) for dtype in CARD["inputs"].values()]
    lengths, member = np.ones(rows, np.int32), np.full(rows, spec["member"], np.int32)
    for row, utterance in enumerate(utterances):
        lengths[row] = len(utterance[0])
        for array, values in zip(inputs, utterance):
            array[row, : len(values)] = values
    labels, probs = program(file)([*weights("lm.npz"), *weights(bank["weights"])], inputs, lengths, member)
    answers = []
    for row in range(len(utterances)):
        sizes = np.cumsum([len(slot["labels"]) for slot in spec["slots"]])
        parts = zip(spec["slots"], np.asarray(labels)[row], np.split(np.asarray(probs)[row], sizes))
        answers.append({s["name"]: (s["labels"][k], dict(zip(s["labels"], p.tolist()))) for s, k, p in parts})
    return answers
"""


def export(
    directory: Path,
    config: UnitLMConfig,
    params: Params,
    banks: Sequence[Bank],
    compute: str,
    merged: bool,
    *,
    columns: Sequence[int],
    rows: Sequence[int],
    progress: bool = False,
) -> Path:
    """Write a directory that serves banks from units with jax and numpy only; its README.md shows how.

    Each program takes a fixed number of rows and columns, on CPUs, NVIDIA GPUs and TPUs. Encoding speech to units is
    not included.

    Args:
      directory: where to write; parents are created, an earlier artefact with the same files is replaced.
      config: the LM's.
      params: the LM's weights, cast or quantized to `compute`.
      banks: the packs.
      compute: a key of frozen.KINDS.
      merged: whether runs of equal units are merged, for the README.
      columns: the most units of an utterance, one program each; at most what the LM's learned positions allow.
      rows: utterances of a batch, one program each.
      progress: show a progress bar after two seconds.

    Returns:
      The absolute path of the directory.

    Raises:
      ValueError: no columns or rows, or numbers below 1.
      StorageError: the directory holds other files.
    """
    if not columns or not rows or min(*columns, *rows) < 1:
        raise ValueError(f"columns {tuple(columns)} and rows {tuple(rows)} must each hold numbers of 1 or more")
    columns = [min(c, config.most_units or c) for c in columns]  # the loader refuses longer utterances
    inputs = {"units": "int32"} if config.prosody is None else {"units": "int32", "durations": "int32", "f0": "float32"}
    writers: dict[str, files.Writer] = {"lm.npz": _npz_writer(jax.tree.leaves(params))}
    described: list[dict[str, Any]] = []
    wanted = [Shape(r, c) for c in sorted(set(columns)) for r in sorted(set(rows))]
    with tqdm(
        total=len(banks) * len(wanted), desc="export", unit="program", delay=2, disable=not progress, leave=False
    ) as bar:
        for number, bank in enumerate(banks):
            programs = []
            leaves, tree = jax.tree.flatten((params, bank.params))
            serve = jax.jit(_serving(config, compute, bank, tree))
            for shape in wanted:
                given = _given(leaves, inputs, shape)
                blob = jax.export.export(serve, platforms=PLATFORMS)(*given).serialize()
                file = f"bank_{number}_{shape.rows}x{shape.columns}.bin"
                writers[file] = _bytes_writer(blob)
                programs.append([*shape, file])
                bar.update()
            writers[f"bank_{number}.npz"] = _npz_writer(jax.tree.leaves(bank.params))
            described.append({"programs": programs, "weights": f"bank_{number}.npz"})
    tasks = {
        name: {"bank": number, "member": member, "slots": pack.card["slots"]}
        for number, bank in enumerate(banks)
        for member, (name, pack) in enumerate(bank.packs.items())
    }
    pack = next(iter(banks[0].packs.values()))
    card = {
        "format": FORMAT, "version": VERSION, "jax": jax.__version__, "platforms": PLATFORMS, "compute": compute,
        "lm": pack.card["lm"], "inputs": inputs, "tasks": tasks, "banks": described,
    }  # fmt: skip
    writers |= {"README.md": _text_writer(_readme(card, banks, merged))}
    used = [name for name in writers if name != "README.md"]
    writers["card.json"] = lambda path: _write_card(path, card, used)  # last: it holds the hashes of the other files
    return files.write_directory(directory, writers, "card.json")


def _given(leaves: Sequence[Any], inputs: dict[str, str], shape: Shape) -> tuple[Any, ...]:
    """Shapes and dtypes of a program's arguments."""
    ints = jax.ShapeDtypeStruct((shape.rows,), np.int32)
    weights = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    return weights, [jax.ShapeDtypeStruct(shape, dtype) for dtype in inputs.values()], ints, ints


def _serving(config: UnitLMConfig, compute: str, bank: Bank, tree: Any) -> Callable[..., Any]:
    """(weights, inputs [B, T] each, lengths [B], member [B]) to (labels int32 [B, slots], probabilities [B, C]).

    Tasks with fewer slots are padded with label -1, tasks with fewer classes with probability 0.
    """
    tasks = [pack.task for pack in bank.packs.values()]
    combinations = max(len(one.combinations) for one in bank.trees)
    slots, classes = max(len(task.slots) for task in tasks), max(task.num_classes for task in tasks)
    slot_labels = np.full((len(tasks), combinations, slots), -1, np.int32)  # label of each slot, by combination
    in_combination = np.zeros((len(tasks), combinations, classes), np.float32)
    for n, (task, one) in enumerate(zip(tasks, bank.trees, strict=True)):
        count, width = one.combinations.shape
        slot_labels[n, :count, :width] = one.combinations - np.asarray(task.slot_offsets[:-1])
        np.put_along_axis(in_combination[n, :count], one.combinations, 1, axis=1)

    def serve(weights: list[Any], inputs: list[Any], lengths: jax.Array, member: jax.Array) -> tuple[Any, Any]:
        lm, prompt = jax.tree.unflatten(tree, weights)
        batch = lay_out(config, *inputs, lengths=lengths)._replace(prompt_id=member)
        log_probs = decode.score(
            lm, prompt, batch, bank.trees, config=config, compute=KINDS[compute], lengths=bank.lengths
        )
        best = jnp.argmax(log_probs, axis=1)
        shares = jnp.einsum("bm,bmc->bc", jnp.exp(log_probs), jnp.asarray(in_combination)[member], precision="highest")
        return jnp.asarray(slot_labels)[member, best], shares

    return serve


def lay_out(config: UnitLMConfig, units: Any, durations: Any = None, f0: Any = None, *, lengths: Any) -> Batch:
    """A traceable version of `data.loader.make_batch`: prompt 0, no padding rows.

    Args:
      config: the LM's.
      units: int32 [B, T], right-padded.
      durations: int32 [B, T], for a multi-stream LM.
      f0: float32 [B, T], for a multi-stream LM.
      lengths: int32 [B], units of each row, 1 to T.
    """
    rows, columns = units.shape
    column, last = jnp.arange(columns), lengths[:, None] - 1
    tokens = units + vocab.UNIT_OFFSET
    source = jnp.where(column < lengths[:, None], jnp.roll(tokens, 1, axis=1), vocab.PAD).at[:, 0].set(config.opener)
    streams = None
    if config.prosody is not None:
        if config.prosody.interpolate_f0:
            f0 = interpolated(f0, lengths)
        behind = jnp.concatenate([jnp.broadcast_to(column - 2, units.shape), last - 1, last], axis=1)
        real = (behind >= 0) & (behind <= last)
        pick = lambda known: jnp.take_along_axis(known, jnp.maximum(behind, 0), axis=1)  # noqa: E731
        nothing = jnp.where(behind == -1, vocab.F0_BOS, vocab.F0_PAD)
        streams = Streams(jnp.where(real, pick(durations), 0), jnp.where(real, pick(f0), nothing))
    zeros = jnp.zeros(rows, jnp.int32)
    return Batch(
        source=source,
        source_length=lengths,
        last=jnp.take_along_axis(tokens, last, axis=1)[:, 0],
        classes=zeros[:, None],
        prompt_id=zeros,
        weight=jnp.ones(rows),
        index=jnp.arange(rows),
        streams=streams,
    )


def interpolated(f0: jax.Array, lengths: jax.Array) -> jax.Array:
    """A traceable version of `UnitSet.with_interpolated_f0`: f0 float32 [B, T], of which lengths int [B] are real."""
    columns = f0.shape[1]
    column = jnp.broadcast_to(jnp.arange(columns), f0.shape)
    voiced = (f0 != 0) & (column < lengths[:, None])
    before = jax.lax.cummax(jnp.where(voiced, column, -1), axis=1)
    after = jax.lax.cummin(jnp.where(voiced, column, columns), axis=1, reverse=True)
    at = lambda where: jnp.exp(jnp.take_along_axis(f0, jnp.clip(where, 0, columns - 1), axis=1))  # noqa: E731
    share = (column - before) / jnp.maximum(after - before, 1)
    between = ~voiced & (before >= 0) & (after < columns)
    return jnp.where(between, jnp.log(at(before) * (1 - share) + at(after) * share), f0)


def _write_card(path: Path, card: dict[str, Any], used: Sequence[str]) -> None:
    """Write card.json, with the hashes of the other files."""
    hashes = {}
    for name in used:
        with path.with_name(name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    full = {**card, "files": hashes}
    path.write_bytes(files.json_bytes({**full, files.SEAL: files.seal(full, ())}))


def _npz_writer(leaves: Sequence[Any]) -> files.Writer:
    def plain(leaf: Any) -> np.ndarray:
        array = np.asarray(leaf)
        return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array  # numpy has no bfloat16

    arrays: Any = {str(number): plain(leaf) for number, leaf in enumerate(leaves)}
    return lambda path: np.savez(path, **arrays)


def _bytes_writer(blob: bytes | bytearray) -> files.Writer:
    return lambda path: path.write_bytes(blob)


def _text_writer(text: str) -> files.Writer:
    return lambda path: path.write_text(text, encoding="utf-8")


def _readme(card: dict[str, Any], banks: Sequence[Bank], merged: bool) -> str:
    sizes = sorted({(rows, columns) for bank in card["banks"] for rows, columns, _ in bank["programs"]})
    packs = dict(itertools.chain.from_iterable(bank.packs.items() for bank in banks))
    origin = next(iter(packs.values())).card
    made = f"{origin['encoder'] or 'an unknown encoder'}, layer {origin['layer']}, k-means {origin['kmeans']}"
    tasks = [
        f"| {name} | {', '.join(slot['name'] for slot in spec['slots'])} | "
        f"{sum(len(slot['labels']) for slot in spec['slots'])} | {spec['bank']} |"
        for name, spec in card["tasks"].items()
    ]
    utterance = ", ".join(card["inputs"])
    loader = LOADER.replace("DIRECTORY", '"."')
    return textwrap.dedent("""\
        # {names}

        Prompted tasks on one frozen speech unit LM, as StableHLO programs. They need only jax and numpy, and run on
        {platforms}, in {compute}.

        | task | slots | labels | bank |
        |---|---|---|---|
        {tasks}

        An utterance is ({utterance}): units of {made}, runs of equal units {merged}. Programs are
        compiled for these sizes (utterances × units, at most): {sizes}.
        LM {hash}. Written by jax {jax}.

        ```python
        {loader}
        print(answer({first!r}, [{example}]))  # for each utterance: {{slot: (label, {{label: probability}})}}
        ```

        Labels are the most probable combination that occurs in training. Tasks of one bank may share a batch: `member`
        is the row's task.
        """).format(
        names=", ".join(card["tasks"]),
        platforms=", ".join(card["platforms"]),
        compute=card["compute"],
        tasks="\n".join(tasks),
        utterance=utterance + ("," if "," not in utterance else ""),
        made=made,
        merged="merged" if merged else "not merged",
        sizes=", ".join(f"{rows} × {columns}" for rows, columns in sizes),
        hash=card["lm"]["hash"],
        jax=card["jax"],
        loader=loader,
        first=next(iter(card["tasks"])),
        example="[[71, 12, 63, 40]]" if len(card["inputs"]) == 1 else "([71, 12, 63], [2, 5, 3], [0.0, 0.1, -0.2])",
    )
