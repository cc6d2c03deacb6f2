"""A pickle interpreter that executes no code from the file.

Python's unpickler calls whatever a file names, and a restricted one still calls what its allow-list contains. This one
only walks the opcodes and builds plain containers, numpy arrays from their bytes, and for every class or function that
a file names an `Inert` record of the call. Only the caller's `makers` are run.
"""

from __future__ import annotations

import dataclasses
import io
import math
import mmap
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

import numpy as np

from spjax.convert import ConvertError

Maker = Callable[..., Any]

_SCALARS = (str, bytes, int, float, bool, type(None))
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_DTYPE = re.compile(r"[?bBhHiIlLqQefdg]|[<>|=]?(b1|[iu][1248]|f[248])")


@dataclasses.dataclass(frozen=True)
class Global:
    """A class or function named in a pickle."""

    name: str  # "module.qualified_name"


@dataclasses.dataclass(eq=False)
class Inert:
    """A call in a pickle, recorded and not executed.

    Attributes:
      name: "module.qualified_name" of the class or function.
      args: arguments of the call.
      state: what would become its `__dict__` (argparse.Namespace keeps its values here).
      items: items that would be appended, or (key, value) pairs that would be set.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = dataclasses.field(default_factory=list)

    def __repr__(self) -> str:  # short, since records in a hostile file may be nested without end
        return f"<inert {self.name[:80]}>"


@dataclasses.dataclass(eq=False)
class PickledDtype:
    """A numpy dtype under construction; numeric types only, no objects."""

    dtype: np.dtype

    def build(self, state: tuple[Any, ...]) -> None:
        """Set the byte order from numpy's (version, order, ...) state."""
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


@dataclasses.dataclass(eq=False)
class PickledArray:
    """A numpy array inside a pickle; `numpy()` returns it."""

    array: np.ndarray | None = None

    def build(self, state: tuple[Any, ...]) -> None:
        """Fill the array from numpy's (version, shape, dtype, is_fortran, bytes) state."""
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, PickledDtype) or not isinstance(data, bytes):
            raise ConvertError("a numpy array in it does not hold numbers")
        counts = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not counts or len(data) != math.prod(shape) * dtype.dtype.itemsize:
            raise ConvertError(f"a numpy array of shape {shown(shape)} in it holds {len(data)} bytes")
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")

    def numpy(self) -> np.ndarray:
        """The array, read-only.

        Raises:
          ConvertError: the pickle does not contain its data.
        """
        if self.array is None:
            raise ConvertError("a numpy array in it has no contents")
        return self.array


def shown(value: Any) -> str:
    """Format a value of a file for a message, in bounded length: the repr of a hostile one may be endless."""
    if isinstance(value, tuple) and len(value) <= 8:
        return f"({', '.join('...' if isinstance(part, tuple) else shown(part) for part in value)})"
    plain = isinstance(value, (str, bytes, float, bool, type(None), Inert, Global))
    if plain or (isinstance(value, int) and value.bit_length() <= 64):
        return f"{value!r:.80}"
    return f"a {type(value).__name__}"


def _numpy_dtype(name: str, *_: Any) -> PickledDtype:
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise ConvertError(f"a numpy array in it is of type {shown(name)}, not of numbers")
    return PickledDtype(np.dtype(name))


def _numpy_scalar(dtype: PickledDtype, data: bytes) -> np.generic:
    if not isinstance(data, bytes) or len(data) != dtype.dtype.itemsize:
        raise ConvertError("a numpy number in it has the wrong number of bytes for its type")
    return np.frombuffer(data, dtype.dtype)[0]


def _latin1(text: str, encoding: str) -> bytes:
    # Protocol 2 stores bytes this way. Other codecs are refused, since one could be a decompressor.
    if encoding not in ("latin1", "latin-1"):
        raise ConvertError(f"bytes in it are encoded as {shown(encoding)}; only latin1 is read")
    return text.encode("latin-1")


def _mapping(pairs: Any = (), *_: Any) -> dict[Any, Any]:
    return {_key(key): value for key, value in (pairs.items() if isinstance(pairs, dict) else pairs)}


_SLACK = 1 << 20  # bytes and items that calls in a pickle may create beyond its size
_MAKERS: dict[str, Maker] = {
    "collections.OrderedDict": _mapping,
    "_codecs.encode": _latin1,
    "builtins.bytes": lambda: b"",  # protocol 2 stores empty bytes this way
    "numpy.dtype": _numpy_dtype,
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: PickledArray() for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in ("core", "_core")},
}


def _key(value: Any) -> Any:
    # Hashing nested tuples recurses in C without a limit, so only flat keys are allowed.
    flat = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, (*_SCALARS, Global, Inert)) for part in flat):
        raise ConvertError(f"a dictionary in it has a key of type {type(value).__name__}")
    return value


def _global(module: str, name: str) -> Global:
    # Protocols 0 to 2 use Python 2's module names.
    return Global(f"{_PYTHON_2.get(module, module)}.{name}")


