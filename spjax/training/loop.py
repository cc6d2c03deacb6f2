"""Training loop shared by pretraining and prompt tuning: epochs, checkpoints, resuming, signals, logs, progress.

To resume, state and metadata are restored from the latest checkpoint, the log is truncated to its step, and the epoch's
plan continues from its position. The plan depends on seed, epoch and parts of the state that only evaluations change;
random keys depend on seed and update. So a resumed run is bit-identical to an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from spjax.training import checkpoints, sharding
from spjax.training.log import Log
from spjax.training.profile import Trace
from spjax.training.speed import Cost
from spjax.training.throughput import Throughput
from spjax.types import Json, State

_log = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """The loss is NaN, infinite or above `MAX_LOSS`; in a bank, that of every member."""


class Interrupted(SystemExit):
    """Raised after SIGTERM or SIGINT, once the state is saved. `number`: the signal number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@dataclasses.dataclass(frozen=True)
class Job:
    """The parts of a training run that differ between pretraining and prompt tuning.

    Attributes:
      state: initial state, on devices.
      steps: maximum number of steps in an epoch.
      plan: (state, epoch) -> steps of the epoch. Must not depend on what `update` changes.
      batches: steps -> iterator of (batch, number of utterances in it).
      update: (state, batch) -> (state, metrics); jitted by the caller. Metrics are "loss", "updates" (updates made) and
        others, scalars or [N] for N members; 0 for members that were not updated.
      evaluate: (state, epoch) -> (state, metrics, score); called after an epoch. Higher scores are better.
      finished: state -> bool; True stops before the last epoch.
      deactivate: (state, bool [N], members that diverged so far) -> state in which they are not trained; called before
        each evaluation. `update` must not change a member that diverges. None: the run ends if one diverges.
      names: member names for messages.
      cost: (state, batch) -> cost of the update (`speed.cost_of`).
    """

    state: State
    steps: int
    plan: Callable[[State, int], Sequence[Any]]
    batches: Callable[[Sequence[Any]], Iterable[tuple[Any, int]]]
    update: Callable[[State, Any], tuple[State, dict[str, jax.Array]]]
    evaluate: Callable[[State, int], tuple[State, Json, float]]
    finished: Callable[[State], bool]
    deactivate: Callable[[State, np.ndarray], State] | None = None
    names: Sequence[str] = ()
    cost: Callable[[State, Any], Cost] = lambda state, batch: Cost(0.0, 0)


def diverged(metrics: Json) -> Any:
    """Whether a metric is NaN or infinite, or the loss above `MAX_LOSS`: bool, scalar or [N] like the metrics."""
    loss, *others = metrics["loss"], *(value for name, value in metrics.items() if name not in ("loss", "updates"))
    found = ~(abs(loss) <= MAX_LOSS)
    for value in others:
        found = found | ~(abs(value) < np.inf)
    return found


