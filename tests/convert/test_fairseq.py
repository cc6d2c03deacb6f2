"""fairseq checkpoints are imported tensor by tensor, or refused with a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from spjax.convert import ConvertError, fairseq, speechprompt
from spjax.convert.__main__ import main
from spjax.convert.torch_file import read_torch_file
from spjax.data.write_records import Utterance, write_unit_records
from spjax.io import KMeans, load_kmeans, load_pack, read_unit_lm, save_kmeans, unit_lm_hash
from spjax.models import unit_lm
from spjax.models.config import UnitLMConfig
from spjax.tasks import TASKS

CASES = (
    "a_freq_single",
    "a2_random_single",
    "b_linear24_multi",
    "b1_linear12_single",
    "c_inputprompt_freq",
    "c1_inputprompt_linear12",
    "d_freq_multi",
)


@pytest.fixture
def lm(golden: Path, tmp_path: Path) -> Path:
    """The golden unit LM, imported with the command line."""
    main(["unit_lm", str(golden / "lm" / "checkpoint_best.pt"), str(tmp_path / "lm")])
    return tmp_path / "lm"


@pytest.fixture
def checkpoint(torch_writer, dictionary, tiny_lm, options):
    """Write `tiny_lm` with changed tensors and options, None to leave one out."""

    def write(tensors=(), changed=(), style="cfg"):
        model = {name: value for name, value in {**tiny_lm, **dict(tensors)}.items() if value is not None}
        chosen = {name: value for name, value in {**options, **dict(changed)}.items() if value is not None}
        content = {"args": torch_writer.namespace(chosen), "cfg": None, "model": model}
        if style == "cfg":
            content |= {"args": None, "cfg": {"model": chosen}}
        if style == "cfg with a namespace":
            content |= {"args": None, "cfg": {"model": torch_writer.namespace(chosen)}}
        return torch_writer.zip(dictionary.with_name("checkpoint.pt"), content)

    return write


def test_an_lm_knows_its_units_by_their_k_means(golden: Path, tmp_path: Path):
    for units in (100, 50):
        centroids = np.eye(units, 7, dtype=np.float32)
        save_kmeans(tmp_path / f"km{units}", KMeans(centroids, {"encoder": "mhubert_base_25hz", "layer": 11}))
    command = ["unit_lm", str(golden / "lm" / "checkpoint_best.pt"), str(tmp_path / "lm")]
    with pytest.raises(SystemExit, match="km50 has 50 units, the LM 100"):
        main([*command, f"--kmeans={tmp_path / 'km50'}"])
    main([*command, f"--kmeans={tmp_path / 'km100'}"])
    identity = load_kmeans(tmp_path / "km100").id
    known = {"encoder": "mhubert_base_25hz", "layer": 11, "kmeans": identity, "vocabulary": 100}
    assert read_unit_lm(tmp_path / "lm")[2]["provenance"]["units"] == known


def test_golden_lm_gives_the_golden_logits(golden: Path, lm: Path):
    config, params, info = read_unit_lm(lm)
    assert config == UnitLMConfig(vocab_size=104, dim=64, layers=3, heads=4, ffn_dim=128)
    assert config.num_params == json.loads((golden / "lm" / "meta.json").read_text())["n_params"] == 107_200
    assert info["parameters"] == sum(array.size for array in _leaves(params)) == 107_200
    expected = np.load(golden / "lm" / "lm_logits.npz")
    got = np.asarray(unit_lm.logits(params, config, expected["tokens"]))
    for row, length in enumerate(expected["lengths"]):
        want = expected["logits"][row, :length]
        assert np.abs(got[row, :length] - want).max() < 1e-5 * np.abs(want).max()


def _leaves(tree):
    return [leaf for value in tree.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]


def test_half_precision_is_upcast(golden: Path):
    config, full = fairseq.import_unit_lm(golden / "lm" / "checkpoint_best.pt")
    half_config, half = fairseq.import_unit_lm(golden / "lm" / "checkpoint_fp16_legacy.pt")
    assert half_config == config
    for a, b in zip(_leaves(full), _leaves(half), strict=True):
        assert b.dtype == np.float32
        np.testing.assert_array_equal(a.astype(np.float16).astype(np.float32), b)
    assert unit_lm_hash(full) != unit_lm_hash(half)


def test_kernels_are_transposed_and_layers_stacked(checkpoint, tiny_lm):
    config, params = fairseq.import_unit_lm(checkpoint())
    assert config == UnitLMConfig(vocab_size=104, dim=8, layers=2, heads=2, ffn_dim=12)
    layers = params["layers"]
    np.testing.assert_array_equal(layers["key"]["kernel"][1], tiny_lm["decoder.layers.1.self_attn.k_proj.weight"].T)
    np.testing.assert_array_equal(layers["ffn_in"]["kernel"][0], tiny_lm["decoder.layers.0.fc1.weight"].T)
    np.testing.assert_array_equal(layers["ffn_out"]["bias"][1], tiny_lm["decoder.layers.1.fc2.bias"])
    np.testing.assert_array_equal(
        layers["attn_norm"]["scale"][1], tiny_lm["decoder.layers.1.self_attn_layer_norm.weight"]
    )
    np.testing.assert_array_equal(layers["ffn_norm"]["bias"][0], tiny_lm["decoder.layers.0.final_layer_norm.bias"])


@pytest.mark.parametrize("style", ["cfg", "args", "cfg with a namespace"])
def test_every_form_of_options(checkpoint, style):
    assert fairseq.import_unit_lm(checkpoint(style=style))[0].heads == 2


def test_bfloat16_and_known_extras(checkpoint, tiny_lm):
    extras = {
        "decoder.version": np.array([3.0], np.float32),
        "decoder.embed_positions._float_tensor": np.zeros(1, np.float16),
        "decoder.output_projection.weight": tiny_lm["decoder.embed_tokens.weight"].copy(),
    }
    assert fairseq.import_unit_lm(checkpoint(extras))[0].layers == 2
    rounded = {name: value.astype(ml_dtypes.bfloat16) for name, value in tiny_lm.items()}
    _, params = fairseq.import_unit_lm(checkpoint(rounded))
    np.testing.assert_array_equal(params["embed"], rounded["decoder.embed_tokens.weight"].astype(np.float32))


@pytest.mark.parametrize(
    ("tensors", "changed", "message"),
    [
        ({"decoder.layers.1.fc1.bias": None}, {}, r"lacks decoder\.layers\.1\.fc1\.bias"),
        ({"decoder.layers.0.adapter.weight": np.ones((2, 2), np.float32)}, {}, r"unknown tensors: .*adapter\.weight"),
        ({"decoder.layers.2.fc1.bias": np.ones(12, np.float32)}, {}, "decoder_layers is 2, but its tensors say 3"),
        ({"decoder.layers.0.fc2.bias": np.ones(12, np.float32)}, {}, r"fc2\.bias has shape \[12\], must be \[8\]"),
        ({"decoder.layer_norm.bias": np.ones(8)}, {}, r"layer_norm\.bias is float64"),
        ({"decoder.output_projection.weight": np.ones((104, 8), np.float32)}, {}, "output_projection.weight differs"),
        ({"decoder.embed_tokens.weight": None}, {}, "is not a unit LM"),
        ({"decoder.embed_tokens.weight": "gone"}, {}, "not a tensor"),
        ({}, {"decoder_embed_dim": 16}, "decoder_embed_dim is 16, but its tensors say 8"),
        ({}, {"decoder_attention_heads": None}, "--heads=16"),
        ({}, {"decoder_layers": [[2]]}, "decoder_layers is a list, must be an integer"),
        ({}, {"decoder_attention_heads": 3}, "dim 8 is not a multiple of heads 3"),
        ({}, {"activation_fn": "gelu"}, "activation_fn='gelu'"),
        ({}, {"decoder_normalize_before": False}, "decoder_normalize_before=False"),
        ({}, {"decoder_learned_pos": True}, "decoder_learned_pos=True"),
    ],
)
def test_mismatched_checkpoints_are_refused(checkpoint, tensors, changed, message):
    path = checkpoint(tensors, changed)
    with pytest.raises(ConvertError, match=message) as raised:
        fairseq.import_unit_lm(path)
    assert str(path) in str(raised.value)


def test_heads_can_be_given_but_not_contradicted(checkpoint):
    path = checkpoint(changed={"decoder_attention_heads": None})
    assert fairseq.import_unit_lm(path, heads=4)[0].heads == 4
    with pytest.raises(ConvertError, match="has decoder_attention_heads=2, not 4"):
        fairseq.import_unit_lm(checkpoint(), heads=4)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1 9", "0 8", *(f"{unit} 1" for unit in range(2, 100))], "line 1: the symbol is '1', must be '0'"),
        ([f"{unit} 1" for unit in range(99)], "has 99 symbols, but the model has 104"),
        ([f"{unit} 1" for unit in range(101)], "has 101 symbols"),
        ([*(f"{unit} 1" for unit in range(99)), "x 1"], "line 100"),
        ([*(f"{unit} 1" for unit in range(98)), "madeupword0000 0", "98 1"], "line 99"),
        (None, "cannot be read"),
    ],
)
def test_dictionaries_out_of_order_are_refused(checkpoint, dictionary, lines, message):
    path = checkpoint()
    dictionary.unlink()
    if lines is not None:
        dictionary.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConvertError, match=message) as raised:
        fairseq.import_unit_lm(path)
    assert str(dictionary) in str(raised.value)


def test_a_padded_dictionary_beside_another_name(checkpoint, tmp_path: Path):
    padded = tmp_path / "padded.txt"
    padded.write_text("".join(f"{unit} 1\n" for unit in range(98)) + "madeupword0000 0\nmadeupword0001 0\n")
    assert fairseq.import_unit_lm(checkpoint(), padded)[0].vocab_size == 104


def test_a_checkpoint_without_a_model_is_refused(torch_writer, tmp_path: Path):
    path = torch_writer.zip(tmp_path / "x.pt", {"epoch": 3})
    with pytest.raises(ConvertError, match=r"no model weights \(it has epoch\)"):
        fairseq.import_unit_lm(path)


def _named(params, layers):
    """A prompt tree under the checkpoint's tensor names."""
    named = {"decoder.sep_embed.weight": params["sep"]}
    if "input" in params:
        named["decoder.prefix_embed_prompts.weight"] = params["input"]
    for part in ("key", "value"):
        for layer in range(layers) if part in params else ():
            named[f"decoder.deep_{part}_embed_prompts.{layer}.weight"] = params[part][layer]
    if "verbalizer" in params:
        named["decoder.prompt_linear_verbalizer.weight"] = params["verbalizer"]
    return named


