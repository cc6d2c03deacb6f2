"""Packs on a hub: real HTTP by huggingface_hub, with a fake server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from spjax.io import StorageError, load_pack
from spjax.io.packs import PromptPack, push_pack, save_pack
from tests.io import hub_server
from tests.io.hub_server import READER, TOKEN, Hub
from tests.io.test_packs import card

PACK = Path(__file__).parent / "pack_version_1"  # saved before packs had a README.md
FILES = {"card.json", "prompt.safetensors", "README.md"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Runs a fake hub with a token and a separate cache."""
    from huggingface_hub import constants

    with hub_server.running() as hub:
        # Values of HF_ENDPOINT and HF_HOME, which the library reads at its first import.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def same(a: PromptPack, b: PromptPack) -> bool:
    return a.card == b.card and all(a.params[name].tobytes() == b.params[name].tobytes() for name in a.params)


def low_rank_pack(place: Path) -> Path:
    """Saves a pack of adapters without prompts."""
    rng = np.random.default_rng(0)
    shapes = {"sep": (1, 8), "verbalizer": (9, 30), "query_a": (2, 2, 8), "query_b": (2, 2, 8)}
    lora = {"rank": 2, "alpha": 3.0, "targets": ["query"]}
    save_pack(place, {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}, card(lora=lora))
    return place


@pytest.mark.parametrize("adapted", [False, True])
def test_there_and_back_bit_for_bit(hub: Hub, tmp_path: Path, adapted: bool):
    place = low_rank_pack(tmp_path / "pack") if adapted else PACK
    pack = PromptPack.load(place)
    commit = pack.push_to_hub("someone/toy", private=True, licence="cc-by-4.0")
    assert "private" in (
        hub.created[0].get("visibility"),
        *hub.created[0],
    )  # newer and older clients use different fields
    on_hub = hub.commits["someone/toy"][commit]
    assert on_hub.keys() == FILES
    assert on_hub["prompt.safetensors"] == (place / "prompt.safetensors").read_bytes()
    assert yaml.safe_load(on_hub["README.md"].decode().split("---\n")[1])["license"] == "cc-by-4.0"
    assert same(PromptPack.from_hub("someone/toy"), pack)
    assert same(PromptPack.from_hub("someone/toy", revision=commit), pack)


def test_a_revision_stays_what_it_was(hub: Hub, tmp_path: Path):
    pack = PromptPack.load(PACK)
    first = pack.push_to_hub("someone/toy")
    other = PromptPack({**pack.params, "sep": pack.params["sep"] + np.float32(1)}, pack.card)
    other.push_to_hub("someone/toy", message="another seed")
    assert same(PromptPack.from_hub("someone/toy", revision=first), pack)
    assert PromptPack.from_hub("someone/toy").params["sep"].tobytes() == other.params["sep"].tobytes()
    assert len(hub.created) == 1


def test_an_edited_readme_is_kept(hub: Hub, tmp_path: Path):
    PromptPack.load(PACK).save(tmp_path / "pack")
    readme = tmp_path / "pack" / "README.md"
    readme.write_text("---\nlicense: mit\ntags: [mine]\n---\nMy own words.\n", encoding="utf-8")
    commit = push_pack(tmp_path / "pack", "someone/toy")
    assert hub.commits["someone/toy"][commit]["README.md"] == readme.read_bytes()
    commit = push_pack(tmp_path / "pack", "someone/toy", licence="cc0-1.0")
    text = hub.commits["someone/toy"][commit]["README.md"].decode()
    assert yaml.safe_load(text.split("---\n")[1]) == {"license": "cc0-1.0", "tags": ["mine"]}
    assert "My own words." in text
    readme.write_text("---\n{broken\n---\n", encoding="utf-8")
    with pytest.raises(StorageError, match=r"README\.md is refused: .*front matter.*push again"):
        push_pack(tmp_path / "pack", "someone/toy")


def test_only_a_packs_files_are_fetched_and_only_once(hub: Hub, tmp_path: Path):
    files = {path.name: path.read_bytes() for path in PACK.iterdir()}
    hub.commit("someone/toy", "main", {**files, "model.pkl": b"never fetched", "notes/big.bin": b"never either"})
    PromptPack.from_hub("someone/toy", cache_dir=tmp_path)
    (directory,) = tmp_path.glob("models--someone--toy/snapshots/*")
    assert {path.name for path in directory.iterdir()} == {"card.json", "prompt.safetensors"}
    before = len([line for line in hub.asked if line.startswith("GET") and "/resolve/" in line])
    assert before == 2
    PromptPack.from_hub("someone/toy", cache_dir=tmp_path)
    assert len([line for line in hub.asked if line.startswith("GET") and "/resolve/" in line]) == before


