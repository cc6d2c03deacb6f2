"""Costs of compiled programs, compared with XLA's or manual counts; and a tiny LM compiled for a TPU."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding

from benchmarks import hlo, tpu_aot
from configs import fsc
from spjax.models.config import UnitLMConfig
from spjax.training import sharding

ROOT = Path(__file__).resolve().parents[2]

# From programs compiled for v5e:2x2 by libtpu 0.0.52, without the parts that the parser ignores.
LOOP = """\
HloModule jit_f, is_scheduled=true, num_partitions=4

%fused_slice (param_0.11: bf16[5,128,256], param_1.13: s32[]) -> bf16[128,256] {
  %param_0.11 = bf16[5,128,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.13 = s32[]{:T(128)S(6)} parameter(1)
  %constant.69 = s32[]{:T(128)} constant(0), metadata={op_name="jit(f)/while/body/dynamic_slice" stack_frame_id=6}
  %dynamic-slice.20 = bf16[1,128,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0.11, %param_1.13, %constant.69, \
%constant.69), dynamic_slice_sizes={1,128,256}
  ROOT %bitcast.11 = bf16[128,256]{1,0:T(8,128)(2,1)} bitcast(%dynamic-slice.20)
}

%fused_product (param_0.12: bf16[32,128], param_1.14: bf16[5,128,256], param_2.7: s32[]) -> bf16[32,256] {
  %param_0.12 = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.14 = bf16[5,128,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param_2.7 = s32[]{:T(128)S(6)} parameter(2)
  %fusion.8 = bf16[128,256]{1,0:T(8,128)(2,1)} fusion(%param_1.14, %param_2.7), kind=kLoop, calls=%fused_slice
  ROOT %convolution.3 = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} convolution(%param_0.12, %fusion.8), dim_labels=bf_io->bf
}

%add.1.clone (x.5: bf16[], y.3: bf16[]) -> bf16[] {
  %y.3 = bf16[]{:T(256)} parameter(1)
  %x.5 = bf16[]{:T(256)} parameter(0)
  ROOT %add.8 = bf16[]{:T(256)} add(%x.5, %y.3)
}

%body (wide.param.2: (s32[], bf16[32,128], bf16[5,128,256], /*index=3*/s32[])) -> (s32[], bf16[32,128], \
bf16[5,128,256], /*index=3*/s32[]) {
  %constant.20 = s32[]{:T(128)} constant(1)
  %wide.param.2 = (s32[]{:T(128)}, bf16[32,128]{1,0:T(8,128)(2,1)S(1)}, bf16[5,128,256]{2,1,0:T(8,128)(2,1)}, \
/*index=3*/s32[]{:T(128)}) parameter(0)
  %get-tuple-element.97 = s32[]{:T(128)} get-tuple-element(%wide.param.2), index=0
  %copy.4 = s32[]{:T(128)S(6)} copy(%get-tuple-element.97)
  %add.11 = s32[]{:T(128)S(6)} add(%copy.4, %constant.20)
  %get-tuple-element.98 = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.2), index=1
  %get-tuple-element.110 = bf16[5,128,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.2), index=2
  %fusion.10 = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.98, %get-tuple-element.110, %copy.4), \
kind=kOutput, calls=%fused_product, metadata={op_name="jit(f)/while/body/dot_general"}, \
backend_config={"window_config":{"estimated_cycles":"4071"}}
  %all-reduce.5 = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} all-reduce(%fusion.10), channel_id=2, \
replica_groups=[2,2]<=[4], use_global_device_ids=true, to_apply=%add.1.clone, \
metadata={op_name="jit(f)/while/body/dot_general"}
  %slice.1 = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} slice(%all-reduce.5), slice={[0:32], [0:128]}
  ROOT %tuple.27 = (s32[]{:T(128)}, bf16[32,128]{1,0:T(8,128)(2,1)S(1)}, bf16[5,128,256]{2,1,0:T(8,128)(2,1)}, \
/*index=3*/s32[]{:T(128)}) tuple(%add.11, %slice.1, %get-tuple-element.110, %add.11)
}

%test (wide.param.1: (s32[], bf16[32,128], bf16[5,128,256], /*index=3*/s32[])) -> pred[] {
  %constant.23 = s32[]{:T(128)} constant(5)
  %wide.param.1 = (s32[]{:T(128)}, bf16[32,128]{1,0:T(8,128)(2,1)S(1)}, bf16[5,128,256]{2,1,0:T(8,128)(2,1)}, \
/*index=3*/s32[]{:T(128)}) parameter(0)
  %get-tuple-element.66 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  ROOT %lt.5 = pred[]{:T(512)} compare(%get-tuple-element.66, %constant.23), direction=LT
}

