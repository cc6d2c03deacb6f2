"""Cost of a training update: time of its matmuls at the devices' peak FLOP/s, and device memory."""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s by JAX device kind, from cloud.google.com/tpu/docs (v4, v5e, v5p, v6e) and NVIDIA's data sheets
# (A100, H100, H200, L4).
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
}


class Cost(NamedTuple):
    """Cost of one update.

    Attributes:
      seconds: time of its matmuls on all devices at peak FLOP/s.
      bytes: device memory of the compiled program: arguments (LM, adapters, optimizer state, batch), results and
        temporaries. 0 if the compiler does not report it.
    """

    seconds: float
    bytes: int


def cost_of(step: Any, operand: Any) -> Callable[..., Cost]:
    """Make a function from an update's arguments to its `Cost`, cached by argument shapes.

    Args:
      step: jitted update on a global batch. It is compiled here, and its first call reuses the compiled program.
      operand: dtype of the matmul operands.
    """
    known: dict[Any, Cost] = {}
    at_peak = functools.cache(lambda: peak(operand))

    def cost(*args: Any) -> Cost:
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(args[1:]))
        if shapes not in known:
            traced = step.trace(*args)
            known[shapes] = Cost(flops(traced.jaxpr) / at_peak(), _memory(traced.lower().compile()))
        return known[shapes]

    return cost


def _memory(program: Any) -> int:
    found = program.memory_analysis()
    if found is None:
        return 0
    results = found.output_size_in_bytes - found.alias_size_in_bytes  # not donated
    return int(found.argument_size_in_bytes + results + found.temp_size_in_bytes)


def flops(program: Any) -> float:
    """FLOPs of the matmuls of a traced program, two per multiply-add, with loops unrolled."""
    return float(sum(2 * math.prod(shape) * depth * times for shape, depth, times in products(program)))


def products(program: Any) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Yield (result shape, contracted size, number of executions) of every matmul of a traced program."""
    for equation, times in equations(program.jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            yield equation.outvars[0].aval.shape, depth, times


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Yield every equation of a jaxpr, nested ones included, and how often it is executed.

    Only the first branch of a conditional (here: of platforms) is counted.
    """
    for equation in jaxpr.eqns:
        yield equation, times
        for name, value in equation.params.items():
            parts = value if isinstance(value, tuple | list) else (value,)
            for part in parts[:1] if name == "branches" else parts:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, times * equation.params.get("length", 1))


def peak(operand: Any) -> float:
    """Peak FLOP/s of all devices: published values for bfloat16, otherwise measured with a large square matmul."""
    devices, operand = jax.devices(), jnp.dtype(operand)
    kind = devices[0].device_kind
    published = [value for name, value in PEAKS.items() if re.match(rf"{name}(?!\w| lite)", kind)]
    if published and operand == jnp.bfloat16:
        return published[0] * len(devices)
    cpu = devices[0].platform == "cpu"  # CPU devices of a process share its cores
    return _measured(1024 if cpu else 8192, operand) * (jax.process_count() if cpu else len(devices))


def _measured(size: int, operand: jnp.dtype) -> float:
    highest = jax.lax.Precision.HIGHEST if operand == jnp.float32 else None
    product = jax.jit(lambda x: jnp.dot(x, x, precision=highest, preferred_element_type=jnp.float32))
    x = jax.device_put(jnp.ones((size, size), operand), jax.local_devices()[0])
    product(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
