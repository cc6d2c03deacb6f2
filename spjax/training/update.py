"""The training step of a bank of prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from spjax.models.verbalizers import Verbalizer
from spjax.training import loop, losses, masks, optim, sharding
from spjax.training.setting import Setting
from spjax.types import Batch, State


def make_update(
    setting: Setting,
    tx: optax.GradientTransformation,
    verbalizers: Sequence[Verbalizer] = (),
    differing: Mapping[str, Sequence[float]] | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
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
        state: State, frozen: masks.Flat, batch: Batch, members: jax.Array | None = None
    ) -> tuple[State, dict[str, jax.Array]]:
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
