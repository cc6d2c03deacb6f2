"""Prompt packs on the Hugging Face hub: a model repository each, in whose root lie the pack's files.

Everything goes through `huggingface_hub`, so its environment holds here: HF_TOKEN and `hf auth login` for who you
are, HF_HUB_OFFLINE=1 for the local cache alone, HF_HOME for where that is, HF_ENDPOINT for another hub.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from spjax.storage import files, kinds, pack_readme, packs, places
from spjax.storage.files import StorageError

_FILES = (packs.CARD_FILE, packs.TENSOR_FILE, pack_readme.FILE)


@contextlib.contextmanager
def _told(repo_id: str, revision: str | None) -> Iterator[None]:
    """The hub's errors as StorageErrors that say what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise StorageError(f"{repo_id!r} is no repository's name: {error}. Give USER/NAME.") from error
    except errors.RevisionNotFoundError as error:
        raise StorageError(
            f"{repo_id} has no revision {revision!r}: give a branch, a tag or a commit of it."
        ) from error
    except errors.GatedRepoError as error:
        raise StorageError(
            f"{repo_id} is gated: ask for access on its page, then log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise StorageError(
            f"the hub shows no repository {repo_id}. Check the name; if it is private, log in with `hf auth login` or "
            "set HF_TOKEN."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise StorageError(
            f"{repo_id} ({revision or 'main'}) is not whole in the local cache, and the hub was not reached: "
            f"{_why(error)} "
            "Connect (and unset HF_HUB_OFFLINE), or have the pack copied here and load it from its directory."
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise StorageError(f"{repo_id}: HF_HUB_OFFLINE is set, so the hub is not asked. Unset it.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        way_out = {
            401: "Log in with `hf auth login`, or set HF_TOKEN.",
            403: "The token may not do that: make one with write access, and publish under your own name.",
        }.get(status, "Try again later.")
        raise StorageError(f"{repo_id}: the hub answers {status} ({_why(error)}) {way_out}") from error
    except errors.LocalTokenNotFoundError as error:
        raise StorageError(f"{repo_id}: there is no token. Log in with `hf auth login`, or set HF_TOKEN.") from error
    except ValueError as error:  # what the hub's check of front matter found
        raise StorageError(
            f"{repo_id}: {pack_readme.FILE} is refused: {_why(error)} Mend it and push again."
        ) from error
    except (errors.HTTPError, OSError) as error:  # httpx's, which no version of the hub turns into its own
        raise StorageError(f"{repo_id}: the hub was not reached ({_why(error)}) Check the connection.") from error


def _why(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200].rstrip(".") + "."


def push_pack(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    licence: str | None = None,
    token: str | None = None,
) -> str:
    """Publishes a prompt pack as it lies on disk, in one commit; its README.md, if you wrote it anew, is kept.

    Args:
      directory: of the pack. Where it has no README.md (packs of older versions), one is written for the hub.
      repo_id: USER/NAME of a model repository; made where there is none.
      private: of a new repository; by default what its owner's settings say.
      revision: branch; by default main.
      message: of the commit.
      licence: identifier of the hub's, e.g. "cc-by-4.0", for the README's front matter; by default what that says.
      token: of the hub; by default the one you are logged in with.

    Returns:
      Hash of the commit, which `fetch_pack` takes as a revision.

    Raises:
      StorageError: a pack that `load_pack` refuses, no network, or a hub that refuses; the message says what to do.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    directory = Path(directory)
    pack = packs.load_pack(directory)
    readme = directory / pack_readme.FILE
    text = places.read_limited(readme, kinds.MAX_JSON).decode() if readme.is_file() else packs.readme(pack)
    if licence is not None:
        text = pack_readme.with_licence(text, licence)
    content: dict[str, str | bytes] = {
        packs.CARD_FILE: files.json_bytes(pack.card),  # that of an older version gets its hash
        packs.TENSOR_FILE: str(directory / packs.TENSOR_FILE),
        pack_readme.FILE: text.encode(),
    }
    with _told(repo_id, revision):
        api = HfApi(library_name="spjax", token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            operations=[CommitOperationAdd(name, path) for name, path in content.items()],
            commit_message=message or f"Prompt pack {pack.card['task']}",
            revision=revision,
        )
    return commit.oid


def fetch_pack(
    repo_id: str, *, revision: str | None = None, cache_dir: str | Path | None = None, token: str | None = None
) -> Path:
    """Brings a pack's files into the hub's local cache; what is there already is not fetched again.

    Args:
      repo_id: USER/NAME.
      revision: branch, tag or commit; name a commit to get the same pack for ever. By default main.
      cache_dir: by default the hub's own (HF_HOME).
      token: of the hub; by default the one you are logged in with.

    Returns:
      Directory in the cache, for `load_pack`. Without a network: the copy that is there, if it is whole.

    Raises:
      StorageError: no such repository or revision, no pack in it, no network and no copy; the message says what to do.
    """
    from huggingface_hub import snapshot_download

    with _told(repo_id, revision):
        directory = snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=list(_FILES),
            library_name="spjax",
        )
    for name in (packs.CARD_FILE, packs.TENSOR_FILE):
        if not (Path(directory) / name).is_file():
            raise StorageError(f"{repo_id} ({revision or 'main'}) has no {name}: it is no prompt pack. Check the name.")
    return Path(directory)
