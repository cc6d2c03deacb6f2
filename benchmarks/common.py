"""What the benchmarks share: the job that both sides do, FLOP counts, the machine, and timing in pairs.

Each side runs in a process of its own, so that thread pools do not fight, and answers one timed run per line of its
input. `race` lets the sides take turns, round after round; what is reported is the ratio within a round, so that a
machine that others load or that changes its clock slows both sides of a ratio.
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
BUSY = 0.1  # share of the machine that others may take before a run is called disturbed


class Job(NamedTuple):
    """One batch and the weights, equal on both sides.

    Attributes:
      config: sizes of the unit LM.
      lm: its weights, numpy (docs/design.md).
      prompt: one member's prompt, numpy, with the `input` prompt that the reference carries along.
      units: int [B, T], unit tokens.
      classes: int [B, slots], class ids.
    """

    config: UnitLMConfig
    lm: Params
    prompt: Params
    units: np.ndarray
    classes: np.ndarray


def add_flags(parser: argparse.ArgumentParser, sides: Sequence[str]) -> None:
    """Sizes of the job (by default the full-size LM and 32 utterances of 50 units), rounds and output."""
    parser.add_argument("--batch", type=int, default=32, help="utterances in a batch")
    parser.add_argument("--units", type=int, default=50, help="units of an utterance")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dim", type=int, default=1024, help="model width; heads of 64, feed-forward of 4 widths")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--out", help="write every run to this JSON file")
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)


def side_commands(module: str, sides: Sequence[str], args: argparse.Namespace) -> dict[str, list[str]]:
    """For `race`: each side is the module itself, with the same sizes and `--side`."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("batch", "units", "layers", "dim")]
    return {side: [sys.executable, "-m", module, f"--side={side}", *sizes] for side in sides}


