"""Optional dependencies: a missing one is reported with the extra of pyproject.toml that has it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator


class MissingExtraError(ImportError):
    """A package of an extra is not installed. The message says what needs it and how to install the extra."""


@contextlib.contextmanager
def needs(extra: str, purpose: str) -> Iterator[None]:
    """Context of the imports of an extra's packages.

    Args:
      extra: the extra's name, such as `data`.
      purpose: what needs the packages, such as `reading unit records`; the subject of the message.

    Raises:
      MissingExtraError: an import in the block failed.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the extra {extra} ({error}): python -m pip install 'spjax[{extra}]', or '.[{extra}]' in "
            "a checkout"
        ) from error


def require(extra: str, purpose: str, package: str) -> None:
    """Raise MissingExtraError if a package of an extra is not installed, without importing it: before long work."""
    with needs(extra, purpose):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}")
