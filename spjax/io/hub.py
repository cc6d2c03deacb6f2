"""Prompt packs on the Hugging Face hub: one model repository a pack, with the pack's files at its root.

`huggingface_hub` reads its usual environment variables: HF_TOKEN (or `hf auth login`), HF_HUB_OFFLINE=1 (use the local
cache only), HF_HOME (location of the cache) and HF_ENDPOINT (another hub).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from spjax.io.files import StorageError


@contextlib.contextmanager
def _translate_hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Raises the hub's errors as StorageErrors with a suggested fix."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise StorageError(f"{repo_id!r} is not a valid repository name: {error}. Give USER/NAME.") from error
    except errors.RevisionNotFoundError as error:
        raise StorageError(
            f"{repo_id} has no revision {revision!r}: give one of its branches, tags or commits."
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
            f"{repo_id} ({revision or 'main'}) is incomplete in the local cache, and the hub cannot be reached: "
            f"{_why(error)} "
            "Connect (and unset HF_HUB_OFFLINE), or copy the pack to this machine and load its directory."
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise StorageError(f"{repo_id}: HF_HUB_OFFLINE is set, so the hub is not contacted. Unset it.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        fix = {
            401: "Log in with `hf auth login`, or set HF_TOKEN.",
            403: "The token lacks the permission: create one with write access, and publish under your account.",
        }.get(status, "Try again later.")
        raise StorageError(f"{repo_id}: the hub answers {status} ({_why(error)}) {fix}") from error
    except errors.LocalTokenNotFoundError as error:
        raise StorageError(f"{repo_id}: no token was found. Log in with `hf auth login`, or set HF_TOKEN.") from error
    except ValueError as error:  # from the hub's validation of the front matter
        raise StorageError(f"{repo_id}: README.md is refused: {_why(error)} Correct it and push again.") from error
    except (errors.HTTPError, OSError) as error:  # huggingface_hub does not wrap httpx's errors
        raise StorageError(f"{repo_id}: the hub cannot be reached ({_why(error)}) Check the connection.") from error


def _why(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200].rstrip(".") + "."


def push(
    repo_id: str,
    content: Mapping[str, str | bytes],
    *,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Publishes files in one commit of a model repository, which is created if absent.

    Args:
      repo_id: USER/NAME.
      content: bytes, or the path of a local file, by name in the repository.
      message: of the commit.
      private: visibility of a new repository; None for the account's default.
      revision: branch; None for main.
      token: hub token; None for the one you are logged in with.

    Returns:
      Hash of the commit.

    Raises:
      StorageError: no network, or an error of the hub; the message suggests a fix.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with _translate_hub_errors(repo_id, revision):
        api = HfApi(library_name="spjax", token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            operations=[CommitOperationAdd(name, path) for name, path in content.items()],
            commit_message=message,
            revision=revision,
        )
    return commit.oid


def fetch(
    repo_id: str,
    required: Sequence[str],
    optional: Sequence[str] = (),
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
) -> Path:
    """Downloads files of a repository into the hub's local cache, unless they are there.

    Args:
      repo_id: USER/NAME.
      required: names of files it must have.
      optional: names of files it may have.
      revision: branch, tag or commit; a commit pins the content. None for main.
      cache_dir: None for the hub's default (HF_HOME).
      token: hub token; None for the one you are logged in with.

    Returns:
      Directory in the cache. Without a network: the cached copy, if complete.

    Raises:
      StorageError: no such repository or revision, a file missing from it, or no network and no copy; the message
        suggests a fix.
    """
    from huggingface_hub import snapshot_download

    with _translate_hub_errors(repo_id, revision):
        directory = snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=[*required, *optional],
            library_name="spjax",
        )
    for name in required:
        if not (Path(directory) / name).is_file():
            raise StorageError(
                f"{repo_id} ({revision or 'main'}) has no {name}: it is not a prompt pack. Check the name."
            )
    return Path(directory)
