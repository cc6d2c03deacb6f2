"""Prompt tuning: a bank of prompts trained against one frozen LM, each member as if it were trained alone.

A member has its own seed, order of utterances, clipping, optimizer state, schedule and early stop. Tasks take turns: a
step computes the members of one task, and nothing for those that have stopped.
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
from spjax.evaluation import decode
from spjax.evaluation.markdown import shown
from spjax.models import low_rank, prompts
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
      seeds: one member of the bank each (of every task): its start, its order of utterances, its dropout.
      epochs: most evaluations.
      passes: passes over train between two evaluations; more than one where train is small (few-shot).
      sampling: updates between two evaluations of tasks of different size, in one bank. A task whose own passes have n
        batches, beside the largest with m, gets m^(1 - sampling) n^sampling: with 1 its own passes, as trained alone;
        with 0 as many as the largest (its passes go round again).
      patience: evaluations without a better score after which a member stops; 0 never stops early.
      select: score by which the best epoch is kept: "metric" (the task's own, on valid; of equal ones, that of the
        highest mean log probability of the labels), "loss" (the training loss on valid), or "last" (keep the last
        epoch; valid is only reported).
      round_loss: decimals that a valid loss is rounded to before it is compared; the reference's 3. -1 does not round.
      trainable: regex over parameter paths; `.*` fine-tunes the whole LM.
      max_rows: most utterances of a member in a batch; a batch holds a multiple of its greatest common divisor with 8.
      max_tokens: most source columns of a member in a batch.
      buckets: most lengths of a task's batches. Each length, with its rows and the number of members that take part, is
        a program to compile, which tasks share.
      multiple: lengths of batches are multiples of this; with a larger one, tasks share more of them.
      checkpoint_every: updates between checkpoints.
      eval_rows: utterances of an evaluation batch; as many as divide among the devices, where these are more.
      profile: updates of which a profiler trace is written, once the first are done (docs/profiling.md); 0: none.
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
            raise ValueError(f"train: seeds {self.seeds!r} must be integers in 0..2^32-1, at least one, each different")
        if not 0 <= self.sampling <= 1:
            raise ValueError(f"train: sampling is {self.sampling}, must lie in [0, 1]")
        if self.select == "last" and self.patience:
            raise ValueError(
                f"train: patience is {self.patience}, but with select='last' no epoch is better than the next: give "
                "--config.train.select=metric, --config.train.select=loss or --config.train.patience=0"
            )
        if self.profile < 0:
            raise ValueError(f"train: profile is {self.profile}, must not be negative (0 writes none)")
        if self.patience < 0:
            raise ValueError(f"train: patience is {self.patience}, must not be negative (0 never stops early)")
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise ValueError(f"train: trainable {self.trainable!r} is no regular expression ({error})") from error
        sizes = ("epochs", "passes", "max_rows", "max_tokens", "buckets", "multiple", "checkpoint_every", "eval_rows")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} is {getattr(self, name)}, must be at least 1")


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What is trained on what: everything that does not change while training.

    Attributes:
      config: the LM's architecture.
      compute: operand type and remat.
      prompt: shape, start and dropout of the prompts.
      loss: which loss.
      verbalizer: classes to outputs.
      tree: label combinations that decoding chooses among.
    """

    config: UnitLMConfig
    compute: Compute
    prompt: prompts.PromptConfig
    loss: losses.LossConfig
    verbalizer: Verbalizer
    tree: decode.LabelTree