def fit(
    job: Job, workdir: str, *, epochs: int, log_every: int = 50, checkpoint_every: int = 500, profile: int = 0
) -> tuple[State, list[Json]]:
    """Train until the last epoch or until `job.finished`.

    Args:
      job: the run.
      workdir: directory of checkpoints and logs; a run found there is resumed.
      epochs: maximum number of epochs.
      log_every: updates between log lines.
      checkpoint_every: updates between checkpoints; one is also written after every epoch.
      profile: number of updates in the profiler trace in WORKDIR/profile.

    Returns:
      The final state; and for every epoch the mean training loss (None for members that were not updated), the score
      and the metrics.

    Raises:
      DivergedError: the run diverged; the last good checkpoint is kept. With `job.deactivate`, raised when all members
        have diverged.
      Interrupted: after SIGTERM or SIGINT, once the state is saved.
      ValueError: the checkpoints found belong to another run.
      OSError: a checkpoint or a log cannot be written; the last complete checkpoint is kept.
    """
    # Exiting the block waits for a checkpoint that is being written.
    with checkpoints.opened(workdir) as manager, StopSignal() as stop:
        run = _restored(manager, job, epochs)

        def leave(epoch: int, step: int) -> Interrupted:
            checkpoints.wait(manager)
            return Interrupted(
                f"stopped at epoch {epoch + 1}, step {step}: saved; the same command continues", stop.number
            )

        with Log(workdir, run.epoch * job.steps + run.step) as log, Trace(workdir, profile) as trace:
            note: str | None = "compiling the first steps"
            while run.epoch < epochs and not job.finished(run.state):
                steps = job.plan(run.state, run.epoch)
                throughput, pending = Throughput(), []
                bar = tqdm(
                    total=len(steps), initial=run.step, desc=f"epoch {run.epoch + 1}/{epochs}", unit="step",
                    disable=jax.process_index() > 0, mininterval=1.0, dynamic_ncols=True, leave=False, postfix=note,
                )  # fmt: skip
                note = None
                with bar:  # closed on errors too, so that messages are printed below it
                    batches = throughput.each(job.batches(steps[run.step :]))
                    for done, (batch, utterances) in enumerate(batches, run.step + 1):
                        throughput.done(utterances, job.cost(run.state, batch))
                        with trace.step():
                            run.state, metrics = job.update(run.state, batch)
                        trace.done(metrics)
                        pending.append(metrics)
                        bar.update()
                        last, due = done == len(steps), done % checkpoint_every == 0
                        # With several processes `requested` is a collective, too slow for every update.
                        asked = jax.process_count() == 1 or done % SYNC_STOP_EVERY == 0 or last
                        stopping = asked and stop.requested()
                        if done % log_every == 0 or last or due or stopping:
                            window, speed = run.add(pending, job, manager), throughput.read()
                            pending = []
                            loss = np.sum(window["loss"]) / max(np.sum(window["updates"]), 1)
                            bar.set_postfix(loss=f"{loss:.4f}", utt_s=f"{speed['utt_s']:.0f}")
                            log.write(run.epoch * job.steps + done, _means(window), **speed)
                        if stopping or (due and not last):
                            run.save(manager, log, job)
                        if stopping:
                            raise leave(run.epoch, done)
                try:
                    with stop.interruptible():
                        evaluated = job.evaluate(run.without_diverged(job), run.epoch)
                except _StopRequested:
                    run.save(manager, log, job)
                    raise leave(run.epoch, len(steps)) from None
                metrics = run.end_epoch(*evaluated)
                log.write(run.epoch * job.steps, {"valid/" + k: v for k, v in metrics.items()})
                run.save(manager, log, job)
                if stop.requested():
                    raise leave(run.epoch - 1, len(steps))
    return run.state, run.history


SYNC_STOP_EVERY = 8  # updates between checks of several processes for a stop signal in any of them
MAX_LOSS = 1e4  # a larger loss counts as divergence
_SUMMED = ("loss", "updates")


@dataclasses.dataclass
class _Run:
    """The content of a checkpoint.

    Attributes:
      state: of the job.
      epoch: index of the current epoch.
      step: steps of it that are done.
      history: metrics of earlier epochs.
      sums: "loss" and "updates" summed over the steps of this epoch, scalar or [N].
      lost: bool, scalar or [N], members that have diverged.
    """

    state: State
    epoch: int = 0
    step: int = 0
    history: list[Json] = dataclasses.field(default_factory=list)
    sums: dict[str, np.ndarray] = dataclasses.field(default_factory=lambda: dict.fromkeys(_SUMMED, np.zeros(())))
    lost: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((), bool))

    def add(
        self, pending: list[dict[str, jax.Array]], job: Job, manager: ocp.CheckpointManager
    ) -> dict[str, np.ndarray]:
        """Add the metrics of the next steps and return their sums over these steps."""
        fetched = sharding.fetch(pending)
        for each in fetched:
            self.step += 1
            self.lost = _check(each, self.lost, f"epoch {self.epoch + 1}, step {self.step}", job, manager)
            # One by one, so that the sum does not depend on where a run was interrupted.
            self.sums = {name: total + np.asarray(each[name], np.float64) for name, total in self.sums.items()}
        return {name: np.sum([each[name] for each in fetched], axis=0) for name in fetched[0]}

    def without_diverged(self, job: Job) -> State:
        """The state in which members that have diverged are not trained."""
        return self.state if job.deactivate is None or not self.lost.any() else job.deactivate(self.state, self.lost)

    def end_epoch(self, state: State, metrics: Json, score: float) -> Json:
        """Go to the next epoch with the result of the evaluation, and return its metrics."""
        train_loss = _means(self.sums)["train/loss"]
        self.history.append({"epoch": self.epoch, "train_loss": train_loss, "score": score, **metrics})
        _log.info("epoch %d: score %.4f, best %.4f", self.epoch + 1, score, max(line["score"] for line in self.history))
        self.state, self.epoch, self.step, self.sums = state, self.epoch + 1, 0, dict.fromkeys(_SUMMED, np.zeros(()))
        return metrics

    def save(self, manager: ocp.CheckpointManager, log: Log, job: Job) -> None:
        """Write a checkpoint in the background."""
        log.copy()  # before the checkpoint, so that the log has every update up to it
        # Copied, since it is written while the next epoch appends to `history`.
        meta = {"epoch": self.epoch, "step": self.step, "history": list(self.history)}
        meta |= {"loss_sum": self.sums["loss"].tolist(), "updates": self.sums["updates"].tolist()}
        meta |= {"diverged": self.lost.tolist()}
        # An epoch has one more position than steps: after its last step, before its evaluation.
        checkpoints.save(manager, self.epoch * (job.steps + 1) + self.step, self.state, meta)


