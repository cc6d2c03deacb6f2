"""Numbers of parameters, initialisation, and invalid sizes."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spjax import vocab
from spjax.models import prompts, unit_lm, verbalizers
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.prompts import PromptConfig
from spjax.tasks import TASKS
from spjax.training import masks
from tests.models import tiny

FULL = UnitLMConfig()


def count(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def new_prompt(config: PromptConfig, kind: str = "learnable", task: str = "fsc") -> Any:
    """Shapes of a prompt of the full-size LM."""
    verbalizer = verbalizers.make(kind, TASKS[task], FULL.vocab_size, units=np.arange(3), classes=np.zeros((1, 3), int))
    embed = jax.ShapeDtypeStruct((FULL.vocab_size, FULL.dim), jnp.float32)
    return jax.eval_shape(lambda embed: prompts.init_member(jax.random.key(0), config, FULL, verbalizer, embed), embed)


def test_the_published_lm_has_151263232_parameters():
    shapes = jax.eval_shape(lambda key: unit_lm.init(key, FULL), jax.random.key(0))
    assert count(shapes) == FULL.num_params == 151_263_232
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype(np.float32)}
    assert {path: leaf.shape for path, leaf in masks.flatten(shapes).items()} == {
        "embed": (104, 1024),
        "layers/attn_norm/scale": (12, 1024),
        "layers/attn_norm/bias": (12, 1024),
        **{f"layers/{name}/kernel": (12, 1024, 1024) for name in ("query", "key", "value", "out")},
        **{f"layers/{name}/bias": (12, 1024) for name in ("query", "key", "value", "out")},
        "layers/ffn_norm/scale": (12, 1024),
        "layers/ffn_norm/bias": (12, 1024),
        "layers/ffn_in/kernel": (12, 1024, 4096),
        "layers/ffn_in/bias": (12, 4096),
        "layers/ffn_out/kernel": (12, 4096, 1024),
        "layers/ffn_out/bias": (12, 1024),
        "final_norm/scale": (1024,),
        "final_norm/bias": (1024,),
    }


def test_a_prompt_for_fsc_has_126816_parameters():
    shapes = new_prompt(PromptConfig())
    assert {name: math.prod(leaf.shape) for name, leaf in shapes.items()} == {
        "key": 61_440,
        "value": 61_440,
        "sep": 1_024,
        "verbalizer": 28 * 104,
    }
    assert count(shapes) == 126_816
    assert count(new_prompt(PromptConfig(), "frequency")) == 126_816 - 28 * 104


def test_shapes_of_other_prompts():
    shallow = new_prompt(PromptConfig(length=7, deep=False, separators=4, steer=True), "identity")
    assert {name: leaf.shape for name, leaf in shallow.items()} == {
        "input": (7, 1024),
        "sep": (4, 1024),
        "sep_deep": (12, 4, 1024),
    }
    assert new_prompt(PromptConfig(length=0))["key"].shape == (12, 0, 1024)


def test_an_lm_is_initialised_like_fairseqs():
    c = dataclasses.replace(tiny.config(2), dim=64, ffn_dim=128)
    flat = {path: np.asarray(leaf) for path, leaf in masks.flatten(jax.jit(unit_lm.init, static_argnums=1)(
        jax.random.key(1), c)).items()}  # fmt: skip
    assert c.num_params == count(flat)
    for path, leaf in flat.items():
        if path.endswith("bias"):
            assert not leaf.any(), path
        elif path.endswith("scale"):
            assert (leaf == 1).all(), path
        elif path.endswith("kernel"):
            bound = (6 / sum(leaf.shape[1:])) ** 0.5  # Xavier, uniform
            assert 0.97 * bound < np.abs(leaf).max() <= bound, path
            assert abs(leaf.std() / (bound / 3**0.5) - 1) < 0.05, path
            assert (leaf[0] != leaf[1]).any(), path
    assert not flat["embed"][vocab.PAD].any()
    assert abs(flat["embed"].std() * c.dim**0.5 - 1) < 0.1


def test_prompts_are_initialised_as_configured():
    c, verbalizer = tiny.config(2), verbalizers.learnable(tiny.TASK, 24)
    embed = tiny.lm(c)["embed"]

    def new(seed: int = 0, **options: Any) -> Any:
        config = PromptConfig(length=300, **options)
        return prompts.init_member(jax.random.key(seed), config, c, verbalizer, embed)

    normal = new(init_scale=0.5, separators=3, sep_scale=0.25, steer=True)
    assert abs(float(normal["key"].std()) - 0.5) < 0.02
    assert abs(float(normal["sep"].std()) - 0.25) < 0.08
    assert not normal["sep_deep"].any(), "steering starts at nothing"
    assert (normal["key"] != normal["value"]).any()
    bound = 24**-0.5
    assert 0.9 * bound < float(jnp.abs(normal["verbalizer"]).max()) <= bound
    for name, leaf in new(seed=1)["key"], new(seed=2)["key"]:
        assert (name != leaf).any()
    units = new(init="units", deep=False)["input"]
    table = {tuple(row) for row in np.asarray(embed[vocab.UNIT_OFFSET :] * c.dim**0.5).tolist()}
    assert {tuple(row) for row in np.asarray(units).tolist()} == table, (
        "all 20 units, and nothing else, among 300 draws"
    )


def test_stack_and_member_are_inverse():
    c, verbalizer = tiny.config(1), verbalizers.learnable(tiny.TASK, 24)
    bank = tiny.bank(c, PromptConfig(length=2), verbalizer, 3)
    again = prompts.stack([prompts.member(bank, n) for n in range(3)])
    assert jax.tree.structure(again) == jax.tree.structure(bank)
    jax.tree.map(np.testing.assert_array_equal, again, bank)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UnitLMConfig(dim=0), "dim is 0"),
        (lambda: UnitLMConfig(layers=2.0), "layers is 2.0"),  # type: ignore[arg-type]
        (lambda: UnitLMConfig(dim=1000, heads=16), "1000 is not a multiple of heads 16"),
        (lambda: UnitLMConfig(dim=9, heads=3), "9 must be even"),
        (lambda: UnitLMConfig(vocab_size=4), "leaves no units"),
        (lambda: Compute("float16"), "'float16', must be float32 or bfloat16"),
        (lambda: PromptConfig(length=-1), "length -1"),
        (lambda: PromptConfig(separators=0), "separators 0"),
        (lambda: PromptConfig(dropout=1.0), "dropout is 1.0"),
        (lambda: PromptConfig(verbalizer_dropout=-0.1), "verbalizer_dropout is -0.1"),
        (lambda: PromptConfig(init="ones"), "'ones', must be one of normal, units"),
    ],
)
def test_invalid_sizes_are_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
