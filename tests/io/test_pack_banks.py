"""Banks on disk: round trip bit for bit; incompatible packs are refused with a suggested fix."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spjax.io import StorageError, load_pack, make_card, save_pack
from spjax.io.banks import load_bank, load_packs, save_bank, split_bank
from spjax.io.packs import PromptPack
from spjax.models import low_rank, prompts
from spjax.models.config import UnitLMConfig
from spjax.models.prompts import PromptConfig
from spjax.models.verbalizers import from_card
from spjax.packs import main
from spjax.tasks import Slot, Task

LM = UnitLMConfig(vocab_size=30, dim=8, layers=2, heads=2, ffn_dim=12)
OLD = Path(__file__).parent / "pack_version_1"


def pack(
    tmp_path: Path, name="a", labels=3, length=2, seed=0, learnable=True, lm="abc", config=LM, lora=None, **more
) -> PromptPack:
    """Saves a pack; `more` are tensors, None to remove one; `lora` is a PromptConfig of adapters."""
    rng = np.random.default_rng(seed)
    task = Task(name, (Slot("word", tuple(f"w{i}" for i in range(labels))),))
    codes = np.arange(labels)[:, None] + 4
    kind, outputs = ("learnable", labels + 4) if learnable else ("random", config.vocab_size)
    card = make_card(task, kind=kind, codes=codes, feeds=codes, outputs=outputs, config=config, lm_hash=lm,
                     lora=lora and lora.lora)  # fmt: skip
    shapes = {"sep": (1, 8)} | ({"key": (2, length, 8), "value": (2, length, 8)} if length or not lora else {})
    if lora:
        drawn = low_rank.init_member(jax.random.key(seed), lora.rank, lora.targets, config)
        shapes |= {key: leaf.shape for key, leaf in drawn.items()}
    shapes |= {"verbalizer": (outputs, config.vocab_size)} if learnable else {}
    tree = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()} | more
    return save_pack(tmp_path / f"{name}-{seed}", {k: v for k, v in tree.items() if v is not None}, card)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def same(a: PromptPack, b: PromptPack) -> bool:
    return a.card == b.card and {k: v.tobytes() for k, v in a.params.items()} == {
        k: v.tobytes() for k, v in b.params.items()
    }


def test_packs_round_trip_through_a_bank(tmp_path: Path):
    odd = np.asarray([[-0.0, 1e-40, 3.4e38, 0, 0, 0, 0, 1]], np.float32)
    members = {
        "first": pack(tmp_path, "a", labels=2, length=5, sep=odd),
        "second": pack(tmp_path, "b", labels=7, length=1, seed=1),
        "no.prompt+1": pack(tmp_path, "c", labels=3, length=0, seed=2),
        "low-rank": pack(tmp_path, "d", length=0, seed=3, lora=PromptConfig(length=0, rank=2, alpha=1.0)),
        "both": pack(tmp_path, "e", length=1, seed=4, lora=PromptConfig(length=1, rank=3, targets=("out", "key"))),
    }
    save_bank(tmp_path / "bank", members)
    found = load_bank(tmp_path / "bank")
    assert list(found) == list(members)
    assert all(same(found[name], members[name]) for name in members)
    paths = split_bank(tmp_path / "bank", tmp_path / "split")
    assert [path.name for path in paths] == list(members)
    for path, saved in zip(paths, ("a-0", "b-1", "c-2", "d-3", "e-4"), strict=True):
        assert contents(path) == contents(tmp_path / saved)  # every file, byte for byte
    save_bank(tmp_path / "again", {path.name: load_pack(path) for path in paths})
    assert contents(tmp_path / "again") == contents(tmp_path / "bank")


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=4))
def test_members_can_be_joined_and_split(tmp_path: Path, shapes):
    forms = [PromptConfig(length=p, rank=r, targets=low_rank.TARGETS[i:]) for i, (_, p, r) in enumerate(shapes)]
    members = {
        f"m{i}": pack(tmp_path, f"t{i}", n, p, seed=i, lora=forms[i] if r else None)
        for i, (n, p, r) in enumerate(shapes)
    }
    save_bank(tmp_path / "bank", members)
    found = load_bank(tmp_path / "bank")
    joined = prompts.join([prompts.stack([one.params]) for one in found.values()])
    for row, (name, one) in enumerate(members.items()):
        verbalizer = from_card(one.card["verbalizer"], one.task)
        member = prompts.part(joined, row, row + 1, verbalizer, forms[row])
        member = jax.tree.map(np.asarray, prompts.member(member, 0))
        assert {k: v.tobytes() for k, v in member.items()} == {k: v.tobytes() for k, v in found[name].params.items()}


def test_an_old_pack_goes_into_a_bank(tmp_path: Path):
    old = load_pack(OLD)
    assert old.card["results"] == {"test": {"headline": 0.875, "exact_match": 0.875, "accuracy": 0.9375}}
    assert np.signbit(old.params["key"][0, 0, 0])
    assert old.params["key"][0, 0, 1] == np.float32(1e-40)
    save_bank(tmp_path / "bank", {"old": old})
    (path,) = split_bank(tmp_path / "bank", tmp_path / "split")
    assert (path / "prompt.safetensors").read_bytes() == (OLD / "prompt.safetensors").read_bytes()
    before, after = (json.loads((place / "card.json").read_text()) for place in (OLD, path))
    assert after == {**before, "version": 2, "card_hash": old.card["card_hash"]}


WIDE = UnitLMConfig(vocab_size=30, dim=8, layers=2, heads=4, ffn_dim=12)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"lm": "abd"}, "a is for the unit LM of hash abc, b for the unit LM of hash abd. A bank serves one unit LM"),
        ({"config": WIDE}, "a is for a unit LM of .*A bank serves one unit LM: merge b into another bank"),
        (
            {"learnable": False},
            "with a learnable verbalizer, b with a rule verbalizer. A bank needs prompts of one structure",
        ),
        ({"sep": np.zeros((2, 8), np.float32)}, "with 1 separators, b with 2 separators"),
        ({"sep_deep": np.zeros((2, 1, 8), np.float32)}, "without separators steered .* b with separators steered"),
        (
            {"key": None, "value": None, "input": np.zeros((4, 8), np.float32)},
            "without an input prompt, b with an input prompt of 4. .*: merge b into another bank",
        ),
    ],
)
def test_incompatible_packs_are_refused(tmp_path: Path, other, message):
    members = {"a": pack(tmp_path, "a"), "b": pack(tmp_path, "b", seed=1, **other)}
    with pytest.raises(StorageError, match=message):
        save_bank(tmp_path / "bank", members)
    assert not (tmp_path / "bank").exists()
    one = {name: jnp.asarray(array)[None] for name, array in members["a"].params.items()}
    two = {name: jnp.asarray(array)[None] for name, array in members["b"].params.items()}
    if other.keys() & {"learnable", "sep", "sep_deep", "key"}:  # packs that are refused could not be joined either
        with pytest.raises((ValueError, TypeError, KeyError)):
            prompts.join([one, two])


def test_a_bank_needs_members_with_names(tmp_path: Path):
    with pytest.raises(StorageError, match="at least one"):
        save_bank(tmp_path / "bank", {})
    for name in ("", "..", "a/b", ".hidden", "a b", "x" * 101):
        with pytest.raises(StorageError, match="is not a valid member name"):
            save_bank(tmp_path / "bank", {name: load_pack(OLD)})


def test_damaged_and_newer_banks_are_refused(tmp_path: Path):
    save_bank(tmp_path / "bank", {"a": pack(tmp_path, "a"), "b": pack(tmp_path, "b", seed=1)})
    card, tensors = tmp_path / "bank" / "bank.json", tmp_path / "bank" / "bank.safetensors"
    described, content = json.loads(card.read_text()), tensors.read_bytes()

    def refused(message: str, **changed) -> None:
        card.write_text(json.dumps({**described, **changed}))
        with pytest.raises(StorageError, match=message):
            load_bank(tmp_path / "bank")
        card.write_text(json.dumps(described))

    for length in (0, 7, 60, len(content) - 4):
        tensors.write_bytes(content[:length])
        with pytest.raises(StorageError, match=r"bank\.safetensors is truncated or damaged .*Take it from its source"):
            load_bank(tmp_path / "bank")
    tensors.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(
        StorageError, match=r"does not hold the prompt that bank\.json describes as .: one of the two was"
    ):
        load_bank(tmp_path / "bank")
    tensors.write_bytes(content)
    refused("version 9, but this spjax reads up to 2. Update spjax", version=9)
    refused("is a prompt pack, not a bank", format="spjax-prompt-pack")
    refused("lists no members", members=[])
    refused("lists no members", members="all")
    refused("bank.json was altered", members=described["members"][:1])
    refused("needs a unique name and a card", members=described["members"] + described["members"][:1])
    refused("needs a unique name and a card", members=[{**described["members"][0], "name": "../../outside"}])
    newer = copy.deepcopy(described["members"])
    newer[1]["card"]["version"] = 9
    refused("bank.json, b: the card of prompt pack 'b' has the version 9, but this spjax reads up to 4", members=newer)
    swapped = [
        {"name": "a", "card": described["members"][1]["card"]},
        {"name": "b", "card": described["members"][0]["card"]},
    ]
    refused("bank.json was altered", members=swapped)
    card.write_text(card.read_text()[:-20])
    with pytest.raises(StorageError, match="is not valid JSON"):
        load_bank(tmp_path / "bank")


def test_packs_are_found_at_any_depth(tmp_path: Path):
    a = pack(tmp_path / "runs" / "a" / "packs", "a")
    pack(tmp_path / "runs" / "b" / "packs", "b", seed=1)
    save_bank(tmp_path / "runs" / "bank", {"c": pack(tmp_path, "c", seed=2)})
    (tmp_path / "runs" / "kmeans").mkdir()
    (tmp_path / "runs" / "kmeans" / "card.json").write_text('{"format": "spjax-kmeans"}')
    (tmp_path / "runs" / ".a.tmp").mkdir()
    (tmp_path / "runs" / ".a.tmp" / "card.json").write_text('{"format": "spjax-prompt-pack"}')
    assert list(load_packs(tmp_path / "runs")) == ["a", "b", "c"], "a pack a task: as the tasks"
    pack(tmp_path / "runs" / "more" / "packs", "a", seed=3)
    assert list(load_packs(tmp_path / "runs")) == ["a-a-0", "b", "c", "a-more-a-3"], "and by the way"
    assert list(load_packs(tmp_path / "runs" / "bank")) == ["c"]
    ((name, found),) = load_packs(tmp_path / "runs" / "a" / "packs" / "a-0").items()
    assert (name, same(found, a)) == ("a", True)
    some = load_packs(tmp_path / "runs" / "bank", f"mine={tmp_path / 'runs' / 'a' / 'packs' / 'a-0'}")
    assert list(some) == ["c", "mine"]
    with pytest.raises(StorageError, match="is a k-means, not a prompt pack"):
        load_packs(tmp_path / "runs" / "kmeans")
    with pytest.raises(StorageError, match="is not a prompt pack, a bank or a directory of them"):
        load_packs(tmp_path / "absent")


def test_the_command_merges_shows_and_splits(tmp_path: Path, capsys):
    for task, seed in (("a", 0), ("b", 0)):
        pack(tmp_path / task, task, seed=seed)
        (tmp_path / task / f"{task}-0").rename(tmp_path / task / "seed_0")
    paths = [str(tmp_path / task / "seed_0") for task in ("a", "b")]
    bank = str(tmp_path / "bank")
    main(["merge", *paths, f"third={paths[0]}", f"--out={bank}"])
    assert capsys.readouterr().out == f"{bank}: bank of 3 prompts: a, b, third\n"
    main(["show", bank])
    shown = capsys.readouterr().out
    assert "b: b, " in shown
    assert "word (3); learnable verbalizer" in shown
    assert "results  accuracy: none recorded" in shown
    main(["split", bank, f"--out={tmp_path / 'out'}"])
    assert contents(tmp_path / "out" / "third") == contents(tmp_path / "a" / "seed_0")
    for words, message in (
        (["merge", *paths, f"--out={bank}"], "exists. Choose another directory, or replace it with --force"),
        (["split", bank, f"--out={tmp_path / 'out'}"], "already holds a"),
        (
            ["merge", paths[0], paths[0], f"--out={tmp_path / 'x'}"],
            "have the name a-seed_0. Leave some out",
        ),
        (["merge", f"a={tmp_path / 'absent'}", f"--out={tmp_path / 'x'}"], "does not exist"),
        (["show", str(tmp_path / "absent")], "is not a prompt pack, a bank"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(words)
    main(["merge", *paths, f"--out={bank}", "--force"])
    assert len(load_bank(bank)) == 2
