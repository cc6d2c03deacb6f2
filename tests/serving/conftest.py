"""What the tests of the server share: a predictor, and a batcher with the module's LIMITS."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from spjax.serving.batcher import Batcher
from spjax.serving.predictor import SpeechPrompt
from tests.serving import page_world


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory, quick_compile: None) -> SpeechPrompt:
    """The predictor of `page_world`; some modules have another."""
    return page_world.predictor(tmp_path_factory.mktemp("predictor"))


@pytest.fixture(scope="module")
def batcher(predictor: SpeechPrompt, request: pytest.FixtureRequest) -> Iterator[Batcher]:
    """A running batcher with the module's LIMITS."""
    with Batcher(predictor, request.module.LIMITS) as batcher:
        yield batcher