class _Machine:
    """Stack and memo of one pickle."""

    def __init__(
        self,
        makers: Mapping[str, Maker],
        persistent: Callable[[Any], Any] | None,
        built: Callable[[Inert], Any] | None = None,
    ) -> None:
        self.makers = {**_MAKERS, **makers}
        self.persistent = persistent
        self.built = built
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.made = 0  # bytes and items that calls have created

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ConvertError("its pickle takes more from the stack than it put there")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        height = self.marks.pop()
        top = self.stack[height:]
        del self.stack[height:]
        return top

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise ConvertError("a call in its pickle has arguments that are not a tuple")
        if not isinstance(function, (Global, Inert)):
            raise ConvertError(f"its pickle calls a {type(function).__name__}")
        if function.name == "copyreg._reconstructor" and args and isinstance(args[0], Global):
            return Inert(args[0].name)  # protocols 0 and 1 store an instance this way
        if isinstance(function, Global) and function.name in self.makers:
            value = self.makers[function.name](*args)
            self.made += len(value) if isinstance(value, (bytes, dict)) else 1
            return value
        return Inert(function.name if isinstance(function, Global) else f"{function.name[:80]}(...)", args)

    def load_persistent(self, value: Any) -> Any:
        if self.persistent is None:
            raise ConvertError("its pickle refers to something outside itself")
        return self.persistent(value)

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (list, Inert)):
            raise ConvertError(f"its pickle appends to a {type(target).__name__}")
        (target if isinstance(target, list) else target.items).extend(values)

    def set_items(self, flat: list[Any]) -> None:
        target, pairs = self.stack[-1], list(zip(flat[::2], flat[1::2], strict=True))
        if isinstance(target, dict):
            target.update(_mapping(pairs))
        elif isinstance(target, Inert):
            target.items.extend(pairs)
        else:
            raise ConvertError(f"its pickle sets an item of a {type(target).__name__}")

    def build(self, state: Any) -> None:
        target = self.stack[-1]
        if isinstance(target, (PickledArray, PickledDtype)):
            target.build(state)
        elif isinstance(target, Inert):
            target.state = state
            if self.built is not None:
                self.stack[-1] = self.built(target)
        elif not isinstance(target, dict):  # attributes of an OrderedDict (torch's _metadata) are ignored
            raise ConvertError(f"its pickle sets attributes of a {type(target).__name__}")

    def step(self, op: str, arg: Any) -> None:
        """Execute one opcode other than STOP."""
        stack = self.stack
        match op:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op])
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT":
                stack.append(arg)
            case "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(arg)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(arg)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_SET":
                stack.append(Inert("builtins.set"))
            case "MARK":
                self.marks.append(len(stack))
            case "DICT":
                flat = self.pop_mark()
                stack.append({})
                self.set_items(flat)
            case "LIST":
                stack.append(self.pop_mark())
            case "TUPLE":
                stack.append(tuple(self.pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                parts = [self.pop() for _ in range(int(op[-1]))]
                stack.append(tuple(reversed(parts)))
            case "FROZENSET":
                stack.append(Inert("builtins.frozenset", items=self.pop_mark()))
            case "APPEND":
                self.append([self.pop()])
            case "APPENDS" | "ADDITEMS":
                self.append(self.pop_mark())
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_mark())
            case "POP":
                if self.marks and len(stack) == self.marks[-1]:
                    self.marks.pop()
                else:
                    self.pop()
            case "POP_MARK":
                self.pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[arg])
            case "GLOBAL":
                stack.append(_global(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                stack.append(_global(module, name))
            case "REDUCE" | "NEWOBJ":
                args, function = self.pop(), self.pop()
                stack.append(self.call(function, args))
            case "NEWOBJ_EX":
                keywords, args, function = self.pop(), self.pop(), self.pop()
                stack.append(Inert(getattr(function, "name", "?"), args, items=[keywords]))
            case "INST":
                stack.append(self.call(_global(*arg.split(" ", 1)), tuple(self.pop_mark())))
            case "OBJ":
                function, *args = self.pop_mark()
                stack.append(self.call(function, tuple(args)))
            case "BUILD":
                self.build(self.pop())
            case "PERSID":
                stack.append(self.load_persistent(arg))
            case "BINPERSID":
                stack.append(self.load_persistent(self.pop()))
            case _:
                raise ConvertError(f"its pickle uses the opcode {op}, which is not allowed in data files")


def read_pickle(
    file: IO[bytes] | mmap.mmap | bytes,
    makers: Mapping[str, Maker] | None = None,
    persistent: Callable[[Any], Any] | None = None,
    built: Callable[[Inert], Any] | None = None,
) -> Any:
    """Read one pickle without running anything that it names.

    Args:
      file: bytes, or a file open for reading (needs read, readline and tell), which is left after the pickle.
      makers: "module.name" → function that replaces calls of that name. It gets the pickle's arguments, which are
        untrusted.
      persistent: function that resolves persistent ids; None to refuse them.
      built: function that gets every `Inert` as soon as its state is set, and returns its replacement. It may read from
        `file`, which is positioned right after the state: joblib stores the bytes of arrays there.

    Returns:
      Dicts, lists, tuples, numbers, strings, bytes, `PickledArray`, what the makers return, and `Inert` or `Global` for
      everything else. Containers may be shared or contain themselves, so limit the depth when walking them.

    Raises:
      ConvertError: truncated, not a pickle, or with contents that are not allowed; the message has no file name.
    """
    machine = _Machine(makers or {}, persistent, built)
    try:
        # An mmap has the methods of a file, but not its type.
        stream = io.BytesIO(file) if isinstance(file, bytes) else cast(IO[bytes], file)
        for opcode, arg, position in pickletools.genops(stream):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, arg)
            # An honest pickle creates each value once; repeated calls on a memoized value could exhaust the memory.
            if machine.made > (position or 0) + _SLACK:
                raise ConvertError("its pickle creates far more data than it holds")
    except ConvertError:
        raise
    except Exception as error:  # a hostile pickle may raise any error in the interpreter
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        raise ConvertError(f"its pickle is damaged or truncated ({reason})") from error
    raise ConvertError("its pickle is truncated")
