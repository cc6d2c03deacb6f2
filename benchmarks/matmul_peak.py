"""Peak of matrix products on this machine, at the shapes of the full-size LM: the upper bound for a step.

    python -m benchmarks.matmul_peak

Products of [rows, D] with [D, D], [D, 4D] and [4D, D] kernels, forward and transposed as in the backward pass, in
float32 and in bfloat16 with float32 accumulation (JAX keeps the float32 result, PyTorch rounds it to bfloat16).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

from benchmarks import common

SIDES = ("jax-float32", "jax-bfloat16", "torch-float32", "torch-float32-onednn", "torch-bfloat16")
REPEATS = 3


def shapes(rows: int, dim: int) -> list[tuple[int, int, int]]:
    """Returns (rows, in, out) of the LM's products."""
    return [(rows, dim, dim), (rows, dim, 4 * dim), (rows, 4 * dim, dim)]


def jax_products(rows: int, dim: int, dtype: str) -> list[tuple[str, int, Callable[[], object]]]:
    """Returns (name, FLOPs, blocking call) of each product in JAX."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.einsum("mk,kn->mn", x, kernel, preferred_element_type=jnp.float32)

    @jax.jit
    def backward(grad: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.einsum("mn,kn->mk", grad, kernel, preferred_element_type=jnp.float32)

    products = []
    for m, k, n in shapes(rows, dim):
        x, kernel, grad = (jnp.ones(shape, dtype) for shape in ((m, k), (k, n), (m, n)))
        for name, call, a in (("forward", forward, x), ("backward", backward, grad)):
            products.append(
                (f"{m}x{k}x{n} {name}", 2 * m * k * n, lambda f=call, a=a, w=kernel: f(a, w).block_until_ready())
            )
    return products


def torch_products(rows: int, dim: int, dtype: str, onednn: bool) -> list[tuple[str, int, Callable[[], object]]]:
    """Returns (name, FLOPs, call) of each product in PyTorch, by F.linear or by oneDNN's kernel."""
    import torch

    torch.set_num_threads(common.cores())

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if onednn:
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return torch.nn.functional.linear(x, weight)

    products = []
    for m, k, n in shapes(rows, dim):
        x, weight = (torch.ones(shape, dtype=getattr(torch, dtype)) for shape in ((m, k), (n, k)))
        products.append((f"{m}x{k}x{n} forward", 2 * m * k * n, lambda x=x, w=weight: linear(x, w)))
    return products


def runner(side: str, rows: int, dim: int) -> Callable[[], common.Result]:
    """Returns a timed run of one of SIDES: best GFLOP/s of each product, and the maximum of all."""
    library, dtype, *onednn = side.split("-")
    if library == "jax":
        products = jax_products(rows, dim, dtype)
    else:
        products = torch_products(rows, dim, dtype, bool(onednn))

    def run() -> common.Result:
        rates = {}
        for name, flops, call in products:
            call()
            seconds = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            rates[name] = flops / min(seconds) / 1e9
        return {"peak": max(rates.values()), "rates": rates}

    return run


def command(side: str, rows: int, dim: int) -> list[str]:
    """Returns the command of the process of a side."""
    return [sys.executable, "-m", "benchmarks.matmul_peak", f"--side={side}", f"--rows={rows}", f"--dim={dim}"]


def main() -> None:
    """Runs one side, or alternates between all of them and prints their peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1760)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="write all results to this JSON file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        common.serve(runner(args.side, args.rows, args.dim))
        return
    results = common.race({side: command(side, args.rows, args.dim) for side in SIDES}, args.rounds)
    names = list(dict.fromkeys(name for rounds in results.values() for name in rounds[0]["rates"]))
    rows = [["GFLOP/s, median of rounds", *results]]
    for name in names:
        rates = [[r["rates"][name] for r in rounds if name in r["rates"]] for rounds in results.values()]
        rows.append([name, *(f"{statistics.median(each):.0f}" if each else "" for each in rates)])
    rows.append(["best product", *(f"{common.median(rounds, 'peak'):.0f}" for rounds in results.values())])
    common.report("Matrix-product peak", args, [common.table(rows)], results)


if __name__ == "__main__":
    main()