@pytest.mark.parametrize("case", CASES)
def test_golden_prompts(golden: Path, lm: Path, tmp_path: Path, case, capsys):
    main(["prompt", str(golden / "prompt" / f"{case}_prompt_ckpt.pt"), str(tmp_path / "pack"), f"--lm={lm}"])
    pack, expected = load_pack(tmp_path / "pack"), dict(np.load(golden / "prompt" / f"{case}_params.npz"))
    if not case.startswith("c"):  # deep prompts do not use the input prompt
        expected.pop("decoder.prefix_embed_prompts.weight")
        assert "Left out the 320 numbers of the input prompt" in capsys.readouterr().out
    named = _named(pack.params, 3)
    assert set(named) == set(expected)
    for name, array in named.items():
        np.testing.assert_array_equal(array, expected[name])
    assert pack.card["parameters"] == sum(array.size for array in expected.values())
    assert pack.card["lm"]["hash"] == read_unit_lm(lm)[2]["hash"]
    classes = {"b_": 24, "b1": 12, "c1": 12}.get(case[:2], 100)
    assert pack.task.slots[0].labels == tuple(map(str, range(classes)))
    learnable = "verbalizer" in pack.params
    assert pack.card["verbalizer"]["outputs"] == (classes + 4 if learnable else 104)
    assert pack.card["verbalizer"]["codes"] == pack.card["verbalizer"]["feeds"] == [[4 + c] for c in range(classes)]


