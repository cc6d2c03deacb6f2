"""Tiny models with random values in all leaves, and the same models in plain numpy, one utterance at a time.

`hidden` is the definition that the fast code is held to: float64, no batch, no padding, no cache, no bank, no scan;
prompts stand where the reference has them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spjax import vocab
from spjax.models import low_rank, prompts, unit_lm
from spjax.models.config import ProsodyConfig, UnitLMConfig
from spjax.models.prompts import PromptConfig
from spjax.models.verbalizers import Verbalizer
from spjax.tasks import Slot, Task
from spjax.types import Batch, Params, Streams

TASK = Task(
    "tiny",
    (Slot("do", ("go", "stop", "turn")), Slot("what", ("none", "up", "all of it")), Slot("where", ("none", "in"))),
)
ONE_SLOT = Task("one", (Slot("word", ("a", "b", "c", "d", "e")),))

# Programs run once on a few kilobytes, so compilation dominates.
QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def config(layers: int = 3, vocab_size: int = 24, prosody: ProsodyConfig | None = None) -> UnitLMConfig:
    return UnitLMConfig(vocab_size=vocab_size, dim=16, layers=layers, heads=2, ffn_dim=24, prosody=prosody)


def filled(shapes: Params, seed: int) -> Params:
    """Normal numbers in every leaf, about the size that a real one's; no bias is 0 and no scale is 1."""
    rng = np.random.default_rng(seed)

    def fill(path: Any, leaf: Any) -> jax.Array:
        name = path[-1].key
        sizes = {"kernel": 0.3, "embed": 0.3, "bias": 0.2, "scale": 0.2} | dict.fromkeys(low_rank.LEAVES, 0.3)
        numbers = rng.normal(size=leaf.shape) * sizes.get(name, 1.0)
        return jnp.asarray(numbers + (name == "scale"), jnp.float32)

    return jax.tree.map_with_path(fill, shapes)


@functools.cache
def lm(c: UnitLMConfig, seed: int = 0) -> Params:
    return filled(jax.eval_shape(lambda: unit_lm.init(jax.random.key(0), c)), seed)


def bank(c: UnitLMConfig, prompt: PromptConfig, verbalizer: Verbalizer, members: int, seed: int = 0) -> Params:
    embed = jnp.zeros((c.vocab_size, c.dim))
    new = lambda: prompts.init_member(jax.random.key(0), prompt, c, verbalizer, embed)  # noqa: E731
    return filled(jax.eval_shape(lambda: prompts.stack([new()] * members)), seed + 100)


def batch(
    utterances: Sequence[Sequence[int]],
    columns: int,
    classes: np.ndarray | None = None,
    prompt_id: Sequence[int] | None = None,
    fill: int = vocab.PAD,
) -> Batch:
    """A batch of unit lists; padding has the value `fill`, which must not have an effect."""
    tokens = [np.asarray(units) + vocab.UNIT_OFFSET for units in utterances]
    source = np.full((len(tokens), columns), fill, np.int32)
    for row, units in zip(source, tokens, strict=True):
        row[: len(units)] = [vocab.EOS, *units[:-1]]
    return Batch(
        source=source,
        source_length=np.asarray([len(units) for units in tokens], np.int32),
        last=np.asarray([units[-1] for units in tokens], np.int32),
        classes=np.zeros((len(tokens), 1), np.int32) if classes is None else np.asarray(classes, np.int32),
        prompt_id=np.zeros(len(tokens), np.int32) if prompt_id is None else np.asarray(prompt_id, np.int32),
        weight=np.ones(len(tokens), np.float32),
        index=np.arange(len(tokens), dtype=np.int32),
    )


def utterances(c: UnitLMConfig, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, c.num_units, length).tolist() for length in lengths]


Spoken = list[tuple[int, float]]  # (duration, f0) of the segments of an utterance


