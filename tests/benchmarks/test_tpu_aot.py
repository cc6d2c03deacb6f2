"""Collectives of compiled programs and the check of frozen weights; and a tiny LM compiled for a TPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding

from benchmarks import tpu_aot
from configs import fsc
from spjax.config import PromptJob, parse
from spjax.models.config import UnitLMConfig
from spjax.training import sharding

# Lines of programs compiled for v5e:2x2 by libtpu 0.0.52.
TEXT = """\
  %fusion.10 = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %all-reduce.4), metadata={op_name="all-reduce"}
  %all-reduce.5 = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} all-reduce(%fusion.10), channel_id=2, to_apply=%add.1.clone
  %all-gather-start = (bf16[16,32]{1,0:T(8,128)(2,1)}, bf16[32,32]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
all-gather-start(%param.2), dimensions={0}
  %all-gather-done = bf16[32,32]{1,0:T(8,128)(2,1)} all-gather-done(%all-gather-start)
  ROOT %all-reduce.6 = (f32[7]{0:T(256)}, f32[]{:T(128)}) all-reduce(%a, %b), to_apply=%add
"""


def test_collectives_of_a_program() -> None:
    assert tpu_aot.collectives(TEXT) == [
        ("all-reduce", (32, 256)),
        *(("all-gather", dims) for dims in ((16, 32), (32, 32), ())),
        *(("all-reduce", dims) for dims in ((7,), ())),
    ]
    assert tpu_aot.collectives(jax.jit(jnp.sin).lower(jnp.zeros((3, 4))).compile().as_text()) == []


@pytest.mark.parametrize(
    ("shards", "sent", "fine"),
    [
        *((1, (kind, (6, 4000)), True) for kind in ("all-reduce", "all-gather")),  # a prompt
        *(  # all layers, a layer, a chip's part of either
            (1, (kind, dims), False)
            for kind in ("all-reduce", "all-gather")
            for dims in ((16, 32), (32, 1, 16), (4, 16, 32), (16, 16), (4, 16, 16))
        ),
        (2, ("all-gather", (16, 16)), True),  # a layer of a sharded LM
        *(
            (2, sent, False)
            for sent in (("all-gather", (4, 16, 16)), ("all-reduce", (16, 16)), ("all-reduce", (8, 16)))
        ),
    ],
)
def test_frozen_kernels_are_not_communicated(shards: int, sent: tuple[str, tuple[int, ...]], fine: bool) -> None:
    mesh = AbstractMesh((4 // shards, shards, 2), ("data", "shard", "model"))
    where = NamedSharding(mesh, sharding.spec_of("lm/layers/ffn_in/kernel"))
    frozen = {"lm/layers/ffn_in/kernel": jax.ShapeDtypeStruct((4, 16, 32), jnp.bfloat16, sharding=where)}
    if fine:
        tpu_aot.check_frozen([sent], frozen)
    else:
        with pytest.raises(AssertionError, match="shaped like frozen kernels"):
            tpu_aot.check_frozen([("all-reduce", (1,)), sent], frozen)


def test_sizes_of_the_lms() -> None:
    assert [round(lm.num_params / 1e6) for lm in tpu_aot.LMS.values()] == [151, 1209, 6445, 358, 1214, 6480]


def test_a_table_of_programs() -> None:
    refused = {"program": "evaluate", "of memory": "does not fit"}
    text = tpu_aot.table([refused, {"program": "train", "of memory": "50%", "GB (XLA)": "2.5"}])
    assert text.splitlines()[2:] == ["| evaluate | does not fit |  |", "| train | 50% | 2.5 |"]


def job(**settings: Any) -> PromptJob:
    config = fsc.get_config()
    config.update_from_flattened_dict(settings)
    made = parse(config)
    assert isinstance(made, PromptJob)
    return made


def test_unknown_programs_are_refused() -> None:
    size = tpu_aot.Size("v9:2x2", "151M", 1, 64, 64)
    with pytest.raises(ValueError, match="topology 'v9:2x2' has no chip of v5e, v5p"):
        next(tpu_aot.measure(job(), size, ["train"]))
    with pytest.raises(ValueError, match="without records, only tasks"):
        tpu_aot.make_setting(job(verbalizer="frequency"), UnitLMConfig())


@pytest.mark.parametrize(
    ("found", "wrong"),
    [(None, "is not installed"), ("0.0.52", "it requires 0.0.4"), ("0.0.4.1", None), ("0.0.42", "requires")],
)
def test_the_compiler_must_match_jax(monkeypatch, found: str | None, wrong: str | None) -> None:
    monkeypatch.setattr(tpu_aot.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(tpu_aot.metadata, "requires", lambda name: ["numpy", 'libtpu==0.0.4.*; extra == "tpu"'])
    monkeypatch.setattr(tpu_aot.metadata, "version", lambda name: {"libtpu": found}.get(name, "0.10.2"))
    message = tpu_aot.wrong_compiler()
    assert (wrong in message and "pip install -e '.[tpu]'" in message) if wrong else message is None


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(message: str, *given: str) -> None:
        with pytest.raises(SystemExit, match=message):
            tpu_aot.main(["tpu_aot", *given])

    fails("error: give --config=configs/fsc.py, or --show=FILE")
    fails(r"error: flag --lm=2B: value should be one of <151M\|1.3B\|7B\|slam-358M\|twist-1.3B\|twist-7B>", "--lm=2B")
    (tmp_path / "aot.jsonl").write_text('{"program": "train"}\n{"program": "predict", "of memory": "50%"}\n')
    tpu_aot.main(["tpu_aot", f"--show={tmp_path}/aot.jsonl"])
    assert "| predict | 50% |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(tpu_aot.wrong_compiler() is not None, reason=str(tpu_aot.wrong_compiler()))
@pytest.mark.parametrize(("bank", "model", "shards"), [(1, 1, 1), (4, 2, 1), (1, 1, 0), (4, 2, 2)])
def test_a_tiny_lm_compiles_for_four_chips(bank: int, model: int, shards: int) -> None:
    prompt = {"prompt.length": 4, "prompt.separators": 1, "prompt.steer": False, "loss.noise": 0.0}
    tiny = job(model_parallel=model, weight_shards=shards, **prompt)
    lm = UnitLMConfig(dim=128, layers=3, heads=2, ffn_dim=256)
    size = tpu_aot.Size("v5e:2x2", "151M", bank, 8, 16)
    train, evaluate = tpu_aot.measure(tiny, size, ["train", "evaluate"], lm)
    assert ("all-gather" in train["collectives"]) >= (shards != 1), train
    assert float(train["arguments GiB"]) > 0
    for row in (train, evaluate):
        assert float(row["TFLOP (XLA)"]) > 0
        assert float(row["of memory"].rstrip("%")) < 10