@dataclasses.dataclass(frozen=True, eq=False)
class Lesson:
    """A task as the members that learn it see it. In a sweep, a task is several lessons.

    Attributes:
      setting: what is trained. Lessons of one bank differ in verbalizer, tree, start, prompt length, rank, alpha and
        rates (`losses.RATES`) alone.
      train_set: units and labels; `train_ids` are the utterances of it to use.
      train_ids: int [m].
      valid_set: what early stopping looks at; `valid_ids` likewise.
      valid_ids: int [m].
      metric: the task's score of a split, from log probabilities [n, M], the tree and classes [n, slots].
      lower_is_better: whether the best epoch is that of the lowest score.
      optimizer: the lesson's, which differs from that of the bank in `lr` and `weight_decay` alone; None: that.
      tried: the values of a sweep that make the lesson, by the field's name.
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
        """What it is trained with, for messages and reports; `optimizer`: of the bank."""
        rest = {name: value for name, value in self.tried.items() if name not in ("length", "rank", "lr")}
        return {**self.setting.prompt.sizes, "learning rate": (self.optimizer or optimizer).lr, **rest}


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """The outcome of a run. `params`: {"lm", "prompt"}, the kept epoch of every member; `history`: a line an epoch.

    Of a member that had stopped before an epoch, or diverged before its end, its line holds None as metric. A member
    that has no epoch to keep, since it diverged in the first or its metric was no number, has best_epoch -1, best_score
    -inf and the prompt that it started from.
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
    """{"lm", "prompt"} at the start: a fresh bank, one member a seed, or every member a copy of `start` (a pack).

    A `start` without a verbalizer (another task's) gets a fresh one where the setting's is learnable.

    Args:
      lm: the LM's weights.
      setting: what is trained.
      seeds: of the members.
      start: a prompt tree.
      real: of each seed the prompt that it starts with, for those made of utterances (`starts.from_utterances`).
    """
    prompt = setting.prompt if start is None else dataclasses.replace(setting.prompt, init="normal")
    new = functools.partial(
        prompts.init_member,
        config=prompt, lm=setting.config, verbalizer=setting.verbalizer, embed=jnp.asarray(lm["embed"]),
    )  # fmt: skip
    members = [new(jax.random.key(seed), real=real[n] if real else None) for n, seed in enumerate(seeds)]
    if start is not None:
        fresh = {"verbalizer"} if setting.verbalizer.learnable else set()
        members = [
            {name: leaf for name, leaf in one.items() if name in fresh} | jax.tree.map(jnp.asarray, start)
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
    """One training step, to be compiled: (state, frozen, batch, members) -> (state, metrics).

    The gradient is taken of the trained leaves alone. State: "trained" and "optimizer", "step" (int32 [N], updates of
    each member so far; or one number for all), "seeds" (uint32 [N]). `members`, int32 [W], are those that take part;
    a batch's rows are theirs, the number N fills the shape. Only their rows of the state, which must all have the bank
    axis, are computed and changed; None: the whole bank takes part. Metrics are [N], 0 for who does not take part. Of
    several members, one that has diverged stays as it is; its metrics say so.

    Args:
      setting: what is trained.
      tx: the optimizer.
      verbalizers: one a member where members learn different tasks; by default all have the setting's.
      differing: values of the members, as `losses.member_losses` takes them.
      mesh: of the devices; None: one.
    """
    spoken = verbalizers or [setting.verbalizer]
    laid = functools.partial(sharding.layerwise, mesh) if mesh else dict

    def update(
        state: dict[str, Any], frozen: masks.Flat, batch: Batch, members: jax.Array | None = None
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        size = len(state["seeds"])
        whole = {name: state[name] for name in ("trained", "optimizer", "step", "seeds")}
        rows = None if members is None else jnp.minimum(members, size - 1)
        own, held = whole, frozen
        if rows is not None:
            own = jax.tree.map(lambda leaf: leaf[rows], whole)
            held = {path: leaf[rows] if path.startswith("prompt/") else leaf for path, leaf in frozen.items()}
        batch = sharding.member_major(mesh, batch, len(own["seeds"]))
        count = jnp.broadcast_to(own["step"], own["seeds"].shape)
        keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step + 1))(own["seeds"], count)

        def loss(trained: masks.Flat) -> tuple[jax.Array, jax.Array]:
            params = masks.unflatten(laid({**trained, **held}))
            each = losses.member_losses(
                params["lm"], params["prompt"], batch, keys,
                loss=setting.loss, prompt=setting.prompt, verbalizers=spoken,
                config=setting.config, compute=setting.compute, differing=differing, members=rows,
            )  # fmt: skip
            return jnp.sum(each), each

        (_, each), grads = jax.value_and_grad(loss, has_aux=True)(own["trained"])
        trained, optimizer = masks.apply_gradients(tx, own["optimizer"], own["trained"], held, grads)
        new = {**own, "trained": trained, "optimizer": optimizer, "step": own["step"] + 1}
        metrics = {"loss": each, "gradient_norm": optim.member_norms(grads), "updates": jnp.ones(len(each))}
        if size > 1:  # one that is alone ends its run
            bad = loop.diverged(metrics)
            keep = lambda old, new: jnp.where(bad.reshape(-1, *[1] * (new.ndim - 1)), old, new) if new.ndim else new  # noqa: E731
            new = jax.tree.map(keep, own, new)
            metrics["updates"] = jnp.where(bad, 0.0, 1.0)
        if members is not None:
            back = lambda bank, rows: bank.at[members].set(rows, mode="drop")  # noqa: E731 - N is nobody's row
            new = jax.tree.map(back, whole, new)
            metrics = {name: back(jnp.zeros(size), value) for name, value in metrics.items()}
        return {**state, **new}, metrics

    return update