def spoken(units: Sequence[Sequence[int]], seed: int = 0) -> list[Spoken]:
    """Prosody of utterances: a third of the segments unvoiced, some longer than the table."""
    rng = np.random.default_rng(seed)
    voice = lambda: float(np.float32(rng.normal() * 0.3)) if rng.random() < 2 / 3 else 0.0  # noqa: E731
    return [[(int(rng.integers(1, 30)), voice()) for _ in row] for row in units]


def spoken_batch(plain: Batch, prosody_of: Sequence[Spoken]) -> Batch:
    """The batch for a multi-stream LM (layout: docs/design.md), with arbitrary values in the padding."""
    columns, source = plain.source.shape[1], plain.source.copy()
    source[:, 0] = vocab.BOS
    duration = np.full((len(prosody_of), columns + 2), 17, np.int32)
    f0 = np.full((len(prosody_of), columns + 2), 0.123, np.float32)
    for row, segments in enumerate(prosody_of):
        beside = [(0, vocab.F0_PAD), (0, vocab.F0_BOS), *segments]
        at = [*range(len(segments)), columns, columns + 1]
        duration[row, at], f0[row, at] = np.asarray(beside).T
    return plain._replace(source=source, streams=Streams(duration, f0))


def random_classes(task: Task, rows: int, seed: int = 0) -> np.ndarray:
    """Class ids [rows, slots]."""
    rng, offsets = np.random.default_rng(seed), task.slot_offsets
    pairs = itertools.pairwise(offsets)
    return np.stack([rng.integers(a, b, rows) for a, b in pairs], axis=1)


def _norm(x: np.ndarray, weights: Any) -> np.ndarray:
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * weights["scale"] + weights["bias"]


def merged(params: Params, prompt: Params, scale: float = 1.0) -> Params:
    """The LM with a member's low-rank adapters in its kernels: W + scale A^T B."""
    layers = dict(params["layers"])
    for name in low_rank.targets_of(prompt):
        more = scale * prompt[f"{name}_a"].swapaxes(-1, -2) @ prompt[f"{name}_b"]
        layers[name] = {**layers[name], "kernel": layers[name]["kernel"] + more}
    return {**params, "layers": layers}


def _project(weights: Any, x: np.ndarray) -> np.ndarray:
    return x @ weights["kernel"] + weights["bias"]


