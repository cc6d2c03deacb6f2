"""pGSLM checkpoints are imported tensor by tensor, or refused with a reason."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from spjax.convert import ConvertError, fairseq
from spjax.convert.__main__ import main
from spjax.convert.fairseq import read_checkpoint
from spjax.convert.pgslm import F0_BINS, import_pgslm, read_f0_edges
from spjax.io import files, read_unit_lm, unit_lm_hash
from spjax.models.config import ProsodyConfig, UnitLMConfig

KINDS = ("discrete_prosody", "discrete_no_prosody", "continuous_prosody", "continuous_no_prosody")
EDGES = np.linspace(-0.4, 0.5, 31)
TASK = {
    "max_token_duration": 20,
    "discrete_duration": True,
    "discrete_f0": True,
    "ignore_duration_input": False,
    "ignore_f0_input": False,
    "log_f0": True,
    "normalize_f0_mean": True,
    "normalize_f0_std": False,
    "interpolate_f0": False,
    "stream_shifts": "1,1",
}
CONTINUOUS = {"discrete_duration": False, "discrete_f0": False}
TABLE, MAP, HEAD = "decoder.embed_other_list", "decoder.proj_other_list", "decoder.project_out_dim.weight"
OUTPUT = "decoder.output_projection.weight"


def streams(discrete: bool) -> dict[str, np.ndarray]:
    """The tensors of a pGSLM beside those of `tiny_lm`."""
    rng = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {OUTPUT: (104, 8), HEAD: (104 + (25 + 36 if discrete else 2), 8)}
    for number, symbols in enumerate((25, 36)):
        if discrete:
            shapes[f"{TABLE}.{number}.weight"] = (symbols, 8)
        else:
            shapes |= {f"{MAP}.{number}.weight": (8, 1), f"{MAP}.{number}.bias": (8,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def checkpoint(torch_writer, tiny_lm, options, tmp_path: Path):
    """Write a small pGSLM with changes (None leaves out a tensor or an option), and edges beside it."""

    def write(tensors=(), task=(), model=(), *, discrete=True, style="cfg", edges=EDGES):
        every = {**tiny_lm, **streams(discrete), **dict(tensors)}
        every = {name: value for name, value in every.items() if value is not None}
        kind = {} if discrete else CONTINUOUS
        chosen = {name: value for name, value in {**TASK, **kind, **dict(task)}.items() if value is not None}
        sizes = {name: value for name, value in {**options, **dict(model)}.items() if value is not None}
        content = {"args": None, "cfg": {"model": sizes, "task": chosen}, "model": every}
        if style == "args":
            content |= {"args": torch_writer.namespace({**sizes, **chosen}), "cfg": None}
        if edges is not None:
            torch_writer.zip(tmp_path / F0_BINS, {32: edges})
        return torch_writer.zip(tmp_path / "pgslm.pt", content)

    return write


def ours(table: np.ndarray) -> np.ndarray:
    """Rows of units, <s>, <pad>, </s>, <unk> in our order."""
    units = len(table) - 4
    return table[[*range(units, units + 4), *range(units)]]


def expected(tensors: dict[str, np.ndarray], config: UnitLMConfig) -> dict[str, np.ndarray]:
    """Our leaves by path, written out."""
    parts = {
        "attn_norm": "self_attn_layer_norm",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.out_proj",
        "ffn_norm": "final_layer_norm",
        "ffn_in": "fc1",
        "ffn_out": "fc2",
    }
    leaves = {
        "embed": ours(tensors["decoder.embed_tokens.weight"]),
        "final_norm/scale": tensors["decoder.layer_norm.weight"],
        "final_norm/bias": tensors["decoder.layer_norm.bias"],
        "heads/unit": ours(tensors[HEAD][:104]),
    }
    for part, theirs in parts.items():
        names = ("scale", "bias") if part.endswith("norm") else ("kernel", "bias")
        for name, kind in zip(names, ("weight", "bias"), strict=True):
            each = [tensors[f"decoder.layers.{layer}.{theirs}.{kind}"].T for layer in range(config.layers)]
            leaves[f"layers/{part}/{name}"] = np.stack(each)
    head = tensors[HEAD][104:]
    if f"{TABLE}.0.weight" in tensors:
        leaves |= {"heads/duration": head[:25], "heads/f0": head[25:]}
        leaves |= {"streams/duration/embed": tensors[f"{TABLE}.0.weight"]}
        leaves |= {"streams/f0/embed": tensors[f"{TABLE}.1.weight"]}
    else:
        leaves |= {"heads/duration": head[:1], "heads/f0": head[1:]}
        for number, stream in enumerate(("duration", "f0")):
            leaves[f"streams/{stream}/kernel"] = tensors[f"{MAP}.{number}.weight"].reshape(1, -1)
            leaves[f"streams/{stream}/bias"] = tensors[f"{MAP}.{number}.bias"]
    return leaves


def check(params, config: UnitLMConfig, tensors: dict[str, np.ndarray]) -> None:
    found, wanted = files.flatten(params), expected(tensors, config)
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], array, err_msg=path)
    assert sum(array.size for array in found.values()) == config.num_params


@pytest.mark.parametrize("kind", KINDS)
def test_golden_checkpoints(golden: Path, tmp_path: Path, kind, capsys):
    source, bins = golden / "pgslm" / f"{kind}.pt", golden / "pgslm" / "f0_bin.th"
    flags = [f"--f0-bins={bins}"] if kind.startswith("discrete") else []
    main(["pgslm", str(source), str(tmp_path / "lm"), *flags])
    printed = capsys.readouterr().out
    config, params, info = read_unit_lm(tmp_path / "lm")

    prosody, has_inputs = config.prosody, kind.endswith("_no_prosody") is False
    assert dataclasses.replace(config, prosody=None) == UnitLMConfig(104, dim=64, layers=3, heads=4, ffn_dim=128)
    assert prosody is not None
    assert (prosody.discrete, prosody.max_duration) == (kind.startswith("discrete"), 20)
    assert (prosody.duration_input, prosody.f0_input) == (has_inputs, has_inputs)
    if prosody.discrete:
        edges = np.load(golden / "pgslm" / f"{kind}.npz")["f0_edges"]
        np.testing.assert_array_equal(np.array(prosody.f0_edges), edges)  # float64, bit for bit
    else:
        assert prosody.f0_edges == ()

    tensors = {name: tensor.numpy() for name, tensor in read_checkpoint(source).tensors.items()}
    check(params, config, tensors)
    ignored = {"decoder.version", OUTPUT}
    assert config.num_params == sum(tensor.size for name, tensor in tensors.items() if name not in ignored)
    assert info["hash"] == unit_lm_hash(params, prosody)
    assert (info["provenance"]["source"], info["provenance"]["made_by"]) == (f"{kind}.pt", "pGSLM (fairseq)")
    assert f"Left out {OUTPUT}, which is unused" in printed
    assert f"multi-stream LM of {config.num_params:,} parameters (3 layers, dim 64, 4 heads, ffn 128" in printed
    streams = "discrete (25 symbols of duration, 36 of f0)" if prosody.discrete else "continuous"
    assert f"streams {streams}, prosody inputs: {'duration and f0' if has_inputs else 'none'}\n" in printed


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("style", ["cfg", "args"])
def test_every_form_of_options(checkpoint, tiny_lm, discrete, style):
    path = checkpoint(discrete=discrete, style=style, edges=EDGES if discrete else None)
    config, params, notes = import_pgslm(path)
    wanted = ProsodyConfig(discrete=discrete, f0_edges=tuple(EDGES.tolist()) if discrete else ())
    assert config == UnitLMConfig(104, dim=8, layers=2, heads=2, ffn_dim=12, prosody=wanted)
    check(params, config, {**tiny_lm, **streams(discrete)})
    assert len(notes) == 2  # the output projection, and the option that `checkpoint` leaves out


@pytest.mark.parametrize("duration", [True, False])
@pytest.mark.parametrize("f0", [True, False])
def test_inputs_that_are_left_out(checkpoint, duration, f0):
    task = {"ignore_duration_input": not duration, "ignore_f0_input": not f0}
    prosody = import_pgslm(checkpoint(task=task))[0].prosody
    assert prosody is not None
    assert (prosody.duration_input, prosody.f0_input) == (duration, f0)


def test_half_precision_is_upcast(checkpoint, tiny_lm):
    half = {name: array.astype(np.float16) for name, array in {**tiny_lm, **streams(True)}.items()}
    config, params, _ = import_pgslm(checkpoint(half))
    check(params, config, {name: array.astype(np.float32) for name, array in half.items()})


def test_longer_durations_and_more_bins(checkpoint, torch_writer, tmp_path: Path):
    rng = np.random.default_rng(2)
    changed = {f"{TABLE}.0.weight": (35, 8), f"{TABLE}.1.weight": (12, 8), HEAD: (104 + 35 + 12, 8)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in changed.items()}
    bins = torch_writer.zip(tmp_path / "bins.th", {4: EDGES[:3], 8: EDGES[:7], "made by": "hand"})
    config, params, _ = import_pgslm(checkpoint(tensors, {"max_token_duration": 30}, edges=None), bins)
    assert config.prosody == ProsodyConfig(max_duration=30, f0_edges=tuple(EDGES[:7].tolist()))
    np.testing.assert_array_equal(params["heads"]["duration"], tensors[HEAD][104:139])
    np.testing.assert_array_equal(params["heads"]["f0"], tensors[HEAD][139:])


def test_options_of_training_do_not_matter(checkpoint):
    plain = import_pgslm(checkpoint())
    model = {"share_decoder_input_output_embed": False, "mask_dur_prob": 0.3, "dropout": 0.1}
    masked = import_pgslm(checkpoint({OUTPUT: None}, {}, model))
    assert plain[0] == masked[0]
    assert unit_lm_hash(plain[1], plain[0].prosody) == unit_lm_hash(masked[1], masked[0].prosody)
    assert len(masked[2]) == 1
    assert "taken as fairseq's default: decoder_xformers_att_config=None." in masked[2][0]


def test_f0_is_interpolated_as_in_training(checkpoint):
    config, params, _ = import_pgslm(checkpoint())
    other, same, _ = import_pgslm(checkpoint({}, {"interpolate_f0": True}))
    assert other.prosody == dataclasses.replace(config.prosody, interpolate_f0=True)
    assert unit_lm_hash(params, config.prosody) != unit_lm_hash(same, other.prosody)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("tensors", "task", "model", "message"),
    [
        ({HEAD: None}, {}, {}, r"lacks decoder\.project_out_dim"),
        ({HEAD: ones(164, 8)}, {}, {}, r"project_out_dim\.weight has shape \[164, 8\], must be \[165, 8\]"),
        ({"decoder.layers.1.fc1.bias": None}, {}, {}, r"lacks decoder\.layers\.1\.fc1\.bias"),
        ({f"{TABLE}.0.weight": None}, {}, {}, r"lacks decoder\.embed_other_list\.0\.weight"),
        ({f"{TABLE}.1.weight": None}, {}, {}, r"no f0 table decoder\.embed_other_list\.1\.weight"),
        ({f"{TABLE}.1.weight": ones(4, 8)}, {}, {}, "no f0 table"),
        ({f"{TABLE}.2.weight": ones(4, 8)}, {}, {}, r"unknown tensors: decoder\.embed_other_list\.2\.weight"),
        ({f"{MAP}.0.bias": ones(8)}, {}, {}, r"unknown tensors: decoder\.proj_other_list\.0\.bias"),
        ({f"{TABLE}.0.weight": ones(25, 8) * np.nan}, {}, {}, "holds NaN or infinity"),
        ({}, CONTINUOUS, {}, r"lacks decoder\.proj_other_list\.0\.weight"),
        ({}, {"discrete_f0": False}, {}, "discrete_duration=True and discrete_f0=False; .* both streams discrete"),
        ({}, {"discrete_f0": 1}, {}, "discrete_f0 is 1, must be true or false"),
        ({}, {"ignore_f0_input": "no"}, {}, "ignore_f0_input is 'no', must be true or false"),
        ({}, {"stream_shifts": "0,0"}, {}, "stream_shifts='0,0'; spjax computes only stream_shifts=1,1"),
        ({}, {"stream_shifts": None}, {}, "lacks the options stream_shifts.*--option=stream_shifts=1,1"),
        ({}, {"log_f0": False}, {}, "log_f0=False"),
        ({}, {"normalize_f0_mean": None}, {}, "lacks the options normalize_f0_mean"),
        ({}, {"normalize_f0_std": True}, {}, "normalize_f0_std=True"),
        ({}, {"max_token_duration": 30}, {}, r"embed_other_list\.0\.weight has shape \[25, 8\], must be \[35, 8\]"),
        ({}, {"max_token_duration": 0}, {}, "max_token_duration is 0, must be a positive integer"),
        ({}, {"max_token_duration": [[]]}, {}, "max_token_duration is a list"),
        ({}, {}, {"activation_fn": "gelu"}, "activation_fn='gelu'"),
        ({}, {}, {"decoder_attention_heads": None}, "--heads=16"),
    ],
)
def test_mismatched_checkpoints_are_refused(checkpoint, tensors, task, model, message):
    path = checkpoint(tensors, task, model)
    with pytest.raises(ConvertError, match=message) as raised:
        import_pgslm(path)
    assert str(path) in str(raised.value)


def test_heads_can_be_given(checkpoint):
    assert import_pgslm(checkpoint(model={"decoder_attention_heads": None}), heads=4)[0].heads == 4


def test_a_multi_stream_lm_is_not_imported_as_a_unit_lm(golden: Path):
    with pytest.raises(ConvertError, match=r"is a multi-stream LM, not a unit LM.*spjax\.convert pgslm`"):
        fairseq.import_unit_lm(golden / "pgslm" / "discrete_prosody.pt")
    with pytest.raises(ConvertError, match="is a unit LM, not a multi-stream LM"):
        import_pgslm(golden / "lm" / "checkpoint_best.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({16: EDGES[:15], 64: EDGES}, "holds edges of 16, 64 bins, but not of 32"),
        ({}, "holds edges of none bins"),
        ([EDGES], "is a list, must map"),
        ({32: EDGES[:30]}, r"of shape \[30\] and type float64, must be 31 floats"),
        ({32: EDGES[None]}, r"of shape \[1, 31\]"),
        ({32: np.arange(31)}, "type int64"),
        ({32: [0.5]}, "are a list, must be 31 floats"),
        ({32: EDGES[::-1].copy()}, "must be ascending"),
        ({32: EDGES * math.inf}, "finite numbers"),
        (None, r"cannot be read: .*truncated"),
    ],
)
def test_mismatched_edges_are_refused(checkpoint, torch_writer, tmp_path: Path, content, message):
    path = checkpoint(edges=None)
    bins = torch_writer.zip(tmp_path / F0_BINS, content or {32: EDGES})
    if content is None:
        bins.write_bytes(b"\x80\x02}q")
    if content == {}:
        torch_writer.zip(bins, {})
    with pytest.raises(ConvertError, match=message) as raised:
        import_pgslm(path)
    assert str(bins) in str(raised.value)


def test_missing_edges(checkpoint, tmp_path: Path):
    path = checkpoint(edges=None)
    with pytest.raises(ConvertError, match=rf"32 bins .* does not exist\. Put the .*{F0_BINS} beside .*--f0-bins=FILE"):
        import_pgslm(path)
    with pytest.raises(ConvertError, match=r"other\.th does not exist"):
        import_pgslm(path, tmp_path / "other.th")
    # A continuous model needs no edges and ignores them.
    assert import_pgslm(checkpoint(discrete=False, edges=None), tmp_path / "other.th")[0].prosody == ProsodyConfig(
        False
    )


def test_nothing_that_a_file_names_is_run(checkpoint, torch_writer, tmp_path: Path):
    marker = tmp_path / "ran"
    command = f"touch {marker}".encode()
    hostile = torch_writer.Raw(b"cos\nsystem\n(X" + len(command).to_bytes(4, "little") + command + b"tR")
    bins = torch_writer.zip(tmp_path / "hostile.th", {32: hostile})
    with pytest.raises(ConvertError, match=r"the edges of 32 bins are <inert \w+\.system>"):
        read_f0_edges(bins, 32)
    with pytest.raises(ConvertError, match="not a tensor"):
        import_pgslm(checkpoint({HEAD: hostile}))
    with pytest.raises(ConvertError, match=r"stream_shifts=<inert"):
        import_pgslm(checkpoint(task={"stream_shifts": hostile}))
    assert not marker.exists()


def test_command(checkpoint, tmp_path: Path, capsys):
    path, out = checkpoint(), tmp_path / "lm"
    main(["pgslm", str(path), str(out)])  # edges are beside it
    with pytest.raises(SystemExit, match="exists"):
        main(["pgslm", str(path), str(out)])
    (tmp_path / F0_BINS).unlink()
    with pytest.raises(SystemExit, match=f"error: .*{F0_BINS} does not exist"):
        main(["pgslm", str(path), str(out), "--force"])
    identity = read_unit_lm(out)[2]["hash"]
    assert f"hash {identity}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["ignore_duration_input", "ignore_f0_input", "interpolate_f0", "discrete_f0", "log_f0"]
)
def test_options_of_the_streams_must_be_known(checkpoint, tmp_path: Path, name: str):
    path = checkpoint(task={name: None})
    with pytest.raises(SystemExit, match=f"lacks the options {name}"):
        main(["pgslm", str(path), str(tmp_path / "lm")])
    main(["pgslm", str(path), str(tmp_path / "lm"), f"--option={name}={str(TASK[name]).lower()}"])
    config, _, info = read_unit_lm(tmp_path / "lm")
    assert config == import_pgslm(checkpoint())[0]
    assert info["provenance"]["options_given"] == {name: TASK[name]}
