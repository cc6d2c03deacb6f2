"""Writes torch files without torch, valid and invalid ones."""

from __future__ import annotations

import dataclasses
import itertools
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

_KINDS = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.bool_): "BoolStorage",
}


@dataclasses.dataclass
class View:
    """A tensor over `base`, with any offset, shape, strides (in elements) and storage size, valid or not."""

    base: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    claimed_size: int | None = None


@dataclasses.dataclass
class Raw:
    """Raw opcodes."""

    opcodes: bytes


class _Encoder:
    def __init__(self, legacy: bool) -> None:
        self.legacy = legacy
        self.storages: dict[int, tuple[str, np.ndarray]] = {}  # by identity: views of one array share a storage

    def encode(self, value: Any) -> bytes:
        match value:
            case Raw():
                return value.opcodes
            case None:
                return b"N"
            case bool():
                return b"\x88" if value else b"\x89"
            case int():
                data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
                return b"\x8a" + bytes([len(data)]) + data
            case float():
                return b"G" + struct.pack(">d", value)
            case str():
                return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
            case tuple():
                return b"(" + b"".join(map(self.encode, value)) + b"t"
            case list():
                return b"](" + b"".join(map(self.encode, value)) + b"e"
            case dict():
                return b"}(" + b"".join(self.encode(part) for pair in value.items() for part in pair) + b"u"
            case np.ndarray():
                strides = tuple(stride // value.itemsize for stride in value.strides)
                return self.encode(View(value, 0, value.shape, strides))
            case View():
                return self.tensor(value)
        raise TypeError(type(value))

    def tensor(self, view: View) -> bytes:
        key, base = self.storages.setdefault(id(view.base), (str(len(self.storages)), view.base))
        size = base.size if view.claimed_size is None else view.claimed_size
        kind = Raw(b"ctorch\n" + _KINDS[base.dtype].encode() + b"\n")
        identity = ("storage", kind, key, "cpu", size) + ((None,) if self.legacy else ())
        storage = Raw(self.encode(identity) + b"Q")
        hooks = Raw(b"ccollections\nOrderedDict\n)R")
        args = (storage, view.offset, view.shape, view.strides, False, hooks)
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + self.encode(args) + b"R"


def _zip(path: Path, value: Any, compression: int = zipfile.ZIP_STORED) -> Path:
    encoder = _Encoder(legacy=False)
    pickle = b"\x80\x02" + encoder.encode(value) + b"."
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle)
        for key, base in encoder.storages.values():
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(base).tobytes())
        archive.writestr("archive/version", b"3\n")
    return path


def _legacy(path: Path, value: Any) -> Path:
    encoder = _Encoder(legacy=True)
    system = {"protocol_version": 1001, "little_endian": True}
    tree = encoder.encode(value)
    keys = [key for key, _ in encoder.storages.values()]
    parts = [encoder.encode(0x1950A86A20F9469CFC6C), encoder.encode(1001), encoder.encode(system), tree]
    with path.open("wb") as file:
        for part in (*parts, encoder.encode(keys)):
            file.write(b"\x80\x02" + part + b".")
        for _, base in encoder.storages.values():
            file.write(struct.pack("<q", base.size) + np.ascontiguousarray(base).tobytes())
    return path


def _namespace(values: dict[str, Any]) -> Raw:
    """argparse.Namespace as pickled with protocol 2."""
    return Raw(b"cargparse\nNamespace\n)\x81" + _Encoder(legacy=False).encode(values) + b"b")


@pytest.fixture(scope="session")
def torch_writer() -> SimpleNamespace:
    """Functions `zip(path, value)` and `legacy(path, value)`; View, Raw and `namespace(values)` as values."""
    return SimpleNamespace(zip=_zip, legacy=_legacy, View=View, Raw=Raw, namespace=_namespace)


@pytest.fixture
def tiny_lm() -> dict[str, np.ndarray]:
    """State dict of a unit LM with 2 layers, dim 8, ffn 12, 104 symbols, as fairseq names and shapes it."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (104, 8), "layer_norm.weight": (8,)}
    shapes["layer_norm.bias"] = (8,)
    sizes = {"fc1": (12, 8), "fc2": (8, 12)}
    linear = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")
    for layer, name in itertools.product(range(2), (*linear, "self_attn_layer_norm", "final_layer_norm")):
        shape = (8,) if name.endswith("norm") else sizes.get(name, (8, 8))
        shapes[f"layers.{layer}.{name}.weight"] = shape
        shapes[f"layers.{layer}.{name}.bias"] = shape[:1]
    return {f"decoder.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def options() -> dict[str, Any]:
    """Model options that match `tiny_lm`."""
    return {
        "decoder_embed_dim": 8,
        "decoder_layers": 2,
        "decoder_ffn_embed_dim": 12,
        "decoder_attention_heads": 2,
        "activation_fn": "relu",
        "decoder_normalize_before": True,
        "share_decoder_input_output_embed": True,
        "no_token_positional_embeddings": False,
        "decoder_learned_pos": False,
        "no_scale_embedding": False,
        "add_bos_token": False,
        "decoder_xformers_att_config": None,
    }


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    """dict.txt of 100 units, in a separate folder."""
    path = tmp_path / "model" / "dict.txt"
    path.parent.mkdir()
    path.write_text("".join(f"{unit} {1000 - unit}\n" for unit in range(100)))
    return path
