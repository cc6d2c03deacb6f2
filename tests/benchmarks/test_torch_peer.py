"""The PyTorch peer reproduces the reference's golden logits, loss, gradients, Adam steps and samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is a benchmark-only dependency (the extra bench)")

import torch

from benchmarks import torch_peer
from spjax.vocab import EOS, PAD, UNIT_OFFSET

LAYERS, HEADS = 3, 4
CASES = (
    "a_freq_single",
    "a2_random_single",
    "b1_linear12_single",
    "b_linear24_multi",
    "c_inputprompt_freq",
    "c1_inputprompt_linear12",
    "d_freq_multi",
)
ONEDNN = pytest.mark.parametrize("onednn", [False, True], ids=["F.linear", "oneDNN"])


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    got, want = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (got, want))
    scale = np.abs(want).max()
    assert np.abs(got - want).max() <= tolerance * (scale or 1)


@pytest.fixture(scope="module")
def tree(golden: Path) -> dict[str, Any]:
    """The golden LM with our parameter names."""
    state = torch.load(golden / "lm" / "checkpoint_best.pt", weights_only=True)["model"]
    get = lambda name: state[f"decoder.{name}"].float().numpy()  # noqa: E731
    stack = lambda name: np.stack([get(f"layers.{i}.{name}") for i in range(LAYERS)])  # noqa: E731
    norm = lambda name: {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}  # noqa: E731

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": stack(f"{name}.weight").transpose(0, 2, 1), "bias": stack(f"{name}.bias")}

    return {
        "embed": get("embed_tokens.weight"),
        "layers": {
            "attn_norm": norm("self_attn_layer_norm"),
            "query": dense("self_attn.q_proj"),
            "key": dense("self_attn.k_proj"),
            "value": dense("self_attn.v_proj"),
            "out": dense("self_attn.out_proj"),
            "ffn_norm": norm("final_layer_norm"),
            "ffn_in": dense("fc1"),
            "ffn_out": dense("fc2"),
        },
        "final_norm": {"scale": get("layer_norm.weight"), "bias": get("layer_norm.bias")},
    }


def named(arrays: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Renames a golden file's prompt leaves to ours."""
    get = lambda name: arrays[f"{prefix}decoder.{name}.weight"]  # noqa: E731
    leaves = {"input": get("prefix_embed_prompts"), "sep": get("sep_embed")}
    if f"{prefix}decoder.deep_key_embed_prompts.0.weight" in arrays:
        for kind in ("key", "value"):
            leaves[kind] = np.stack([get(f"deep_{kind}_embed_prompts.{i}") for i in range(LAYERS)])
    if f"{prefix}decoder.prompt_linear_verbalizer.weight" in arrays:
        leaves["verbalizer"] = get("prompt_linear_verbalizer")
    return leaves


@ONEDNN
@pytest.mark.parametrize("case", CASES)
def test_outputs_loss_and_gradients(golden: Path, tree: dict[str, Any], case: str, onednn: bool) -> None:
    batch, grads = (np.load(golden / "prompt" / f"{case}_{kind}.npz") for kind in ("batch", "grads"))
    prompts = torch_peer.load_prompts(named(np.load(golden / "prompt" / f"{case}_params.npz")))
    tokens, targets = (torch.from_numpy(batch[name]) for name in ("src_tokens", "target"))
    lm = torch_peer.load_lm(tree, HEADS, onednn=onednn)

    outputs = torch_peer.forward(lm, prompts, tokens)
    real = np.concatenate([np.ones((len(tokens), 5), bool), tokens.numpy() != PAD], axis=1)
    close(outputs.detach().numpy()[real], batch["logits"][real])
    loss = torch_peer.summed_loss(outputs, targets)
    close(loss, batch["loss_sum"])
    loss.backward()
    for name, want in named(grads).items():
        if name == "input" and "key" in prompts:
            assert not want.any()
        else:
            close(prompts[name].grad, want)


@pytest.mark.parametrize(
    ("case", "steps", "clip"),
    [
        ("b_linear24_multi", "b_linear24_multi_adam5", 1.0),
        ("b_linear24_multi", "b_linear24_multi_adam5_clip0.05", 0.05),
    ],
)
def test_adam_steps(golden: Path, tree: dict[str, Any], case: str, steps: str, clip: float) -> None:
    batch, want = np.load(golden / "prompt" / f"{case}_batch.npz"), np.load(golden / "prompt" / f"{steps}.npz")
    prompts = torch_peer.load_prompts(named(np.load(golden / "prompt" / f"{case}_params.npz")))
    tokens, targets = (torch.from_numpy(batch[name]) for name in ("src_tokens", "target"))
    state, lm = torch_peer.adam(prompts, clip=clip), torch_peer.load_lm(tree, HEADS)
    for step in range(1, 6):
        torch_peer.train_step(lm, prompts, state, step, tokens, targets)
        for name, leaf in named(want, f"step{step}/").items():
            close(prompts[name], leaf)


@pytest.mark.parametrize("case", ["b_linear24_multi", "b1_linear12_single"])
def test_decoding(golden: Path, tree: dict[str, Any], case: str) -> None:
    samples = json.loads((golden / "prompt" / f"{case}_samples.json").read_text())
    prompts = torch_peer.load_prompts(named(np.load(golden / "prompt" / f"{case}_params.npz")))
    lm = torch_peer.load_lm(tree, HEADS)
    for sample in list(samples.values())[:10]:
        units = sample["src"].split()[:-1]
        source = [EOS, *(UNIT_OFFSET + int(unit) for unit in units), 0]
        got = torch_peer.decode(lm, prompts, source, 150)
        assert " ".join(str(output - UNIT_OFFSET) for output in got) == sample["predict"]


@ONEDNN
def test_bfloat16_is_near(golden: Path, tree: dict[str, Any], onednn: bool) -> None:
    batch = np.load(golden / "prompt" / "b_linear24_multi_batch.npz")
    prompts = torch_peer.load_prompts(named(np.load(golden / "prompt" / "b_linear24_multi_params.npz")))
    lm = torch_peer.load_lm(tree, HEADS, torch.bfloat16, onednn=onednn)
    outputs = torch_peer.forward(lm, prompts, torch.from_numpy(batch["src_tokens"]))
    loss = torch_peer.summed_loss(outputs, torch.from_numpy(batch["target"]))
    loss.backward()
    assert outputs.dtype == torch.float32
    assert abs(loss.item() / float(batch["loss_sum"]) - 1) < 0.03
    assert all(prompts[name].grad.dtype == torch.float32 for name in ("key", "value", "sep", "verbalizer"))