class Evaluator:
    """Valid or test scores of a bank of one task: every utterance answered by every member."""

    def __init__(self, setting: Setting, units: UnitSet, plan: list[planning.Step], mesh: Any) -> None:
        """`plan`: an unshuffled plan over the split for one member."""
        self._setting, self._units, self._plan, self._mesh = setting, units, plan, mesh
        self._tables = decode.tables([setting.tree], multiple=16)

    def _batches(self, what: str, members: int) -> Iterator[tuple[Batch, Batch]]:
        """Batches with the member of every row, and as programs take them."""
        steps = [step._replace(ids=np.repeat(step.ids, members, axis=0)) for step in self._plan]
        ready = loader.prefetch(loader.batches(self._units, steps, *sharding.own_rows(self._mesh)))
        quiet = jax.process_index() > 0
        for batch in tqdm(ready, desc=what, total=len(steps), leave=False, disable=quiet, delay=2, unit="batch"):
            rows = sharding.shard_rows(self._mesh, batch)
            yield rows, sharding.member_major(self._mesh, rows, members)

    def log_probs(self, flat: masks.Flat, who: np.ndarray | None = None) -> np.ndarray:
        """Log probability of every combination of the tree, float32 [N, n, M], utterances in their own order.

        Args:
          flat: parameters of a bank.
          who: int [N], members of the bank that answer; None: all.
        """
        flat, members, count = _some(sharding.layerwise(self._mesh, flat), who)
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
        return found[:count]

    def loss(self, flat: masks.Flat, who: np.ndarray | None = None) -> np.ndarray:
        """The training loss on the split, [N]; arguments as of `log_probs`."""
        flat, members, number = _some(sharding.layerwise(self._mesh, flat), who)
        own = self._setting
        same = own.prompt.scale, own.loss.kind, own.verbalizer, own.config, own.compute
        parts = [sharding.fetch(_measure(flat, batch, *same)) for _, batch in self._batches("loss", members)]
        total, count = np.stack(parts).sum(axis=0, dtype=np.float64)
        return (total / np.maximum(count, 1))[:number]


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _answer(
    flat: masks.Flat, scale: float, tables: decode.Tables, batch: Batch, config: UnitLMConfig, compute: Compute
) -> jax.Array:
    """Scores of every combination: a program for all tasks of like sizes, whatever their labels are."""
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
    """Summed loss of every member with its count, [2, N]: a program for all lessons of a sweep. Rows: member-major."""
    params = masks.unflatten(flat)
    each = losses.member_losses(
        params["lm"], params["prompt"], batch, None,
        loss=losses.LossConfig(kind=kind), prompt=prompts.PromptConfig(), verbalizers=[verbalizer],
        config=config, compute=compute, differing={"scale": [scale]},
    )  # fmt: skip
    size = (batch.source_length + verbalizer.steps + 2 if kind == "reference" else 1) * batch.weight
    count = size.reshape(len(each), -1).sum(axis=1)
    return jnp.stack([each * count, count])


