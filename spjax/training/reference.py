"""Training settings of the published SpeechPrompt code, selected by one switch."""

from __future__ import annotations

import dataclasses

from spjax.models.prompts import PromptConfig
from spjax.training.losses import LossConfig
from spjax.training.optim import OptimConfig
from spjax.training.train import TrainConfig


def protocol(train: TrainConfig) -> tuple[PromptConfig, LossConfig, OptimConfig, TrainConfig]:
    """Return the published settings; seeds, batch rows, buckets and checkpoint intervals are taken from `train`.

    Prompts of length 5, one separator, dropout 0.1; loss over all target tokens; Adam with a constant learning rate of
    5e-3 and eps added before bias correction; batches of at most 4,096 tokens; early stopping after one epoch without a
    lower valid loss, rounded to 3 decimals; at most 300 epochs.

    Args:
      train: supplies the fields that the published code does not fix.
    """
    return (
        PromptConfig(),
        LossConfig(kind="reference"),
        OptimConfig(lr=5e-3, warmup=0.0, decay="constant", eps_before_correction=True, clip=1.0),
        dataclasses.replace(train, epochs=300, passes=1, patience=1, select="loss", round_loss=3, max_tokens=4096),
    )
