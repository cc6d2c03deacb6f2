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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

State = Any  # a tree of arrays

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
    evaluate: Callable[[State, int], tuple[State, dict[str, Any], float]]
    finished: Callable[[State], bool]
    deactivate: Callable[[State, np.ndarray], State] | None = None
    names: Sequence[str] = ()
    cost: Callable[[State, Any], Cost] = lambda state, batch: Cost(0.0, 0)


def diverged(metrics: Mapping[str, Any]) -> Any:
    """Whether a metric is NaN or infinite, or the loss above `MAX_LOSS`: bool, scalar or [N] like the metrics."""
    loss, *others = metrics["loss"], *(value for name, value in metrics.items() if name not in ("loss", "updates"))
    found = ~(abs(loss) <= MAX_LOSS)
    for value in others:
        found = found | ~(abs(value) < np.inf)
    return found


def fit(
    job: Job, workdir: str, *, epochs: int, log_every: int = 50, checkpoint_every: int = 500, profile: int = 0
) -> tuple[State, list[dict[str, Any]]]:
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
        state, epoch, start, history, sums, lost = job.state, 0, 0, [], _NOTHING, np.zeros((), bool)
        found = checkpoints.restore(manager, state)
        if found is not None:
            state, meta = found
            epoch, start, history = meta["epoch"], meta["step"], meta["history"]
            # Checkpoints of earlier pretraining runs have no "updates": every step was an update.
            sums = {"loss": np.asarray(meta["loss_sum"]), "updates": np.asarray(meta.get("updates", start))}
            lost = np.asarray(meta.get("diverged", False))
            if epoch == epochs:
                _log.info("all %d epochs are done", epochs)
            else:
                _log.info("continuing from epoch %d, step %d", epoch + 1, start)

        def save(epoch: int, step: int) -> None:
            log.copy()  # before the checkpoint, so that the log has every update up to it
            # Copied, since it is written in the background while the next epoch appends to `history`.
            meta = {"epoch": epoch, "step": step, "history": list(history)}
            meta |= {"loss_sum": sums["loss"].tolist(), "updates": sums["updates"].tolist(), "diverged": lost.tolist()}
            # An epoch has one more position than steps: after its last step, before its evaluation.
            checkpoints.save(manager, epoch * (job.steps + 1) + step, state, meta)

        def leave(epoch: int, step: int) -> Interrupted:
            checkpoints.wait(manager)
            return Interrupted(
                f"stopped at epoch {epoch + 1}, step {step}: saved; the same command continues", stop.number
            )

        with Log(workdir, epoch * job.steps + start) as log, Trace(workdir, profile) as trace:
            started = False
            while epoch < epochs and not job.finished(state):
                pending: list[dict[str, jax.Array]] = []
                steps = job.plan(state, epoch)
                throughput = Throughput()
                bar = tqdm(
                    total=len(steps), initial=start, desc=f"epoch {epoch + 1}/{epochs}", unit="step",
                    disable=jax.process_index() > 0, mininterval=1.0, dynamic_ncols=True, leave=False,
                )  # fmt: skip
                if not started:
                    bar.set_postfix_str("compiling the first steps")
                    started = True
                with bar:  # closed on errors too, so that messages are printed below it
                    for done, (batch, utterances) in enumerate(throughput.each(job.batches(steps[start:])), start + 1):
                        throughput.done(utterances, job.cost(state, batch))
                        with trace.step():
                            state, metrics = job.update(state, batch)
                        trace.done(metrics)
                        pending.append(metrics)
                        bar.update()
                        # With several processes `requested` is a collective, too slow for every update.
                        alone = jax.process_count() == 1
                        stopping = (alone or done % SYNC_STOP_EVERY == 0 or done == len(steps)) and stop.requested()
                        due = done % checkpoint_every == 0
                        if done % log_every == 0 or done == len(steps) or due or stopping:
                            fetched = sharding.fetch(pending)
                            pending = []
                            for step, each in enumerate(fetched, done - len(fetched) + 1):
                                lost = _check(each, lost, f"epoch {epoch + 1}, step {step}", job, manager)
                                # One by one, so that the sum does not depend on where a run was interrupted.
                                sums = {
                                    name: total + np.asarray(each[name], np.float64) for name, total in sums.items()
                                }
                            window = {name: np.sum([each[name] for each in fetched], axis=0) for name in fetched[0]}
                            loss = np.sum(window["loss"]) / max(np.sum(window["updates"]), 1)
                            speed = throughput.read()
                            bar.set_postfix(loss=f"{loss:.4f}", utt_s=f"{speed['utt_s']:.0f}")
                            log.write(epoch * job.steps + done, _means(window), **speed)
                        if stopping or (due and done < len(steps)):
                            save(epoch, done)
                        if stopping:
                            raise leave(epoch, done)
                try:
                    with stop.interruptible():
                        rest = state if job.deactivate is None or not lost.any() else job.deactivate(state, lost)
                        new, metrics, score = job.evaluate(rest, epoch)
                except _StopRequested:
                    save(epoch, len(steps))
                    raise leave(epoch, len(steps)) from None
                state, train_loss = new, _means(sums)["train/loss"]
                history.append({"epoch": epoch, "train_loss": train_loss, "score": score, **metrics})
                epoch, start, sums = epoch + 1, 0, _NOTHING
                log.write(epoch * job.steps, {"valid/" + k: v for k, v in metrics.items()})
                save(epoch, 0)
                best = max(line["score"] for line in history)
                _log.info("epoch %d: score %.4f, best %.4f", epoch, score, best)
                if stop.requested():
                    raise leave(epoch - 1, len(steps))
    return state, history


SYNC_STOP_EVERY = 8  # updates between checks of several processes for a stop signal in any of them
MAX_LOSS = 1e4  # a larger loss counts as divergence
_NOTHING = {"loss": np.zeros(()), "updates": np.zeros(())}


def _means(sums: dict[str, Any]) -> dict[str, Any]:
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
