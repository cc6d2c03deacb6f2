"""Readers of the golden vectors: a case's prompt, batch and expected numbers, in our trees (see golden/README.md)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from spjax import vocab
from spjax.convert.fairseq import import_unit_lm
from spjax.models.config import UnitLMConfig
from spjax.models.prompts import PromptConfig
from spjax.models.verbalizers import Verbalizer
from spjax.types import Batch, Params

CASES = (
    "a_freq_single",
    "a2_random_single",
    "b1_linear12_single",
    "b_linear24_multi",
    "c1_inputprompt_linear12",
    "c_inputprompt_freq",
    "d_freq_multi",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden case. `arrays` is its batch file; `bank` its prompt tree with a bank axis of one."""

    name: str
    arrays: dict[str, np.ndarray]
    bank: Params
    batch: Batch
    verbalizer: Verbalizer
    prompt: PromptConfig


def tiny_lm(golden: Path) -> tuple[UnitLMConfig, Params]:
    """The tiny LM of the golden vectors, through our importer."""
    return import_unit_lm(golden / "lm" / "checkpoint_best.pt")


def tree_of(named: dict[str, np.ndarray], layers: int) -> Params:
    """Checkpoint names to a prompt tree with a bank axis of one; the dead input prompt of deep mode left out."""
    tree: Params = {"sep": named["decoder.sep_embed.weight"][None]}
    if "decoder.deep_key_embed_prompts.0.weight" in named:
        for kind in ("key", "value"):
            tree[kind] = np.stack([named[f"decoder.deep_{kind}_embed_prompts.{i}.weight"] for i in range(layers)])[None]
    else:
        tree["input"] = named["decoder.prefix_embed_prompts.weight"][None]
    if "decoder.prompt_linear_verbalizer.weight" in named:
        tree["verbalizer"] = named["decoder.prompt_linear_verbalizer.weight"][None]
    return tree


def load_case(golden: Path, name: str, layers: int) -> Case:
    """Read a case of golden/prompt."""
    folder = golden / "prompt"
    params = dict(np.load(folder / f"{name}_params.npz"))
    arrays = dict(np.load(folder / f"{name}_batch.npz"))
    bank = tree_of(params, layers)
    tokens, targets, lengths = arrays["src_tokens"], arrays["target"], arrays["src_lengths"]
    separator = (tokens == vocab.BOS).argmax(axis=1)
    labels = int(lengths[0] - separator[0] - 1)
    width = int(separator.max()) - 1
    source = np.full((len(tokens), width), vocab.PAD, np.int32)
    for row, at in zip(range(len(tokens)), separator, strict=True):
        source[row, : at - 1] = tokens[row, : at - 1]
    rows = np.arange(len(tokens))
    said = np.stack([tokens[rows, separator + 1 + k] for k in range(labels)], axis=1)
    learnable = "verbalizer" in bank
    outputs = bank["verbalizer"].shape[1] if learnable else 104
    # The vectors name outputs, not classes: let class c be output 4 + c of one big slot repeated per label.
    classes = said - 4
    codes = (np.arange(outputs - 4, dtype=np.int32) + 4)[:, None]
    verbalizer = GoldenVerbalizer("learnable" if learnable else "identity", codes, codes, outputs, (0, outputs - 4))
    object.__setattr__(verbalizer, "labels", labels)
    batch = Batch(
        source=source,
        source_length=(separator - 1).astype(np.int32),
        last=tokens[rows, separator - 1].astype(np.int32),
        classes=classes.astype(np.int32),
        prompt_id=np.zeros(len(tokens), np.int32),
        weight=np.ones(len(tokens), np.float32),
        index=rows.astype(np.int32),
    )
    del targets
    prompt = PromptConfig(deep="key" in bank, length=5, dropout=0.0, verbalizer_dropout=0.0)
    return Case(name, arrays, bank, batch, verbalizer, prompt)


class GoldenVerbalizer(Verbalizer):
    """Every label step may say every class: the golden vectors have no slots."""

    labels: int

    @property
    def steps(self) -> int:
        return self.labels


def relative(found: Any, expected: Any) -> float:
    """Largest error relative to the expected scale."""
    expected = np.asarray(expected)
    return float(np.abs(np.asarray(found) - expected).max() / max(np.abs(expected).max(), 1e-30))
