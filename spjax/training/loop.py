"""The loop that every training shares: epochs over a plan, checkpoints, resuming, signals, logs, progress.

Order of resuming: state and meta from the latest checkpoint; logs cut back to its step; the plan of its epoch from its
position on. The plan is a function of seed, epoch and what only evaluations change in the state, all random keys are of
(seed, update), so a run that was killed ends at the numbers of one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from spjax.storage import files, places
from spjax.training import checkpoints, sharding
from spjax.training.pace import Pace
from spjax.training.profile import Trace
from spjax.training.speed import Cost

State = Any  # a tree of arrays

_log = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """The loss is no longer a number, or has exploded; of a bank, that of every member."""


class Interrupted(SystemExit):
    """SIGTERM or Ctrl-C: the state is saved. `number`: the signal's."""

    def __init__(self, told: str, number: int) -> None:
        super().__init__(told)
        self.number = number


@dataclasses.dataclass(frozen=True)
class Job:
    """What differs between pretraining and prompt tuning.

    Attributes:
      state: first state, placed on devices.
      steps: the most steps that an epoch has.
      plan: (state, epoch) -> the steps of the epoch. Updates change nothing that it looks at.
      batches: steps -> iterator of (batch, utterances in it).
      update: (state, batch) -> (state, metrics); compiled by the caller. Metrics are "loss", "updates" (how many it
        made) and others, each one number, or one for every learner; 0 for learners that made no update.
      evaluate: (state, epoch) -> (state, metrics, score); at the end of an epoch, higher scores are better.
      finished: state -> bool; stop before the last epoch.
      without: (state, who of the learners diverged so far) -> the state in which they take no further part; called at
        the end of an epoch, before it is evaluated. `update` must leave theirs as it was. None: one ends the run.
      names: what messages call the learners.
      cost: (state, batch) -> what the update takes (`speed.cost_of`).
    """

    state: State
    steps: int
    plan: Callable[[State, int], Sequence[Any]]
    batches: Callable[[Sequence[Any]], Iterable[tuple[Any, int]]]
    update: Callable[[State, Any], tuple[State, dict[str, jax.Array]]]
    evaluate: Callable[[State, int], tuple[State, dict[str, Any], float]]
    finished: Callable[[State], bool]
    without: Callable[[State, np.ndarray], State] | None = None
    names: Sequence[str] = ()
    cost: Callable[[State, Any], Cost] = lambda state, batch: Cost(0.0, 0)


def diverged(metrics: Mapping[str, Any]) -> Any:
    """Whether each learner's metrics are no numbers any more, or its loss has exploded: bool, [N] where they are."""
    loss, *others = metrics["loss"], *(value for name, value in metrics.items() if name not in ("loss", "updates"))
    found = ~(abs(loss) <= EXPLODED)
    for value in others:
        found = found | ~(abs(value) < np.inf)
    return found


