"""Load test of a real server: many clients at once, a tenth of their requests invalid, compared with batch size 1.

    python -m benchmarks.load

The server (`python -m spjax.serve`) runs with packs of one structure on the small LM of the published results, log-mel
features and a k-means fitted on tones and noise. Clients run in a separate process; each sends a recording with some
tasks, waits for the answer and repeats. Every answer is compared with the predictor's for that recording: none may be
wrong or missing, and invalid requests must be refused with a message. The same load then goes to a server that computes
one utterance and task at a time (`--most-rows=1`). The server's memory is sampled every half second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import common
from benchmarks.bank import numbers

SIDES = {"batched": (), "alone": ("--most-rows=1",)}
AGREE = 1e-5  # of probabilities
FASTER, FLAT = 8.0, 1.05  # goals: throughput relative to batch size 1, and growth of memory over the second half
RUBBISH = ("cut off", "text", "empty", "huge", "unknown task", "half sent", "hung up")
RUBBISH_SHARE = 0.1
SEED = 0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds flags of the sizes of LM, prompts and load, and of the output."""
    parser.add_argument("--dim", type=int, default=256, help="model width; heads of 64, feed-forward of 4 widths")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=48, help="prompt length")
    parser.add_argument("--separators", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=8, help="packs that are served")
    parser.add_argument("--asked", type=numbers, default=(1, 2, 8), help="tasks of a request, in turn")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the load")
    parser.add_argument("--warm", type=float, default=10.0, help="seconds of load before anything is counted")
    parser.add_argument("--recordings", type=int, default=48)
    parser.add_argument("--longest", type=float, default=1.2, help="seconds of the longest recording; 3 x the shortest")
    parser.add_argument("--sides", default="batched,alone", help="sides to compare (%(default)s)")
    parser.add_argument("--out", help="write everything to this JSON file")


# ---- the server


