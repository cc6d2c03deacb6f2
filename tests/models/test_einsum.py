"""`einsum`: float32 einsum, bfloat16 operands, and no gradients of frozen operands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spjax.models.einsum import einsum
from tests.golden_data import relative

SPECS = {
    "btd,de->bte": ((2, 3, 4), (4, 5)),
    "bhqd,bhkd->bhqk": ((2, 2, 3, 4), (2, 2, 5, 4)),
    "bqd,vd->bqv": ((2, 3, 4), (6, 4)),
}
BATCHED = ("bhqd,bhkd->bhqk",)  # not cast on CPUs
F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


def operands(spec: str):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in SPECS[spec]]


@pytest.mark.parametrize("spec", SPECS)
def test_value_and_gradients_are_those_of_einsum(spec: str):
    a, b = operands(spec)
    cotangent = jnp.cos(jnp.arange(np.einsum(spec, a, b).size)).reshape(np.einsum(spec, a, b).shape)
    value, back = jax.vjp(lambda a, b: einsum(spec, a, b, F32), a, b)
    expected, back_einsum = jax.vjp(lambda a, b: jnp.einsum(spec, a, b, precision="highest"), a, b)
    assert relative(value, expected) < 1e-6
    for found, wanted in zip(back(cotangent), back_einsum(cotangent), strict=True):
        assert relative(found, wanted) < 1e-6


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in BATCHED])
def test_bfloat16_rounds_operands_and_not_results(spec: str):
    a, b = operands(spec)
    rounded = [np.asarray(x.astype(BF16).astype(F32), np.float64) for x in (a, b)]
    value, back = jax.vjp(lambda a, b: einsum(spec, a, b, BF16), a, b)
    assert value.dtype == F32
    assert relative(value, np.einsum(spec, *rounded)) < 1e-6
    # The cotangent is cast too, and gradients have the dtypes of the operands.
    assert [g.dtype for g in back(value)] == [F32, F32]
    narrow = b.astype(BF16)
    _, back = jax.vjp(lambda a, b: einsum(spec, a, b, BF16), a, narrow)
    assert [g.dtype for g in back(value)] == [F32, BF16]


@pytest.mark.parametrize(("platform", "narrow"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_a_batched_product_is_low_precision_if_the_platform_supports_it(platform: str, narrow: bool):
    both = jax.jit(lambda a, b: jax.vjp(lambda a, b: einsum(BATCHED[0], a, b, BF16), a, b)[1](jnp.ones((2, 2, 3, 5))))
    text = both.trace(*operands(BATCHED[0])).lower(lowering_platforms=(platform,)).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 2
    assert all(("bf16" in line) == narrow for line in dots), dots


def test_a_batched_product_is_not_rounded_on_a_cpu():
    a, b = operands(BATCHED[0])
    if jax.default_backend() == "cpu":
        assert jnp.array_equal(einsum(BATCHED[0], a, b, BF16), einsum(BATCHED[0], a, b, F32))


def products(jaxpr) -> int:
    return str(jaxpr).count("dot_general")


def test_a_frozen_operand_gets_no_gradient():
    a, b = operands("btd,de->bte")
    loss = lambda a, b: jnp.sin(einsum("btd,de->bte", a, b, F32)).sum()  # noqa: E731
    assert products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(a, b)) == 3
    assert products(jax.make_jaxpr(jax.grad(loss, argnums=0))(a, b)) == 2
    assert products(jax.make_jaxpr(jax.grad(loss, argnums=1))(a, b)) == 2
    # Residuals: the operand that the gradient needs, and not the other.
    _, back = jax.vjp(lambda a: einsum("btd,de->bte", a, b, BF16), a)
    kept = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(back) if leaf.ndim}
    assert kept == {(b.shape, BF16)}
