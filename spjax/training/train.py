"""Prompt tuning: train a bank of prompts on one frozen LM; each member gets the result of training it alone.

A member has its own seed, data order, gradient clipping, optimizer state, schedule and early stopping. Steps of
different tasks are interleaved: a step computes the members of one task, or of a sweep's task runs with the same
utterances. No program depends on which of them have stopped.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from spjax.data import loader
from spjax.data import plan as planning
from spjax.data.bank_plan import BankPlan
from spjax.data.plan import Step
from spjax.data.unit_set import UnitSet, join
from spjax.evaluation.markdown import shown
from spjax.models import decode, prompts
from spjax.training import loop, losses, masks, optim, sharding, speed
from spjax.training.evaluator import Evaluator
from spjax.training.selection import keep_best
from spjax.training.setting import Setting
from spjax.training.update import make_update
from spjax.types import Batch, Json, Params, State

Metric = Callable[[np.ndarray, decode.LabelTree, np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A prompt tuning run.

    Attributes:
      seeds: one member of the bank for each seed and task. The seed sets initialisation, data order and dropout.
      epochs: maximum number of epochs; each ends with an evaluation on valid.
      passes: passes over train in an epoch; more than one for small train sets (few-shot).
      sampling: exponent that balances tasks of different size in a bank. A task with n batches per epoch, beside the
        largest with m, gets m^(1 - sampling) n^sampling updates per epoch: 1: n, as if trained alone; 0: m.
      patience: epochs without a better score after which a member stops; 0: no early stopping.
      select: criterion of the best epoch on valid: "metric" (the task's metric; ties are broken by the mean log
        probability of the true labels), "loss" (the training loss), or "last" (keep the last epoch).
      round_loss: decimals to which the valid loss is rounded before comparison; -1: no rounding.
      trainable: regex over parameter paths; `.*` fine-tunes the LM.
      max_rows: maximum utterances of a member in a batch; batches have a multiple of gcd(8, max_rows) rows.
      max_tokens: maximum source columns of a member in a batch.
      buckets: maximum number of padded lengths of a task. Each combination of length, rows and number of members is
        compiled once; tasks share programs.
      multiple: padded lengths are multiples of this; larger values let tasks share more programs.
      checkpoint_every: updates between checkpoints.
      eval_rows: utterances of an evaluation batch, rounded up to a multiple of the devices if these are more.
      profile: number of updates in the profiler trace (docs/profiling.md); 0: no trace.
    """

    seeds: tuple[int, ...] = (0,)
    epochs: int = 10
    passes: int = 1
    sampling: float = 1.0
    patience: int = 0
    select: str = "metric"
    round_loss: int = -1
    trainable: str = "prompt/.*"
    max_rows: int = 32
    max_tokens: int = 4096
    buckets: int = 4
    multiple: int = 8
    checkpoint_every: int = 250
    eval_rows: int = 64
    profile: int = 0

    def __post_init__(self) -> None:
        if self.select not in ("metric", "loss", "last"):
            raise ValueError(f"train: select is {self.select!r}, must be metric, loss or last")
        proper = all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in self.seeds)
        if not proper or not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"train: seeds {self.seeds!r} must be one or more different integers in 0..2^32-1")
        if not 0 <= self.sampling <= 1:
            raise ValueError(f"train: sampling is {self.sampling}, must be in [0, 1]")
        if self.select == "last" and self.patience:
            raise ValueError(
                f"train: patience is {self.patience}, but select='last' has no best epoch: give "
                "--config.train.select=metric, --config.train.select=loss or --config.train.patience=0"
            )
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise ValueError(f"train: trainable {self.trainable!r} is not a regular expression ({error})") from error
        sizes = ("epochs", "passes", "max_rows", "max_tokens", "buckets", "multiple", "checkpoint_every", "eval_rows")
        for name, least in {**dict.fromkeys(sizes, 1), "patience": 0, "profile": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"train: {name} is {getattr(self, name)}, must be at least {least}")


