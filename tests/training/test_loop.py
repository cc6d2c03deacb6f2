"""The training loop on a job with three parameters: resuming, signals, divergence, checkpoints and logs."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spjax.training import checkpoints, log, loop
from tests.conftest import PACE

STEPS = 7
BATCHES = np.random.default_rng(0).normal(size=(4, STEPS, 3)).astype(np.float32)


@jax.jit
def _update(state: dict[str, jax.Array], batch: jax.Array) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    x = state["x"] * jnp.float32(0.9) + batch
    metrics = {"loss": jnp.sum(x**2), "gradient_norm": jnp.abs(x), "updates": 1}
    return {"x": x, "step": state["step"] + 1}, metrics


def _start(size: int = 3) -> dict[str, jax.Array]:
    return {"x": jnp.zeros(size), "step": jnp.zeros((), jnp.int32)}


def _job(before: Callable[[int, int], None] = lambda epoch, step: None, scores: tuple[float, ...] = ()) -> loop.Job:
    """A job that calls `before` before every step, and with step = STEPS before every evaluation."""

    def plan(state: dict[str, jax.Array], epoch: int) -> list[tuple[int, int]]:
        return [(epoch, step) for step in range(STEPS)]

    def batches(steps: Sequence[tuple[int, int]]) -> Iterator[tuple[np.ndarray, int]]:
        for epoch, step in steps:
            before(epoch, step)
            yield BATCHES[epoch, step], 8

    def evaluate(state: dict[str, jax.Array], epoch: int) -> tuple[dict[str, jax.Array], dict[str, Any], float]:
        before(epoch, STEPS)
        score = scores[epoch] if scores else -float(state["x"][0])
        return state, {"metric": [score, score / 2]}, score

    return loop.Job(_start(), STEPS, plan, batches, _update, evaluate, lambda state: False)


def _lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in PACE} for line in lines]


def _positions(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


class _Killed(Exception):  # noqa: N818 - no error
    pass


def _at(place: tuple[int, int], act: Callable[[], None]) -> Callable[[int, int], None]:
    """Call the action at this place, the first time it is reached."""
    left = [place]

    def before(epoch: int, step: int) -> None:
        if left == [(epoch, step)]:
            left.clear()
            act()

    return before


def _raise(error: type[BaseException] = _Killed) -> None:
    raise error


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    state, history = loop.fit(_job(), str(folder), epochs=3, checkpoint_every=3, log_every=2)
    return folder, jax.device_get(state), history


def test_every_batch_is_used_once_in_order(undisturbed: tuple) -> None:
    _, state, history = undisturbed
    x, losses = np.zeros(3, np.float32), []
    for batch in BATCHES[:3].reshape(-1, 3):
        x = x * np.float32(0.9) + batch
        losses.append((x**2).sum())
    np.testing.assert_allclose(state["x"], x, rtol=1e-5)
    assert state["step"] == 3 * STEPS
    assert [line["epoch"] for line in history] == [0, 1, 2]
    np.testing.assert_allclose(
        [line["train_loss"] for line in history], np.reshape(losses, (3, STEPS)).mean(axis=1), rtol=1e-5
    )
    assert history[2]["metric"] == [history[2]["score"], history[2]["score"] / 2]


@pytest.mark.parametrize("cuts", [[(0, 0)], [(0, 2)], [(1, 4)], [(1, STEPS)], [(2, 6), (2, STEPS)], [(0, 5), (2, 1)]])
def test_a_run_that_was_killed_ends_at_the_same_numbers(tmp_path: Path, undisturbed: tuple, cuts: list) -> None:
    for cut in cuts:
        with pytest.raises(_Killed):
            loop.fit(_job(_at(cut, _raise)), str(tmp_path), epochs=3, checkpoint_every=3, log_every=2)
    again, history = loop.fit(_job(), str(tmp_path), epochs=3, checkpoint_every=3, log_every=2)
    folder, state, expected = undisturbed
    assert np.array_equal(again["x"], state["x"])  # bit for bit
    assert history == expected
    assert _lines(tmp_path) == _lines(folder)


@pytest.mark.parametrize("place", [(0, 0), (1, 2), (1, STEPS - 1), (1, STEPS), (2, STEPS)])
def test_sigterm_saves_and_leaves_at_once(tmp_path: Path, undisturbed: tuple, place: tuple[int, int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def ask() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def note(epoch: int, step: int) -> None:
        seen.append((epoch, step))
        at(epoch, step)

    at = _at(place, ask)
    epoch, step = place
    with pytest.raises(loop.Interrupted, match=f"stopped at epoch {epoch + 1}, step {min(step + 1, STEPS)}: saved"):
        loop.fit(_job(note), str(tmp_path), epochs=3, checkpoint_every=100, log_every=2)
    assert seen[-1] == place  # no step started after the signal
    assert signal.getsignal(signal.SIGTERM) == before
    seen.clear()
    state, history = loop.fit(_job(note), str(tmp_path), epochs=3, checkpoint_every=100, log_every=2)
    assert seen[0] == (epoch, min(step + 1, STEPS))  # no step was repeated
    assert np.array_equal(state["x"], undisturbed[1]["x"])
    assert history == undisturbed[2]


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path) -> None:
    reached = []

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("first")
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("second")

    with pytest.raises(KeyboardInterrupt):
        loop.fit(_job(_at((0, 3), twice)), str(tmp_path), epochs=3)
    assert reached == ["first"]


def test_the_latest_is_kept(tmp_path: Path) -> None:
    loop.fit(_job(scores=(0.1, 0.9, 0.3, 0.2)), str(tmp_path), epochs=4, checkpoint_every=2)
    assert _positions(tmp_path) == [4 * (STEPS + 1)]


def test_only_a_full_disk_suggests_to_free_space(tmp_path: Path) -> None:
    job = dataclasses.replace(_job(), state={**_start(), "empty": jnp.zeros((0, 3))}, update=lambda state, batch: (
        {**_update(state, batch)[0], "empty": state["empty"]}, _update(state, batch)[1]
    ))  # fmt: skip
    with pytest.raises(OSError, match="could not be written") as caught:
        loop.fit(job, str(tmp_path), epochs=1)
    assert "free disk space" not in str(caught.value)


def test_a_finished_job_stops_and_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    job = dataclasses.replace(_job(), finished=lambda state: int(state["step"]) >= 2 * STEPS)
    state, history = loop.fit(job, str(tmp_path), epochs=4)
    assert len(history) == 2
    touched = dataclasses.replace(_job(lambda *_: _raise()), finished=job.finished)
    again, same = loop.fit(touched, str(tmp_path), epochs=4)
    assert same == history
    assert np.array_equal(again["x"], state["x"])


def test_log_is_cut_back_to_the_resumed_position(tmp_path: Path) -> None:
    with pytest.raises(_Killed):
        loop.fit(_job(_at((1, 5), _raise)), str(tmp_path), epochs=2, checkpoint_every=4, log_every=1)
    assert _lines(tmp_path)[-1]["step"] == STEPS + 5
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 13, "train/lo')  # an incomplete line
    first = []

    def note(epoch: int, step: int) -> None:
        if not first:
            first.append((epoch, step, _lines(tmp_path)[-1]["step"]))

    loop.fit(_job(note), str(tmp_path), epochs=2, checkpoint_every=4, log_every=1)
    assert first == [(1, 4, STEPS + 4)]
    steps = [line["step"] for line in _lines(tmp_path) if "train/loss" in line]
    assert steps == list(range(1, 2 * STEPS + 1))


def test_tensorboard_holds_the_log(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loop.fit(_job(), str(tmp_path), epochs=2, log_every=7)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/gradient_norm/2", "valid/metric/1", "utt_s"} <= set(events.Tags()["scalars"])
    logged = [line["train/loss"] for line in _lines(tmp_path) if "train/loss" in line]
    np.testing.assert_allclose([event.value for event in events.Scalars("train/loss")], logged, rtol=1e-6)


@pytest.mark.parametrize("leaving", [None, loop.Interrupted("saved", signal.SIGTERM)])
def test_an_error_of_copying_the_log_does_not_hide_other_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaving: BaseException | None
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("a bucket cannot be reached")

    def end() -> None:
        with log.Log(str(tmp_path), 0) as written:
            written.write(1, {"train/loss": 1.0})
            if leaving is not None:
                raise leaving

    (tmp_path / "here").mkdir()
    monkeypatch.setattr(log.tempfile, "tempdir", str(tmp_path / "here"))
    monkeypatch.setattr(log.places, "is_remote", lambda _: True)
    monkeypatch.setattr(log.places, "copy", refuse)
    with pytest.raises(OSError if leaving is None else loop.Interrupted):
        end()
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    ("name", "value", "message"), [("loss", np.nan, "nan"), ("loss", 2e4, "20000"), ("gradient_norm", np.inf, "inf")]
)
def test_divergence_is_reported_and_the_last_good_checkpoint_kept(
    tmp_path: Path, name: str, value: float, message: str
) -> None:
    def update(state: dict[str, jax.Array], batch: np.ndarray) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        state, metrics = _update(state, batch)
        if int(state["step"]) == STEPS + 4:
            state, metrics = {**state, "x": state["x"] * np.nan}, {**metrics, name: jnp.asarray(value)}
        return state, metrics

    job = dataclasses.replace(_job(), update=update)
    with pytest.raises(loop.DivergedError) as caught:
        loop.fit(job, str(tmp_path), epochs=3, checkpoint_every=2, log_every=50)
    for part in (f"{name} is {message}", "epoch 2, step 4", str(tmp_path / "checkpoints" / "10"), "learning rate"):
        assert part in str(caught.value)
    with checkpoints.opened(str(tmp_path)) as manager:
        state, meta = checkpoints.restore(manager, _start())
    assert (meta["epoch"], meta["step"], int(state["step"])) == (1, 2, STEPS + 2)
    assert np.isfinite(state["x"]).all()
    assert all(np.isfinite(line.get("train/loss", 0)) for line in _lines(tmp_path))


def test_divergence_before_any_checkpoint_says_there_is_none(tmp_path: Path) -> None:
    job = dataclasses.replace(
        _job(), update=lambda state, batch: (state, {"loss": jnp.asarray(jnp.nan), "updates": jnp.ones(())})
    )
    with pytest.raises(loop.DivergedError, match="No checkpoint was written yet"):
        loop.fit(job, str(tmp_path), epochs=1)


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    loop.fit(_job(), str(tmp_path), epochs=1)
    for state in (_start(4), {**_start(), "more": jnp.zeros(2)}, {"y": jnp.zeros(3), "step": jnp.zeros((), jnp.int32)}):
        with pytest.raises(
            ValueError, match=r"checkpoints/8 is damaged or does not fit this config .*use another --workdir"
        ):
            loop.fit(dataclasses.replace(_job(), state=state), str(tmp_path), epochs=2)


def test_a_full_disk_is_reported_and_the_last_complete_checkpoint_kept(tmp_path: Path) -> None:
    """The file size limit is 64 kB from the third epoch on, to simulate a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = 100_000
    noise = np.random.default_rng(0).normal(size=size).astype(np.float32)

    def update(state: dict[str, jax.Array], batch: np.ndarray) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        x = state["x"] * 0.5 + noise * batch[0]
        return {"x": x, "step": state["step"] + 1}, {"loss": x[0] ** 2, "updates": 1}

    def fit(before: Callable[[int, int], None]) -> tuple[dict[str, jax.Array], list[dict[str, Any]]]:
        return loop.fit(dataclasses.replace(_job(before), state=_start(size), update=update), str(tmp_path), epochs=3)

    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # noqa: E731
    try:
        with pytest.raises(
            OSError, match=r"checkpoint could not be written .* last complete one is kept: free disk space"
        ):
            fit(_at((2, 1), limit))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # The second epoch's checkpoint may still have been written in the background.
    assert _positions(tmp_path)[-1] in (STEPS + 1, 2 * (STEPS + 1))
    state, history = fit(lambda *_: None)
    assert int(state["step"]) == 3 * STEPS
    assert [line["epoch"] for line in history] == [0, 1, 2]
