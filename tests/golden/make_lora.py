"""Writes lora.npz: LoRA by PEFT on a decoder of our architecture in PyTorch, forward, gradients and Adam steps.

    pip install torch peft transformers accelerate
    python -m tests.golden.make_lora

Weights and starts are those of tests/models/tiny.py, so the file holds results alone. They are computed in float64:
the tolerance of the test is all ours.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import nn
from torch.nn import functional

from spjax import vocab
from spjax.models import low_rank, verbalizers
from spjax.models.prompts import PromptConfig
from tests.models import tiny

FILE = Path(__file__).with_name("lora.npz")
CONFIG = tiny.config(3)
LENGTHS = (3, 8, 1, 5)
LR, STEPS = 3e-3, 5
CASES = {
    "all": PromptConfig(length=0, rank=4, alpha=8.0),
    "query_value": PromptConfig(length=0, rank=2, alpha=1.0, targets=("query", "value")),
    "both": PromptConfig(length=2, separators=2, rank=3, alpha=3.0),
}


class Layer(nn.Module):
    """A decoder layer, pre-norm; deep prompts stand in front of its keys and values."""

    def __init__(self) -> None:
        super().__init__()
        for name, (rows, columns) in CONFIG.kernels.items():
            setattr(self, name, nn.Linear(rows, columns))
        self.attn_norm, self.ffn_norm = nn.LayerNorm(CONFIG.dim), nn.LayerNorm(CONFIG.dim)

    def forward(self, x: torch.Tensor, prompt: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        heads = lambda y: y.reshape(len(y), CONFIG.heads, -1).transpose(0, 1)  # noqa: E731
        normed = self.attn_norm(x)
        keys, values = (normed if prompt is None else torch.cat([one, normed]) for one in (prompt or (None, None)))
        q, k, v = heads(self.query(normed)), heads(self.key(keys)), heads(self.value(values))
        ahead = k.shape[1] - q.shape[1]
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(ahead)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.out(mixed.transpose(0, 1).reshape(x.shape))
        return x + self.ffn_out(functional.relu(self.ffn_in(self.ffn_norm(x))))


class Decoder(nn.Module):
    """Embedded columns of one utterance to final hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG.layers))
        self.final_norm = nn.LayerNorm(CONFIG.dim)

    def forward(self, x: torch.Tensor, key: torch.Tensor | None = None, value: Any = None) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, None if key is None else (key[number], value[number]))
        return self.final_norm(x)


def decoder() -> Decoder:
    """With the weights of tiny.lm."""
    ours, model = tiny.double(tiny.lm(CONFIG)), Decoder().double()
    state = {}
    for path, _ in model.named_parameters():
        *parents, name, kind = path.split(".")
        weights = ours[name] if not parents else {k: v[int(parents[1])] for k, v in ours["layers"][name].items()}
        found = weights["bias"] if kind == "bias" else weights.get("scale", weights.get("kernel"))
        state[path] = torch.tensor(found.T if found.ndim == 2 else found)
    model.load_state_dict(state)
    return model


def columns(sep: torch.Tensor, units: list[int], feeds: np.ndarray) -> torch.Tensor:
    """`</s> units separators labels`, embedded."""
    embed = torch.tensor(tiny.double(tiny.lm(CONFIG))["embed"])
    before, behind = [vocab.EOS, *(unit + vocab.UNIT_OFFSET for unit in units)], feeds.tolist()
    x = torch.cat([embed[before], sep, embed[behind]]) * CONFIG.dim**0.5
    return x + torch.tensor(tiny._positions(len(x), CONFIG.dim, vocab.FIRST_POSITION))


def case(config: PromptConfig) -> dict[str, np.ndarray]:
    """Results of one case: loss, hidden states at the labels, gradients, and what is trained after the steps."""
    verbalizer = verbalizers.learnable(tiny.TASK, CONFIG.vocab_size)
    bank = {name: leaf[0] for name, leaf in tiny.double(tiny.bank(CONFIG, config, verbalizer, 1)).items()}
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=list(config.targets)
    )
    model = peft.get_peft_model(decoder(), settings).double()
    trained: dict[str, Any] = {
        name: nn.Parameter(torch.tensor(leaf)) for name, leaf in bank.items() if name not in low_rank.LEAVES
    }
    adapters: dict[str, list[nn.Parameter]] = {}
    for number, layer in enumerate(model.base_model.model.layers):
        for target in config.targets:
            for part in "ab":
                weight = getattr(getattr(layer, target), f"lora_{part.upper()}")["default"].weight
                leaf = bank[f"{target}_{part}"][number]
                weight.data = torch.tensor(leaf if part == "a" else leaf.T.copy())
                adapters.setdefault(f"{target}_{part}", []).append(weight)
    assert sum(p.requires_grad for p in model.parameters()) == sum(map(len, adapters.values()))
    classes = tiny.random_classes(tiny.TASK, len(LENGTHS))
    codes, feeds = (table[classes].reshape(len(classes), -1) for table in (verbalizer.codes, verbalizer.fed_back))
    embed, allowed = torch.tensor(tiny.double(tiny.lm(CONFIG))["embed"]), torch.tensor(verbalizer.allowed)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = [
            model(columns(trained["sep"], units, fed[:-1]), trained.get("key"), trained.get("value"))[-len(fed) :]
            for units, fed in zip(tiny.utterances(CONFIG, LENGTHS), feeds, strict=True)
        ]
        states = torch.stack(hidden)
        scores = states @ embed.T @ trained["verbalizer"].T
        log_probs = torch.log_softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1)
        return -log_probs.gather(2, torch.tensor(codes)[..., None]).mean(), states

    def ours(pick: Any) -> dict[str, np.ndarray]:
        plain = {name: pick(leaf) for name, leaf in trained.items()}
        low = {name: torch.stack([pick(leaf) for leaf in leaves]) for name, leaves in adapters.items()}
        low = {name: leaf if name.endswith("a") else leaf.mT for name, leaf in low.items()}
        return {name: leaf.detach().numpy().astype(np.float32) for name, leaf in {**plain, **low}.items()}

    flat = [*trained.values(), *(leaf for leaves in adapters.values() for leaf in leaves)]
    adam = torch.optim.Adam(flat, lr=LR, betas=(0.9, 0.98), eps=1e-8)
    found: dict[str, np.ndarray] = {}
    for step in range(STEPS):
        adam.zero_grad()
        loss, states = run()
        loss.backward()
        if step == 0:
            found |= {"loss": loss.detach().numpy(), "hidden": states.detach().numpy().astype(np.float32)}
            found |= {f"grad/{name}": leaf for name, leaf in ours(lambda leaf: leaf.grad).items()}
        adam.step()
    return found | {f"after/{name}": leaf for name, leaf in ours(lambda leaf: leaf.data).items()}


def main() -> None:
    """Write the file."""
    made = {f"{name}/{key}": value for name, config in CASES.items() for key, value in case(config).items()}
    versions = {name: importlib.metadata.version(name) for name in ("peft", "torch", "transformers", "accelerate")}
    np.savez_compressed(FILE, versions=np.asarray([f"{name} {version}" for name, version in versions.items()]), **made)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes; {versions}")


if __name__ == "__main__":
    main()