def test_without_a_network_the_copy_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    pack = PromptPack.load(PACK)
    pack.push_to_hub("someone/toy")
    PromptPack.from_hub("someone/toy")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert same(PromptPack.from_hub("someone/toy"), pack)
    with pytest.raises(StorageError, match=r"someone/other \(main\) is incomplete in the local cache.*HF_HUB_OFFLINE"):
        PromptPack.from_hub("someone/other")
    with pytest.raises(StorageError, match=r"someone/toy: .*HF_HUB_OFFLINE"):
        pack.push_to_hub("someone/toy")
    assert len(hub.asked) == asked


def test_without_a_server_a_fix_is_suggested(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(StorageError, match=r"someone/toy: the hub cannot be reached .*Check the connection"):
        PromptPack.load(PACK).push_to_hub("someone/toy")
    with pytest.raises(StorageError, match=r"the hub cannot be reached: .*Connect"):
        PromptPack.from_hub("someone/toy")


def test_errors_suggest_a_fix(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    pack = PromptPack.load(PACK)
    with pytest.raises(StorageError, match=r"shows no repository someone/absent.*hf auth login"):
        PromptPack.from_hub("someone/absent")
    with pytest.raises(StorageError, match=r"is not a valid repository name: .*Give USER/NAME"):
        PromptPack.from_hub("no//name")
    hub.commit("someone/toy", "main", {"weights.bin": b"x", "README.md": b"hello"})
    with pytest.raises(StorageError, match=r"someone/toy \(main\) has no card\.json: it is not a prompt pack"):
        PromptPack.from_hub("someone/toy")
    with pytest.raises(
        StorageError, match="someone/toy has no revision 'v9': give one of its branches, tags or commits"
    ):
        PromptPack.from_hub("someone/toy", revision="v9")
    with pytest.raises(StorageError, match="someone/toy has no revision 'v9'"):
        pack.push_to_hub("someone/toy", revision="v9")
    with pytest.raises(StorageError, match="'mine, all mine' is not a licence identifier"):
        pack.push_to_hub("someone/toy", licence="mine, all mine")
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(StorageError, match=r"403.*write access"):
        pack.push_to_hub("someone/new")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(StorageError, match=r"Log in|log in"):
        pack.push_to_hub("someone/new")
    assert "someone/new" not in hub.commits


def test_a_damaged_pack_is_not_published_and_not_used(hub: Hub, tmp_path: Path):
    pack = PromptPack.load(PACK).save(tmp_path / "pack")
    file = tmp_path / "pack" / "prompt.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(StorageError, match="one of the two was altered"):
        push_pack(tmp_path / "pack", "someone/toy")
    assert not hub.asked
    card = (tmp_path / "pack" / "card.json").read_bytes()
    hub.commit("someone/toy", "main", {"card.json": card, "prompt.safetensors": file.read_bytes()})
    with pytest.raises(StorageError, match="one of the two was altered"):
        PromptPack.from_hub("someone/toy")
    newer = card.replace(b'"version": 2', b'"version": 9')
    hub.commit("someone/toy", "main", {"card.json": newer})
    with pytest.raises(StorageError, match=r"this spjax reads up to 4. Update spjax"):
        PromptPack.from_hub("someone/toy")
    assert pack.card["version"] == 2


def test_the_command_pushes_and_pulls_through_hf_endpoint(tmp_path: Path):
    def run(*words: str, **extra: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu", "HF_HOME": str(tmp_path / "hf")}
        environment.pop("HF_HUB_OFFLINE", None)
        return subprocess.run(
            [sys.executable, "-m", "spjax.packs", *words], env={**environment, **extra}, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip

    with hub_server.running() as hub:
        there = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        done = run("push", str(PACK), "someone/toy", "--licence=cc-by-4.0", **there)
        assert (done.returncode, done.stdout) == (0, f"someone/toy: commit {hub.branches['someone/toy']['main']}\n"), (
            done
        )
        done = run("pull", "someone/toy", f"--out={tmp_path / 'pulled'}", **there)
        assert done.returncode == 0, done
        assert same(load_pack(tmp_path / "pulled"), load_pack(PACK))
    done = run("pull", "someone/other", f"--out={tmp_path / 'again'}", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: someone/other (main) is incomplete in the local cache")
    assert not (tmp_path / "again").exists()