ENTRY %main (param.2: bf16[32,128], param.3: bf16[5,128,256]) -> bf16[32,128] {
  %param.2 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %copy-start = (bf16[32,128]{1,0:T(8,128)(2,1)S(1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
copy-start(%param.2), cross_program_prefetch_index=0
  %constant.24 = s32[]{:T(128)} constant(0)
  %param.3 = bf16[5,128,256]{2,1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="w"}
  %copy.11 = s32[]{:T(128)S(6)} copy(%constant.24)
  %copy-done = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %tuple.28 = (s32[]{:T(128)}, bf16[32,128]{1,0:T(8,128)(2,1)S(1)}, bf16[5,128,256]{2,1,0:T(8,128)(2,1)}, \
/*index=3*/s32[]{:T(128)}) tuple(%copy.11, %copy-done, %param.3, %copy.11)
  %while.13 = (s32[]{:T(128)}, bf16[32,128]{1,0:T(8,128)(2,1)S(1)}, bf16[5,128,256]{2,1,0:T(8,128)(2,1)}, \
/*index=3*/s32[]{:T(128)}) while(%tuple.28), condition=%test, body=%body
  ROOT %get-tuple-element.52 = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%while.13), index=1
}
"""

# Batched products of attention as one convolution, whose spatial axes are utterances and heads.
ATTENTION = """\
ENTRY %main (q: f32[64,16,75,64], k: f32[64,16,75,64]) -> f32[64,16,75,75] {
  %q = f32[64,16,75,64]{3,2,1,0:T(8,128)} parameter(0)
  %k = f32[64,16,75,64]{2,3,1,0:T(8,128)} parameter(1)
  ROOT %scores = f32[64,16,75,75]{3,2,1,0:T(8,128)} convolution(%q, %k), window={size=64x16 stride=63x15 \
lhs_dilate=64x16}, dim_labels=01bf_01oi->01bf, operand_precision={highest,highest}
}
"""


def test_a_loop_counts_its_iterations() -> None:
    costs = hlo.costs(hlo.parse(LOOP))
    (product,) = (work for work in costs.work if work.flops)
    assert (product.times, product.flops, product.passes) == (5, 2 * 32 * 128 * 256, 2 * 32 * 128 * 256)
    assert product.cycles == 4071
    assert product.bytes == 128 * 256 * 2  # one layer of the stack; vector memory is free
    (copy,) = (work for work in costs.work if work.name == "copy-start")
    assert (copy.times, copy.bytes) == (1, 32 * 128 * 2)
    (sent,) = costs.collectives
    assert (sent.kind, sent.times, sent.bytes) == ("all-reduce", 5, 32 * 256 * 2)
    assert sent.groups.tolist() == [[0, 1], [2, 3]]
    assert sent.origin == "jit(f)/while/body/dot_general"


def test_a_loop_of_unknown_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the number of iterations of loop while.13 is unknown"):
        hlo.costs(hlo.parse(LOOP.replace("direction=LT", "direction=NE")))
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule jit_f")


def test_a_collective_beside_other_work_counts_once() -> None:
    line = next(line for line in LOOP.splitlines() if line.startswith("  %all-reduce.5"))
    again = "  %copy.11 = ", f"{line.replace('%all-reduce.5', '%all-reduce.4').replace('%fusion.10', '%param.2')}\n"
    costs = hlo.costs(hlo.parse(LOOP.replace(again[0], again[1] + again[0])))
    assert [sent.times for sent in costs.collectives] == [1]


def test_batched_products_and_precision() -> None:
    (work,) = hlo.costs(hlo.parse(ATTENTION)).work
    assert work.flops == 2 * 64 * 16 * 75 * 75 * 64
    assert work.passes == 6 * work.flops
    # 64 columns are padded to 128 lanes, 75 rows to 80; the key is transposed.
    assert work.bytes == 4 * 64 * 16 * (80 * 128 + 64 * 128 + 80 * 128)


@settings(max_examples=25)
@given(
    data=st.data(),
    size=st.integers(1, 5),
    stride=st.integers(1, 3),
    pads=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    holes=st.integers(1, 3),
    far=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
)
def test_products_agree_with_xla(data, size, stride, pads, holes, far, groups) -> None:
    length = data.draw(st.integers((size - 1) * far + 1, 20))

    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (stride,), [pads], (holes,), (far,), ("NWC", "WIO", "NWC"), feature_group_count=groups
        )

    compiled = jax.jit(conv).lower(jnp.zeros((3, length, 4)), jnp.zeros((size, 4 // groups, 6))).compile()
    found = hlo.costs(hlo.parse(compiled.as_text()))
    assume(" convolution(" in compiled.as_text())  # XLA for CPUs compiles some to other instructions
    assert sum(work.flops for work in found.work) == compiled.cost_analysis().get("flops", 0)


def test_a_scan_has_the_products_of_all_iterations() -> None:
    def run(x: jax.Array, kernels: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    compiled = jax.jit(run).lower(jnp.zeros((8, 16)), jnp.zeros((7, 16, 16))).compile()
    found = hlo.costs(hlo.parse(compiled.as_text()))
    assert sum(work.times * work.flops for work in found.work) == 7 * 2 * 8 * 16 * 16
    assert compiled.cost_analysis()["flops"] < 2 * 2 * 8 * 16 * 16 + 200  # XLA counts one iteration


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, to_apply=%add", [[0, 2], [1, 3]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3]]),
        ("channel_id=2, replica_groups=[2,2]<=[4], to_apply=%add", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=4] {'axis_0'}, to_apply=%add", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, to_apply=%add", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, to_apply=%add", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, to_apply=%add", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([4]) {'b'}, to_apply=%add", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}, to_apply=%add", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_in_every_notation(attributes: str, groups: list[list[int]]) -> None:
    assert hlo.replica_groups(attributes, 4).tolist() == groups


@pytest.mark.parametrize("attributes", ["replica_groups=mesh['a'=4] {'a':(1)2}", "replica_groups=%new"])
def test_unknown_groups_are_refused(attributes: str) -> None:
    with pytest.raises(ValueError, match=r"unknown notation of groups: .*replica_groups="):
        hlo.replica_groups(attributes, 4)


@pytest.mark.parametrize(
    ("array", "size", "main"),
    [
        (hlo.Array("f32", (64, 16, 75, 64), "3,2,1,0:T(8,128)"), 64 * 16 * 80 * 128 * 4, True),
        (hlo.Array("bf16", (3, 100), "0,1:T(8,128)(2,1)S(1)"), 128 * 104 * 2, False),
        (hlo.Array("pred", (7,), ""), 7, True),
        (hlo.Array("s32", (), ":T(128)S(6)"), 4, False),
        (hlo.Array("u4", (16,), "0"), 8, True),
    ],
)
def test_sizes_are_padded_to_tiles(array: hlo.Array, size: float, main: bool) -> None:
    assert (array.size, array.in_main_memory) == (size, main)
    assert array.nbytes <= array.size


def _sent(dims: tuple[int, ...], groups: list[list[int]], times: int = 1) -> hlo.Collective:
    return hlo.Collective("all-reduce", [dims], 4 * math.prod(dims), times, np.asarray(groups), "")


def test_only_gradients_of_prompts_may_cross_data_shards() -> None:
    layer, data = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    prompt, everyone = (6, 4000), [[0, 1, 2, 3]]
    sent = [_sent((64, 16), layer, 9), _sent(prompt, data), _sent((1,), everyone)]
    within, across = tpu_aot.sent(hlo.Costs([], sent), 2)
    assert [len(within), len(across)] == [1, 2]
    trained = {"prompt/key": jax.ShapeDtypeStruct((6, 4000), jnp.float32)}

    def check(more: list[hlo.Collective], shards: int = 1) -> float:
        mesh = AbstractMesh((4 // shards, shards, 2), ("data", "shard", "model"))
        where = NamedSharding(mesh, sharding.spec_of("lm/layers/ffn_in/kernel"))
        kernel = jax.ShapeDtypeStruct((4, 16, 32), jnp.bfloat16, sharding=where)
        return tpu_aot.check_frozen([*across, *more], trained, {"lm/layers/ffn_in/kernel": kernel})

    gathered = lambda dims: _sent(dims, data)._replace(kind="all-gather")  # noqa: E731
    assert check([]) == pytest.approx(1, abs=1e-3)
    assert check([gathered(prompt)]) == pytest.approx(1, abs=1e-3)  # no sum
    for dims in ((16, 32), (32, 1, 16), (4, 16, 32), (16, 16), (4, 16, 16)):  # all, a layer, a chip's part of either
        for one in (_sent(dims, data), gathered(dims)):
            with pytest.raises(AssertionError, match="shaped like frozen kernels"):
                check([one])
    with pytest.raises(AssertionError, match="the prompts' gradients take 96,000"):
        check([_sent((6, 4001), data, 2)])
    check([gathered((16, 16))], shards=2)  # a layer of a sharded LM
    for one in (gathered((4, 16, 16)), _sent((16, 16), data), _sent((8, 16), data)):
        with pytest.raises(AssertionError, match="shaped like frozen kernels"):
            check([one], shards=2)


def test_seconds_of_a_collective() -> None:
    chip = tpu_aot.CHIPS["v5e"]
    few, many = (_sent((1_000_000,), [list(range(n))]) for n in (4, 256))
    assert tpu_aot.link_seconds(few, chip) == pytest.approx(2 * 4e6 * 3 / 4 / 50e9 + 4e-6)
    assert tpu_aot.link_seconds(many, chip) == pytest.approx(2 * 4e6 * 255 / 256 / 50e9 + 60e-6)
    gathered = few._replace(kind="all-gather")
    assert tpu_aot.link_seconds(gathered, chip) == pytest.approx(tpu_aot.link_seconds(few, chip) / 2)


def test_sizes_of_the_lms() -> None:
    assert [round(lm.num_params / 1e6) for lm in tpu_aot.LMS.values()] == [151, 1209, 6445]


def test_a_table_of_programs() -> None:
    size = {
        "libtpu": "0.0.4",
        "topology": "v5e:2x2",
        "lm": "7B",
        "bank": 1,
        "rows": 64,
        "columns": 64,
        "model": 1,
        "shards": 0,
        "remat": True,
    }
    costs = dict.fromkeys(
        ("flops", "passes", "bytes", "products s", "memory s", "links s", "roofline s", "compiler s"), 2e12
    )
    memory = {"arguments": 2**30, "outputs": 0, "temporaries": 7 * 2**30, "code": 0, "fits": True}
    sent = {"kind": "all-reduce", "bytes": 5e5, "times": 10, "among": 4, "across": True}
    fits = {"program": "train", **size, **memory, **costs, "collectives": [sent, {**sent, "times": 2}]}
    text = tpu_aot.table([fits, {"program": "evaluate", **size, "fits": False, "refused": "too much"}])
    _, _, first, second = text.splitlines()
    assert "| 1.00 | 7.00 | 50% | 2.00 | 1.00 | 2000.0 |  | 12 all-reduce, 6 MB |" in first
    assert "**does not fit**" in second
    assert first.count("|") == second.count("|")


def test_unknown_programs_are_refused() -> None:
    size = tpu_aot.Size("v9:2x2", "151M", 1, 64, 64, 1, 1, False)
    with pytest.raises(ValueError, match="topology 'v9:2x2' has no chip of v5e, v5p"):
        next(tpu_aot.measure(fsc.get_config(), size, ["train"]))
    config = fsc.get_config()
    config.verbalizer = "frequency"
    with pytest.raises(ValueError, match="without records, only tasks"):
        tpu_aot.make_setting(config, UnitLMConfig())


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


def test_the_command_line() -> None:
    def run(*flags: str) -> str:
        command = [sys.executable, "-m", "benchmarks.tpu_aot", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        return done.stderr

    assert "error: give --config=configs/fsc.py, or --show=FILE" in run()
    assert "error: flag --lm=2B: value should be one of <151M|1.3B|7B>" in run("--lm=2B")


@pytest.mark.slow
@pytest.mark.skipif(tpu_aot.wrong_compiler() is not None, reason=str(tpu_aot.wrong_compiler()))
def test_a_tiny_lm_compiles_for_four_chips() -> None:
    config = fsc.get_config()
    config.prompt.update({"length": 4, "separators": 1, "steer": False})
    config.loss.noise = 0.0
    lm = UnitLMConfig(dim=128, layers=3, heads=2, ffn_dim=256)
    for bank, model, shards in ((1, 1, 1), (4, 2, 1), (1, 1, 0), (4, 2, 2)):
        size = tpu_aot.Size("v5e:2x2", "151M", bank, 8, 16, model, shards, False)
        train, evaluate = tpu_aot.measure(config, size, ["train", "evaluate"], lm)
        assert train["fits"]
        assert 0.5 < train["summed of prompts"] < 1.1 + 2**16 / 1e4
        rows, columns = 8, 16 + 1 + 1 + 2
        dense = 2 * rows * columns * (4 * 128**2 + 2 * 128 * 256)  # of a layer, forward
        assert dense < train["flops"] * model < 8 * dense
        assert all(one["across"] for one in train["collectives"]) == (model == 1)
        gathered = [one for one in train["collectives"] if one["across"] and one["kind"] == "all-gather"]
        assert bool(gathered) == (shards != 1), gathered
        assert evaluate["temporaries"] > 0
        assert not {"summed of prompts"} & evaluate.keys()
