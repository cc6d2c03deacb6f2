"""The benchmark job in plain PyTorch, by the reference's method: the baseline of our speed measurements.

Prompts are P positions before the tokens and run through every layer, where the inputs of their keys and values are
replaced; logits over the entire vocabulary are computed at every position; decoding takes one utterance at a time and
runs the entire prefix again for every label. Otherwise it is optimised: frozen weights have no gradient, attention uses
the faster form for the precision, and matrix products may use oneDNN where PyTorch's default is slower (`Linear`).
tests/benchmarks compares it with numbers of the reference.

PyTorch is a benchmark-only dependency (the extra bench).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from spjax.vocab import BOS, EOS, FIRST_POSITION, PAD

Prompts = dict[str, Tensor]  # trained float32 leaves: input, key, value, sep, verbalizer (docs/design.md, no N axis)
POSITIONS = 2048  # rows of the position table


class Linear(NamedTuple):
    """A frozen affine map `x @ weight.T + bias`.

    Attributes:
      weight: [out, in]
      bias: [out]
      transposed: [in, out], `weight` transposed for the backward product of oneDNN; None uses F.linear, which in
        float32 calls MKL: on an AMD processor that was less than half as fast as oneDNN.
    """

    weight: Tensor
    bias: Tensor
    transposed: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out]."""
        if self.transposed is None:
            return F.linear(x, self.weight, self.bias)
        return _OneDNNLinear.apply(x, *self)


class _OneDNNLinear(torch.autograd.Function):
    """F.linear by oneDNN's dense kernel, with a gradient for x only, since the weights are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, transposed: Tensor) -> Tensor:
        ctx.save_for_backward(transposed)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (transposed,) = ctx.saved_tensors
        grad_x = torch.ops.mkldnn._linear_pointwise(grad.contiguous(), transposed, None, "none", [], "")
        return grad_x, None, None, None


class Layer(NamedTuple):
    """One frozen decoder layer; norms are (scale, bias)."""

    attn_norm: tuple[Tensor, Tensor]
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    ffn_norm: tuple[Tensor, Tensor]
    ffn_in: Linear
    ffn_out: Linear


class FrozenLM(NamedTuple):
    """The frozen unit LM: embedding [V, D], position table [POSITIONS, D], layers, final norm, number of heads."""

    embed: Tensor
    positions: Tensor
    layers: list[Layer]
    final_norm: tuple[Tensor, Tensor]
    heads: int


def load_lm(tree: Mapping[str, Any], heads: int, dtype: torch.dtype = torch.float32, onednn: bool = False) -> FrozenLM:
    """Loads frozen weights from our parameter tree.

    Args:
      tree: the `lm` tree of docs/design.md (arrays that numpy can read).
      heads: number of attention heads.
      dtype: float32, or bfloat16 for weights and activations (sums, norms and softmax use float32 internally).
      onednn: use oneDNN's kernel for matrix products instead of F.linear.
    """

    def tensor(array: Any) -> Tensor:
        return torch.from_numpy(np.array(array, np.float32)).to(dtype)

    def linear(weights: Mapping[str, Any], i: int) -> Linear:
        kernel = tensor(weights["kernel"][i])
        return Linear(kernel.t().contiguous(), tensor(weights["bias"][i]), kernel if onednn else None)

    def norm(weights: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return tensor(weights["scale"]), tensor(weights["bias"])

    def layer(i: int) -> Layer:
        rows = tree["layers"]
        return Layer(
            **{
                name: linear(rows[name], i)
                if "kernel" in rows[name]
                else norm({k: v[i] for k, v in rows[name].items()})
                for name in Layer._fields
            }
        )

    embed = tensor(tree["embed"])
    layers = [layer(i) for i in range(len(tree["layers"]["query"]["bias"]))]
    return FrozenLM(embed, _sinusoids(embed.shape[1]).to(dtype), layers, norm(tree["final_norm"]), heads)


def load_prompts(tree: Mapping[str, Any]) -> Prompts:
    """Loads trainable float32 leaves from one prompt's tree (docs/design.md, without the N axis)."""
    return {name: torch.from_numpy(np.array(leaf, np.float32)).requires_grad_() for name, leaf in tree.items()}


