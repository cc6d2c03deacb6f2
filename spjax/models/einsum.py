"""Einsum with low-precision operands and float32 accumulation, in the forward and the backward pass."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def _einsum(spec: str, a: Any, b: Any, dtype: jnp.dtype) -> jax.Array:
    def product(dtype: jnp.dtype, a: Any, b: Any) -> jax.Array:
        # Without HIGHEST, TPUs and GPUs round float32 operands.
        precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)

    if dtype == jnp.float32 or not _batched(spec):
        return product(dtype, a, b)
    # XLA on CPUs has no batched matmul with low-precision operands.
    wide = functools.partial(product, jnp.dtype(jnp.float32))
    return lax.platform_dependent(a, b, cpu=wide, default=functools.partial(product, dtype))


def _batched(spec: str) -> bool:
    """Whether an index occurs in both operands and in the result."""
    operands, out = spec.split("->")
    left, right = operands.split(",")
    return bool({*left} & {*right} & {*out})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`einsum(spec, a, b)` with operands cast to `dtype` and float32 accumulation; no cast in batched products on CPUs.

    JAX's transpose would multiply the float32 cotangent with the low-precision operand at float32 speed; here the
    cotangent is cast too. Operands without a gradient (the frozen LM) get none, and the other operand is not saved as a
    residual; this is decided while tracing.

    Args:
      spec: einsum of two operands; every index of an operand must occur in the other or in the result.
      a: first operand.
      b: second operand.
      dtype: dtype of the operands.

    Returns:
      float32 array.
    """
    return _einsum(spec, a, b, dtype)


def _forward(spec: str, a: Any, b: Any, dtype: jnp.dtype) -> tuple[jax.Array, tuple[Any, ...]]:
    keep = (lambda x: x) if _batched(spec) else (lambda x: x.astype(dtype))
    kept_a = keep(a.value) if b.perturbed else None
    kept_b = keep(b.value) if a.perturbed else None
    types = jnp.zeros((), a.value.dtype), jnp.zeros((), b.value.dtype)
    return _einsum(spec, a.value, b.value, dtype), (kept_a, kept_b, *types)


def _backward(spec: str, dtype: jnp.dtype, kept: tuple[Any, ...], g: Any) -> tuple[Any, Any]:
    a, b, a_type, b_type = kept
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None
    operands, out = spec.split("->")
    left, right = operands.split(",")
    da = None if b is None else _einsum(f"{out},{right}->{left}", g, b, dtype).astype(a_type.dtype)
    db = None if a is None else _einsum(f"{left},{out}->{right}", a, g, dtype).astype(b_type.dtype)
    return da, db


einsum.defvjp(_forward, _backward, symbolic_zeros=True)