def test_labels_of_a_rule_verbalizer(golden: Path, lm: Path, tmp_path: Path):
    data = golden / "e2e" / "SCR_google_speech_commands" / "verbalized_freq_data" / "verbalizer.json"
    source = golden / "e2e" / "SCR_freq_prompt_ckpt.pt"
    main(["prompt", str(source), str(tmp_path / "pack"), f"--lm={lm}", "--task=gsc", f"--verbalizer={data}"])
    card = load_pack(tmp_path / "pack").card
    assert (card["task"], card["verbalizer"]["kind"]) == ("gsc", "frequency")
    units = json.loads(data.read_text())
    for label, code in zip(card["slots"][0]["labels"], card["verbalizer"]["codes"], strict=True):
        assert code == [4 + int(units[label])]
    # Without a task the labels are those of the file, in its order.
    main(["prompt", str(source), str(tmp_path / "bare"), f"--lm={lm}", f"--verbalizer={data}", "--kind=random"])
    bare = load_pack(tmp_path / "bare")
    assert bare.task.slots[0].labels == tuple(units)
    assert bare.card["verbalizer"]["kind"] == "random"


def test_labels_of_a_learnable_verbalizer_in_three_slots(golden: Path, lm: Path, tmp_path: Path):
    data = golden / "e2e" / "IC_fluent_commands" / "verbalized_learnable_data" / "verbalizer.json"
    source = golden / "e2e" / "IC_learnable_prompt_ckpt.pt"
    actions = ["change language", "activate", "deactivate", "increase", "decrease", "bring"]
    objects = ["none", *(f"obj{number}" for number in range(14))]
    task = {
        "name": "intents",
        "slots": [
            {"name": "action", "labels": actions},
            {"name": "object", "labels": objects},
            {"name": "location", "labels": ["none", "kitchen", "bedroom", "washroom"]},
        ],
        "metric": "exact_match",
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    options = [f"--lm={lm}", f"--task={tmp_path / 'task.json'}", f"--verbalizer={data}"]
    main(["prompt", str(source), str(tmp_path / "pack"), *options])
    pack = load_pack(tmp_path / "pack")
    assert pack.task.num_classes == 25
    numbers = json.loads(data.read_text())
    expected = [numbers[label.replace(" ", "_")] for _, label in pack.task.classes]
    assert [code[0] - 4 for code in pack.card["verbalizer"]["codes"]] == list(map(int, expected))
    assert pack.card["verbalizer"]["outputs"] == len(pack.params["verbalizer"]) == 28
    with pytest.raises(SystemExit, match="lacks Chinese"):
        main(["prompt", str(source), str(tmp_path / "x"), f"--lm={lm}", "--task=fsc", f"--verbalizer={data}"])


def test_a_task_alone_and_slots_alone(golden: Path, lm: Path, tmp_path: Path, capsys):
    source = golden / "prompt" / "b_linear24_multi_prompt_ckpt.pt"
    main(["prompt", str(source), str(tmp_path / "fsc"), f"--lm={lm}", "--task=fsc"])
    assert "Took row 4 + c of the verbalizer for class c of task 'fsc'" in capsys.readouterr().out
    card = load_pack(tmp_path / "fsc").card
    assert card["slots"][2] == {"name": "location", "labels": ["none", "kitchen", "bedroom", "washroom"]}
    assert card["verbalizer"]["codes"][20:] == [[24], [25], [26], [27]]
    main(["prompt", str(source), str(tmp_path / "two"), f"--lm={lm}", "--slots=2"])
    assert [len(slot.labels) for slot in load_pack(tmp_path / "two").task.slots] == [24, 24]
    with pytest.raises(SystemExit, match=r"3 slots have 13,824 combinations of labels.*--data=RECORDS"):
        main(["prompt", str(source), str(tmp_path / "three"), f"--lm={lm}", "--slots=3"])
    assert not (tmp_path / "three").exists()
    # The labels of SpeechPrompt's file may be the task's class numbers, in any order.
    order = tmp_path / "order.json"
    order.write_text(json.dumps({str(c): str(23 - c) for c in range(24)}))
    main(["prompt", str(source), str(tmp_path / "turned"), f"--lm={lm}", "--task=fsc", f"--verbalizer={order}"])
    assert load_pack(tmp_path / "turned").card["verbalizer"]["codes"] == [[27 - c] for c in range(24)]


def test_combinations_are_those_of_the_records(golden: Path, lm: Path, tmp_path: Path):
    labels = [(1, 7, 21), (5, 12, 20), (1, 7, 21)]
    write_unit_records(
        tmp_path / "fsc", TASKS["fsc"], {"train": [Utterance(str(i), [1, 2], c) for i, c in enumerate(labels)]}
    )
    source = golden / "prompt" / "b_linear24_multi_prompt_ckpt.pt"
    options = [f"--lm={lm}", "--task=fsc", f"--data={tmp_path / 'fsc'}"]
    main(["prompt", str(source), str(tmp_path / "pack"), *options])
    assert load_pack(tmp_path / "pack").card["combinations"] == [[1, 7, 21], [5, 12, 20]]
    with pytest.raises(SystemExit, match="whose slots are not the prompt's"):
        main(["prompt", str(source), str(tmp_path / "x"), f"--lm={lm}", "--slots=2", f"--data={tmp_path / 'fsc'}"])
    with pytest.raises(SystemExit, match="is not a complete directory of unit records"):
        main(["prompt", str(source), str(tmp_path / "x"), f"--lm={lm}", "--task=fsc", f"--data={tmp_path / 'no'}"])


@pytest.mark.parametrize("out", ["afile/pack", "afile"])
def test_an_unwritable_path_is_named(
    golden: Path, lm: Path, tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "afile").write_text("")
    source = golden / "prompt" / "b_linear24_multi_prompt_ckpt.pt"
    with pytest.raises(SystemExit):
        main(["prompt", str(source), str(tmp_path / out), f"--lm={lm}", "--task=fsc"])
    assert str(tmp_path / out) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("d_freq_multi", ["--verbalizer={random}"], "'obj0' and 'obj9' share the number 62"),
        ("a_freq_single", ["--task=gsc"], "rule verbalizer"),
        ("b1_linear12_single", ["--task=fsc"], "has 12 classes, task 'fsc' has 24"),
        ("b1_linear12_single", ["--kind=random"], "learnable verbalizer, not a random one"),
        ("a_freq_single", ["--kind=learnable"], "no learnable verbalizer"),
        ("b1_linear12_single", ["--verbalizer={random}"], "number its labels 0 to 11"),
        ("a_freq_single", ["--task=nonsense"], "none of fsc, gsc"),
        ("a_freq_single", ["--task={random}", "--verbalizer={random}"], "does not describe a task"),
        ("a_freq_single", ["--verbalizer=absent.json"], "absent.json is not a verbalizer"),
        ("a_freq_single", ["--slots=0"], "--slots=0"),
        ("a_freq_single_base_prompt_model", [], "unknown tensors: decoder.embed_tokens.weight"),
    ],
)
def test_mismatched_labels_are_refused(golden: Path, lm: Path, tmp_path: Path, source, options, message):
    random = golden / "e2e" / "IC_fluent_commands" / "verbalized_random_data" / "verbalizer.json"
    name = source if source.endswith("model") else f"{source}_prompt_ckpt"
    command = ["prompt", str(golden / "prompt" / f"{name}.pt"), str(tmp_path / "pack"), f"--lm={lm}"]
    with pytest.raises(SystemExit, match=re.escape(message)):
        main([*command, *(option.format(random=random) for option in options)])
    assert not (tmp_path / "pack").exists()


