"""LoRA adapters of the frozen kernels (Hu et al. 2021): y = x W + b + (alpha / rank) (x A^T) B.

In a bank they are leaves `TARGET_a` [N, L, r, in] and `TARGET_b` [N, L, r, out]. The factor alpha / rank is not part of
the trained B, since Adam's updates do not scale with the parameters; `scaled` multiplies B by it for the forward pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Key

from spjax.models.config import UnitLMConfig
from spjax.models.einsum import einsum
from spjax.types import Params

# Kernels grouped by input; kernels of the same input share one matmul with their concatenated A.
INPUTS = {
    "attention": ("query", "key", "value"),
    "out": ("out",),
    "ffn_in": ("ffn_in", "ffn_gate"),
    "ffn_out": ("ffn_out",),
}
TARGETS = ("query", "key", "value", "out", "ffn_in", "ffn_out")  # of every LM
KNOWN = (*TARGETS, "ffn_gate")  # only LMs with swiglu have the last
LEAVES = tuple(f"{target}_{part}" for target in KNOWN for part in "ab")


class Lora(NamedTuple):
    """LoRA adapters of n members for the LM. Inside a layer the arrays have no axis L.

    Attributes:
      a: by input (`INPUTS`), [L, n, k r, in], A of its k adapted kernels, concatenated.
      b: by kernel, [L, n, r, out], multiplied by alpha / rank.
      rows: int [L, B], member of each row; None: B / n consecutive rows for each member.
      drop: dropout keys [L, B, C], one for each column, and rates [L, B]; None: no dropout.
    """

    a: dict[str, jax.Array]
    b: dict[str, jax.Array]
    rows: jax.Array | None = None
    drop: tuple[jax.Array, jax.Array] | None = None

    def down(
        self, name: str, x: Float[jax.Array, "B T in"], start: int, dtype: jnp.dtype
    ) -> Float[jax.Array, "B T kr"] | None:
        """Compute x A^T for all kernels of an input, float32 [B, T, k r]; None if none of them is adapted.

        Args:
          name: the input (`INPUTS`).
          x: float32 [B, T, in], columns `start` to `start + T`.
          start: first column; negative values count from the end.
          dtype: operand dtype.
        """
        if name not in self.a:
            return None
        if self.drop is not None:
            keys, rates = self.drop
            x = _drop(x, keys[:, start:][:, : x.shape[1]], list(INPUTS).index(name), rates)
        return _by_member(_down, x, self.a[name], self.rows, dtype)

    def up(
        self, target: str, low: Float[jax.Array, "B T kr"] | None, dtype: jnp.dtype
    ) -> Float[jax.Array, "B T out"] | float:
        """Compute the term added to a kernel's output, float32 [B, T, out]; 0 if it is not adapted.

        Args:
          target: the kernel.
          low: output of `down` for its input.
          dtype: operand dtype.
        """
        if low is None or target not in self.b:
            return 0.0
        beside = [name for name in _input_of(target) if name in self.b]
        rank, place = self.b[target].shape[-2], beside.index(target)
        return _by_member(_up, low[..., place * rank : (place + 1) * rank], self.b[target], self.rows, dtype)


NONE = Lora({}, {})


def _input_of(target: str) -> tuple[str, ...]:
    """Kernels with the same input as `target`."""
    return next(names for names in INPUTS.values() if target in names)


# Matmuls with a small rank are limited by memory bandwidth. So operands are cast like those of the main matmuls, A is
# stored as [r, in] so that its gradient needs no transpose, and up to this rank the product with B is a sum of outer
# products, which XLA fuses with the addition to the kernel's output.
_FUSED_RANK = 16


def _product(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`einsum` over arrays with a member axis n, which is dropped for a single member."""
    if len(a) > 1:
        return einsum(spec, a, b, dtype)
    return einsum(spec.replace("n", ""), a[0], b[0], dtype)[None]