def make_place(folder: Path, args: argparse.Namespace) -> None:
    """Writes an LM, packs, a k-means, and recordings with the predictor's answers to them."""
    import soundfile

    from benchmarks import serving
    from spjax import SpeechPrompt, load_encoder, load_unit_lm
    from spjax.encoders import kmeans
    from spjax.io import save_kmeans, save_pack, save_unit_lm

    job = common.make_job(argparse.Namespace(dim=args.dim, layers=args.layers, batch=1, units=1))
    save_unit_lm(folder / "lm", job.config, job.lm)
    lm = load_unit_lm(folder / "lm")
    packs = serving.make_packs(args, lm)
    for name, pack in packs.items():
        save_pack(folder / "packs" / name, pack.params, pack.card)
    rng = np.random.default_rng(SEED)
    waves = [_sound(rng, seconds) for seconds in rng.uniform(args.longest / 3, args.longest, args.recordings)]
    features = load_encoder("log_mel").features(waves)
    clusters = min(100, sum(map(len, features)) // 4)
    save_kmeans(folder / "km", kmeans.fit(features, clusters, card={"encoder": "log_mel", "layer": None}))
    predictor = SpeechPrompt.load(lm, "log_mel", packs, kmeans=folder / "km", compilation_cache=str(folder / "xla"))
    (folder / "waves").mkdir()
    for number, wave in enumerate(waves):
        soundfile.write(folder / "waves" / f"{number}.wav", wave, 16_000, subtype="PCM_16")
    files = [folder / "waves" / f"{number}.wav" for number in range(len(waves))]
    (folder / "answers.json").write_text(json.dumps(predictor.predict(files, progress=True)))


def _sound(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Makes tones that change several times a second, with noise: float32 [n]."""
    samples = int(16_000 * seconds)
    pitch = np.repeat(rng.uniform(100, 3000, samples // 1600 + 1), 1600)[:samples]
    tones = np.sin(2 * np.pi * np.cumsum(pitch) / 16_000)
    return (0.3 * tones + rng.normal(0, 0.03, samples)).astype(np.float32)


@contextlib.contextmanager
def server(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs a server of the folder; yields its process and address, and ends it by SIGTERM.

    Raises:
      RuntimeError: the server does not start, or ends with an error status.
    """
    command = [
        sys.executable, "-m", "spjax.serve", f"--lm={folder / 'lm'}", "--encoder=log_mel", f"--kmeans={folder / 'km'}",
        f"--packs={folder / 'packs'}", "--port=0", f"--compilation-cache={folder / 'xla'}", "--max-mb=1", *flags,
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            address = re.search(r"http://\S+", line)
            if not address:
                raise RuntimeError(f"the server did not start: {line}")
            yield process, address.group()
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                if process.wait(90):
                    raise RuntimeError(f"the server ended with status {process.returncode}")
        finally:
            process.kill()


# ---- clients


def rubbish(kind: str, wave: bytes) -> tuple[dict[str, str], bytes, tuple[int, ...]]:
    """Makes an invalid request of a kind: query, body, and the statuses that refuse it."""
    bodies = {"cut off": wave[: len(wave) // 2], "text": b"what was said: stop\n" * 50, "empty": b""}
    bodies["huge"] = bytes(1_200_000)
    query = {"tasks": "word_0,nothing"} if kind == "unknown task" else {}
    return query, bodies.get(kind, wave), (413,) if kind == "huge" else (400,)


async def drop(address: str, wave: bytes, whole: bool) -> None:
    """Sends a request, or half of one, and disconnects before the answer."""
    host, port = address.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(wave)}\r\n\r\n".encode()
    writer.write(head + (wave if whole else wave[: len(wave) // 2]))
    await writer.drain()
    await asyncio.sleep(0.02)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def wrong(found: Any, expected: dict[str, Any], tasks: list[str]) -> str:
    """Describes the difference of an answer from the predictor's; "" if there is none."""
    if list(found.get("answers", ())) != tasks or len(found.get("units", ())) != len(found.get("durations", "-")):
        return f"no answer to {tasks}: {str(found)[:200]}"
    for name in tasks:
        one, want = found["answers"][name], expected[name]
        difference = max(
            abs(one["probabilities"][slot][label] - share)
            for slot, shares in want["probabilities"].items()
            for label, share in shares.items()
        )
        if not difference <= AGREE or one["labels"] != want["labels"]:
            return f"{name}: {one['labels']} is not {want['labels']}, or probabilities differ ({difference:.1e})"
    return ""


async def load(address: str, folder: Path, args: argparse.Namespace) -> common.Result:
    """Returns the clients' results: latencies of correct answers in seconds, counts, and descriptions of faults."""
    import httpx

    answers = json.loads((folder / "answers.json").read_text())
    waves = [(folder / "waves" / f"{number}.wav").read_bytes() for number in range(len(answers))]
    names, seconds, counts = list(answers[0]), list[float](), Counter[str]()
    faults: list[str] = []
    began = time.perf_counter() + args.warm
    until = began + args.seconds
    context = httpx.create_ssl_context()  # shared, since each takes a while to make

    async def one(client: Any, rng: random.Random, turn: int) -> None:
        number = rng.randrange(len(waves))
        if rng.random() < RUBBISH_SHARE:
            kind = rng.choice(RUBBISH)
            counts["rubbish"] += 1
            if kind in ("half sent", "hung up"):
                await drop(address, waves[number], kind == "hung up")
                return
            query, body, statuses = rubbish(kind, waves[number])
            reply = await client.post("/predict", params=query, content=body)
            if reply.status_code not in statuses or not reply.json()["error"]:
                faults.append(f"{kind}: {reply.status_code} {reply.text[:200]}")
            return
        tasks = rng.sample(names, min(args.asked[turn % len(args.asked)], len(names)))
        start = time.perf_counter()
        reply = await client.post("/predict", params={"tasks": ",".join(tasks)}, content=waves[number])
        end = time.perf_counter()
        fault = f"status {reply.status_code}: {reply.text[:200]}"
        fault = wrong(reply.json(), answers[number], tasks) if reply.status_code == 200 else fault
        if fault:
            faults.append(fault)
        if began <= end <= until:
            seconds.append(end - start)
            counts["good"] += 1
            counts["rows"] += len(tasks)

    async def client(number: int) -> None:
        rng = random.Random(number)
        async with httpx.AsyncClient(base_url=address, timeout=120, verify=context) as http:
            turn = number
            while time.perf_counter() < until:
                try:
                    await one(http, rng, turn)
                except (httpx.HTTPError, OSError) as error:
                    faults.append(f"lost: {type(error).__name__} {error}")
                turn += 1

    await asyncio.gather(*map(client, range(args.clients)))
    return {"latencies": seconds, "faults": faults, **counts}


class Watch(threading.Thread):
    """Samples a process's resident memory in MiB, every half second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.samples, self.over = pid, list[float](), threading.Event()

    def run(self) -> None:
        """Samples until `over` is set."""
        while not self.over.wait(0.5):
            with contextlib.suppress(OSError, AttributeError):
                self.samples.append(resident(self.pid))


def resident(pid: int) -> float:
    """Returns the resident memory of a process in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024  # type: ignore[union-attr]


def race(folder: Path, side: str, args: argparse.Namespace, flags: Sequence[str] = ("--no-page",)) -> common.Result:
    """Loads one side; returns clients' counts, the server's metrics and memory. `flags`: further server flags."""
    import httpx

    sizes = [f"--{name}={getattr(args, name)}" for name in ("clients", "seconds", "warm")]
    sizes.append(f"--asked={','.join(map(str, args.asked))}")
    with server(folder, *flags, *SIDES[side]) as (process, address):
        watch = Watch(process.pid)
        watch.start()
        before = _cpu(process.pid)
        command = [sys.executable, "-m", "benchmarks.load", f"--clients-of={address}", f"--place={folder}", *sizes]
        clients = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        spent = _cpu(process.pid) - before
        watch.over.set()
        metrics = httpx.get(f"{address}/metrics").text
        health = httpx.get(f"{address}/health").json()
    result = json.loads(clients.stdout)
    values = dict(re.findall(r"^(\S+) (\S+)$", metrics, re.MULTILINE))
    batches = float(values["spjax_batch_rows_count"])
    memory = watch.samples[int(len(watch.samples) * args.warm / (args.warm + args.seconds)) :]
    half = len(memory) // 2
    if health["waiting"] or health["working"]:
        result["faults"].append(f"unfinished requests: {health}")
    return {
        **result,
        "seconds": args.seconds,
        "server_cpu": spent,
        "all_rows": float(values["spjax_batch_rows_sum"]),  # including the warm-up
        "rows_a_batch": float(values["spjax_batch_rows_sum"]) / max(1.0, batches),
        "memory": memory,
        "growth": statistics.median(memory[half:]) / statistics.median(memory[:half]) if half else 1.0,
        "outcomes": {k: float(v) for k, v in values.items() if k.startswith("spjax_requests_total")},
    }


def _cpu(pid: int) -> float:
    """Returns the CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu(result: common.Result) -> float:
    """Returns the server's CPU milliseconds a row, refused requests included."""
    return 1000 * result["server_cpu"] / max(1.0, result["all_rows"])


def tables(results: dict[str, common.Result], args: argparse.Namespace) -> list[str]:
    """Makes the parts of the report."""
    rows = [["side", "good answers/s", "rows/s", "p50 s", "p99 s", "rows a batch", "CPU ms a row", "invalid", "faults"]]
    memory = [["side", "MiB at start", "at end", "maximum", "second half : first", "goal"]]
    for side, one in results.items():
        cuts = np.percentile(one["latencies"], (50, 99)) if one["latencies"] else (np.nan, np.nan)
        rate, row_rate = one["good"] / args.seconds, one["rows"] / args.seconds
        rows.append([
            side, f"{rate:.1f}", f"{row_rate:.1f}", f"{cuts[0]:.2f}", f"{cuts[1]:.2f}", f"{one['rows_a_batch']:.1f}",
            f"{cpu(one):.1f}", one["rubbish"], len(one["faults"]),
        ])  # fmt: skip
        held = one["memory"] or [np.nan]
        sizes = [f"{held[0]:.0f}", f"{held[-1]:.0f}", f"{max(held):.0f}"]
        memory.append([side, *sizes, f"{one['growth']:.3f}", f"≤ {FLAT}"])
    parts = [common.table(rows), common.table(memory)]
    if {"batched", "alone"} <= results.keys():
        times = results["batched"]["good"] / max(1, results["alone"]["good"])
        cheaper = cpu(results["alone"]) / cpu(results["batched"])
        parts.append(
            f"Batched, compared with one row at a time: {times:.2f} times the good answers (goal ≥ {FASTER:g}), "
            f"{cheaper:.2f} times the rows for the same CPU time of the server."
        )
    faults = [f"- {side}: {fault}" for side, one in results.items() for fault in one["faults"][:20]]
    return [*parts, "\n".join(["Faults:", *faults])] if faults else parts


def main() -> None:
    """Loads the sides in sequence; or runs the clients of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--clients-of", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.clients_of:
        print(json.dumps(asyncio.run(load(args.clients_of, args.place, args))))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_place(Path(folder), args)
        sides = tqdm(args.sides.split(","), desc="load", unit="side", file=sys.stderr)
        results = {side: race(Path(folder), side, args) for side in sides}
    common.report(f"{args.clients} clients", args, tables(results, args), {k: [one] for k, one in results.items()})
    if any(one["faults"] for one in results.values()):
        sys.exit("some answers were wrong or missing, or invalid requests were accepted: see above")


if __name__ == "__main__":
    main()
