"""Shared code of the benchmarks: the common job, FLOP counts, machine facts, and paired timing.

Each side runs in a separate process, so that thread pools do not compete, and prints one timed run for each line of its
input. `race` alternates between the sides, round after round, and reports ratios within a round, so that load from
other processes or a changing clock affects both sides of a ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from spjax.models.config import UnitLMConfig
from spjax.tasks import TASKS
from spjax.types import Batch, Params
from spjax.vocab import BOS, EOS, UNIT_OFFSET

Result = dict[str, Any]
FSC = TASKS["fsc"]
PROMPT_LENGTH = 5
BUSY = 0.1  # fraction of the machine used by others above which a run is reported as disturbed


class Job(NamedTuple):
    """One batch and the weights, equal on both sides.

    Attributes:
      config: sizes of the unit LM.
      lm: weights of the LM, numpy (docs/design.md).
      prompt: one prompt, numpy, including the `input` prompt of the reference.
      units: int [B, T], unit tokens.
      classes: int [B, slots], class ids.
    """

    config: UnitLMConfig
    lm: Params
    prompt: Params
    units: np.ndarray
    classes: np.ndarray


def add_flags(parser: argparse.ArgumentParser, sides: Sequence[str]) -> None:
    """Adds flags of the job's sizes (default: the full-size LM and 32 utterances of 50 units), rounds and output."""
    parser.add_argument("--batch", type=int, default=32, help="utterances in a batch")
    parser.add_argument("--units", type=int, default=50, help="units of an utterance")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dim", type=int, default=1024, help="model width; heads of 64, feed-forward of 4 widths")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--out", help="write every run to this JSON file")
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)


def side_commands(module: str, sides: Sequence[str], args: argparse.Namespace) -> dict[str, list[str]]:
    """Returns the commands for `race`: the module with the same sizes and a `--side`."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("batch", "units", "layers", "dim")]
    return {side: [sys.executable, "-m", module, f"--side={side}", *sizes] for side in sides}


def lm_config(args: argparse.Namespace) -> UnitLMConfig:
    """Returns the architecture of the unit LM that the flags set."""
    return UnitLMConfig(dim=args.dim, layers=args.layers, heads=max(args.dim // 64, 1), ffn_dim=4 * args.dim)


def make_job(args: argparse.Namespace, seed: int = 0) -> Job:
    """Makes the job of the flags, equal in every process: random weights, FSC's slots, learnable verbalizer."""
    config, rng = lm_config(args), np.random.default_rng(seed)
    depth, d, f, v = config.layers, config.dim, config.ffn_dim, config.vocab_size

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(scale)

    def norm(*shape: int) -> Params:
        return {"scale": np.ones(shape, np.float32), "bias": np.zeros(shape, np.float32)}

    def dense(rows: int, columns: int) -> Params:
        kernel = normal(depth, rows, columns, scale=(2 / (rows + columns)) ** 0.5)
        return {"kernel": kernel, "bias": np.zeros((depth, columns), np.float32)}

    layers = {name: dense(d, d) for name in ("query", "key", "value", "out")}
    layers |= {"ffn_in": dense(d, f), "ffn_out": dense(f, d), "attn_norm": norm(depth, d), "ffn_norm": norm(depth, d)}
    lm = {"embed": normal(v, d, scale=d**-0.5), "layers": layers, "final_norm": norm(d)}
    prompt = {name: normal(depth, PROMPT_LENGTH, d) for name in ("key", "value")}
    prompt |= {"input": normal(PROMPT_LENGTH, d), "sep": normal(1, d)}
    prompt["verbalizer"] = normal(FSC.num_classes + UNIT_OFFSET, v, scale=v**-0.5)
    units = rng.integers(UNIT_OFFSET, v, (args.batch, args.units))
    slots = itertools.pairwise(FSC.slot_offsets)
    classes = np.stack([rng.integers(a, b, args.batch) for a, b in slots], axis=1)
    return Job(config, lm, prompt, units, classes)


def our_batch(job: Job) -> Batch:
    """Converts the job to our batch, without padding and with one prompt for all rows."""
    rows, length = job.units.shape
    return Batch(
        source=np.concatenate([np.full((rows, 1), EOS), job.units[:, :-1]], axis=1).astype(np.int32),
        source_length=np.full(rows, length, np.int32),
        last=job.units[:, -1].astype(np.int32),
        classes=job.classes.astype(np.int32),
        prompt_id=np.zeros(rows, np.int32),
        weight=np.ones(rows, np.float32),
        index=np.arange(rows, dtype=np.int32),
    )


