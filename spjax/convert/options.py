"""Read the training options of a checkpoint, in whatever form they were pickled, without running code.

fairseq stored them as argparse.Namespace under `args` (until 2020), as OmegaConf's DictConfig (2020 and 2021) or as a
dict (since) under `cfg`. Missing options are not guessed: `Options.require` asks the user for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spjax.convert import ConvertError
from spjax.convert.safe_pickle import Inert, shown

_SECTIONS = ("task", "model")  # of cfg; the latter takes precedence
_DEEPEST = 32
_MISSING = "???"  # OmegaConf's
_REFERENCE = re.compile(r"\$\{(\w+(?:\.\w+)*)\}")


def _fields(value: Any) -> Any:
    """Unwrap one level: a dict or list for a container of any kind, a plain value for an OmegaConf node."""
    for _ in range(4):  # at most an Optional node of a node
        if not isinstance(value, Inert):
            return value
        state = value.state
        if isinstance(state, tuple) and len(state) == 2:  # (__dict__, slots)
            state = state[0] or state[1]
        if value.name.startswith("omegaconf."):
            key = next((key for key in ("_content", "content", "_val") if isinstance(state, dict) and key in state), "")
            inner = state[key] if key else value
            if isinstance(inner, Inert) and inner.args and isinstance(inner.args[-1], str):  # a member of an enum
                return inner.args[-1]
            if inner is value:
                return value
            value = inner
        elif isinstance(state, dict):  # Namespace, a dataclass
            return state
        elif value.items and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value.items):
            return dict(value.items)  # a subclass of dict
        else:
            return value
    return value


def _reached(root: Any, path: str, otherwise: Any) -> Any:
    for name in path.split("."):
        root = _fields(root)
        if not isinstance(root, dict) or name not in root:
            return otherwise
        root = root[name]
    return root


def plain(value: Any, root: Any) -> Any:
    """Convert OmegaConf containers and nodes, Namespaces and dataclasses to dicts, lists and plain values.

    `${a.b}` is resolved from `root`, or kept if that fails; missing values (`???`) are dropped; anything else is kept
    as it was pickled.

    Raises:
      ConvertError: containers that contain themselves, or are nested too deeply.
    """
    done: dict[int, Any] = {}  # each container is converted once, since shared ones would multiply

    def walk(value: Any, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ConvertError("its options are nested too deeply")
        opened = _fields(value)
        if isinstance(opened, str) and (reference := _REFERENCE.fullmatch(opened)):
            found = _reached(root, reference[1], opened)
            return opened if found is opened else walk(found, depth + 1)
        if not isinstance(opened, dict | list | tuple):
            return opened.item() if isinstance(opened, np.generic) else opened
        if id(opened) not in done:
            if isinstance(opened, dict):
                parts = {name: walk(part, depth + 1) for name, part in opened.items() if isinstance(name, str)}
                done[id(opened)] = {name: part for name, part in parts.items() if part != _MISSING}
            else:
                done[id(opened)] = type(opened)(walk(part, depth + 1) for part in opened)
        return done[id(opened)]

    return walk(value, 0)


def parse(texts: Iterable[str]) -> dict[str, Any]:
    """Parse `NAME=VALUE` arguments; true, false, none and numbers are converted.

    Raises:
      ConvertError: without "=", or a name twice.
    """
    words: dict[str, Any] = {"true": True, "false": False, "none": None, "null": None}
    given: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w+", name) or name in given:
            raise ConvertError(f"--option={text:.80} must be NAME=VALUE, such as activation_fn=relu, each name once.")
        number = next((kind(value) for kind, form in _NUMBERS if re.fullmatch(form, value)), value)
        given[name] = words.get(value.lower(), number)
    return given


_NUMBERS: tuple[tuple[Any, str], ...] = (
    (int, r"-?\d{1,18}"),
    (float, r"-?\d{1,18}(\.\d{0,18})?(e-?\d{1,2})?"),
)


class Options:
    """Options by name: found in the checkpoint, given by the user, or assumed.

    Attributes:
      path: the checkpoint, for messages.
      found: options in the checkpoint.
      given: options from the user; contradictions with the checkpoint are refused.
      assumed: options in neither, for which fairseq has only one default, as far as they were requested.
    """

    def __init__(self, path: Path, found: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> None:
        self.path, self.found, self.given = path, dict(found), dict(given or {})
        self.assumed: dict[str, Any] = {}
        self.conflicts: dict[str, tuple[Any, Any]] = {}
        self.asked: set[str] = set()
        for name, value in self.given.items():
            if self.found.get(name, value) not in (value, None):  # None: unknown
                raise ConvertError(f"{path} has {name}={shown(self.found[name])}, not {value}. Leave that flag out.")

    def __contains__(self, name: str) -> bool:
        return name in self.found or name in self.given

    def get(self, name: str, default: Any = None) -> Any:
        """The value of an option, or `default` if it is unknown.

        Raises:
          ConvertError: `args` and `cfg` of the checkpoint disagree on it.
        """
        self.asked.add(name)
        if name in self.conflicts:
            args, cfg = self.conflicts[name]
            raise ConvertError(
                f"{self.path} contradicts itself: its args have {name}={shown(args)}, its cfg {name}={shown(cfg)}. "
                "Find out which is right, and save the checkpoint with that one only."
            )
        found = self.found.get(name)
        return self.given.get(name, self.found.get(name, default)) if found is None else found

    def assume(self, name: str, default: Any) -> Any:
        """The value of an option that has one value in every fairseq version that may omit it; records assumptions."""
        value = self.get(name)
        if value is not None or (name in self and default is None):
            return value
        self.assumed[name] = default
        return default

    def require(self, needed: Mapping[str, str]) -> None:
        """Refuse a checkpoint that lacks options which decide what it computes.

        Args:
          needed: name → example value, for the message.

        Raises:
          ConvertError: with the flags to give.
        """
        missing = [name for name in needed if self.get(name) is None]
        if missing:
            flags = " ".join(
                f"--heads={needed[name]}" if name == "decoder_attention_heads" else f"--option={name}={needed[name]}"
                for name in missing
            )
            raise ConvertError(
                f"{self.path} lacks the options {', '.join(missing)}, which the weights do not reveal. Give the values "
                f"of its training, for example {flags} (see the training log, these may differ)."
            )

    def check_given(self) -> None:
        """Refuse options from the user that were never requested: a misspelt name, or another kind of model.

        Raises:
          ConvertError: with the names.
        """
        unknown = sorted(self.given.keys() - self.asked)
        if unknown:
            raise ConvertError(
                f"{self.path}: unknown option {', '.join(unknown)}. Check the spelling; this import uses "
                f"{', '.join(sorted(self.asked))}."
            )

    def remarks(self, library: str) -> list[str]:
        """The assumptions in one sentence, if there are any. `library`: whose defaults they are."""
        assumed = ", ".join(f"{name}={value}" for name, value in sorted(self.assumed.items()))
        return [f"Not in the checkpoint, taken as {library}'s default: {assumed}."] if assumed else []

    def record(self) -> dict[str, Any]:
        """Options that were given or assumed, for the provenance of an import."""
        parts = {"given": self.given, "assumed": self.assumed}
        return {f"options_{name}": dict(values) for name, values in parts.items() if values}


def read_options(path: Path, contents: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Options:
    """Read the options of model and task: from `cfg`, which takes precedence in fairseq too, else from `args`.

    Args:
      path: the checkpoint, for messages.
      contents: of the checkpoint.
      given: options from the user.

    Raises:
      ConvertError: options of an unsupported form, or that contradict `given`.
    """
    forms: dict[str, dict[str, Any]] = {}
    for key in ("args", "cfg"):
        root = contents.get(key)
        if root is None:
            continue
        opened = _fields(root)
        if not isinstance(opened, dict):
            raise ConvertError(f"{path}: its options ({key}) are {shown(root)}, which is not supported.")
        sections = [opened[name] for name in _SECTIONS if opened.get(name) is not None]
        if key == "args" or not ({*_SECTIONS} & opened.keys()):
            sections = [opened]
        forms[key] = {}
        for section in sections:
            try:
                values = plain(section, root)
            except ConvertError as error:
                raise ConvertError(f"{path}: {error}.") from error
            if isinstance(values, str) and not isinstance(section, Inert):
                values = {"_name": values}
            if values is None:
                continue
            if not isinstance(values, dict):
                raise ConvertError(f"{path}: its options ({key}) are {shown(values)}, which is not supported.")
            forms[key] |= values
    args, cfg = forms.get("args", {}), forms.get("cfg", {})
    options = Options(path, args | cfg, given)
    both = sorted(args.keys() & cfg.keys())
    options.conflicts = {name: (args[name], cfg[name]) for name in both if args[name] != cfg[name]}
    return options