@dataclasses.dataclass(frozen=True, eq=False)
class TaskRun:
    """One task with one setting; its members are one for each seed. A sweep has several task runs for a task.

    Attributes:
      setting: task runs of one bank may differ in verbalizer, tree, initialisation, prompt length, rank, alpha and
        rates (`losses.RATES`) only.
      train_set: units and labels of the train split.
      train_ids: int [m], utterances of it to use.
      valid_set: split for early stopping and selection.
      valid_ids: int [m], utterances of it to use.
      metric: (log probabilities [n, M], tree, classes [n, slots]) -> score.
      lower_is_better: whether lower scores of `metric` are better.
      optimizer: may differ from the bank's optimizer in `lr` and `weight_decay` only; None: the bank's.
      tried: values of the sweep for this task run, by field name.
    """

    setting: Setting
    train_set: UnitSet
    train_ids: np.ndarray
    valid_set: UnitSet
    valid_ids: np.ndarray
    metric: Metric
    lower_is_better: bool = False
    optimizer: optim.OptimConfig | None = None
    tried: Json = dataclasses.field(default_factory=dict)

    def described(self, optimizer: optim.OptimConfig) -> Json:
        """Hyperparameters by name, for messages and reports. `optimizer`: the bank's."""
        rest = {name: value for name, value in self.tried.items() if name not in ("length", "rank", "lr")}
        return {**self.setting.prompt.sizes, "learning rate": (self.optimizer or optimizer).lr, **rest}


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """Result of `train`.

    Attributes:
      params: {"lm", "prompt"}; for every member the parameters of its best epoch.
      history: metrics of every epoch; None for members that had stopped or diverged.
      best_epoch: best epoch of every member, from 0. -1 for a member without one, which diverged in the first epoch or
        had a NaN metric; it keeps its initial prompt.
      best_score: selection score of that epoch; -inf without one.
    """

    params: Params
    history: list[Json]
    best_epoch: list[int]
    best_score: list[float]


def train(
    params: Params,
    task_runs: Sequence[TaskRun],
    run: TrainConfig,
    optimizer: optim.OptimConfig,
    *,
    workdir: str,
    model_parallel: int = 1,
    weight_shards: int = 1,
) -> Trained:
    """Train a bank of prompts, one member for each task run and seed; resume a run found in `workdir`.

    Args:
      params: initial {"lm", "prompt"} (`first_params`, joined in the order of `task_runs`).
      task_runs: tasks and their settings.
      run: length, batching and selection.
      optimizer: Adam settings.
      workdir: directory of checkpoints and logs.
      model_parallel, weight_shards: see `sharding.make_mesh`.

    Raises:
      ValueError: `run.trainable` trains the LM, which several members would share.
      DivergedError, Interrupted, OSError: as `loop.fit`.
    """
    setting, members = task_runs[0].setting, [one for one in task_runs for _ in run.seeds]
    mesh = sharding.make_mesh(model_parallel, weight_shards)
    trained, frozen = masks.split(masks.flatten(params), run.trainable)
    train_set, bank = _bank_plan(task_runs, run, sharding.batch_shards(mesh))
    tx = masks.masked(_optimizer(members, run, optimizer, bank.updates, trained), trained, frozen)
    seeds = np.tile(np.asarray(run.seeds, np.uint32), len(task_runs))
    state = _initial_state(trained, tx.init({**trained, **frozen}), seeds)
    where = sharding.state_shardings(mesh, state)
    state = sharding.place(state, where)
    frozen = sharding.place_frozen(mesh, frozen, setting.compute.operand)

    verbalizers = [one.setting.verbalizer for one in members] if len(task_runs) > 1 else []
    update = make_update(setting, tx, verbalizers, _differing(members), mesh)
    step_fn = jax.jit(update, donate_argnums=0, out_shardings=(where, None))
    cost = speed.cost_of(step_fn, setting.compute.operand)

    def batches(steps: Sequence[Step]) -> Iterator[tuple[tuple[Batch, jax.Array | None], int]]:
        shards, runs = sharding.local_shards(mesh)
        ready = loader.prefetch(loader.batches(train_set, steps, shards, runs))
        for step, batch in zip(steps, ready, strict=True):
            who = None if step.members is None else sharding.place(step.members, where["step"])
            yield (sharding.shard_rows(mesh, batch), who), int(batch.weight.sum()) * runs // len(shards)

    evaluators = [evaluator_for(one, run, one.valid_set, one.valid_ids, mesh) for one in task_runs]

    def evaluate(state: State, epoch: int) -> tuple[State, dict[str, list[float | None]], float]:
        active, best_score = sharding.fetch((state["active"], state["best_score"]))
        score, found = _scores({**state["trained"], **frozen}, task_runs, evaluators, run, epoch, active)
        shared = np.where(active, score[:, 0], best_score[:, 0])
        known = shared[np.isfinite(shared)]
        mean = float(known.mean()) if len(known) else -math.inf
        return keep_best(state, epoch, score, run.patience, where), found, mean

    def deactivate(state: State, lost: np.ndarray) -> State:
        return {**state, "active": sharding.place(sharding.fetch(state["active"]) & ~lost, where["active"])}

    job = loop.Job(
        state=state,
        steps=bank.most,
        plan=lambda state, epoch: bank.epoch(epoch, sharding.fetch(state["active"])),
        batches=batches,
        update=lambda state, item: step_fn(state, frozen, *item),
        evaluate=evaluate,
        finished=lambda state: not bool(sharding.fetch(state["active"]).any()),
        deactivate=deactivate,
        names=_names(members, seeds.tolist(), optimizer),
        cost=lambda state, item: cost(state, frozen, *item),
    )
    state, history = loop.fit(
        job, workdir, epochs=run.epochs, checkpoint_every=run.checkpoint_every, profile=run.profile
    )
    kept = masks.unflatten({**masks.flatten(params), **sharding.fetch(state["best"])})
    best_epoch, best_score = sharding.fetch((state["best_epoch"], state["best_score"]))
    return Trained(kept, history, best_epoch.tolist(), best_score[:, 0].tolist())


