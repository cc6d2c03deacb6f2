"""What a bank of prompts is trained with: LM, prompt, loss, labels; and its initial parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from spjax.models import prompts
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.decode import LabelTree
from spjax.models.verbalizers import Verbalizer
from spjax.training.losses import LossConfig
from spjax.types import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """Model, prompt and loss settings, constant during training.

    Attributes:
      config: LM architecture.
      compute: operand dtype and rematerialisation.
      prompt: shape, initialisation and dropout of the prompts.
      loss: loss settings.
      verbalizer: maps classes to outputs.
      tree: label combinations among which decoding chooses.
    """

    config: UnitLMConfig
    compute: Compute
    prompt: prompts.PromptConfig
    loss: LossConfig
    verbalizer: Verbalizer
    tree: LabelTree


def first_params(
    lm: Params,
    setting: Setting,
    seeds: tuple[int, ...],
    start: Params | None = None,
    real: Sequence[Params] | None = None,
) -> Params:
    """Initialise {"lm", "prompt"}: a bank with one member for each seed, random or copies of `start`.

    Args:
      lm: LM weights.
      setting: prompt settings.
      seeds: one for each member.
      start: prompt tree to copy, e.g. of a pack. If it has no verbalizer (from another task) and the setting's is
        learnable, a new one is initialised.
      real: for each seed its initial prompt, for data-dependent inits (`starts.from_utterances`).
    """
    prompt = setting.prompt if start is None else dataclasses.replace(setting.prompt, init="normal")
    new = functools.partial(
        prompts.init_member,
        config=prompt, lm=setting.config, verbalizer=setting.verbalizer, embed=jnp.asarray(lm["embed"]),
    )  # fmt: skip
    members = [new(jax.random.key(seed), real=real[n] if real else None) for n, seed in enumerate(seeds)]
    if start is not None:
        new_leaves = {"verbalizer"} if setting.verbalizer.learnable else set()
        members = [
            {name: leaf for name, leaf in one.items() if name in new_leaves} | jax.tree.map(jnp.asarray, start)
            for one in members
        ]
    return {"lm": lm, "prompt": prompts.stack(members)}
