"""Quantized frozen LM: bfloat16 kernels, or int8 ones with a scale per output channel (qwix).

The model code is the same either way: all that it does with a kernel is to index a layer and to cast it to the
operands' type.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from spjax.extras import needs
from spjax.models.config import Compute
from spjax.types import Params

KINDS = {"float32": Compute("float32"), "bfloat16": Compute("bfloat16"), "int8": Compute("bfloat16")}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Kernel:
    """A kernel stored in int8 and dequantized where it is used, one layer at a time.

    Attributes:
      quantised: qwix.QArray of qvalue int8 [..., in, out], and scale float32 [..., 1, out].
    """

    quantised: Any

    def astype(self, dtype: Any) -> jax.Array:
        """Dequantize to the operands' type: [..., in, out]."""
        with needs("quant", "int8"):
            import qwix

        return qwix.dequantize(self.quantised).astype(dtype)


def quantize(params: Params, kind: str) -> Params:
    """Cast or quantize an LM's layer kernels; everything else stays float32.

    Embeddings, norms, biases and prompts are a few per cent of the bytes.

    Args:
      params: the `lm` tree of docs/design.md, float32.
      kind: float32 (unchanged), bfloat16 (half the bytes, bfloat16 operands), or int8 (a quarter of the bytes, bfloat16
        operands).

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"compute is {kind!r}, must be one of {', '.join(KINDS)}")
    if kind == "float32":
        return params

    def kernel(leaf: jax.Array) -> Any:
        if kind == "bfloat16":
            return leaf.astype(jnp.bfloat16)
        with needs("quant", "int8"):
            import qwix

        channels = (0, leaf.ndim - 1)  # a scale for each layer and output channel
        return Int8Kernel(qwix.quantize(leaf, jnp.int8, channelwise_axes=channels))

    layers = {
        name: {**weights, "kernel": kernel(weights["kernel"])} if "kernel" in weights else weights
        for name, weights in params["layers"].items()
    }
    return {**params, "layers": layers}


def size(params: Params) -> int:
    """Bytes of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
