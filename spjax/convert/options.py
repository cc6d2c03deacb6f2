"""The options that a checkpoint was trained with, read from whatever they were pickled as, without running it.

fairseq kept them as argparse.Namespace under `args` (until 2020), as OmegaConf's DictConfig (2020 and 2021) or a dict
(since) under `cfg`. What an option that is not there was is not guessed: `Options.require` asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spjax.convert import ConvertError
from spjax.convert.safe_pickle import Inert, shown

_SECTIONS = ("task", "model")  # of cfg; the latter wins
_DEEPEST = 32
_MISSING = "???"  # OmegaConf's
_REFERENCE = re.compile(r"\$\{(\w+(?:\.\w+)*)\}")


def _fields(value: Any) -> Any:
    """One level opened: a dict or list where `value` is a container of any kind, a plain value where it is a node."""
    for _ in range(4):  # an Optional node of a node, at most
        if not isinstance(value, Inert):
            return value
        state = value.state
        if isinstance(state, tuple) and len(state) == 2:  # (__dict__, slots)
            state = state[0] or state[1]
        if value.name.startswith("omegaconf."):
            key = next((key for key in ("_content", "content", "_val") if isinstance(state, dict) and key in state), "")
            inner = state[key] if key else value
            if isinstance(inner, Inert) and inner.args and isinstance(inner.args[-1], str):  # an enum's member
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
    """Containers and nodes of OmegaConf, Namespaces and dataclasses as dicts, lists and plain values.

    `${a.b}` is looked up from `root`, and stays as it is where that leads nowhere; what is missing (`???`) is left out;
    anything else stays as it was pickled.

    Raises:
      ConvertError: containers that contain themselves, or nest deep.
    """
    done: dict[int, Any] = {}  # each container once: shared ones would multiply

    def walk(value: Any, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ConvertError("its options nest without end")
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
    """`NAME=VALUE` of a command line; true, false, none and numbers are read as such.

    Raises:
      ConvertError: without "=", or a name twice.
    """
    words: dict[str, Any] = {"true": True, "false": False, "none": None, "null": None}
    given: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w+", name) or name in given:
            raise ConvertError(f"--option={text:.80} must read NAME=VALUE, as --option=activation_fn=relu, each once.")
        number = next((kind(value) for kind, form in _NUMBERS if re.fullmatch(form, value)), value)
        given[name] = words.get(value.lower(), number)
    return given


_NUMBERS: tuple[tuple[Any, str], ...] = (
    (int, r"-?\d{1,18}"),
    (float, r"-?\d{1,18}(\.\d{0,18})?(e-?\d{1,2})?"),
)


class Options:
    """Options by name: found in the checkpoint, given by hand, or assumed.

    Attributes:
      path: the checkpoint, for messages.
      found: what the checkpoint says.
      given: what the user says; what contradicts the checkpoint is refused.
      assumed: what neither says and fairseq has one default for, as far as it was asked for.
    """

    def __init__(self, path: Path, found: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> None:
        self.path, self.found, self.given = path, dict(found), dict(given or {})
        self.assumed: dict[str, Any] = {}
        self.conflicts: dict[str, tuple[Any, Any]] = {}
        self._asked: set[str] = set()
        for name, value in self.given.items():
            if self.found.get(name, value) not in (value, None):  # None: not known
                raise ConvertError(f"{path} says {name}={shown(self.found[name])}, not {value}. Leave that flag out.")

    def __contains__(self, name: str) -> bool:
        return name in self.found or name in self.given

    def get(self, name: str, default: Any = None) -> Any:
        """An option, or `default` where nobody says.

        Raises:
          ConvertError: `args` and `cfg` of the checkpoint disagree on it.
        """
        self._asked.add(name)
        if name in self.conflicts:
            args, cfg = self.conflicts[name]
            raise ConvertError(
                f"{self.path} contradicts itself: its args say {name}={shown(args)}, its cfg {name}={shown(cfg)}. "
                "Find out which is right, and save it with that one only."
            )
        found = self.found.get(name)
        return self.given.get(name, self.found.get(name, default)) if found is None else found

    def assume(self, name: str, default: Any) -> Any:
        """An option for which every fairseq that could leave it out had one value; noted where it is left out."""
        value = self.get(name)
        if value is not None or (name in self and default is None):
            return value
        self.assumed[name] = default
        return default

    def require(self, needed: Mapping[str, str]) -> None:
        """Refuses a checkpoint that lacks options which decide what it computes.

        Args:
          needed: name → an example of a value, for the message.

        Raises:
          ConvertError: with the flags that say what is missing.
        """
        missing = [name for name in needed if self.get(name) is None]
        if missing:
            flags = " ".join(
                f"--heads={needed[name]}" if name == "decoder_attention_heads" else f"--option={name}={needed[name]}"
                for name in missing
            )
            raise ConvertError(
                f"{self.path} does not say {', '.join(missing)}, and the weights do not show it. Say what it was "
                f"trained with, for example {flags} (values from its training log, not these if they differ)."
            )

    def check_given(self) -> None:
        """Refuses what was given by hand and nothing asked for: a name misspelt, or of another kind of model.

        Raises:
          ConvertError: with the names.
        """
        unknown = sorted(self.given.keys() - self._asked)
        if unknown:
            raise ConvertError(
                f"{self.path}: the import looks at no option {', '.join(unknown)}. Check the spelling; it looks at "
                f"{', '.join(sorted(self._asked))}."
            )

    def remarks(self, library: str) -> list[str]:
        """What was assumed, in a sentence; none where nothing was. `library`: whose defaults they are."""
        assumed = ", ".join(f"{name}={value}" for name, value in sorted(self.assumed.items()))
        return [f"Not in the checkpoint, taken as {library}'s default: {assumed}."] if assumed else []

    def record(self) -> dict[str, Any]:
        """What was not found in the checkpoint, for the provenance of an import; empty where all was."""
        parts = {"given": self.given, "assumed": self.assumed}
        return {f"options_{name}": dict(values) for name, values in parts.items() if values}


def read_options(path: Path, contents: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Options:
    """Options of model and task of a checkpoint: from `cfg`, which wins in fairseq too, else from `args`.

    Args:
      path: the checkpoint, for messages.
      contents: of it.
      given: options by hand.

    Raises:
      ConvertError: options of a form that is not understood, or `given` ones that contradict them.
    """
    forms: dict[str, dict[str, Any]] = {}
    for key in ("args", "cfg"):
        root = contents.get(key)
        if root is None:
            continue
        opened = _fields(root)
        if not isinstance(opened, dict):
            raise ConvertError(f"{path}: its options ({key}) are {shown(root)}, which is not understood.")
        sections = [opened[name] for name in _SECTIONS if opened.get(name) is not None]
        if key == "args" or not ({*_SECTIONS} & opened.keys()):
            sections = [opened]
        forms[key] = {}
        for section in sections:
            try:
                said = plain(section, root)
            except ConvertError as error:
                raise ConvertError(f"{path}: {error}.") from error
            if isinstance(said, str) and not isinstance(section, Inert):
                said = {"_name": said}
            if said is None:
                continue
            if not isinstance(said, dict):
                raise ConvertError(f"{path}: its options ({key}) are {shown(said)}, which is not understood.")
            forms[key] |= said
    args, cfg = forms.get("args", {}), forms.get("cfg", {})
    options = Options(path, args | cfg, given)
    both = sorted(args.keys() & cfg.keys())
    options.conflicts = {name: (args[name], cfg[name]) for name in both if args[name] != cfg[name]}
    return options
