"""Checks the shapes in annotations (jaxtyping) in every call of a test, by beartype.

jaxtyping's own import hook wraps private functions and closures too, which is slow, and checks annotations without
shapes too, whose values the functions check themselves with better messages.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import beartype
from jaxtyping import jaxtyped

CHECKED = re.compile(r"spjax\.(models|encoders)\.\w+|spjax\.training\.losses")
_SHAPE = re.compile(r"\b(Bool|Float|Int|Key|Shaped)\[")
_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # an int is a float


def check_functions(module: ModuleType) -> list[str]:
    """Wrap the public functions and methods of a module that have shapes in their annotations; return their names."""
    wrapped = []
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    for scope in (module, *(value for value in classes if value.__module__ == module.__name__)):
        for name, value in list(vars(scope).items()):
            function = value.fget if isinstance(value, property) else value
            if not inspect.isfunction(function) or function.__module__ != module.__name__:
                continue
            if any(_SHAPE.search(str(hint)) for hint in function.__annotations__.values()):
                function.__signature__ = _shapes_only(inspect.signature(function))
                setattr(scope, name, jaxtyped(value, typechecker=_check))
                wrapped.append(function.__qualname__)
    return wrapped


def _shapes_only(signature: inspect.Signature) -> inspect.Signature:
    # NumPy arrays are accepted wherever JAX arrays are, as by JAX itself.
    only = lambda hint: hint.replace("[jax.Array,", "[jax.typing.ArrayLike,") if _SHAPE.search(str(hint)) else Any  # noqa: E731
    parameters = [one.replace(annotation=only(one.annotation)) for one in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=only(signature.return_annotation))


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, _: object = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if CHECKED.fullmatch(name) else None
        if spec is None:
            return None
        run = spec.loader.exec_module

        def run_and_check(module: ModuleType) -> None:
            run(module)
            check_functions(module)

        spec.loader.exec_module = run_and_check
        return spec


def install() -> None:
    """Check the modules imported from now on."""
    sys.meta_path.insert(0, _Finder)