def _expand(low: jax.Array, rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Product of low [n, m, r] and rows [n, r, e], float32 [n, m, e]."""
    rank = low.shape[2]
    if rank > _FUSED_RANK:
        return _product("nmr,nre->nme", low, rows, dtype)
    return sum((low[:, :, r, None] * rows[:, r, None] for r in range(1, rank)), low[:, :, 0, None] * rows[:, 0, None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _down(x: jax.Array, a: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Product of x [n, m, in] and the transpose of a [n, r, in], float32 [n, m, r]."""
    return _product("nmd,nrd->nmr", x, a, dtype)


def _down_forward(x: jax.Array, a: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x = x.astype(dtype)
    return _down(x, a, dtype), (x, a)


def _down_backward(dtype: jnp.dtype, kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, a = kept
    return _expand(g, a, dtype), _product("nmr,nmd->nrd", g, x, dtype)


_down.defvjp(_down_forward, _down_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _up(low: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Product of low [n, m, r] and b [n, r, out], float32 [n, m, out]."""
    return _expand(low, b, dtype)


def _up_forward(low: jax.Array, b: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _up(low, b, dtype), (low, b)


def _up_backward(dtype: jnp.dtype, kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, b = kept
    return _product("nme,nre->nmr", g, b, dtype), _product("nmr,nme->nre", low, g, dtype)


_up.defvjp(_up_forward, _up_backward)


def _by_member(
    product: Callable[[jax.Array, jax.Array, jnp.dtype], jax.Array],
    x: jax.Array,
    w: jax.Array,
    rows: jax.Array | None,
    dtype: jnp.dtype,
) -> jax.Array:
    """Apply `_down` or `_up` to [B, T, i] with the weights w [n, ..] of each row's member: [B, T, o]."""
    w = w if rows is None else w[rows]
    found = product(x.reshape(len(w), len(x) // len(w) * x.shape[1], x.shape[2]), w, dtype)
    return found.reshape(*x.shape[:2], found.shape[2])


def _drop(x: jax.Array, keys: jax.Array, salt: int, rates: jax.Array) -> jax.Array:
    """Dropout on x [B, T, D] with a key for each column [B, T] and a rate for each row [B]."""

    def column(key: jax.Array, x: jax.Array, rate: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(jax.random.fold_in(key, salt), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), 0)

    return jax.vmap(jax.vmap(column, (0, 0, None)))(keys, x, rates)


def is_zero(rate: float | jax.Array) -> bool:
    """Whether a rate is the Python number 0, so that no random numbers are traced."""
    return isinstance(rate, float | int) and not rate


def init_member(rng: Key[jax.Array, ""], rank: int, targets: Sequence[str], lm: UnitLMConfig) -> Params:
    """Initialise the adapters of one member (no bank axis) like PEFT: A uniform within 1 / sqrt(in), B zero.

    The values of a target do not depend on the other targets.

    Raises:
      ValueError: a target that the LM lacks.
    """
    tree: Params = {}
    check(rank, 1.0, targets, lm)
    for target in targets:
        size, out = lm.kernels[target]
        key, bound = jax.random.fold_in(rng, KNOWN.index(target)), size**-0.5
        tree[f"{target}_a"] = jax.random.uniform(key, (lm.layers, rank, size), minval=-bound, maxval=bound)
        tree[f"{target}_b"] = jnp.zeros((lm.layers, rank, out))
    return tree


def check(rank: int, alpha: float, targets: Sequence[str], lm: UnitLMConfig | None = None) -> None:
    """Raise ValueError if the adapter settings of a config or card are invalid (rank 0 included), or not of an LM."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank is {rank!r}, must be a positive integer")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha!r}, must be a positive number")
    if not targets or list(targets) != [target for target in KNOWN if target in targets]:
        raise ValueError(f"targets {tuple(targets)} must be one or more of {', '.join(KNOWN)}, in this order")
    if lm is not None and not set(targets) <= lm.kernels.keys():
        raise ValueError(f"targets {tuple(targets)} must be kernels of the LM, which has {', '.join(lm.kernels)}")


def targets_of(tree: Mapping[str, object]) -> tuple[str, ...]:
    """Kernels that the leaves of a member or bank adapt."""
    return tuple(target for target in KNOWN if f"{target}_a" in tree)


def scaled(bank: Params, scales: float | Sequence[float] | Float[jax.Array, ...]) -> Params:
    """Multiply every B by its member's alpha / rank. The result is for the forward pass, not to be trained or stored.

    Args:
      bank: prompt trees [N, ...].
      scales: alpha / rank of each member, or one for all.
    """
    by = jnp.asarray(scales, jnp.float32).reshape(-1, 1, 1, 1)
    return {**bank, **{f"{target}_b": bank[f"{target}_b"] * by for target in targets_of(bank)}}


def from_bank(bank: Params, prompt_id: Int[jax.Array, " B"] | None) -> Lora:
    """Make the `Lora` of a bank for a batch of B rows.

    Args:
      bank: prompt trees [N, ...], from `scaled`.
      prompt_id: int [B], member of each row; None: member-major.
    """
    layers_first = lambda leaf: jnp.swapaxes(leaf, 0, 1)  # noqa: E731
    targets, a = targets_of(bank), {}
    for name, readers in INPUTS.items():
        parts = [bank[f"{target}_a"] for target in readers if target in targets]
        if parts:
            a[name] = layers_first(jnp.concatenate(parts, axis=2) if len(parts) > 1 else parts[0])
    b = {target: layers_first(bank[f"{target}_b"]) for target in targets}
    if not b or prompt_id is None or len(bank["sep"]) == 1:
        return Lora(a, b)
    depth = len(next(iter(b.values())))
    return Lora(a, b, jnp.broadcast_to(prompt_id, (depth, len(prompt_id))))  # gathered layer by layer


def with_dropout(
    lora: Lora, keys: Key[jax.Array, " B"], columns: Int[jax.Array, " C"], rate: float | Float[jax.Array, "#B"]
) -> Lora:
    """Add elementwise dropout on the input of every A; kernels of the same input share a mask.

    Args:
      lora: adapters of L layers.
      keys: random keys [B], one for each row.
      columns: int [C], id of each column, which determines its mask together with the row's key.
      rate: dropout rate, for all rows or [B].
    """
    if is_zero(rate) or not lora.b:
        return lora
    depth = len(next(iter(lora.b.values())))
    each = jax.vmap(jax.random.fold_in, (None, 0))
    by_column = jax.vmap(each, (0, None))(keys, columns)  # [B, C]
    by_layer = jax.vmap(jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None)), (None, 0))
    rates = jnp.broadcast_to(jnp.asarray(rate, jnp.float32), (depth, len(keys)))
    return lora._replace(drop=(by_layer(by_column, jnp.arange(depth)), rates))
