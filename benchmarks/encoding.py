"""Feature extraction: full-size HuBERT to layer 6, ours compared with transformers' HubertModel on PyTorch.

    python -m benchmarks.encoding

Both sides have the same random weights and waveforms, and their float32 features are checked to agree. The peer has six
layers only, and its weight norm is removed beforehand. Its products run by `F.linear` and by oneDNN's kernel
(`-onednn`), as in the other benchmarks; its convolutions use oneDNN in both. Ours is `hubert.extract`, from waveforms
to features, with padding and group norm statistics. CPU seconds, of all threads, are more reliable than seconds when
other processes use the machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import common, matmul_peak
from spjax.convert.hubert import HUGGING_FACE
from spjax.io import files
from spjax.models.config import Compute
from spjax.models.hubert_config import HubertConfig
from spjax.types import Params

OURS = ("ours-float32", "ours-bfloat16")
PEERS = ("peer-float32", "peer-float32-onednn", "peer-bfloat16", "peer-bfloat16-onednn")
GOALS = (("ours-float32", "float32", 1.3), ("ours-bfloat16", "bfloat16", 1.3))
LAYER = 6
RATE = 16000
MAX_DIFFERENCE = 1e-3  # of float32 features, which are of scale 1


def config_of(args: argparse.Namespace) -> HubertConfig:
    """Returns the architecture of the encoder that the flags set, with its first six layers."""
    heads = max(args.dim // 64, 1)
    return HubertConfig(conv_dim=args.conv_dim, dim=args.dim, layers=LAYER, heads=heads, ffn_dim=4 * args.dim)


def make_job(args: argparse.Namespace, seed: int = 0) -> tuple[HubertConfig, Params, np.ndarray]:
    """Makes config, random weights and waveforms float32 [B, n], equal in every process."""
    config, rng = config_of(args), np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("kernel"):
            return rng.standard_normal(shape, np.float32) * np.float32(np.prod(shape[:-1]) ** -0.5)
        return np.full(shape, path.endswith("scale"), np.float32)

    params = files.unflatten({path: draw(path, shape) for path, shape in config.shapes.items()})
    waves = 0.1 * rng.standard_normal((args.batch, int(args.seconds * RATE)), np.float32)
    return config, params, waves


def floor_flops(config: HubertConfig, samples: int) -> int:
    """FLOPs of the matrix products that one waveform needs up to the last layer, two a multiply-add."""
    frames, c, d = config.frames(samples), config.conv_dim, config.dim
    total, steps, channels = 0, samples, 1
    for kernel, stride in zip(config.conv_kernels, config.conv_strides, strict=True):
        steps = (steps - kernel) // stride + 1
        total += 2 * steps * kernel * channels * c
        channels = c
    total += 2 * frames * (c * d + config.position_width * d * d // config.position_groups)
    block = 2 * (4 * d * d + 2 * d * config.ffn_dim) + 4 * frames * d
    return total + config.layers * frames * block


def ours(config: HubertConfig, params: Params, waves: np.ndarray, dtype: str) -> Callable[[], common.Result]:
    """Returns a timed run of `extract` on all waveforms."""
    from spjax.encoders import hubert

    compute = Compute(dtype)
    placed, rows = hubert.place(params, LAYER, compute), list(waves)
    size = len(waves) * 2 * config.frames(waves.shape[1])  # all in one batch

    def run() -> common.Result:
        found = hubert.extract(placed, config, rows, LAYER, batch_frames=size, compute=compute)
        return {"utterances": len(found), **digest(found[0])}

    return run


def digest(found: np.ndarray) -> dict[str, Any]:
    """Samples one waveform's features [F, D], for a comparison of the sides."""
    return {"features": found[:: max(1, len(found) // 8), :8].astype(float).tolist()}


def peer_state(params: Params, config: HubertConfig) -> dict[str, np.ndarray]:
    """Converts our tree to the names and shapes of transformers, without weight norm."""
    state: dict[str, np.ndarray] = {"masked_spec_embed": np.zeros(config.dim, np.float32)}
    for path, array in files.flatten(params).items():
        *folders, kind = path.split("/")
        part, number = (folders[-1], folders[1]) if folders[0] == "layers" else (folders[0], folders[-1])
        name = f"{HUGGING_FACE.names[part].format(number)}.{'bias' if kind == 'bias' else 'weight'}"
        state[name] = np.ascontiguousarray(array.T)  # kernels of convolutions too
    return state


def peer(config: HubertConfig, params: Params, waves: np.ndarray, dtype: str, onednn: bool) -> Callable[[], Any]:
    """Returns a timed run of transformers' model on all waveforms."""
    import torch
    import transformers
    from torch.nn.utils import parametrize

    torch.set_num_threads(common.cores())
    sizes = transformers.HubertConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.ffn_dim,
        conv_dim=[config.conv_dim] * len(config.conv_kernels),
    )
    model = transformers.HubertModel(sizes).eval()
    parametrize.remove_parametrizations(model.encoder.pos_conv_embed.conv, "weight")
    state = {name: torch.from_numpy(x) for name, x in peer_state(params, config).items()}
    model.load_state_dict(state)
    model = model.to(getattr(torch, dtype))
    if onednn:

        def linear(self: Any, x: Any) -> Any:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.forward = linear.__get__(module)

    rows = torch.from_numpy(waves).to(getattr(torch, dtype))

    def run() -> common.Result:
        with torch.inference_mode():
            found = model(rows).last_hidden_state
        return {"utterances": len(found), **digest(found[0].float().numpy())}

    return run


def runner(side: str, args: argparse.Namespace) -> Callable[[], common.Result]:
    """Returns the timed run of a side."""
    job = make_job(args)
    who, dtype, *rest = side.split("-")
    encode = ours(*job, dtype) if who == "ours" else peer(*job, dtype, "onednn" in rest)

    def run() -> common.Result:
        start = time.process_time()
        result = encode()
        return {**result, "cpu": time.process_time() - start}

    return run


def check_features(results: dict[str, list[common.Result]]) -> None:
    """Checks that both sides compute the same features.

    Raises:
      AssertionError: float32 features differ, so the sides do different work.
    """
    want = np.asarray(results["peer-float32"][0]["features"])
    for side in ("ours-float32", "peer-float32-onednn"):
        difference = np.abs(np.asarray(results[side][0]["features"]) - want).max()
        if not difference < MAX_DIFFERENCE:
            raise AssertionError(
                f"{side}: features differ from the peer's by {difference:.1e}: the sides do different work"
            )


def main() -> None:
    """Runs one side, or compares all of them, for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="waveforms in a batch")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a waveform")
    parser.add_argument("--dim", type=int, default=768, help="model width; heads of 64, feed-forward of 4 widths")
    parser.add_argument("--conv-dim", type=int, default=512, help="channels of the convolutions")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--sides", nargs="+", choices=(*OURS, *PEERS), default=[*OURS, *PEERS], help="sides to compare")
    parser.add_argument("--out", help="write every run to this JSON file")
    parser.add_argument("--side", choices=(*OURS, *PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        common.serve(runner(args.side, args))
        return

    parts, every = [], {}
    for batch in args.batches:
        sizes = [f"--{n}={getattr(args, n.replace('-', '_'))}" for n in ("seconds", "dim", "conv-dim")]
        command = [sys.executable, "-m", "benchmarks.encoding", *sizes, f"--batch={batch}"]
        commands = {side: [*command, f"--side={side}"] for side in args.sides}
        peaks = {f"peak-{name}": matmul_peak.command(name, 2048, args.dim) for name in matmul_peak.SIDES[:2]}
        results = common.race({**commands, **peaks}, args.rounds)
        if {"ours-float32", "peer-float32", "peer-float32-onednn"} <= results.keys():
            check_features(results)
        floor = floor_flops(config_of(args), int(args.seconds * RATE))
        rows = [["side", "seconds of speech a second", "a CPU second", "needed FLOPs, of JAX's peak"]]
        for side in args.sides:
            dtype = "bfloat16" if "bfloat16" in side else "float32"
            seconds = float(np.median([common.cost(result) for result in results[side]]))
            peak = common.median(results[f"peak-jax-{dtype}"], "peak")
            per_cpu = batch * args.seconds / common.median(results[side], "cpu")
            rows.append(
                [side, f"{args.seconds / seconds:.1f}", f"{per_cpu:.1f}", f"{floor / seconds / 1e9 / peak:.0%}"]
            )
        wanted = [goal for goal in GOALS if {goal[0], f"peer-{goal[1]}"} <= results.keys()]
        parts += [f"## Batch of {batch}", common.table(rows), common.goals(results, wanted)]
        every |= {f"{side} batch {batch}": runs for side, runs in results.items()}
    note = f"A waveform of {args.seconds} s needs {floor / 1e9:.1f} GFLOP."
    common.report("Encoding", args, [*parts, note], every)


if __name__ == "__main__":
    main()