def fit(
    job: Job, workdir: str, *, epochs: int, log_every: int = 50, checkpoint_every: int = 500, profile: int = 0
) -> tuple[State, list[dict[str, Any]]]:
    """Train until the last epoch or until the job is finished.

    Args:
      job: what to train.
      workdir: where checkpoints and logs go; a run found there is continued.
      epochs: most epochs.
      log_every: updates between log lines.
      checkpoint_every: updates between checkpoints; one is written after every epoch too.
      profile: updates of which a profiler trace is written to WORKDIR/profile.

    Returns:
      The last state, and of every epoch its mean training loss (None for a learner that rested), its score and its
      metrics.

    Raises:
      DivergedError: with the step, the value and the way out; the last good checkpoint is kept. Of learners that can
        do `without` each other, once all have diverged.
      Interrupted: after SIGTERM or SIGINT, once the state is saved.
      ValueError: the checkpoints found are another run's.
      OSError: a checkpoint or a log cannot be written; the last complete checkpoint is kept.
    """
    # Leaving the block by any way waits for a checkpoint that is being written.
    with checkpoints.opened(workdir) as manager, Stop() as stop:
        state, epoch, start, history, sums, lost = job.state, 0, 0, [], _NOTHING, np.zeros((), bool)
        found = checkpoints.restore(manager, state)
        if found is not None:
            state, meta = found
            epoch, start, history = meta["epoch"], meta["step"], meta["history"]
            # Pretraining of earlier releases kept no count: every step was an update.
            sums = {"loss": np.asarray(meta["loss_sum"]), "updates": np.asarray(meta.get("updates", start))}
            lost = np.asarray(meta.get("diverged", False))
            if epoch == epochs:
                _log.info("all %d epochs are done", epochs)
            else:
                _log.info("continuing from epoch %d, step %d", epoch + 1, start)

        def save(epoch: int, step: int) -> None:
            log.keep()  # no checkpoint knows of updates that the log may lose
            # A copy: it is written in the background, while the next epoch adds its line.
            meta = {"epoch": epoch, "step": step, "history": list(history)}
            meta |= {"loss_sum": sums["loss"].tolist(), "updates": sums["updates"].tolist(), "diverged": lost.tolist()}
            # An epoch has one position more than steps: behind its last step, before its evaluation.
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
                pace = Pace()
                bar = tqdm(
                    total=len(steps), initial=start, desc=f"epoch {epoch + 1}/{epochs}", unit="step",
                    disable=jax.process_index() > 0, mininterval=1.0, dynamic_ncols=True,
                )  # fmt: skip
                if not started:
                    bar.set_postfix_str("compiling the first steps")
                    started = True
                with bar:  # closed by whatever ends the epoch: what is printed then stands below it
                    for done, (batch, utterances) in enumerate(pace.each(job.batches(steps[start:])), start + 1):
                        pace.done(utterances, job.cost(state, batch))
                        with trace.step():
                            state, metrics = job.update(state, batch)
                        trace.done(metrics)
                        pending.append(metrics)
                        bar.update()
                        # Several processes wait for each other to ask, which must not hold up every update.
                        alone = jax.process_count() == 1
                        asked = (alone or done % ASK_EVERY == 0 or done == len(steps)) and stop.asked()
                        due = done % checkpoint_every == 0
                        if done % log_every == 0 or done == len(steps) or due or asked:
                            fetched = sharding.fetch(pending)
                            pending = []
                            for step, each in enumerate(fetched, done - len(fetched) + 1):
                                lost = _check(each, lost, f"epoch {epoch + 1}, step {step}", job, manager)
                                # One by one: the sum is the same wherever a run was cut.
                                sums = {
                                    name: total + np.asarray(each[name], np.float64) for name, total in sums.items()
                                }
                            window = {name: np.sum([each[name] for each in fetched], axis=0) for name in fetched[0]}
                            loss = np.sum(window["loss"]) / max(np.sum(window["updates"]), 1)
                            told = pace.read()
                            bar.set_postfix(loss=f"{loss:.4f}", utt_s=f"{told['utt_s']:.0f}")
                            log.write(epoch * job.steps + done, _means(window), **told)
                        if asked or (due and done < len(steps)):
                            save(epoch, done)
                        if asked:
                            raise leave(epoch, done)
                try:
                    with stop.at_once():
                        rest = state if job.without is None or not lost.any() else job.without(state, lost)
                        new, metrics, score = job.evaluate(rest, epoch)
                except _Asked:
                    save(epoch, len(steps))
                    raise leave(epoch, len(steps)) from None
                state, train_loss = new, _means(sums)["train/loss"]
                history.append({"epoch": epoch, "train_loss": train_loss, "score": score, **metrics})
                epoch, start, sums = epoch + 1, 0, _NOTHING
                log.write(epoch * job.steps, {"valid/" + k: v for k, v in metrics.items()})
                save(epoch, 0)
                best = max(line["score"] for line in history)
                _log.info("epoch %d: score %.4f, best %.4f", epoch, score, best)
                if stop.asked():
                    raise leave(epoch - 1, len(steps))
    return state, history


ASK_EVERY = 8  # updates after which several processes ask each other whether to stop
EXPLODED = 1e4  # a loss beyond this counts as divergence
_NOTHING = {"loss": np.zeros(()), "updates": np.zeros(())}


def _means(sums: dict[str, Any]) -> dict[str, Any]:
    """Sums over steps as means over the updates: a number, or one for every learner, None where it made no update."""
    made = sums["updates"]
    means = {name: np.divide(total, np.maximum(made, 1)) for name, total in sums.items() if name != "updates"}
    return {f"train/{name}": np.asarray(np.where(made > 0, mean, None)).tolist() for name, mean in means.items()}