def _restored(manager: ocp.CheckpointManager, job: Job, epochs: int) -> _Run:
    """Continue from the latest checkpoint, if there is one."""
    found = checkpoints.restore(manager, job.state)
    if found is None:
        return _Run(job.state)
    state, meta = found
    epoch, step = meta["epoch"], meta["step"]
    if epoch == epochs:
        _log.info("all %d epochs are done", epochs)
    else:
        _log.info("continuing from epoch %d, step %d", epoch + 1, step)
    # Checkpoints of earlier pretraining runs have no "updates": every step was an update.
    sums = {"loss": np.asarray(meta["loss_sum"]), "updates": np.asarray(meta.get("updates", step))}
    return _Run(state, epoch, step, meta["history"], sums, np.asarray(meta.get("diverged", False)))


def _means(sums: Json) -> Json:
    """Divide sums by the number of updates: a number, or a list with None for members without updates."""
    made = sums["updates"]
    means = {name: np.divide(total, np.maximum(made, 1)) for name, total in sums.items() if name != "updates"}
    return {f"train/{name}": np.asarray(np.where(made > 0, mean, None)).tolist() for name, mean in means.items()}


def _check(
    values: dict[str, np.ndarray], lost: np.ndarray, where: str, job: Job, manager: ocp.CheckpointManager
) -> np.ndarray:
    """Add members that diverged in this step to `lost`, and set their values to 0."""
    bad = np.asarray(diverged(values))
    if not bad.any():
        return lost
    describe = lambda n: ", ".join(  # noqa: E731
        f"{name} is {np.asarray(value)[n].tolist()}" for name, value in values.items() if name != "updates"
    )
    after = lost | bad
    if job.deactivate is None or after.all():
        kept = manager.latest_step()
        good = (
            f"The last good checkpoint is {manager.directory}/{kept}"
            if kept is not None
            else "No checkpoint was written yet"
        )
        raise DivergedError(
            f"training diverged at {where}: {describe(...)}. {good}. Lower the learning rate or increase the "
            "warm-up, and use another --workdir"
        )
    for n in np.flatnonzero(after & ~lost).tolist():
        _log.warning(
            "%s diverged at %s (%s): its best epoch is kept, the other members continue",
            job.names[n],
            where,
            describe(n),
        )
    values |= {name: np.where(bad, 0, value) for name, value in values.items()}
    return after


class _StopRequested(Exception):  # noqa: N818 - no error
    """SIGTERM or SIGINT arrived in an `interruptible` block."""


class StopSignal:
    """Context that records SIGTERM and SIGINT instead of raising; a second SIGINT raises KeyboardInterrupt."""

    def __enter__(self) -> StopSignal:
        self._requested = self._interruptible = False
        self.number: int = signal.SIGTERM
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._requested and jax.process_index() == 0:
            print("\nstopping: saving the state after the current step", file=sys.stderr, flush=True)
        self._requested, self.number = True, number
        if self._interruptible:
            self._interruptible = False  # a second signal must not interrupt the handling of the first
            raise _StopRequested

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Block without side effects that a signal interrupts; with several processes it runs to its end."""
        self._interruptible = jax.process_count() == 1
        try:
            if self._interruptible and self._requested:
                raise _StopRequested
            yield
        finally:
            self._interruptible = False

    def requested(self) -> bool:
        """Whether any process received a signal; a collective, so that all processes stop at the same step."""
        if jax.process_count() == 1:
            return self._requested
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.asarray(self._requested)).any())