def _bank_plan(task_runs: Sequence[TaskRun], run: TrainConfig, shards: int) -> tuple[UnitSet, BankPlan]:
    """Join the train sets, which task runs may share, and plan their batches."""
    sets = list({id(one.train_set): one.train_set for one in task_runs}.values())
    starts = np.cumsum([0, *map(len, sets)])
    first = {id(one): start for one, start in zip(sets, starts, strict=False)}
    train_set, ids = join(sets), [one.train_ids + first[id(one.train_set)] for one in task_runs]
    return train_set, BankPlan(
        train_set.lengths, ids, run.seeds, run.buckets, run.max_rows, run.max_tokens, run.multiple, run.passes,
        run.sampling, shards,
    )  # fmt: skip


def _optimizer(
    members: Sequence[TaskRun], run: TrainConfig, optimizer: optim.OptimConfig, updates: list[int], trained: masks.Flat
) -> optax.GradientTransformation:
    """Make the optimizer of the bank. `members`: task run of each; `updates`: of each task run in an epoch."""
    own, totals = [one.optimizer or optimizer for one in members], [run.epochs * number for number in updates]
    if not any(path.startswith("lm/") for path in trained):
        totals = np.repeat(totals, len(run.seeds)).tolist()
        return optim.make_bank(optimizer, totals, [one.lr for one in own], [one.weight_decay for one in own])
    if len(members) > 1:
        raise ValueError(
            f"trainable={run.trainable!r} trains the LM, which {len(members)} members share: give one task and one seed"
        )
    return optim.make(own[0], totals[0])


def _initial_state(trained: masks.Flat, optimizer: optax.OptState, seeds: np.ndarray) -> State:
    members = len(seeds)
    return {
        "trained": trained,
        "optimizer": optimizer,
        "step": jnp.zeros(members, jnp.int32),
        "seeds": jnp.asarray(seeds),
        "active": jnp.ones(members, bool),
        "best": jax.tree.map(jnp.copy, trained),
        "best_score": jnp.full((members, 2), -jnp.inf, jnp.float32),  # not weakly typed, which would compile twice
        "best_epoch": jnp.full(members, -1, jnp.int32),
    }


def _names(members: Sequence[TaskRun], seeds: Sequence[int], optimizer: optim.OptimConfig) -> list[str]:
    """Names of the members, for messages."""
    tried = [", ".join(f"{k} {shown(v)}" for k, v in one.described(optimizer).items()) for one in members]
    return [f"member {n} (seed {seed}, {values})" for n, (seed, values) in enumerate(zip(seeds, tried, strict=True))]


