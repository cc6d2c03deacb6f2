"""Memory of a real server over thousands of mixed requests, which must stay constant.

    python -m benchmarks.memory

The server (`python -m spjax.serve`, with its page) runs with a tiny LM and log-mel features. Clients send recordings of
many formats and lengths for some of the tasks, invalid and interrupted requests, and calls of the page. The server's
resident memory is printed every 500 requests; over the second half the maximum must be within 2 % of the minimum.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, load

FLAT = 1.02  # goal: maximum over minimum of the second half
FORMATS = (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"))
RATES = (8_000, 16_000, 22_050, 44_100, 48_000)  # Hz
GETS = ("/health", "/tasks", "/metrics", "/", "/config", "/gradio_api/info", "/predict")
SHARES = {"good": 0.7, "rubbish": 0.12, "page": 0.1, "get": 0.08}  # fractions of the requests
TINY = ["--dim=64", "--layers=1", "--prompt=3", "--separators=2", "--tasks=4", "--recordings=6", "--longest=0.6"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds flags of the number of requests and of the output."""
    parser.add_argument("--requests", type=int, default=10_000, help="after the warm-up")
    parser.add_argument("--warm", type=int, default=1_000, help="requests of the warm-up, which are not measured")
    parser.add_argument("--every", type=int, default=500, help="requests between samples of the memory")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--recordings", type=int, default=200, help="recordings of different formats and lengths")
    parser.add_argument("--seconds", type=float, default=2.4, help="length of the longest recording")
    parser.add_argument("--out", help="write everything to this JSON file")


def recordings(count: int, longest: float) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of recordings that differ in format, rate, channels and length."""
    import soundfile

    rng = np.random.default_rng(load.SEED)
    kinds = itertools.cycle(itertools.product(FORMATS, RATES, (1, 2)))
    for number, ((kind, subtype), rate, channels) in zip(range(count), kinds, strict=False):
        samples = int(rate * rng.uniform(0.1, longest))
        wave = 0.3 * np.sin(2 * np.pi * np.cumsum(rng.uniform(100, 3000, samples)) / rate)
        data = io.BytesIO()
        soundfile.write(data, np.stack([wave] * channels, axis=1), rate, format=kind, subtype=subtype)
        yield f"{number}.{kind.lower()}", data.getvalue()


async def call_page(client: Any, name: str, data: bytes, tasks: list[str]) -> str:
    """Calls the page's `/predict` by its API; returns the kind of the last event."""
    (place,) = (await client.post("/gradio_api/upload", files={"files": (name, data)})).json()
    given = [{"path": place, "meta": {"_type": "gradio.FileData"}}, tasks]
    event = (await client.post("/gradio_api/call/predict", json={"data": given})).json()["event_id"]
    events = (await client.get(f"/gradio_api/call/predict/{event}")).text
    return events.rpartition("event: ")[2].partition("\n")[0]


async def one(client: Any, rng: random.Random, sent: list[tuple[str, bytes]], tasks: list[str]) -> tuple[str, str]:
    """Sends a random request; returns its kind, and a description of a fault or ""."""
    (kind,) = rng.choices(list(SHARES), list(SHARES.values()))
    name, data = rng.choice(sent)
    chosen = rng.sample(tasks, rng.randint(1, len(tasks)))
    if kind == "get":
        place = rng.choice((*GETS, f"/nowhere/{rng.random()}"))
        reply = await client.get(place)
        return kind, "" if reply.status_code in (200, 404, 405) else f"{place}: {reply.status_code}"
    if kind == "page":
        end = await call_page(client, name, data, chosen)
        return kind, "" if end == "complete" else f"the page answered {end!r} to {name}"
    if kind == "rubbish":
        bad = rng.choice(load.RUBBISH)
        if bad in ("half sent", "hung up"):
            await load.drop(str(client.base_url).rstrip("/"), data, bad == "hung up")
            return kind, ""
        if bad == "cut off":
            name, data = sent[0]  # a format in which half a file is recognised as incomplete
        query, body, statuses = load.rubbish(bad, data)
        reply = await client.post("/predict", params=query, content=body)
        return kind, "" if reply.status_code in statuses else f"{bad}: {reply.status_code} {reply.text[:200]}"
    reply = await client.post("/predict", params={"tasks": chosen}, content=data)
    return kind, "" if reply.status_code == 200 else f"{name}: {reply.status_code} {reply.text[:200]}"


async def measure(address: str, pid: int, args: argparse.Namespace) -> common.Result:
    """Measures resident memory in MiB every `args.every` requests; also returns counts and descriptions of faults."""
    import httpx

    sent = list(recordings(args.recordings, args.seconds))
    total, begun, done = args.warm + args.requests, itertools.count(), 0
    memory, counts, faults = list[float](), Counter[str](), list[str]()
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        tasks = list((await client.get("/tasks")).json())

        async def ask(rng: random.Random) -> None:
            nonlocal done
            while next(begun) < total:
                kind, fault = await one(client, rng, sent, tasks)
                counts[kind] += 1
                faults.extend([fault] if fault else [])
                done += 1
                if done >= args.warm and (done - args.warm) % args.every == 0:
                    memory.append(load.resident(pid))
                    print(f"{done - args.warm} requests: {memory[-1]:.1f} MiB", file=sys.stderr, flush=True)

        await asyncio.gather(*(ask(random.Random(number)) for number in range(args.clients)))
    half = memory[len(memory) // 2 :]
    return {"memory": memory, "growth": max(half) / min(half), "faults": faults, "sent": dict(counts)}


def run(args: argparse.Namespace) -> common.Result:
    """Starts a server and measures it."""
    with tempfile.TemporaryDirectory() as folder:
        parser = argparse.ArgumentParser()
        load.add_flags(parser)
        load.make_place(Path(folder), parser.parse_args(TINY))
        flags = ("--max-units=256", f"--max-seconds={args.seconds + 1:g}")
        with load.server(Path(folder), *flags) as (process, address):
            return asyncio.run(measure(address, process.pid, args))


def main() -> None:
    """Measures, prints, and fails if memory grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    args = parser.parse_args()
    result = run(args)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))
    print(" ".join(f"{one:.0f}" for one in result["memory"]), f"MiB; second half: {result['growth']:.3f} (≤ {FLAT})")
    print("sent:", result["sent"])
    if result["faults"] or result["growth"] > FLAT:
        sys.exit("\n".join(["memory grows, or answers were wrong:", *result["faults"][:20]]))


if __name__ == "__main__":
    main()
