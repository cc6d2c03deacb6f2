"""Counted FLOPs, throughput in the log, and profiler traces."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spjax.training import loop, profile, speed
from spjax.training.speed import Cost
from spjax.training.throughput import Throughput


def test_flops_are_those_that_xla_counts() -> None:
    x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))

    @jax.jit
    def unrolled(x: jax.Array, w: jax.Array) -> jax.Array:
        for kernel in w:
            x = x @ kernel
        return x

    looped = jax.jit(lambda x, w: jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, w)[0])
    by_hand = 2 * 5 * 8 * 16 * 16
    assert speed.flops(unrolled.trace(x, w).jaxpr) == speed.flops(looped.trace(x, w).jaxpr) == by_hand
    cost = unrolled.lower(x, w).compile().cost_analysis()
    assert cost["flops"] == pytest.approx(by_hand, rel=0.01)
    chosen = jax.jit(lambda x: jax.lax.platform_dependent(x, cpu=lambda x: x @ x.T, default=lambda x: x @ x.T))
    assert speed.flops(chosen.trace(x).jaxpr) == 2 * 8 * 8 * 16, "a choice of platforms is made once"
    again = jax.jit(jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(x @ w[0]))(x).sum()))
    assert speed.flops(again.trace(x).jaxpr) == 3 * 2 * 8 * 16 * 16, "rematerialised matmuls count"


def test_the_cost_of_an_update_depends_on_the_batch_and_compiles_nothing_twice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    traces: list[int] = []

    @jax.jit
    def step(state: jax.Array, batch: jax.Array) -> jax.Array:
        traces.append(1)
        return batch @ state

    monkeypatch.setattr(speed, "peak", lambda operand: 1e3)
    cost, state = speed.cost_of(step, "float32"), jnp.ones((4, 4))
    with jax.log_compiles():
        for rows in (2, 3, 2):
            batch = jnp.ones((rows, 4))
            assert cost(state, batch).seconds == pytest.approx(2 * rows * 16 / 1e3)
            assert cost(state, batch).bytes >= 4 * (4 * 4 + 2 * rows * 4), "state, batch and result"
            step(state, batch)
    assert len(traces) == 2, "the update's own trace is used"
    assert sum("Finished XLA compilation of jit(step)" in line for line in caplog.messages) == 2


class _Device:
    platform = "gpu"

    def __init__(self, kind: str) -> None:
        self.device_kind = kind


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 7.0),  # not an L4: measured
        ("cpu", 7.0),
    ],
)
def test_peaks(monkeypatch: pytest.MonkeyPatch, kind: str, flops: float) -> None:
    monkeypatch.setattr(speed, "_measured", lambda size, operand: 7.0)
    monkeypatch.setattr(speed.jax, "devices", lambda: [_Device(kind)] * 3)
    assert speed.peak("bfloat16") == 3 * flops
    assert speed.peak("float32") == 21


def test_a_measured_peak_is_one() -> None:
    assert 1e8 < speed._measured(128, jnp.dtype("float32")) < 1e15


def test_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def items() -> object:
        for _ in range(4):
            now[0] += 1.0  # waiting for input
            yield None

    pace = Throughput()
    for _ in pace.each(items()):
        now[0] += 3.0
        pace.done(8, Cost(1.5, 10))
    pace.done(0, Cost(0.0, 7))
    assert pace.read() == {"utt_s": 2.0, "step_s": 3.2, "step_bytes": 10, "peak_share": 0.375, "input_wait": 0.25}
    now[0] += 1.0
    assert pace.read() == {"utt_s": 0.0, "step_s": 1.0, "step_bytes": 0, "peak_share": 0.0, "input_wait": 0.0}


def _job(stop: int = 1000) -> loop.Job:
    update = jax.jit(lambda s, batch: ({"x": s["x"] + batch.sum()}, {"loss": jnp.cos(s["x"]), "updates": jnp.ones(())}))

    def batches(steps: object) -> object:
        for number, step in enumerate(steps):
            if number == stop:
                raise OSError("no more")
            yield np.full(3, step, np.float32), 3

    start = {"x": jnp.zeros(())}
    return loop.Job(
        start, 20, lambda state, epoch: range(20), batches, update, lambda state, epoch: (state, {}, 0.0),
        lambda state: False, cost=lambda state, batch: Cost(1e-9, 0),
    )  # fmt: skip


def _traced(folder: Path) -> list[int]:
    """Numbers of the updates in the trace."""
    (trace,) = folder.glob("profile/plugins/profile/*/*.trace.json.gz")
    (_,) = folder.glob("profile/plugins/profile/*/*.xplane.pb")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sorted(int(event["args"]["step_num"]) for event in events if event.get("name") == "update")


def test_a_trace_of_some_updates(tmp_path: Path) -> None:
    loop.fit(_job(), str(tmp_path / "whole"), epochs=1, profile=3)
    assert _traced(tmp_path / "whole") == [profile.SKIPPED + n for n in (1, 2, 3)]
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert all(0 <= line["input_wait"] <= 1 and line["peak_share"] > 0 for line in lines if "utt_s" in line)
    # A trace is written even if the run ends early.
    with pytest.raises(OSError, match="no more"):
        loop.fit(_job(stop=12), str(tmp_path / "cut"), epochs=1, profile=5)
    assert _traced(tmp_path / "cut") == [profile.SKIPPED + 1, profile.SKIPPED + 2]
    loop.fit(_job(), str(tmp_path / "none"), epochs=1)
    assert not (tmp_path / "none/profile").exists()