def _some(flat: masks.Flat, who: np.ndarray | None) -> tuple[masks.Flat, int, int]:
    """Parameters of some members of a bank, how many they are, and how many of these were asked for.

    Those that are more repeat others: their number is one of a few, so that few programs are compiled.
    """
    bank = len(flat["prompt/sep"])
    if who is None or len(who) == bank:
        return flat, bank, bank
    rows = np.resize(who, planning.width(len(who), bank))
    some = {path: leaf[rows] if path.startswith("prompt/") else leaf for path, leaf in flat.items()}
    return some, len(rows), len(who)


def exact_match(log_probs: np.ndarray, tree: decode.LabelTree, classes: np.ndarray) -> float:
    """Share of utterances whose every slot is right: log probabilities [n, M] of the tree, classes [n, slots]."""
    return float((tree.combinations[log_probs.argmax(axis=1)] == classes).all(axis=1).mean())


def train(
    params: Params,
    lessons: Sequence[Lesson],
    run: TrainConfig,
    optimizer: optim.OptimConfig,
    *,
    workdir: str,
    model_parallel: int = 1,
    weight_shards: int = 1,
) -> Trained:
    """Train a bank of prompts, one member a lesson and seed; continue the run found in `workdir`.

    An epoch is `run.passes` passes over a lesson's train split, or what `run.sampling` makes of it; tasks take turns.

    Args:
      params: {"lm", "prompt"} at the start (`first_params`; of several lessons joined), lesson after lesson.
      lessons: the tasks.
      run: for how long and how.
      optimizer: Adam settings.
      workdir: checkpoints and logs.
      model_parallel, weight_shards: as `sharding.make_mesh`.
    """
    setting, seeds = lessons[0].setting, np.asarray(run.seeds, np.uint32)
    own, members = len(seeds), len(seeds) * len(lessons)
    mesh = sharding.make_mesh(model_parallel, weight_shards)
    trained, frozen = masks.split(masks.flatten(params), run.trainable)
    trains_lm = any(path.startswith("lm/") for path in trained)
    if members > 1 and trains_lm:
        raise ValueError(
            f"trainable={run.trainable!r} trains the LM, which {members} members would share: give one task and seed"
        )
    sets = list({id(lesson.train_set): lesson.train_set for lesson in lessons}.values())  # lessons may share one
    train_set = join(sets)
    starts = np.cumsum([0, *map(len, sets)])
    first = {id(one): start for one, start in zip(sets, starts, strict=False)}
    ids = [lesson.train_ids + first[id(lesson.train_set)] for lesson in lessons]
    course = bank_plan.BankPlan(
        train_set.lengths, ids, run.seeds, run.buckets, run.max_rows, run.max_tokens, run.multiple, run.passes,
        run.sampling, sharding.batch_shards(mesh),
    )  # fmt: skip
    programs: set[tuple[int, ...]] = set()

    def plan(state: dict[str, Any], epoch: int) -> list[planning.Step]:
        steps = course.epoch(epoch, sharding.fetch(state["active"]))
        new = {(step.bucket, *step.ids.shape) for step in steps} - programs
        programs.update(new)
        if new:
            told = ", ".join(f"{n} × {rows} × {bucket}" for bucket, n, rows in sorted(new))
            _log.info("epoch %d: programs are compiled, of members × utterances × columns %s", epoch + 1, told)
        return steps

    optimizers = [lesson.optimizer or optimizer for lesson in lessons]
    totals = [run.epochs * number for number in course.updates]
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
        "seeds": jnp.tile(seeds, len(lessons)),
        "active": jnp.ones(members, bool),
        "best": jax.tree.map(jnp.copy, trained),
        "best_score": jnp.full((members, 2), -jnp.inf, jnp.float32),  # not weakly typed: that would compile twice
        "best_epoch": jnp.full(members, -1, jnp.int32),
    }
    where = sharding.state_shardings(mesh, state)
    state = sharding.place(state, where)
    frozen = sharding.place_frozen(mesh, frozen, setting.compute.operand)
    spoken = [lesson.setting.verbalizer for lesson in lessons for _ in seeds] if len(lessons) > 1 else []
    update = make_update(setting, tx, spoken, _differing(lessons, own), mesh)
    step_fn = jax.jit(update, donate_argnums=0, out_shardings=(where, None))
    cost = speed.cost_of(step_fn, setting.compute.operand)

    def batches(steps: Sequence[planning.Step]) -> Iterator[tuple[tuple[Batch, jax.Array | None], int]]:
        own, runs = sharding.own_rows(mesh)
        ready = loader.prefetch(loader.batches(train_set, steps, own, runs))
        for step, batch in zip(steps, ready, strict=True):
            who = None if step.members is None else sharding.place(step.members, where["step"])
            yield (sharding.shard_rows(mesh, batch), who), int(batch.weight.sum()) * runs // len(own)

    evaluators = [evaluator_for(lesson, run, lesson.valid_set, lesson.valid_ids, mesh) for lesson in lessons]

    def scores(
        flat: masks.Flat, who: np.ndarray, lesson: Lesson, evaluator: Evaluator, epoch: int
    ) -> dict[str, np.ndarray]:
        """Of members `who`: "metric", "loss" where it is asked for, and "score", of which more is better: first [:, 0],
        then, where that is equal, [:, 1]."""
        tree, classes = lesson.setting.tree, lesson.valid_set.classes[lesson.valid_ids]
        log_probs = evaluator.log_probs(flat, who)[:, lesson.valid_ids]
        metric = np.asarray([lesson.metric(one, tree, classes) for one in log_probs])
        found, tie = {"metric": metric}, np.zeros(len(metric))
        if run.select == "loss":
            found["loss"] = evaluator.loss(flat, who)
            score = -(np.round(found["loss"], run.round_loss) if run.round_loss >= 0 else found["loss"])
        elif run.select == "last":
            score = np.full(len(metric), float(epoch))
        else:
            score = -metric if lesson.lower_is_better else metric
            right = (tree.combinations == classes[:, None]).all(axis=2)  # no row's, of labels that train does not have
            tie = log_probs[:, right].mean(axis=1) if right.any() else tie
        return {**found, "score": np.stack([score, tie], axis=1)}

    def evaluate(state: dict[str, Any], epoch: int) -> tuple[dict[str, Any], dict[str, Any], float]:
        active, best_score = sharding.fetch((state["active"], state["best_score"]))
        whole = masks.unflatten({**state["trained"], **frozen})
        score, found = np.full((members, 2), -np.inf), {"metric": np.full(members, None)}
        for number, (lesson, evaluator) in enumerate(zip(lessons, evaluators, strict=True)):
            who = np.flatnonzero(active[number * own : (number + 1) * own])
            if len(who):
                flat = masks.flatten(lesson_params(whole, lessons, run, number))
                new = scores(flat, who, lesson, evaluator, epoch)
                score[number * own + who] = new.pop("score")
                for name, values in new.items():
                    found.setdefault(name, np.full(members, None))[number * own + who] = values
        score = np.where(np.isnan(score), -np.inf, score)
        metrics = {name: [None if one != one else one for one in value.tolist()] for name, value in found.items()}
        shared = np.where(active, score[:, 0], best_score[:, 0])
        known = shared[np.isfinite(shared)]
        mean = float(known.mean()) if len(known) else -math.inf
        return _keep_best(state, epoch, score, run.patience, where), metrics, mean

    def without(state: dict[str, Any], lost: np.ndarray) -> dict[str, Any]:
        return {**state, "active": sharding.place(sharding.fetch(state["active"]) & ~lost, where["active"])}

    def name(n: int) -> str:
        described = lessons[n // own].described(optimizer).items()
        return f"member {n} (seed {seeds[n % own]}, {', '.join(f'{what} {shown(value)}' for what, value in described)})"

    job = loop.Job(
        state=state,
        steps=course.most,
        plan=plan,
        batches=batches,
        update=lambda state, item: step_fn(state, frozen, *item),
        evaluate=evaluate,
        finished=lambda state: not bool(sharding.fetch(state["active"]).any()),
        without=without,
        names=[name(n) for n in range(members)],
        cost=lambda state, item: cost(state, frozen, *item),
    )
    state, history = loop.fit(
        job, workdir, epochs=run.epochs, checkpoint_every=run.checkpoint_every, profile=run.profile
    )
    kept = masks.unflatten({**masks.flatten(params), **sharding.fetch(state["best"])})
    best_epoch, best_score = sharding.fetch((state["best_epoch"], state["best_score"]))
    return Trained(kept, history, best_epoch.tolist(), best_score[:, 0].tolist())


def _differing(lessons: Sequence[Lesson], seeds: int) -> dict[str, list[Any]]:
    """What lessons do not have alike, [N] each, as `losses.member_losses` takes it; N lessons of so many seeds."""

    def values(name: str) -> list[Any]:
        settings = [lesson.setting for lesson in lessons for _ in range(seeds)]
        return [getattr(one.prompt if hasattr(one.prompt, name) else one.loss, name) for one in settings]

    every = {name: values(name) for name in ("length", "scale", *losses.RATES)}
    return {name: found for name, found in every.items() if len(set(found)) > 1}


def lesson_params(params: Params, lessons: Sequence[Lesson], run: TrainConfig, number: int) -> Params:
    """{"lm", "prompt"} of the members that learn lesson `number` of a joined bank."""
    if len(lessons) == 1:
        return params
    own, setting = len(run.seeds), lessons[number].setting
    members = number * own, (number + 1) * own
    return {**params, "prompt": prompts.part(params["prompt"], *members, setting.verbalizer, setting.prompt)}


def _keep_best(state: dict[str, Any], epoch: int, score: np.ndarray, patience: int, where: Any) -> dict[str, Any]:
    """Members whose score, [N, 2], is better than ever keep a copy; those without one for `patience` epochs stop."""
    small = sharding.fetch({name: state[name] for name in ("active", "best_score", "best_epoch")})
    (new, tie), (best, best_tie) = score.astype(np.float32).T, small["best_score"].T
    better = small["active"] & ((new > best) | (np.isfinite(new) & (new == best) & (tie > best_tie)))
    best_epoch = np.where(better, epoch, small["best_epoch"]).astype(np.int32)
    active = small["active"] & ((epoch - best_epoch < patience) if patience else True)
    for n in np.flatnonzero(small["active"] & ~active):
        _log.info(
            "member %d stops: %s", n, f"best epoch {best_epoch[n] + 1}" if best_epoch[n] >= 0 else "no epoch is kept"
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


def evaluator_for(lesson: Lesson, run: TrainConfig, units: UnitSet, ids: np.ndarray, mesh: Any) -> Evaluator:
    """An evaluator of utterances `ids` of a split for the members of a lesson."""
    return Evaluator(lesson.setting, units, evaluation_plan(lesson, run, units, ids, mesh), mesh)


def evaluation_plan(
    lesson: Lesson, run: TrainConfig, units: UnitSet, ids: np.ndarray, mesh: Any
) -> list[planning.Step]:
    """Batches of utterances `ids` of a split, in order, each once.

    It has the buckets of the lesson's train split, and one more where an utterance is longer: splits share programs.
    Where a batch of training holds few rows, for long utterances, so may one of it.
    """
    lengths = units.lengths
    multiple = math.lcm(math.gcd(8, run.eval_rows, run.max_rows), sharding.batch_shards(mesh))
    edges = planning.buckets(lesson.train_set.lengths[lesson.train_ids], run.buckets, run.multiple)
    longest = math.ceil(lengths[ids].max() / run.multiple) * run.multiple
    edges += (longest,) if longest > edges[-1] else ()
    return planning.plan(
        lengths, seed=0, epoch=0, buckets=edges, ids=ids, shuffle=False,
        max_rows=max(run.eval_rows, multiple), row_multiple=multiple,
        max_tokens=max(run.max_tokens, multiple * edges[-1]),
    )  # fmt: skip
