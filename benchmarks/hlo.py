"""Analyses a compiled XLA program from its text: matrix products, memory traffic, collectives.

A compiled program's `cost_analysis()` counts the body of a loop once, and a scan over layers is a loop. Here every
instruction counts as often as its loops run.

- FLOPs are those of `dot` and `convolution` (all that matrix units do), two a multiply-add, without positions in
  padding or the holes of a dilation. A float32 product of precision HIGHEST takes six passes of bfloat16 on a TPU, HIGH
  three.
- Bytes are those read from and written to main memory, with arrays padded to the tiles of their layout. Arrays in a
  TPU's vector memory, S(1) in their layout, cost nothing; of an operand that is only sliced, the slice counts.
- A collective counts the bytes of its results on one chip.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BITS = {"token": 0, "opaque": 0, "pred": 8, "bf16": 16, "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
PASSES = {"highest": 6, "high": 3}  # passes of the matrix unit for a float32 product
# Instructions that move no data.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id",
    "replica-id", "domain", "add-dependency",
}  # fmt: skip
ROLES = ("calls", "to_apply", "body", "condition", "true_computation", "false_computation")  # of called computations
SLICES = ("dynamic-slice", "slice", "gather")
WHOLE = ("convolution", "dot", "reduce", "reduce-window", "sort", "scatter", "custom-call")  # read entire operands


class Array(NamedTuple):
    """A result of an instruction: dtype, dimensions, and layout as in the text, without braces."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def in_main_memory(self) -> bool:
        """Whether the array is in main memory, not in vector memory or a semaphore."""
        return not re.search(r"S\([1-9]\d*\)", self.layout)

    @property
    def nbytes(self) -> float:
        """Bytes without padding."""
        return self._bytes(self.dims)

    @property
    def size(self) -> float:
        """Bytes in memory, padded to tiles."""
        dims = list(self.dims)
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if tile and order:
            minor = [int(axis) for axis in order.split(",")]
            sides = [int(side) for side in tile[1].split(",")]
            for axis, side in zip(minor, reversed(sides), strict=False):
                dims[axis] = -(-dims[axis] // side) * side
        return self._bytes(dims)

    def _bytes(self, dims: Sequence[int]) -> float:
        bits = BITS[self.dtype] if self.dtype in BITS else int(re.sub(r"\D", "", self.dtype))
        return math.prod(dims) * bits / 8


class Instruction(NamedTuple):
    """A line of a computation. `calls`: computations that it calls, by role (calls, body, condition, ..)."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    calls: dict[str, str]
    root: bool


Computation = dict[str, Instruction]


class Collective(NamedTuple):
    """A collective instruction on one chip.

    Attributes:
      kind: one of COLLECTIVES.
      arrays: dimensions of its results.
      bytes: of the results without padding, each time.
      times: number of executions.
      groups: int [groups, members], partitions that take part together.
      origin: `op_name` of the instruction, which names its source.
    """

    kind: str
    arrays: list[tuple[int, ...]]
    bytes: float
    times: int
    groups: np.ndarray
    origin: str


class Work(NamedTuple):
    """Costs of one execution of an instruction, and the number of executions.

    Attributes:
      name: of the instruction.
      origin: its `op_name`.
      times: number of executions.
      flops: of matrix products.
      passes: FLOPs times the number of passes of the matrix unit.
      bytes: read from and written to main memory.
      cycles: the compiler's estimate; 0 if it has none.
    """

    name: str
    origin: str
    times: int
    flops: float
    passes: float
    bytes: float
    cycles: float


class Costs(NamedTuple):
    """Costs of a program on one chip."""

    work: list[Work]
    collectives: list[Collective]


class Program(NamedTuple):
    """A compiled program: computations by name, the entry computation, and the number of partitions."""

    computations: dict[str, Computation]
    entry: str
    partitions: int


def parse(text: str) -> Program:
    """Parses the text of `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$", line)
        if head:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            one = _instruction(line)
            current[one.name] = one
    if not entry:
        raise ValueError("hlo: no ENTRY computation in the text: give compiled.as_text() of a compiled program")
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(line: str) -> Instruction:
    head, _, rest = re.sub(r"/\*.*?\*/", "", line).partition(" = ")
    name = head.split()[-1].lstrip("%")
    shape, rest = _closed(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, rest = re.match(r"\s*([\w\-]+)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    inside, attributes = _closed(rest)
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inside))
    if opcode in ("constant", "parameter"):  # the value, or the number
        attributes = inside + attributes
    calls = dict(re.findall(rf"\b({'|'.join(ROLES)})=%?([\w.\-]+)", attributes))
    branches = re.search(r"branch_computations=\{([^}]*)\}", attributes)
    if branches:
        calls |= {f"branch {n}": called.strip(" %") for n, called in enumerate(branches[1].split(","))}
    return Instruction(name, opcode, _arrays(shape), operands, attributes, calls, "ROOT" in head.split())


def _closed(text: str) -> tuple[str, str]:
    """Splits a text that starts with a parenthesis into the parenthesised part and the rest."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[1:place], text[place + 1 :]
    raise ValueError(f"hlo: unclosed parenthesis: {text[:80]!r}")


def _arrays(shape: str) -> tuple[Array, ...]:
    found = re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", shape)
    return tuple(Array(kind, tuple(int(d) for d in dims.split(",") if d), layout) for kind, dims, layout in found)


def costs(program: Program) -> Costs:
    """Returns the computation, memory traffic and communication of the program, with loops multiplied out.

    Raises:
      ValueError: a loop with an unknown number of iterations, or an unknown notation.
    """
    found = Costs([], [])
    channels: dict[str, Collective] = {}
    for one, computation, times in _running(program, program.entry, 1):
        for deep in (one, *(deep for called in one.calls.values() for deep in _inside(program, called))):
            if deep.opcode.removesuffix("-start") in COLLECTIVES:
                # An asynchronous collective is listed with each instruction that runs beside it, under one channel.
                channel = re.search(r"channel_id=(\d+)", deep.attributes)
                new = _collective(program, deep, times)
                old = channels.setdefault(channel[1] if channel else deep.name, new)
                channels[channel[1] if channel else deep.name] = min(old, new, key=lambda each: each.times)
        if one.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
            continue
        flops = passes = 0.0
        for deep, where in _products(program, one, computation):
            each = _flops(deep, where)
            flops += each
            passes += each * _passes(deep)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
        moved = 0.0 if one.opcode.endswith("-done") else _traffic(program, one, computation)
        work = Work(one.name, _origin(one), times, flops, passes, moved, float(cycles[1]) if cycles else 0.0)
        if work.flops or work.bytes or work.cycles:
            found.work.append(work)
    found.collectives.extend(channels.values())
    return found


def _running(program: Program, name: str, times: int) -> Iterator[tuple[Instruction, Computation, int]]:
    """Yields executed instructions with computation and number of executions; every branch of a conditional counts."""
    computation = program.computations[name]
    for one in computation.values():
        if one.opcode == "while":
            turns = times * _turns(program, one, computation)
            yield from _running(program, one.calls["body"], turns)
        elif one.opcode in ("call", "conditional", "async-start"):
            for called in one.calls.values():
                yield from _running(program, called, times)
        elif one.opcode not in FREE:
            yield one, computation, times


def _turns(program: Program, loop: Instruction, computation: Computation) -> int:
    known = re.search(r'known_trip_count":?=?\{"?n"?:"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations[loop.calls["condition"]]
    test = next(one for one in condition.values() if one.root)
    sides = [condition[name] for name in test.operands]
    counter = next((side for side in sides if side.opcode == "get-tuple-element"), None)
    limit = next((side for side in sides if side.opcode == "constant"), None)
    if test.opcode != "compare" or "direction=LT" not in test.attributes or counter is None or limit is None:
        raise ValueError(f"hlo: the number of iterations of loop {loop.name} is unknown: its test is {test.opcode}")
    index = int(re.search(r"index=(\d+)", counter.attributes)[1])  # type: ignore[index]
    start = _constant(computation, computation[loop.operands[0]].operands[index])
    return int(re.match(r"\d+", limit.attributes)[0]) - start  # type: ignore[index]


def _constant(computation: Computation, name: str) -> int:
    one = computation[name]
    while one.opcode in ("copy", "bitcast"):
        one = computation[one.operands[0]]
    number = re.match(r"-?\d+", one.attributes)
    if one.opcode != "constant" or not number:
        raise ValueError(f"hlo: a loop counts from {name}, which is not a constant but {one.opcode}")
    return int(number[0])


def _inside(program: Program, name: str) -> Iterator[Instruction]:
    for one in program.computations.get(name, {}).values():
        yield one
        for called in one.calls.values():
            yield from _inside(program, called)


def _products(
    program: Program, one: Instruction, computation: Computation
) -> Iterator[tuple[Instruction, Computation]]:
    """Yields the matrix products of an instruction: itself, or all in its fusion."""
    if one.opcode in ("dot", "convolution"):
        yield one, computation
    elif "calls" in one.calls:
        within = program.computations[one.calls["calls"]]
        for deep in within.values():
            yield from _products(program, deep, within)


def _flops(one: Instruction, computation: Computation) -> float:
    left, right = (computation[name].results[0].dims for name in one.operands[:2])
    if one.opcode == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        axes = [int(axis) for axis in summed[1].split(",") if axis] if summed else []
        return 2.0 * math.prod(one.results[0].dims) * math.prod(left[axis] for axis in axes)
    spec = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    assert spec is not None
    ours, kernel, out = spec.groups()
    inside = re.search(r"window=\{([^}]*)\}", one.attributes)
    window = dict(re.findall(r"(size|stride|pad|lhs_dilate|rhs_dilate)=([\dx_\-]+)", inside[1] if inside else ""))
    count = len(kernel) - 2

    def numbers(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * count

    places = 1
    for axis in range(count):
        size, stride, holes, far = (
            int(numbers(name, "1")[axis]) for name in ("size", "stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(numbers("pad", "0_0")[axis].split("_")[0])
        places *= _hits(
            left[ours.index(str(axis))], one.results[0].dims[out.index(str(axis))], size, stride, low, holes, far
        )
    groups = {name: int(n) for name, n in re.findall(r"(feature_group_count|batch_group_count)=(\d+)", one.attributes)}
    features = left[ours.index("f")] / groups.get("feature_group_count", 1)
    rows = left[ours.index("b")] / groups.get("batch_group_count", 1)
    return 2.0 * features * rows * right[kernel.index("o")] * places


@functools.lru_cache(maxsize=4096)
def _hits(source: int, out: int, size: int, stride: int, low: int, holes: int, far: int) -> int:
    """Counts, along an axis, pairs of output and kernel positions that meet an input value, not padding or a hole."""
    start = np.arange(out) * stride - low
    last = (source - 1) * holes
    met = 0
    for tap in range(size):
        place = start + tap * far
        met += int(np.count_nonzero((place >= 0) & (place <= last) & (place % holes == 0)))
    return met


def _passes(one: Instruction) -> int:
    precision = re.search(r"operand_precision=\{(\w+)", one.attributes)
    return PASSES.get(precision[1], 1) if precision else 1


def _origin(one: Instruction) -> str:
    name = re.search(r'op_name="([^"]*)"', one.attributes)
    return name[1] if name else ""


def _traffic(program: Program, one: Instruction, computation: Computation) -> float:
    """Returns the bytes that an instruction reads from and writes to main memory."""
    if one.opcode.endswith("-start"):  # an asynchronous copy: its results are target, source and a semaphore
        written = next(array for array in one.results[1 if one.opcode == "slice-start" else 0 :])
        there = [written, Array(written.dtype, written.dims, computation[one.operands[0]].results[0].layout)]
        return sum(array.size for array in there if array.in_main_memory)
    if one.opcode == "custom-call" and not any(array.size for array in one.results):
        return 0.0
    if re.search(r'custom_call_target="(AllocateBuffer|ConcatBitcast|Assume\w+)"', one.attributes):
        return 0.0
    if one.opcode == "fusion":
        within, shares = program.computations[one.calls["calls"]], _shares(program, one.calls["calls"])
        read = sum(
            shares[n] * _result(computation, name).size
            for n, name in enumerate(one.operands)
            if _result(computation, name).in_main_memory
        )
        return read + _written(program, within, one.results)
    read = 0.0
    for number, name in enumerate(one.operands):
        array = _result(computation, name)
        if array.in_main_memory and not (one.opcode == "dynamic-update-slice" and number == 0):
            read += min(array.size, one.results[0].size) if one.opcode in SLICES else array.size
    if one.opcode == "dynamic-update-slice":
        return read + (_result(computation, one.operands[1]).size if one.results[0].in_main_memory else 0)
    return read + sum(array.size for array in one.results if array.in_main_memory)


def _result(computation: Computation, name: str) -> Array:
    return (computation[name].results or (Array("token", (), ""),))[0]


def _parameters(within: Computation) -> dict[int, Instruction]:
    return {int(one.attributes.partition(",")[0]): one for one in within.values() if one.opcode == "parameter"}


def _shares(program: Program, name: str, wanted: float = 1.0) -> dict[int, float]:
    """Returns the fraction of each fusion parameter that is read if the fraction `wanted` of its result is."""
    within = program.computations[name]
    share = dict.fromkeys(within, 0.0)
    for one in reversed(within.values()):
        needed = share[one.name] = wanted if one.root else share[one.name]
        if not needed:
            continue
        inner = _shares(program, one.calls["calls"], needed) if one.opcode == "fusion" else {}
        for number, source in enumerate(one.operands):
            known = share[source]
            if one.opcode in SLICES and number == 0:  # slices of one array add up
                fraction = math.prod(one.results[0].dims) / max(1, math.prod(_result(within, source).dims))
                share[source] = min(1.0, known + needed * fraction)
            elif one.opcode == "pad" and number == 0:
                share[source] = max(known, needed * _kept(one, _result(within, source)))
            elif one.opcode == "dynamic-update-slice":  # in place: the target is not read
                share[source] = known if number == 0 else 1.0
            else:
                share[source] = max(known, inner.get(number, 1.0 if one.opcode in WHOLE else needed))
    return {number: share[one.name] for number, one in _parameters(within).items()}


def _kept(pad: Instruction, source: Array) -> float:
    """Returns the fraction of a padded array that is kept; negative padding crops."""
    text = re.search(r"padding=([\d_x\-]+)", pad.attributes)
    sides = [[int(n) for n in axis.split("_")[:2]] for axis in text[1].split("x")] if text else []
    return math.prod((n + sum(min(side, 0) for side in ends)) / n for n, ends in zip(source.dims, sides, strict=False))


def _written(program: Program, within: Computation, results: tuple[Array, ...]) -> float:
    """Returns the bytes that a fusion writes; for an in-place update, those of the update."""
    root = next(one for one in within.values() if one.root)
    parts = [within[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for array, part in zip(results, parts, strict=False):
        where, one = within, part
        while one.opcode in ("bitcast", "fusion"):
            if one.opcode == "fusion":
                where = program.computations[one.calls["calls"]]
                one = next(deep for deep in where.values() if deep.root)
            else:
                one = where[one.operands[0]]
        update = one.opcode == "dynamic-update-slice"
        if array.in_main_memory:
            total += _result(where, one.operands[1]).size if update else array.size
    return total


def _collective(program: Program, one: Instruction, times: int) -> Collective:
    kind = one.opcode.removesuffix("-start")
    arrays = list(one.results)
    if one.opcode.endswith("-start") and kind != "all-reduce":  # operand, result, and possibly semaphores
        arrays = [max(arrays, key=lambda array: array.nbytes)]
    groups = replica_groups(one.attributes, program.partitions)
    dims = [array.dims for array in arrays]
    return Collective(kind, dims, sum(array.nbytes for array in arrays), times, groups, _origin(one))


def replica_groups(attributes: str, partitions: int) -> np.ndarray:
    """Parses the groups of a collective, int [groups, members], from an instruction's attributes.

    Args:
      attributes: the text after the operands, with `replica_groups` as lists, as `[2,2]<=[4]T(1,0)` or by mesh axes; or
        with `source_target_pairs`.
      partitions: of the program; an empty list means all of them.

    Raises:
      ValueError: another notation.
    """
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    if pairs:
        return np.asarray([[int(n) for n in pair] for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]).reshape(-1, 2)
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    if listed:
        rows = [[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d,]*)\}", listed[1])]
        return np.asarray(rows) if rows else np.arange(partitions)[None]
    spread = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if spread:
        shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in spread.groups())
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)  # type: ignore[arg-type]
    ids_of = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    mesh = re.search(rf"replica_groups=mesh\[([^\]]*)\]{ids_of}\s*\{{([^}}]*)\}}", attributes)
    if mesh and "(" not in mesh[4]:
        axes = dict(re.findall(r"'?([\w]+)'?=(\d+)", mesh[1]))
        taken = re.findall(r"[\w]+", mesh[4])
        names = list(axes)
        ids = np.arange(math.prod(map(int, axes.values())))
        dims, turned = ([int(n) for n in part.split(",")] if part else None for part in mesh.group(2, 3))
        if dims:  # the devices of the mesh are permuted
            ids = ids.reshape(dims).transpose(turned)
        ids = ids.reshape([int(n) for n in axes.values()])
        order = [n for n, name in enumerate(names) if name not in taken] + [names.index(name) for name in taken]
        return ids.transpose(order).reshape(-1, math.prod(int(axes[name]) for name in taken))
    found = re.search(r"replica_groups=.{0,80}", attributes)
    raise ValueError(f"hlo: unknown notation of groups: {found[0] if found else attributes[:80]!r}")
