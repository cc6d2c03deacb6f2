"""Low-rank adapters (LoRA, Hu et al. 2021) of the frozen kernels: y = x W + b + (alpha / rank) (x A^T) B.

In a bank they are leaves `TARGET_a` [N, L, r, in] and `TARGET_b` [N, L, r, out]. Training keeps alpha / rank apart from
A and B, since Adam's steps depend on their size; `scaled` multiplies it into B where they are run.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spjax.models.config import UnitLMConfig
from spjax.models.contract import contract
from spjax.types import Params

# Kernels by the input that they read: what reads the same input shares one product with A.
INPUTS = {"attention": ("query", "key", "value"), "out": ("out",), "ffn_in": ("ffn_in",), "ffn_out": ("ffn_out",)}
TARGETS = tuple(itertools.chain(*INPUTS.values()))
LEAVES = tuple(f"{target}_{part}" for target in TARGETS for part in "ab")


class Lora(NamedTuple):
    """Low-rank adapters of n members as the LM takes them. In a layer of it every array is without L.

    Attributes:
      a: by input (`INPUTS`), [L, n, k r, in], those of the k adapted kernels that read it one below the other.
      b: by kernel, [L, n, r, out], multiplied by alpha / rank.
      rows: int [L, B], the member of each row; None where B / n rows after each other are a member's.
      drop: random keys [L, B, C] of dropout, of each column that is run, and its rates [L, B]; None drops nothing.
    """

    a: dict[str, jax.Array]
    b: dict[str, jax.Array]
    rows: jax.Array | None = None
    drop: tuple[jax.Array, jax.Array] | None = None

    def down(self, name: str, x: jax.Array, start: int, dtype: jnp.dtype) -> jax.Array | None:
        """x A^T of the kernels that read this input, float32 [B, T, k r]; None where none of them is adapted.

        Args:
          name: the input (`INPUTS`).
          x: float32 [B, T, in], columns `start` to `start + T` of those that are run.
          start: below 0 counts from the end.
          dtype: operand type.
        """
        if name not in self.a:
            return None
        if self.drop is not None:
            keys, rates = self.drop
            x = _drop(x, keys[:, start:][:, : x.shape[1]], list(INPUTS).index(name), rates)
        return _by_member(_down, x, self.a[name], self.rows, dtype)

    def up(self, target: str, low: jax.Array | None, dtype: jnp.dtype) -> jax.Array | float:
        """What is added to a kernel's output, float32 [B, T, out]; 0 where it is not adapted.

        Args:
          target: the kernel.
          low: of its input, as `down` gives it.
          dtype: operand type.
        """
        if low is None or target not in self.b:
            return 0.0
        beside = [name for name in _input_of(target) if name in self.b]
        rank, place = self.b[target].shape[-2], beside.index(target)
        return _by_member(_up, low[..., place * rank : (place + 1) * rank], self.b[target], self.rows, dtype)


NONE = Lora({}, {})


def _input_of(target: str) -> tuple[str, ...]:
    """The kernels that read what this one reads."""
    return next(names for names in INPUTS.values() if target in names)


# Products with a side of a few numbers take as long as it takes to read what they read. So they take operands as the
# products beside them have them, a gradient comes in the layout that it is wanted in (A lies as [r, in] for that), and
# what is added to a large array is a sum, which becomes part of what is done with that array.
_FEW = 16


def _product(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`contract` of arrays with a leading axis of members, n in the spec; of a single one without it."""
    if len(a) > 1:
        return contract(spec, a, b, dtype)
    return contract(spec.replace("n", ""), a[0], b[0], dtype)[None]


