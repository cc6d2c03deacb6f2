"""A sweep: settings of prompt, loss and optimizer that are trained in one bank."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TypeVar

from spjax.models.prompts import PromptConfig
from spjax.training.losses import LossConfig
from spjax.training.optim import OptimConfig
from spjax.types import Json

T = TypeVar("T", bound=PromptConfig | LossConfig | OptimConfig)


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Grid of values for fields of `prompt`, `loss` and `optim`; every setting is trained with every seed.

    Fields that are empty are not swept. Other fields cannot differ between members of a bank.

    Attributes:
      length, rank, alpha, init, dropout, verbalizer_dropout, lora_dropout: of `PromptConfig`.
      noise, label_smoothing: of `LossConfig`.
      weight_decay, lr: of `OptimConfig`.
    """

    length: tuple[int, ...] = ()
    rank: tuple[int, ...] = ()
    alpha: tuple[float, ...] = ()
    init: tuple[str, ...] = ()
    dropout: tuple[float, ...] = ()
    verbalizer_dropout: tuple[float, ...] = ()
    lora_dropout: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()
    label_smoothing: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()
    lr: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values = tuple(getattr(self, field.name))
            object.__setattr__(self, field.name, values)
            kinds, least, must = _VALUES.get(field.name, _RATES)
            proper = all(type(value) in kinds and (type(value) is str or least < value < math.inf) for value in values)
            if not proper or len(set(values)) < len(values):
                raise ValueError(f"sweep: {field.name} {values} must be different {must}")

    @property
    def tried(self) -> list[Json]:
        """All settings of the grid, as values by field name; [{}] for an empty sweep."""
        every = {name: values for name, values in dataclasses.asdict(self).items() if values}
        return [dict(zip(every, values, strict=True)) for values in itertools.product(*every.values())]


_WHOLE = ((int,), 0, "positive integers")
_RATES = ((int, float), -1e-9, "numbers of at least 0")
_VALUES: dict[str, tuple[tuple[type, ...], float, str]] = {
    "length": _WHOLE, "rank": _WHOLE, "init": ((str,), 0, "words"),
    **dict.fromkeys(("lr", "alpha"), ((int, float), 0, "positive numbers")),
}  # fmt: skip


def with_values(config: T, values: Json) -> T:
    """Replace the fields of a config dataclass that are in `values`; others in `values` are ignored.

    Raises:
      ValueError: a value is invalid.
    """
    return dataclasses.replace(config, **{name: value for name, value in values.items() if hasattr(config, name)})
