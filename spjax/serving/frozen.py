"""The frozen LM in fewer bytes: bfloat16 kernels, or int8 ones with a scale for each output channel (qwix).

The model is the same code either way: all it does with a kernel is to take a layer of it and to ask for it in the
operands' type.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from spjax.models.config import Compute
from spjax.types import Params

KINDS = {"float32": Compute("float32"), "bfloat16": Compute("bfloat16"), "int8": Compute("bfloat16")}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Kernel:
    """A kernel that is kept in int8 and multiplied out where it is used, a layer at a time.

    Attributes:
      quantised: qwix.QArray of qvalue int8 [..., in, out], and scale float32 [..., 1, out].
    """

    quantised: Any

    def astype(self, dtype: Any) -> jax.Array:
        """The kernel in the operands' type, [..., in, out]."""
        import qwix

        return qwix.dequantize(self.quantised).astype(dtype)


def narrow(params: Params, kind: str) -> Params:
    """An LM's weights with its large kernels as `kind` has them; all else stays float32.

    Embeddings, norms, biases and prompts are a few per cent of the bytes.

    Args:
      params: the `lm` tree of docs/design.md, float32.
      kind: float32 (as they are), bfloat16 (half the bytes; operands bfloat16), or int8 (a quarter; operands
        bfloat16).

    Raises:
      ValueError: no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"compute is {kind!r}, must be one of {', '.join(KINDS)}")
    if kind == "float32":
        return params

    def kernel(leaf: jax.Array) -> Any:
        if kind == "bfloat16":
            return leaf.astype(jnp.bfloat16)
        import qwix

        channels = (0, leaf.ndim - 1)  # a scale for each layer and output
        return Int8Kernel(qwix.quantize(leaf, jnp.int8, channelwise_axes=channels))

    layers = {
        name: {**weights, "kernel": kernel(weights["kernel"])} if "kernel" in weights else weights
        for name, weights in params["layers"].items()
    }
    return {**params, "layers": layers}


def size(params: Params) -> int:
    """Bytes of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