def _spread(low: jax.Array, rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """low [n, m, r] by rows [n, r, e]: float32 [n, m, e]."""
    rank = low.shape[2]
    if rank > _FEW:
        return _product("nmr,nre->nme", low, rows, dtype)
    return sum((low[:, :, r, None] * rows[:, r, None] for r in range(1, rank)), low[:, :, 0, None] * rows[:, 0, None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _down(x: jax.Array, a: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x [n, m, in] by a [n, r, in], transposed: float32 [n, m, r]."""
    return _product("nmd,nrd->nmr", x, a, dtype)


def _down_forward(x: jax.Array, a: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x = x.astype(dtype)
    return _down(x, a, dtype), (x, a)


def _down_backward(dtype: jnp.dtype, kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, a = kept
    return _spread(g, a, dtype), _product("nmr,nmd->nrd", g, x, dtype)


_down.defvjp(_down_forward, _down_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _up(low: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """low [n, m, r] by b [n, r, out]: float32 [n, m, out]."""
    return _spread(low, b, dtype)


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
    """`_down` or `_up` of [B, T, i] with each member's w [n, ..], or each row's where they are named: [B, T, o]."""
    w = w if rows is None else w[rows]
    found = product(x.reshape(len(w), len(x) // len(w) * x.shape[1], x.shape[2]), w, dtype)
    return found.reshape(*x.shape[:2], found.shape[2])


def _drop(x: jax.Array, keys: jax.Array, salt: int, rates: jax.Array) -> jax.Array:
    """x [B, T, D] with a share [B] of its numbers 0, each column's by its key [B, T]."""

    def column(key: jax.Array, x: jax.Array, rate: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(jax.random.fold_in(key, salt), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), 0)

    return jax.vmap(jax.vmap(column, (0, 0, None)))(keys, x, rates)


def is_zero(rate: float | jax.Array) -> bool:
    """Whether a rate is known to be 0, of all members, when a program is made: then it needs no random numbers."""
    return isinstance(rate, float | int) and not rate


def init_member(rng: jax.Array, rank: int, targets: Iterable[str], lm: UnitLMConfig) -> Params:
    """A member's fresh leaves (no bank axis) as PEFT starts them: A uniform within 1 / sqrt(in), B zero.

    A target's start does not depend on which others there are.
    """
    tree: Params = {}
    for target in targets:
        size, out = sizes(lm.dim, lm.ffn_dim)[target]
        key, bound = jax.random.fold_in(rng, TARGETS.index(target)), size**-0.5
        tree[f"{target}_a"] = jax.random.uniform(key, (lm.layers, rank, size), minval=-bound, maxval=bound)
        tree[f"{target}_b"] = jnp.zeros((lm.layers, rank, out))
    return tree


def sizes(dim: int, ffn_dim: int) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every kernel that may be adapted, of an LM of this width and feed-forward width."""
    square = dict.fromkeys(("query", "key", "value", "out"), (dim, dim))
    return {**square, "ffn_in": (dim, ffn_dim), "ffn_out": (ffn_dim, dim)}


def check(rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Raise ValueError for what is wrong with the adapters of a config or card, whose rank is not 0."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank is {rank!r}, must be a positive integer")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha!r}, must be a positive number")
    if not targets or list(targets) != [target for target in TARGETS if target in targets]:
        raise ValueError(f"targets {tuple(targets)} must be one or more of {', '.join(TARGETS)}, in this order")


def targets_of(tree: Mapping[str, object]) -> tuple[str, ...]:
    """The kernels that a member's or bank's leaves adapt."""
    return tuple(target for target in TARGETS if f"{target}_a" in tree)


def scaled(bank: Params, scales: float | Sequence[float] | jax.Array) -> Params:
    """The bank with every B multiplied by its member's alpha / rank: to be run, not trained or stored.

    Args:
      bank: trees [N, ...].
      scales: of each member, or one for all.
    """
    by = jnp.asarray(scales, jnp.float32).reshape(-1, 1, 1, 1)
    return {**bank, **{f"{target}_b": bank[f"{target}_b"] * by for target in targets_of(bank)}}


def of_bank(bank: Params, prompt_id: jax.Array | None) -> Lora:
    """A bank's adapters for a batch of B rows.

    Args:
      bank: trees [N, ...], `scaled`.
      prompt_id: int [B], row of the bank per utterance; None: member-major.
    """
    laid = lambda leaf: jnp.swapaxes(leaf, 0, 1)  # noqa: E731
    targets, a = targets_of(bank), {}
    for name, readers in INPUTS.items():
        own = [bank[f"{target}_a"] for target in readers if target in targets]
        if own:
            a[name] = laid(jnp.concatenate(own, axis=2) if len(own) > 1 else own[0])
    b = {target: laid(bank[f"{target}_b"]) for target in targets}
    if not b or prompt_id is None or len(bank["sep"]) == 1:
        return Lora(a, b)
    depth = len(next(iter(b.values())))
    return Lora(a, b, jnp.broadcast_to(prompt_id, (depth, len(prompt_id))))  # looked up layer by layer


def with_dropout(lora: Lora, keys: jax.Array, columns: jax.Array, rate: float | jax.Array) -> Lora:
    """The adapters with dropout on the input of every A, elementwise; kernels that read one input share its mask.

    Args:
      lora: of L layers.
      keys: random keys [B], one a row.
      columns: int [C], a number of each column that is run: what is dropped there depends on nothing else.
      rate: share of the numbers that are 0, of all rows or [B] of each.
    """
    if is_zero(rate) or not lora.b:
        return lora
    depth = len(next(iter(lora.b.values())))
    each = jax.vmap(jax.random.fold_in, (None, 0))
    by_column = jax.vmap(each, (0, None))(keys, columns)  # [B, C]
    by_layer = jax.vmap(jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None)), (None, 0))
    rates = jnp.broadcast_to(jnp.asarray(rate, jnp.float32), (depth, len(keys)))
    return lora._replace(drop=(by_layer(by_column, jnp.arange(depth)), rates))