def our_params(job: Job, dtype: str) -> Params:
    """Puts the job's weights on the device: kernels in `dtype`, the prompt as a bank of one."""
    import jax
    import jax.numpy as jnp

    def put(path: tuple[Any, ...], leaf: np.ndarray) -> jax.Array:
        return jnp.asarray(leaf, dtype if path[-1].key == "kernel" else "float32")

    bank = {name: leaf[None] for name, leaf in job.prompt.items() if name != "input"}
    return jax.tree_util.tree_map_with_path(put, {"lm": job.lm, "prompt": bank})


def sentences(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Makes the reference's inputs and targets, int64 [B, T + K + 2] each, of rows `</s> units <s> labels </s>`."""
    edge = np.full((len(job.units), 1), EOS)
    rows = np.concatenate([edge, job.units, 0 * edge + BOS, job.classes + UNIT_OFFSET, edge], axis=1)
    return rows[:, :-1], rows[:, 1:]


# FLOPs of matrix products, two a multiply-add; norms, softmax and the optimizer are left out.


def _row(config: UnitLMConfig) -> tuple[int, int, int]:
    """Returns FLOPs of a row in a layer: of one D x D projection, of the feed-forward block, of the layer."""
    projection, ffn = 2 * config.dim**2, 4 * config.dim * config.ffn_dim
    return projection, ffn, 4 * projection + ffn


def peer_training_flops(config: UnitLMConfig, batch: int, tokens: int) -> int:
    """FLOPs of the reference's step: every layer and position, prompts included, forward and backward to inputs."""
    rows = batch * (tokens + PROMPT_LENGTH)
    attention = 2 * batch * (tokens + PROMPT_LENGTH) ** 2 * config.dim  # QK and PV, the causal half of each
    head = 2 * rows * config.vocab_size * config.dim
    return 2 * (config.layers * rows * _row(config)[2] + head) + 3 * config.layers * attention


def training_floor_flops(config: UnitLMConfig, batch: int, tokens: int, scored: int) -> int:
    """FLOPs that a step needs at least for the same gradients.

    Prompts are a key/value prefix, so only tokens are rows. In the last layer all rows need keys and values, and only
    scored rows need the rest. In the backward pass, the first layer's units lead to no trained parameter: it needs its
    attention and feed-forward block, but its query, key and value projections only at the separator.
    """
    projection, ffn, layer = _row(config)
    rows, ends = batch * tokens, batch * scored
    last = 2 * projection * rows + (2 * projection + ffn) * ends
    middle = (config.layers - 2) * layer * rows
    first_back = (projection + ffn) * rows + 3 * projection * batch
    prompts = 2 * 2 * projection * config.layers * PROMPT_LENGTH
    attention = (config.layers - 1) * rows * _mixing(config, tokens / 2) + ends * _mixing(config, tokens)
    return int(layer * rows + 2 * (middle + last) + first_back + prompts + 3 * attention)


def decoding_floor_flops(config: UnitLMConfig, units: int, labels: int) -> int:
    """FLOPs that the labels of one utterance need at least: each token once, the last layer for label steps only."""
    projection, ffn, layer = _row(config)
    tokens = 1 + units + 1 + labels - 1  # </s>, units, <s>, and all but the last label
    last = 2 * projection * tokens + (2 * projection + ffn) * labels
    attention = (config.layers - 1) * tokens * _mixing(config, tokens / 2) + labels * _mixing(config, tokens)
    return int((config.layers - 1) * layer * tokens + last + attention)


def _mixing(config: UnitLMConfig, seen: float) -> float:
    """FLOPs of one query's attention over `seen` tokens and the prompt."""
    return 4 * config.dim * (seen + PROMPT_LENGTH)


# ---- the machine


def machine() -> Result:
    """Describes the machine: processor, cores, memory, versions and load."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", "").split()
    versions = {}
    for package in ("jax", "jaxlib", "torch", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "processor": fields.get("model name", platform.processor()),
        "cores": cores(),
        "matrix instructions": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **versions,
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "load average": [round(x, 1) for x in os.getloadavg()],
    }


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ticks(pid: int) -> tuple[int, int, int] | None:
    """Returns clock ticks of (all cores, all idle cores, process `pid`); None if /proc is not available."""
    try:
        total = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        process = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return sum(total), total[3] + total[4], int(process[11]) + int(process[12])


# ---- sides and rounds


def serve(run: Callable[[], Result]) -> None:
    """Answers each line of standard input with `run`'s result and its `seconds`, as JSON.

    The first answer is sent without a request, after compilation. Every timed run follows an untimed one, since the
    first step after a pause is slower: other processes have used caches and memory in between.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of libraries must not be read as an answer
    for _ in itertools.chain([""], sys.stdin):
        run()
        start = time.perf_counter()
        result = run()
        answers.write(json.dumps({"seconds": time.perf_counter() - start, **result}) + "\n")
        answers.flush()


class _Side:
    """A process that runs `serve`."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> Result:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"side {self.name!r} ended with code {self.process.wait()}; see its output above")
        return json.loads(line)

    def run(self) -> Result:
        before = _ticks(self.process.pid)
        self.process.stdin.write("\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        result, after = self.answer(), _ticks(self.process.pid)
        if before and after and after[0] > before[0]:
            total, idle, process = (b - a for a, b in zip(before, after, strict=True))
            result["others"] = max(0.0, 1 - (idle + process) / total)
        return result

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def race(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Result]]:
    """Runs the sides alternately; each result list has one entry a round, in order.

    Args:
      commands: side → command of its process, which calls `serve`.
      rounds: number of rounds; the order of the sides is reversed in every other one.

    Raises:
      RuntimeError: a side ended.
    """
    sides: list[_Side] = []
    found: dict[str, list[Result]] = {name: [] for name in commands}
    with contextlib.ExitStack() as stack:
        steps = tqdm(total=len(commands) * (rounds + 1), desc="warm-up", file=sys.stderr)
        stack.callback(steps.close)
        for name, command in commands.items():  # in sequence, since warming up needs the cores too
            sides.append(_Side(name, command))
            stack.callback(sides[-1].close)
            sides[-1].answer()
            steps.update()
        for number in range(rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                steps.set_description(side.name)
                found[side.name].append(side.run())
                steps.update()
    return found


class Ratio(NamedTuple):
    """A ratio of paired runs: median, minimum and maximum over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """Returns the statistics of `over / under` within each round."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


def cost(result: Result) -> float:
    """Returns seconds an utterance."""
    return result["seconds"] / result["utterances"]


def goals(results: Mapping[str, Sequence[Result]], wanted: Sequence[tuple[str, str, float]]) -> str:
    """Makes a table of our speed relative to the peer's, by rounds.

    Args:
      results: runs of the sides `ours-...` and `peer-PRECISION[-variant]`.
      wanted: (our side, precision of the peer, goal).
    """
    rows = [["race", "goal", "against the faster peer", "which", "against plain F.linear"]]
    for side, precision, goal in wanted:
        peers = [name for name in results if name.startswith(f"peer-{precision}")]
        ratios = {name: ratio(*([cost(r) for r in results[each]] for each in (name, side))) for name in peers}
        best = min(peers, key=lambda name: statistics.median(cost(r) for r in results[name]))
        met = "met" if ratios[best].median >= goal else "missed"
        rows.append([f"{side} : peer {precision}", f"≥ {goal}", f"{ratios[best]} {met}", best, ratios[peers[0]]])
    return table(rows)


def median(results: Sequence[Result], key: str = "seconds") -> float:
    """Returns the median over the rounds."""
    return statistics.median(result[key] for result in results)


def table(rows: Sequence[Sequence[object]]) -> str:
    """Formats a Markdown table; the first row is the header."""
    head, *body = [[str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def report(name: str, args: argparse.Namespace, parts: Sequence[str], results: Mapping[str, Sequence[Result]]) -> None:
    """Prints a Markdown report of the machine and the parts; also writes it, with every run, to `args.out` if given."""
    described = machine()
    lines = [f"{key}: {value}  " for key, value in described.items()]
    worst = max((result.get("others", 0.0) for rounds in results.values() for result in rounds), default=0.0)
    if worst > BUSY:
        lines.append(f"**Disturbed**: other processes took up to {worst:.0%} of the machine during a timed run.")
    text = "\n".join([f"# {name}", "", *lines, *(f"\n{part}" for part in parts)])
    print(text)
    if args.out:
        content = {"name": name, "args": vars(args), "machine": described, "report": text, "results": results}
        Path(args.out).write_text(json.dumps(content, indent=1) + "\n")