def _check(
    values: dict[str, np.ndarray], lost: np.ndarray, where: str, job: Job, manager: ocp.CheckpointManager
) -> np.ndarray:
    """`lost` and who diverged in this step; of them, the values become 0."""
    bad = np.asarray(diverged(values))
    if not bad.any():
        return lost
    told = lambda n: ", ".join(  # noqa: E731
        f"{name} is {np.asarray(value)[n].tolist()}" for name, value in values.items() if name != "updates"
    )
    after = lost | bad
    if job.without is None or after.all():
        kept = manager.latest_step()
        good = (
            f"{manager.directory}/{kept} is kept, the last good one"
            if kept is not None
            else "No checkpoint was written yet"
        )
        raise DivergedError(
            f"training diverged at {where}: {told(...)}. {good}. Lower the learning rate or raise the warm-up, and use "
            "another --workdir"
        )
    for n in np.flatnonzero(after & ~lost).tolist():
        _log.warning("%s diverged at %s (%s): its best epoch is kept, the others go on", job.names[n], where, told(n))
    values |= {name: np.where(bad, 0, value) for name, value in values.items()}
    return after


class _Asked(Exception):  # noqa: N818 - no error
    """SIGTERM or SIGINT arrived where it may interrupt at once."""


class Stop:
    """While entered, SIGTERM and SIGINT ask for an end instead of making one; a second SIGINT interrupts at once."""

    def __enter__(self) -> Stop:
        self._asked = self._at_once = False
        self.number: int = signal.SIGTERM
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._asked and jax.process_index() == 0:
            print("\nstopping: the state is saved once the step at hand is done", file=sys.stderr, flush=True)
        self._asked, self.number = True, number
        if self._at_once:
            self._at_once = False  # once only: a second signal must not break what handles the first
            raise _Asked

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that changes nothing, which a signal may leave; not with several hosts, who leave together."""
        self._at_once = jax.process_count() == 1
        try:
            if self._at_once and self._asked:
                raise _Asked
            yield
        finally:
            self._at_once = False

    def asked(self) -> bool:
        """Whether this host, or with several hosts any host, was asked: all of them leave at the same step."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.asarray(self._asked)).any())


class Log:
    """`log.jsonl` and TensorBoard events, written by the first host; lines behind the resumed step are cut.

    An object of a bucket cannot be added to. So for a workdir there both grow in a folder of this machine, are copied
    now and then, which takes a twentieth of the time at most, and at the end.
    """

    def __init__(self, workdir: str, step: int) -> None:
        self._file: Any = None
        self._writer: Any = None
        if jax.process_index() > 0:
            return
        self._workdir = places.at(workdir)
        self._folder = tempfile.TemporaryDirectory(prefix="spjax-log-") if places.is_remote(workdir) else None
        self._here = Path(self._folder.name) if self._folder else self._workdir
        self._next = time.monotonic() + KEPT_EVERY
        kept = [line for line in _lines(self._workdir / "log.jsonl") if line["step"] <= step]
        path = self._here / "log.jsonl"
        files.write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a")
        from tensorboardX import SummaryWriter  # tensorboard's own writer imports TensorFlow

        # Events behind the resumed step are of a killed run, which went further than its last checkpoint.
        purge = {"purge_step": step + 1} if step else {}
        self._writer = SummaryWriter(os.fspath(self._here / "tensorboard"), **purge)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, _: object, leaving: BaseException | None, __: object) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
            self._writer.close()
            self.keep()
        except OSError as error:
            if leaving is None:
                raise
            _log.warning("the last lines of the log did not get to %s: %s", self._workdir, error)  # what ends it counts
        finally:
            if self._folder:
                self._folder.cleanup()

    def write(self, step: int, values: dict[str, Any], **extra: float) -> None:
        """Log numbers, or a list of numbers per member, at a step."""
        if self._file is None:
            return
        line = {"step": step, "time": time.time(), **values, **extra}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in {**values, **extra}.items():
            for n, number in enumerate(np.atleast_1d(value).tolist()):
                tag = f"{name}/{n}" if isinstance(value, list) else name
                if isinstance(number, int | float):
                    self._writer.add_scalar(tag, number, step)
        if time.monotonic() >= self._next:
            self.keep()

    def keep(self) -> None:
        """Copy what was logged so far to a workdir in a bucket.

        Raises:
          OSError: the bucket cannot be written to.
        """
        if self._file is None or not self._folder:
            return
        start = time.monotonic()
        if not self._file.closed:
            self._writer.flush()
        with places.translate_bucket_errors():
            for path in self._here.rglob("*"):
                if path.is_file():
                    places.copy(path, self._workdir / path.relative_to(self._here).as_posix())
        now = time.monotonic()
        self._next = now + max(KEPT_EVERY, 20 * (now - start))


KEPT_EVERY = 60.0  # seconds after which a log in a bucket is copied there again, at the soonest


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            return  # the half line of a killed run