def _positions(rows: int, dim: int, first: int) -> np.ndarray:
    frequency = np.exp(-np.arange(dim // 2) * np.log(10000) / (dim // 2 - 1))
    angle = (first + np.arange(rows))[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def double(tree: Params) -> Params:
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def _prosody(params: Params, prosody: ProsodyConfig, prosody_of: Spoken, columns: int) -> np.ndarray:
    """Sum of the stream embeddings of each column, [columns, D]: segments lag, then no speech."""
    durations = [0, 0, *(duration for duration, _ in prosody_of)] + [0] * columns
    f0 = ["pad", "bos", *(value for _, value in prosody_of)] + ["bos"] * columns
    bins = len(prosody.f0_edges) + 1

    def one(value: Any, part: Params, table: Any, number: Any, enabled: bool) -> np.ndarray:
        if not enabled:
            return part["embed"][0] if prosody.discrete else part["bias"]
        return part["embed"][table(value)] if prosody.discrete else part["kernel"][0] * number(value) + part["bias"]

    def f0_row(x: Any) -> int:
        return (
            {"bos": bins, "pad": bins + 1}[x]
            if isinstance(x, str)
            else sum(x > np.float32(e) for e in prosody.f0_edges)
        )

    def f0_number(x: Any) -> float:
        return {"bos": 0.0, "pad": -5.0}[x] if isinstance(x, str) else x

    length, pitch = params["streams"]["duration"], params["streams"]["f0"]
    return np.stack(
        [
            one(d, length, lambda d: min(d, prosody.max_duration), float, prosody.duration_input)
            + one(x, pitch, f0_row, f0_number, prosody.f0_input)
            for d, x in zip(durations[:columns], f0[:columns], strict=True)
        ]
    )


def hidden(
    params: Params,
    prompt: Params,
    c: UnitLMConfig,
    units: Sequence[int],
    feeds: Sequence[int],
    prosody_of: Spoken | None = None,
) -> np.ndarray:
    """Final hidden states of one utterance, [1 + S + J, D]: last unit, separators, labels fed back.

    Args:
      params: the LM's weights in float64.
      prompt: one member of a bank (no bank axis) in float64; of low-rank adapters B as it is added, alpha / rank in it.
      c: the LM's architecture.
      units: unit numbers.
      feeds: J tokens.
      prosody_of: prosody of the units, for a multi-stream LM.
    """
    root, params = c.dim**0.5, merged(params, prompt)
    tokens = [vocab.EOS if prosody_of is None else vocab.BOS, *(unit + vocab.UNIT_OFFSET for unit in units)]
    first, last = len(tokens), len(tokens) + len(prompt["sep"])
    x = np.concatenate([params["embed"][tokens], prompt["sep"], params["embed"][list(feeds)]]) * root
    x = x + _positions(
        len(x), c.dim, vocab.FIRST_POSITION if prosody_of is None else c.vocab_size - vocab.UNIT_OFFSET + 2
    )
    if prosody_of is not None:
        assert c.prosody is not None
        x = x + _prosody(params, c.prosody, prosody_of, len(x))
    shallow = prompt.get("input", np.zeros((0, c.dim)))
    x = np.concatenate([shallow, x])
    first, last = first + len(shallow), last + len(shallow)
    for i in range(c.layers):
        w = jax.tree.map(lambda a, i=i: a[i], params["layers"])
        if "sep_deep" in prompt:
            x[first:last] += prompt["sep_deep"][i]
        normed = _norm(x, w["attn_norm"])
        query, key, value = (_project(w[name], normed) for name in ("query", "key", "value"))
        if "key" in prompt:
            key = np.concatenate([_project(w["key"], prompt["key"][i]), key])
            value = np.concatenate([_project(w["value"], prompt["value"][i]), value])
        ahead = len(key) - len(x)
        mixed = np.zeros_like(x)
        for head in range(c.heads):
            at = slice(head * c.head_dim, (head + 1) * c.head_dim)
            for row in range(len(x)):
                seen = slice(0, ahead + row + 1)
                score = key[seen, at] @ query[row, at] * c.head_dim**-0.5
                weight = np.exp(score - score.max())
                mixed[row, at] = weight / weight.sum() @ value[seen, at]
        x = x + _project(w["out"], mixed)
        x = x + _project(w["ffn_out"], np.maximum(_project(w["ffn_in"], _norm(x, w["ffn_norm"])), 0))
    return _norm(x, params["final_norm"])[first - 1 :]


def outputs(params: Params, prompt: Params, states: np.ndarray) -> np.ndarray:
    """Verbalizer outputs of hidden states [Q, D]."""
    logits = states @ (params["heads"]["unit"] if "heads" in params else params["embed"]).T
    return logits @ prompt["verbalizer"].T if "verbalizer" in prompt else logits


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def answer_score(
    params: Params,
    prompt: Params,
    c: UnitLMConfig,
    verbalizer: Verbalizer,
    units: Sequence[int],
    classes: Sequence[int],
    prosody_of: Spoken | None = None,
) -> float:
    """Log probability of a label combination; each step is normalised over the outputs of its slot."""
    codes = verbalizer.codes[list(classes)].reshape(-1)
    feeds = verbalizer.fed_back[list(classes)].reshape(-1)
    scores = outputs(params, prompt, hidden(params, prompt, c, units, feeds[:-1], prosody_of)[len(prompt["sep"]) :])
    total = 0.0
    for step, code in enumerate(codes):
        slot, m = divmod(step, verbalizer.steps_per_slot)
        start, stop = verbalizer.slot_offsets[slot : slot + 2]
        allowed = sorted(set(verbalizer.codes[start:stop, m].tolist()))
        total += log_softmax(scores[step][allowed])[allowed.index(code)]
    return total