def test_a_prompt_of_another_lm_is_refused(golden: Path, checkpoint, tmp_path: Path):
    main(["unit_lm", str(checkpoint()), str(tmp_path / "other")])
    source = golden / "prompt" / "a_freq_single_prompt_ckpt.pt"
    with pytest.raises(SystemExit, match=r"has shape \[5, 64\], must be \[5, 8\]\. The LM given by --lm has dim 8"):
        main(["prompt", str(source), str(tmp_path / "pack"), f"--lm={tmp_path / 'other'}"])


def test_a_fine_tuned_prompt_is_refused(torch_writer, tmp_path: Path):
    model = {"decoder.prefix_embed_prompts.weight": np.ones((5, 8), np.float32)}
    path = torch_writer.zip(tmp_path / "x.pt", {"cfg": {"model": {"fine_tune": True}}, "model": model})
    with pytest.raises(ConvertError, match="fine_tune=True"):
        speechprompt.import_prompt(path, UnitLMConfig(dim=8, heads=2, layers=2, ffn_dim=12), "h")


def test_nothing_is_overwritten_without_force(checkpoint, tmp_path: Path, capsys):
    command = ["unit_lm", str(checkpoint()), str(tmp_path / "lm")]
    main(command)
    assert f"unit LM of {read_unit_lm(tmp_path / 'lm')[0].num_params:,} parameters" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"lm exists\. .*--force"):
        main(command)
    (tmp_path / "lm" / "config.json").write_text("{}")
    main([*command, "--force"])
    assert read_unit_lm(tmp_path / "lm")[0].dim == 8
    (tmp_path / "lm" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"holds notes\.txt"):
        main([*command, "--force"])


@pytest.mark.parametrize("job", ["unit_lm", "prompt"])
def test_help(job, capsys):
    with pytest.raises(SystemExit) as done:
        main([job, "--help"])
    assert done.value.code == 0
    assert f"\n  python -m spjax.convert {job} " in capsys.readouterr().out


def test_golden_checkpoints_share_one_storage_between_embedding_and_output(golden: Path):
    model = read_torch_file(golden / "lm" / "checkpoint_best.pt")["model"]
    np.testing.assert_array_equal(
        model["decoder.output_projection.weight"].numpy(), model["decoder.embed_tokens.weight"].numpy()
    )
