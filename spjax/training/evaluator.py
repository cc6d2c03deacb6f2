"""Evaluation of a bank of prompts on a split."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from spjax.data import loader
from spjax.data.plan import Step
from spjax.data.unit_set import UnitSet
from spjax.models import decode, low_rank, prompts
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.verbalizers import Verbalizer
from spjax.training import losses, masks, sharding
from spjax.training.setting import Setting
from spjax.types import Batch


class Evaluator:
    """Evaluate all members of a one-task bank on a split."""

    def __init__(self, setting: Setting, units: UnitSet, plan: Sequence[Step], mesh: Mesh) -> None:
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
        setting = self._setting
        same = setting.prompt.scale, setting.loss.kind, setting.verbalizer, setting.config, setting.compute
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