def _sinusoids(dim: int) -> Tensor:
    half = dim // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float32) * -(np.log(10000) / (half - 1)))
    angle = torch.arange(POSITIONS, dtype=torch.float32)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: Tensor) -> Tensor:
    """Causal attention, [B, T, D] each: fused in float32, explicit in bfloat16, whichever is faster on a CPU."""
    batch, length, dim = q.shape
    q, k, v = (x.view(batch, length, heads, dim // heads).transpose(1, 2) for x in (q, k, v))
    if q.dtype == torch.float32:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        q, k, v = ((x * s).reshape(-1, length, dim // heads) for x, s in ((q, (dim // heads) ** -0.5), (k, 1), (v, 1)))
        mixed = torch.bmm(torch.baddbmm(causal, q, k.transpose(1, 2)).softmax(-1), v)
        mixed = mixed.view(batch, heads, length, dim // heads)
    return mixed.transpose(1, 2).reshape(batch, length, dim)


def _front(prompt: Tensor | None, x: Tensor, dropout: float) -> Tensor:
    """Replaces the first P columns of x [B, P + T, D] by a prompt [P, D] (one dropout mask for the batch)."""
    if prompt is None:
        return x
    prompt = F.dropout(prompt, dropout).to(x.dtype).expand(len(x), -1, -1)
    return torch.cat([prompt, x[:, prompt.shape[1] :]], dim=1)


def forward(lm: FrozenLM, prompts: Prompts, tokens: Tensor, dropout: float = 0.0) -> Tensor:
    """Returns every position's outputs, float32 [B, P + T, V], or [B, P + T, C + 4] with a learnable verbalizer.

    Args:
      lm: frozen weights.
      prompts: trained vectors; without `key` and `value`, the input prompt acts as a shallow prompt.
      tokens: int64 [B, T], right-padded.
      dropout: rate on key and value prompts and on the verbalizer's output.
    """
    dim, dtype = lm.embed.shape[1], lm.embed.dtype
    x = F.embedding(tokens, lm.embed)
    x = torch.where((tokens == BOS)[..., None], prompts["sep"].to(dtype), x) * dim**0.5
    x = x + lm.positions[FIRST_POSITION : FIRST_POSITION + tokens.shape[1]]
    x = torch.cat([prompts["input"].to(dtype).expand(len(tokens), -1, -1), x], dim=1)
    length = x.shape[1]
    causal = torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
    deep_key, deep_value = (prompts.get(name) for name in ("key", "value"))
    for i, layer in enumerate(lm.layers):
        h = F.layer_norm(x, (dim,), *layer.attn_norm)
        key_in = _front(None if deep_key is None else deep_key[i], h, dropout)
        value_in = _front(None if deep_value is None else deep_value[i], h, dropout)
        mixed = _attend(layer.query(h), layer.key(key_in), layer.value(value_in), lm.heads, causal)
        x = x + layer.out(mixed)
        x = x + layer.ffn_out(F.relu(layer.ffn_in(F.layer_norm(x, (dim,), *layer.ffn_norm))))
    logits = F.linear(F.layer_norm(x, (dim,), *lm.final_norm), lm.embed).float()
    return F.dropout(F.linear(logits, prompts["verbalizer"]), dropout) if "verbalizer" in prompts else logits


def summed_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sums the negative log likelihood over separator, labels and end of each row (the reference's loss, undivided).

    Args:
      outputs: float32 [B, P + T, O].
      targets: int64 [B, T], right-padded with PAD; the token after each token.
    """
    log_probability = F.log_softmax(outputs, dim=-1)[:, -targets.shape[1] :]
    scored = ((targets == BOS).cumsum(1) > 0) & (targets != PAD)
    # Unit targets are not outputs of the verbalizer; positions that are not scored may have any valid index.
    index = targets.where(scored, 0)[..., None]
    return -(log_probability.gather(2, index)[..., 0] * scored).sum()


class Adam(NamedTuple):
    """Moments of each prompt leaf, and settings; eps is added before the bias correction, as in the reference."""

    mean: Prompts
    square: Prompts
    learning_rate: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    clip: float = 1.0


def adam(prompts: Prompts, **settings: Any) -> Adam:
    """Makes a new optimizer state for the prompts; `settings` override those of `Adam`."""
    mean, square = ({name: torch.zeros_like(leaf) for name, leaf in prompts.items()} for _ in range(2))
    return Adam(mean, square, **settings)


def train_step(
    lm: FrozenLM, prompts: Prompts, state: Adam, step: int, tokens: Tensor, targets: Tensor, dropout: float = 0.0
) -> float:
    """Runs one step of the reference: loss over all target tokens, clipping, Adam; updates prompts and state in place.

    Args:
      lm: frozen weights.
      prompts: trained vectors.
      state: optimizer moments.
      step: number of this step, starting at 1.
      tokens: int64 [B, T].
      targets: int64 [B, T].
      dropout: as in `forward`.

    Returns:
      The loss before the step, summed over scored positions and divided by all target tokens.
    """
    loss = summed_loss(forward(lm, prompts, tokens, dropout), targets) / (targets != PAD).sum()
    live = {name: leaf for name, leaf in prompts.items() if name != "input" or "key" not in prompts}
    grads = dict(zip(live, torch.autograd.grad(loss, list(live.values())), strict=True))
    norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
    scale = (state.clip / (norm + 1e-6)).clamp(max=1.0)
    beta1, beta2 = state.betas
    rate = state.learning_rate * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    with torch.no_grad():
        for name, grad in grads.items():
            grad = grad * scale
            state.mean[name].lerp_(grad, 1 - beta1)
            state.square[name].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            prompts[name].addcdiv_(state.mean[name], state.square[name].sqrt() + state.eps, value=-rate)
    return loss.item()


@torch.no_grad()
def decode(
    lm: FrozenLM,
    prompts: Prompts,
    source: Sequence[int],
    steps: int,
    *,
    end: int | None = EOS,
    allowed: Tensor | None = None,
    tick: Callable[[], None] = lambda: None,
) -> list[int]:
    """Decodes one utterance greedily; each step runs the entire prefix again.

    Args:
      lm: frozen weights.
      prompts: trained vectors.
      source: tokens `</s> u1 .. uT <s>`.
      steps: maximum number of outputs.
      end: output that ends the decoding and is not returned; None decodes all steps.
      allowed: bool [K, O], outputs allowed at each of the first K steps; the reference allows all.
      tick: called after each step.
    """
    tokens = list(source)
    for step in range(steps):
        scores = forward(lm, prompts, torch.tensor([tokens]))[0, -1]
        if allowed is not None and step < len(allowed):
            scores = scores.masked_fill(~allowed[step], float("-inf"))
        output = int(scores.argmax())
        tick()
        if output == end:
            break
        tokens.append(output)
    return tokens[len(source) :]
