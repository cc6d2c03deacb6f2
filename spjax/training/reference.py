"""The original's protocol under one switch (FACTS.md: Prompts, Loss and optimiser)."""

from __future__ import annotations

import dataclasses

from spjax.models.prompts import PromptConfig
from spjax.training.losses import LossConfig
from spjax.training.optim import OptimConfig
from spjax.training.train import TrainConfig


def protocol(train: TrainConfig) -> tuple[PromptConfig, LossConfig, OptimConfig, TrainConfig]:
    """The original's settings; seeds, batch size, buckets and checkpoints stay the caller's.

    Prompts of length 5, one separator, dropout 0.1; loss over all target tokens; Adam at a constant 5e-3, eps before
    bias correction; batches of up to 4,096 tokens; patience of one epoch on the valid loss rounded to 3 decimals; at
    most 300 epochs.
    """
    return (
        PromptConfig(),
        LossConfig(kind="reference"),
        OptimConfig(lr=5e-3, warmup=0.0, decay="constant", eps_before_correction=True, clip=1.0),
        dataclasses.replace(train, epochs=300, passes=1, patience=1, select="loss", round_loss=3, max_tokens=4096),
    )