def lm_config(args: argparse.Namespace) -> UnitLMConfig:
    """The unit LM that the flags ask for."""
    return UnitLMConfig(dim=args.dim, layers=args.layers, heads=max(args.dim // 64, 1), ffn_dim=4 * args.dim)


def make_job(args: argparse.Namespace, seed: int = 0) -> Job:
    """The job of the flags, the same in every process: random weights, FSC's slots, learnable verbalizer."""
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
    """The job as our batch: no padding, one prompt for all."""
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
    """The job's weights as ours, on the device: kernels in the operands' type, one prompt as a bank of one."""
    import jax
    import jax.numpy as jnp

    def put(path: tuple[Any, ...], leaf: np.ndarray) -> jax.Array:
        return jnp.asarray(leaf, dtype if path[-1].key == "kernel" else "float32")

    bank = {name: leaf[None] for name, leaf in job.prompt.items() if name != "input"}
    return jax.tree_util.tree_map_with_path(put, {"lm": job.lm, "prompt": bank})


def sentences(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """The reference's rows, int64 [B, T + K + 2] each: `</s> units <s> labels` and what follows each token."""
    edge = np.full((len(job.units), 1), EOS)
    whole = np.concatenate([edge, job.units, 0 * edge + BOS, job.classes + UNIT_OFFSET, edge], axis=1)
    return whole[:, :-1], whole[:, 1:]


# FLOPs of matrix products, two a multiply-add; norms, softmax and the optimizer are left out.


def _row(config: UnitLMConfig) -> tuple[int, int, int]:
    """FLOPs a row and layer: of one D x D projection, of the feed-forward, of the whole layer."""
    projection, ffn = 2 * config.dim**2, 4 * config.dim * config.ffn_dim
    return projection, ffn, 4 * projection + ffn


def peer_training_flops(config: UnitLMConfig, batch: int, tokens: int) -> int:
    """What the reference's step computes: every layer, every position, prompts included, forward and backward to x."""
    rows = batch * (tokens + PROMPT_LENGTH)
    attention = 2 * batch * (tokens + PROMPT_LENGTH) ** 2 * config.dim  # QK and PV, the causal half of each
    head = 2 * rows * config.vocab_size * config.dim
    return 2 * (config.layers * rows * _row(config)[2] + head) + 3 * config.layers * attention


def training_floor_flops(config: UnitLMConfig, batch: int, tokens: int, scored: int) -> int:
    """The least a step must compute for the same gradients.

    Prompts are a key/value prefix, so only tokens are rows. In the last layer all rows need keys and values, only the
    scored ones the rest. Backward, the first layer's units lead to no trained parameter: its attention and feed-forward
    are crossed, its query, key and value projections only at the separator.
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
    """The least that the labels of one utterance take: each token runs once, the last layer for label steps only."""
    projection, ffn, layer = _row(config)
    tokens = 1 + units + 1 + labels - 1  # </s>, units, <s>, and all labels but the last
    last = 2 * projection * tokens + (2 * projection + ffn) * labels
    attention = (config.layers - 1) * tokens * _mixing(config, tokens / 2) + labels * _mixing(config, tokens)
    return int((config.layers - 1) * layer * tokens + last + attention)


def _mixing(config: UnitLMConfig, seen: float) -> float:
    """FLOPs of one query's attention over so many tokens and the prompt."""
    return 4 * config.dim * (seen + PROMPT_LENGTH)


# The machine


def machine() -> Result:
    """Processor, cores, memory, versions and load: what a number means nothing without."""
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
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ticks(pid: int) -> tuple[int, int, int] | None:
    """Clock ticks so far of (all cores, all cores idle, process `pid`); None where /proc does not tell."""
    try:
        total = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        own = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return sum(total), total[3] + total[4], int(own[11]) + int(own[12])


# Sides and rounds


def serve(run: Callable[[], Result]) -> None:
    """Answer each line of standard input with `run`'s result and its `seconds`, as JSON.

    The first answer comes unasked, once all is compiled. Every timed run follows one that is not timed: a training
    takes its steps one after another, and the first step after a pause pays for memory that others took in between.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not look like an answer
    for _ in itertools.chain([""], sys.stdin):
        run()
        start = time.perf_counter()
        result = run()
        answers.write(json.dumps({"seconds": time.perf_counter() - start, **result}) + "\n")
        answers.flush()


class _Side:
    """A process that serves timed runs."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> Result:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"side {self.name!r} ended with code {self.process.wait()}; its own words stand above")
        return json.loads(line)

    def run(self) -> Result:
        before = _ticks(self.process.pid)
        self.process.stdin.write("\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        result, after = self.answer(), _ticks(self.process.pid)
        if before and after and after[0] > before[0]:
            total, idle, own = (b - a for a, b in zip(before, after, strict=True))
            result["others"] = max(0.0, 1 - (idle + own) / total)
        return result

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def race(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Result]]:
    """Let the sides take turns: each result list has one entry a round, in order.

    Args:
      commands: side to the command of its process, which calls `serve`.
      rounds: how many; the order of the sides turns round in every other one.

    Raises:
      RuntimeError: a side ended.
    """
    sides: list[_Side] = []
    found: dict[str, list[Result]] = {name: [] for name in commands}
    with contextlib.ExitStack() as stack:
        steps = tqdm(total=len(commands) * (rounds + 1), desc="warm-up", file=sys.stderr)
        stack.callback(steps.close)
        for name, command in commands.items():  # one after the other: warming up is heavy too
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
    """A ratio of paired runs: median, least and greatest of the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """Round by round `over / under`."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


def cost(result: Result) -> float:
    """Seconds an utterance."""
    return result["seconds"] / result["utterances"]


def goals(results: Mapping[str, Sequence[Result]], wanted: Sequence[tuple[str, str, float]]) -> str:
    """A table of how many times faster we are than the peer, round by round.

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
    """Median over the rounds."""
    return statistics.median(result[key] for result in results)


def table(rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first row is the head."""
    head, *body = [[str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def report(name: str, args: argparse.Namespace, parts: Sequence[str], results: Mapping[str, Sequence[Result]]) -> None:
    """Print a Markdown report of the machine and the parts; write it with every single run to `args.out` if given."""
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
