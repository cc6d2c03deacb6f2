"""Prompt tuning: train a bank of prompts on one frozen LM; each member gets the result of training it alone.

A member has its own seed, data order, gradient clipping, optimizer state, schedule and early stopping. Steps of
different tasks are interleaved: a step computes the members of one task. So a bank is a batch of members: no program
depends on which of them have stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from spjax.data import bank_plan, loader
from spjax.data import plan as planning
from spjax.data.unit_set import UnitSet, join
from spjax.evaluation.markdown import shown
from spjax.models import decode, low_rank, prompts
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.verbalizers import Verbalizer
from spjax.training import loop, losses, masks, optim, sharding, speed
from spjax.types import Batch, Params

_log = logging.getLogger(__name__)

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
        if self.profile < 0:
            raise ValueError(f"train: profile is {self.profile}, must be at least 0 (0 writes no trace)")
        if self.patience < 0:
            raise ValueError(f"train: patience is {self.patience}, must be at least 0 (0 disables early stopping)")
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise ValueError(f"train: trainable {self.trainable!r} is not a regular expression ({error})") from error
        sizes = ("epochs", "passes", "max_rows", "max_tokens", "buckets", "multiple", "checkpoint_every", "eval_rows")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} is {getattr(self, name)}, must be at least 1")


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """Model, prompt and loss settings, constant during training.

    Attributes:
      config: LM architecture.
      compute: operand dtype and rematerialisation.
      prompt: shape, initialisation and dropout of the prompts.
      loss: loss settings.
      verbalizer: maps classes to outputs.
      tree: label combinations among which decoding chooses.
    """

    config: UnitLMConfig
    compute: Compute
    prompt: prompts.PromptConfig
    loss: losses.LossConfig
    verbalizer: Verbalizer
    tree: decode.LabelTree


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
    tried: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def described(self, optimizer: optim.OptimConfig) -> dict[str, Any]:
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
    history: list[dict[str, Any]]
    best_epoch: list[int]
    best_score: list[float]


def first_params(
    lm: Params,
    setting: Setting,
    seeds: tuple[int, ...],
    start: Params | None = None,
    real: Sequence[Params] | None = None,
) -> Params:
    """Initialise {"lm", "prompt"}: a bank with one member for each seed, random or copies of `start`.

    Args:
      lm: LM weights.
      setting: prompt settings.
      seeds: one for each member.
      start: prompt tree to copy, e.g. of a pack. If it has no verbalizer (from another task) and the setting's is
        learnable, a new one is initialised.
      real: for each seed its initial prompt, for data-dependent inits (`starts.from_utterances`).
    """
    prompt = setting.prompt if start is None else dataclasses.replace(setting.prompt, init="normal")
    new = functools.partial(
        prompts.init_member,
        config=prompt, lm=setting.config, verbalizer=setting.verbalizer, embed=jnp.asarray(lm["embed"]),
    )  # fmt: skip
    members = [new(jax.random.key(seed), real=real[n] if real else None) for n, seed in enumerate(seeds)]
    if start is not None:
        new_leaves = {"verbalizer"} if setting.verbalizer.learnable else set()
        members = [
            {name: leaf for name, leaf in one.items() if name in new_leaves} | jax.tree.map(jnp.asarray, start)
            for one in members
        ]
    return {"lm": lm, "prompt": prompts.stack(members)}


def make_update(
    setting: Setting,
    tx: Any,
    verbalizers: Sequence[Verbalizer] = (),
    differing: Mapping[str, Sequence[float]] | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """Make the training step, to be jitted: (state, frozen, batch, members) -> (state, metrics).

    State: "trained" and "optimizer"; "step", int32 [N], updates of each member so far, or a scalar; "seeds", uint32
    [N]; "active", bool [N]. `members`, int32 [W], are the members of the batch's rows, in order; index N is padding.
    Only their rows of the state are computed and changed, which needs a bank axis in all leaves. None: all members.
    Metrics are [N], 0 for members that are not updated. Of several members, one that is not active or diverges is not
    changed.

    Args:
      setting: model, prompt and loss.
      tx: the optimizer.
      verbalizers: one for each member if their tasks differ; by default `setting.verbalizer` for all.
      differing: values that differ between members, see `losses.member_losses`.
      mesh: device mesh; None: one device.
    """
    verbalizers = verbalizers or [setting.verbalizer]
    as_lm_params = functools.partial(sharding.layerwise, mesh) if mesh else dict

    def update(
        state: dict[str, Any], frozen: masks.Flat, batch: Batch, members: jax.Array | None = None
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        size = len(state["seeds"])
        full = {name: state[name] for name in ("trained", "optimizer", "step", "seeds", "active")}
        rows = None if members is None else jnp.minimum(members, size - 1)
        old, frozen_rows = full, frozen
        if rows is not None:
            old = jax.tree.map(lambda leaf: leaf[rows], full)
            frozen_rows = {path: leaf[rows] if path.startswith("prompt/") else leaf for path, leaf in frozen.items()}
        batch = sharding.member_major(mesh, batch, len(old["seeds"]))
        count = jnp.broadcast_to(old["step"], old["seeds"].shape)
        keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step + 1))(old["seeds"], count)

        def loss(trained: masks.Flat) -> tuple[jax.Array, jax.Array]:
            params = masks.unflatten(as_lm_params({**trained, **frozen_rows}))
            each = losses.member_losses(
                params["lm"], params["prompt"], batch, keys,
                loss=setting.loss, prompt=setting.prompt, verbalizers=verbalizers,
                config=setting.config, compute=setting.compute, differing=differing, members=rows,
            )  # fmt: skip
            return jnp.sum(each), each

        (_, each), grads = jax.value_and_grad(loss, has_aux=True)(old["trained"])
        trained, optimizer = masks.apply_gradients(tx, old["optimizer"], old["trained"], frozen_rows, grads)
        new = {**old, "trained": trained, "optimizer": optimizer, "step": old["step"] + 1}
        metrics = {"loss": each, "gradient_norm": optim.member_norms(grads), "updates": jnp.ones(len(each))}
        if size > 1:  # a single member that diverges ends the run
            stays = ~old["active"] | loop.diverged(metrics)
            keep = lambda old, new: jnp.where(stays.reshape(-1, *[1] * (new.ndim - 1)), old, new) if new.ndim else new  # noqa: E731
            new = jax.tree.map(keep, old, new)
            metrics["updates"] = jnp.where(stays, 0.0, 1.0)
        if members is not None:
            back = lambda bank, rows: bank.at[members].set(rows, mode="drop")  # noqa: E731 - index N is padding
            new = jax.tree.map(back, full, new)
            metrics = {name: back(jnp.zeros(size), value) for name, value in metrics.items()}
        return {**state, **new}, metrics

    return update


class Evaluator:
    """Evaluate all members of a one-task bank on a split."""

    def __init__(self, setting: Setting, units: UnitSet, plan: list[planning.Step], mesh: Any) -> None:
        """`plan`: unshuffled plan over the split for one member."""
        self._setting, self._units, self._plan, self._mesh = setting, units, plan, mesh
        self._tables = decode.batch_trees([setting.tree], multiple=16)

    def _batches(self, what: str, members: int) -> Iterator[tuple[Batch, Batch]]:
        """Yield batches with `prompt_id`, and the same batches after `sharding.member_major`."""
        steps = [step._replace(ids=np.repeat(step.ids, members, axis=0)) for step in self._plan]
        ready = loader.prefetch(loader.batches(self._units, steps, *sharding.local_shards(self._mesh)))
        quiet = jax.process_index() > 0
        for batch in tqdm(ready, desc=what, total=len(steps), leave=False, disable=quiet, delay=2, unit="batch"):
            rows = sharding.shard_rows(self._mesh, batch)
            yield rows, sharding.member_major(self._mesh, rows, members)

    def log_probs(self, flat: masks.Flat) -> np.ndarray:
        """Log probability of every label combination of the tree, float32 [N, n, M], in the split's order.

        Args:
          flat: parameters of a bank of N members.
        """
        flat, members = sharding.layerwise(self._mesh, flat), len(flat["prompt/sep"])
        setting, most = self._setting, len(self._setting.tree.combinations)
        if "prompt/verbalizer" in flat:
            matrix = flat["prompt/verbalizer"]
            more = self._tables.allowed.shape[2] - matrix.shape[1]
            flat = {**flat, "prompt/verbalizer": jnp.pad(matrix, ((0, 0), (0, more), (0, 0)))}
        found = np.full((members, len(self._units), most), np.nan, np.float32)
        for rows, batch in self._batches("decoding", members):
            answers = _answer(flat, setting.prompt.scale, self._tables, batch, setting.config, setting.compute)
            scores, index, member = sharding.fetch((answers, rows.index, rows.prompt_id))
            real = index >= 0
            found[member[real], index[real]] = scores[real, :most]
        return found

    def loss(self, flat: masks.Flat) -> np.ndarray:
        """Training loss on the split, [N]. Arguments: see `log_probs`."""
        flat, members = sharding.layerwise(self._mesh, flat), len(flat["prompt/sep"])
        own = self._setting
        same = own.prompt.scale, own.loss.kind, own.verbalizer, own.config, own.compute
        parts = [sharding.fetch(_measure(flat, batch, *same)) for _, batch in self._batches("loss", members)]
        total, count = np.stack(parts).sum(axis=0, dtype=np.float64)
        return total / np.maximum(count, 1)


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _answer(
    flat: masks.Flat, scale: float, tables: decode.BatchedTrees, batch: Batch, config: UnitLMConfig, compute: Compute
) -> jax.Array:
    """Score every label combination; the program depends on the sizes of a task only, not on its labels."""
    params = masks.unflatten(flat)
    bank = low_rank.scaled(params["prompt"], scale)
    return decode.score(params["lm"], bank, batch, tables, config=config, compute=compute)


@functools.partial(jax.jit, static_argnames=("kind", "verbalizer", "config", "compute"))
def _measure(
    flat: masks.Flat,
    batch: Batch,
    scale: float,
    kind: str,
    verbalizer: Verbalizer,
    config: UnitLMConfig,
    compute: Compute,
) -> jax.Array:
    """Summed loss and count of every member, [2, N]; one program for all settings of a sweep."""
    params = masks.unflatten(flat)
    each = losses.member_losses(
        params["lm"], params["prompt"], batch, None,
        loss=losses.LossConfig(kind=kind), prompt=prompts.PromptConfig(), verbalizers=[verbalizer],
        config=config, compute=compute, differing={"scale": [scale]},
    )  # fmt: skip
    size = (batch.source_length + verbalizer.steps + 2 if kind == "reference" else 1) * batch.weight
    count = size.reshape(len(each), -1).sum(axis=1)
    return jnp.stack([each * count, count])


def exact_match(log_probs: np.ndarray, tree: decode.LabelTree, classes: np.ndarray) -> float:
    """Fraction of utterances with all slots correct: log probabilities [n, M] of the tree, classes [n, slots]."""
    return float((tree.combinations[log_probs.argmax(axis=1)] == classes).all(axis=1).mean())


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
    setting, seeds = task_runs[0].setting, np.asarray(run.seeds, np.uint32)
    own, members = len(seeds), len(seeds) * len(task_runs)
    mesh = sharding.make_mesh(model_parallel, weight_shards)
    trained, frozen = masks.split(masks.flatten(params), run.trainable)
    trains_lm = any(path.startswith("lm/") for path in trained)
    if members > 1 and trains_lm:
        raise ValueError(
            f"trainable={run.trainable!r} trains the LM, which {members} members share: give one task and one seed"
        )
    sets = list({id(one.train_set): one.train_set for one in task_runs}.values())  # task runs may share a set
    train_set = join(sets)
    starts = np.cumsum([0, *map(len, sets)])
    first = {id(one): start for one, start in zip(sets, starts, strict=False)}
    ids = [task_run.train_ids + first[id(task_run.train_set)] for task_run in task_runs]
    bank = bank_plan.BankPlan(
        train_set.lengths, ids, run.seeds, run.buckets, run.max_rows, run.max_tokens, run.multiple, run.passes,
        run.sampling, sharding.batch_shards(mesh),
    )  # fmt: skip
    programs: set[tuple[int, ...]] = set()

    def plan(state: dict[str, Any], epoch: int) -> list[planning.Step]:
        steps = bank.epoch(epoch, sharding.fetch(state["active"]))
        new = {(step.bucket, *step.ids.shape) for step in steps} - programs
        programs.update(new)
        if new:
            shapes = ", ".join(f"{n} × {rows} × {bucket}" for bucket, n, rows in sorted(new))
            _log.info("epoch %d: compiling programs for members × utterances × columns %s", epoch + 1, shapes)
        return steps

    optimizers = [task_run.optimizer or optimizer for task_run in task_runs]
    totals = [run.epochs * number for number in bank.updates]
    if trains_lm:
        tx = optim.make(optimizers[0], totals[0])
    else:
        parts = totals, [one.lr for one in optimizers], [one.weight_decay for one in optimizers]
        tx = optim.make_bank(optimizer, *(np.repeat(part, own).tolist() for part in parts))
    tx = masks.masked(tx, trained, frozen)
    state = {
        "trained": trained,
        "optimizer": tx.init({**trained, **frozen}),
        "step": jnp.zeros(members, jnp.int32),
        "seeds": jnp.tile(seeds, len(task_runs)),
        "active": jnp.ones(members, bool),
        "best": jax.tree.map(jnp.copy, trained),
        "best_score": jnp.full((members, 2), -jnp.inf, jnp.float32),  # not weakly typed, which would compile twice
        "best_epoch": jnp.full(members, -1, jnp.int32),
    }
    where = sharding.state_shardings(mesh, state)
    state = sharding.place(state, where)
    frozen = sharding.place_frozen(mesh, frozen, setting.compute.operand)
    verbalizers = [task_run.setting.verbalizer for task_run in task_runs for _ in seeds] if len(task_runs) > 1 else []
    update = make_update(setting, tx, verbalizers, _differing(task_runs, own), mesh)
    step_fn = jax.jit(update, donate_argnums=0, out_shardings=(where, None))
    cost = speed.cost_of(step_fn, setting.compute.operand)

    def batches(steps: Sequence[planning.Step]) -> Iterator[tuple[tuple[Batch, jax.Array | None], int]]:
        own, runs = sharding.local_shards(mesh)
        ready = loader.prefetch(loader.batches(train_set, steps, own, runs))
        for step, batch in zip(steps, ready, strict=True):
            who = None if step.members is None else sharding.place(step.members, where["step"])
            yield (sharding.shard_rows(mesh, batch), who), int(batch.weight.sum()) * runs // len(own)

    evaluators = [evaluator_for(task_run, run, task_run.valid_set, task_run.valid_ids, mesh) for task_run in task_runs]

    def scores(flat: masks.Flat, task_run: TaskRun, evaluator: Evaluator, epoch: int) -> dict[str, np.ndarray]:
        """Evaluate a task run's members: "metric", "loss" if it is the criterion, and "score" [N, 2], where higher is
        better and column 1 breaks ties of column 0."""
        tree, classes = task_run.setting.tree, task_run.valid_set.classes[task_run.valid_ids]
        log_probs = evaluator.log_probs(flat)[:, task_run.valid_ids]
        metric = np.asarray([task_run.metric(one, tree, classes) for one in log_probs])
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
        return {**found, "score": np.stack([score, tie], axis=1)}

    def evaluate(state: dict[str, Any], epoch: int) -> tuple[dict[str, Any], dict[str, Any], float]:
        active, best_score = sharding.fetch((state["active"], state["best_score"]))
        whole = masks.unflatten({**state["trained"], **frozen})
        score, found = np.full((members, 2), -np.inf), {"metric": np.full(members, None)}
        for number, (task_run, evaluator) in enumerate(zip(task_runs, evaluators, strict=True)):
            who = np.flatnonzero(active[number * own : (number + 1) * own])
            if len(who):
                flat = masks.flatten(task_run_params(whole, task_runs, run, number))
                new = scores(flat, task_run, evaluator, epoch)
                score[number * own + who] = new.pop("score")[who]
                for name, values in new.items():
                    found.setdefault(name, np.full(members, None))[number * own + who] = values[who]
        score = np.where(np.isnan(score), -np.inf, score)
        metrics = {name: [None if one != one else one for one in value.tolist()] for name, value in found.items()}
        shared = np.where(active, score[:, 0], best_score[:, 0])
        known = shared[np.isfinite(shared)]
        mean = float(known.mean()) if len(known) else -math.inf
        return _keep_best(state, epoch, score, run.patience, where), metrics, mean

    def deactivate(state: dict[str, Any], lost: np.ndarray) -> dict[str, Any]:
        return {**state, "active": sharding.place(sharding.fetch(state["active"]) & ~lost, where["active"])}

    def name(n: int) -> str:
        described = task_runs[n // own].described(optimizer).items()
        return f"member {n} (seed {seeds[n % own]}, {', '.join(f'{what} {shown(value)}' for what, value in described)})"

    job = loop.Job(
        state=state,
        steps=bank.most,
        plan=plan,
        batches=batches,
        update=lambda state, item: step_fn(state, frozen, *item),
        evaluate=evaluate,
        finished=lambda state: not bool(sharding.fetch(state["active"]).any()),
        deactivate=deactivate,
        names=[name(n) for n in range(members)],
        cost=lambda state, item: cost(state, frozen, *item),
    )
    state, history = loop.fit(
        job, workdir, epochs=run.epochs, checkpoint_every=run.checkpoint_every, profile=run.profile
    )
    kept = masks.unflatten({**masks.flatten(params), **sharding.fetch(state["best"])})
    best_epoch, best_score = sharding.fetch((state["best_epoch"], state["best_score"]))
    return Trained(kept, history, best_epoch.tolist(), best_score[:, 0].tolist())


def _differing(task_runs: Sequence[TaskRun], seeds: int) -> dict[str, list[Any]]:
    """Values that differ between task runs, [N] each, for `losses.member_losses`."""

    def values(name: str) -> list[Any]:
        settings = [task_run.setting for task_run in task_runs for _ in range(seeds)]
        return [getattr(one.prompt if hasattr(one.prompt, name) else one.loss, name) for one in settings]

    values_of = {name: values(name) for name in ("length", "scale", *losses.RATES)}
    return {name: found for name, found in values_of.items() if len(set(found)) > 1}


def task_run_params(params: Params, task_runs: Sequence[TaskRun], run: TrainConfig, number: int) -> Params:
    """Select {"lm", "prompt"} of the members of task run `number` from a joined bank."""
    if len(task_runs) == 1:
        return params
    own, setting = len(run.seeds), task_runs[number].setting
    members = number * own, (number + 1) * own
    return {**params, "prompt": prompts.part(params["prompt"], *members, setting.verbalizer, setting.prompt)}


def _keep_best(state: dict[str, Any], epoch: int, score: np.ndarray, patience: int, where: Any) -> dict[str, Any]:
    """Update the best parameters by scores [N, 2], and deactivate members without progress for `patience` epochs."""
    small = sharding.fetch({name: state[name] for name in ("active", "best_score", "best_epoch")})
    (new, tie), (best, best_tie) = score.astype(np.float32).T, small["best_score"].T
    better = small["active"] & ((new > best) | (np.isfinite(new) & (new == best) & (tie > best_tie)))
    best_epoch = np.where(better, epoch, small["best_epoch"]).astype(np.int32)
    active = small["active"] & ((epoch - best_epoch < patience) if patience else True)
    for n in np.flatnonzero(small["active"] & ~active):
        _log.info(
            "member %d stops: %s", n, f"best epoch {best_epoch[n] + 1}" if best_epoch[n] >= 0 else "no epoch kept"
        )

    def pick(path: str) -> jax.Array:
        trained, kept = state["trained"][path], state["best"][path]
        chosen = better.reshape(-1, *[1] * (trained.ndim - 1)) if path.startswith("prompt/") else better[0]
        return jnp.where(chosen, trained, kept)

    changed = {
        "best": {path: pick(path) for path in state["best"]},
        "active": active,
        "best_score": np.where(better[:, None], score, small["best_score"]).astype(np.float32),
        "best_epoch": best_epoch,
    }
    return {**state, **sharding.place(changed, {name: where[name] for name in changed})}


def evaluator_for(task_run: TaskRun, run: TrainConfig, units: UnitSet, ids: np.ndarray, mesh: Any) -> Evaluator:
    """Make an evaluator on utterances `ids` of a split for the members of a task run."""
    return Evaluator(task_run.setting, units, evaluation_plan(task_run, run, units, ids, mesh), mesh)


def evaluation_plan(
    task_run: TaskRun, run: TrainConfig, units: UnitSet, ids: np.ndarray, mesh: Any
) -> list[planning.Step]:
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
