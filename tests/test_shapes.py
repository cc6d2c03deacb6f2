"""The tests' check of shapes: it is on, and a wrong shape, type or number of axes is reported."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from spjax.encoders import prosody, whisper
from spjax.models import low_rank, prompts, unit_lm
from spjax.models.config import Compute
from spjax.training import losses


@pytest.mark.parametrize(
    "function",
    [unit_lm.extend, prompts.rows_of, low_rank.Lora.down, whisper.log_mel, prosody.normalise, losses.member_losses],
)
def test_shapes_are_checked(function):
    assert hasattr(function, "__wrapped__")


def test_numpy_arrays_are_accepted():
    params = {"embed": jnp.ones((8, 4))}
    assert unit_lm.embed_tokens(params, np.zeros((2, 3), np.int32)).shape == (2, 3, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: unit_lm.embed_tokens({"embed": jnp.ones((8, 4))}, jnp.zeros((2, 3))),  # tokens are no integers
        lambda: unit_lm.unembed({"embed": jnp.ones((8, 4))}, jnp.ones((2, 4)), Compute()),  # an axis is missing
        lambda: prosody.normalise(np.zeros(3), np.zeros(4, np.int32)),  # the lengths differ
    ],
)
def test_a_wrong_shape_is_reported(call):
    with pytest.raises(TypeCheckError):
        call()