def _scores(
    flat: masks.Flat,
    task_runs: Sequence[TaskRun],
    evaluators: Sequence[Evaluator],
    run: TrainConfig,
    epoch: int,
    active: np.ndarray,
) -> tuple[np.ndarray, dict[str, list[float | None]]]:
    """Evaluate the active members on valid.

    Returns:
      Scores for `keep_best`, [N, 2]; "metric" and, if it is the criterion, "loss" of each member. -inf and None for
      members that are not active or whose value is NaN.
    """
    params, own = masks.unflatten(flat), len(run.seeds)
    score, found = np.full((len(active), 2), np.nan), {"metric": np.full(len(active), np.nan)}
    for number, (task_run, evaluator) in enumerate(zip(task_runs, evaluators, strict=True)):
        members = slice(number * own, (number + 1) * own)
        if active[members].any():
            own_flat = masks.flatten(task_run_params(params, task_runs, run, number))
            values, score[members] = _task_scores(own_flat, task_run, evaluator, run, epoch, active[members])
            for name, value in values.items():
                found.setdefault(name, np.full(len(active), np.nan))[members] = value
    metrics = {
        name: np.where(active & ~np.isnan(value), value, np.asarray(None)).tolist() for name, value in found.items()
    }
    return np.where(active[:, None] & ~np.isnan(score), score, -np.inf), metrics


def _task_scores(
    flat: masks.Flat, task_run: TaskRun, evaluator: Evaluator, run: TrainConfig, epoch: int, active: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Evaluate the members of a task run on valid: metrics [N] by name, and scores [N, 2]; NaN for inactive ones."""
    tree, classes = task_run.setting.tree, task_run.valid_set.classes[task_run.valid_ids]
    log_probs = evaluator.log_probs(flat)[:, task_run.valid_ids]
    # Inactive members may have diverged: metrics refuse NaN.
    metric = np.asarray(
        [task_run.metric(one, tree, classes) if on else np.nan for one, on in zip(log_probs, active, strict=True)]
    )
    found, tie = {"metric": metric}, np.zeros(len(metric))
    if run.select == "loss":
        found["loss"] = evaluator.loss(flat)
        score = -(np.round(found["loss"], run.round_loss) if run.round_loss >= 0 else found["loss"])
    elif run.select == "last":
        score = np.full(len(metric), float(epoch))
    else:
        score = -metric if task_run.lower_is_better else metric
        right = (tree.combinations == classes[:, None]).all(axis=2)  # [n, M]; no column for unseen combinations
        tie = log_probs[:, right].mean(axis=1) if right.any() else tie
    return found, np.stack([score, tie], axis=1)


def _differing(members: Sequence[TaskRun]) -> dict[str, list[float]]:
    """Values that differ between members, [N] each, for `losses.member_losses`."""
    parts = [
        {**vars(one.setting.loss), **vars(one.setting.prompt), "scale": one.setting.prompt.scale} for one in members
    ]
    values = {name: [part[name] for part in parts] for name in ("length", "scale", *losses.RATES)}
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def task_run_params(params: Params, task_runs: Sequence[TaskRun], run: TrainConfig, number: int) -> Params:
    """Select {"lm", "prompt"} of the members of task run `number` from a joined bank."""
    if len(task_runs) == 1:
        return params
    own, setting = len(run.seeds), task_runs[number].setting
    members = number * own, (number + 1) * own
    return {**params, "prompt": prompts.part(params["prompt"], *members, setting.verbalizer, setting.prompt)}


def evaluator_for(task_run: TaskRun, run: TrainConfig, units: UnitSet, ids: np.ndarray, mesh: Mesh) -> Evaluator:
    """Make an evaluator on utterances `ids` of a split for the members of a task run."""
    return Evaluator(task_run.setting, units, evaluation_plan(task_run, run, units, ids, mesh), mesh)


def evaluation_plan(task_run: TaskRun, run: TrainConfig, units: UnitSet, ids: np.ndarray, mesh: Mesh) -> list[Step]:
    """Plan batches of utterances `ids` of a split, in order, each once.

    Uses the buckets of the train split, plus one for longer utterances, so that splits share programs.
    """
    lengths = units.lengths
    multiple = math.lcm(math.gcd(8, run.eval_rows, run.max_rows), sharding.batch_shards(mesh))
    edges = planning.buckets(task_run.train_set.lengths[task_run.train_ids], run.buckets, run.multiple)
    longest = math.ceil(lengths[ids].max() / run.multiple) * run.multiple
    edges += (longest,) if longest > edges[-1] else ()
    return planning.plan(
        lengths, seed=0, epoch=0, buckets=edges, ids=ids, shuffle=False,
        max_rows=max(run.eval_rows, multiple), row_multiple=multiple,
        max_tokens=max(run.max_tokens, multiple * edges[-1]),
    )  # fmt: skip
