"""The Hugging Face hub, and policies there: ``hub:owner/name``, or ``hub:owner/name@revision``.

Of policies only JSON, text and safetensors travel, in both directions: a repository's pickles are not even downloaded.
The hub's address and token are huggingface_hub's (``HF_ENDPOINT``, ``hf auth login``).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm4vla.errors import UserError
from vlm4vla.files import beside

PREFIX = "hub:"
FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.md")


def split(name: str) -> tuple[str, str]:
    """``hub:owner/name@revision`` -> ``("owner/name", "revision")``; the revision is empty where none is named."""
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    return repository, revision


def local(source: Path | str) -> Path:
    """A folder as it is; of ``hub:owner/name`` the local copy, see ``fetch``."""
    return fetch(str(source)) if str(source).startswith(PREFIX) else Path(source)


def policy_folder(source: Path | str, others: str = "") -> Path:
    """``local`` of a policy.

    Args:
        others: what else may be named there, told in the error.

    Raises:
        UserError: there is no policy; and see ``fetch``.
    """
    folder = local(source)
    if (folder / "policy.json").is_file():
        return folder
    below = [str(path.parent) for path in sorted(folder.glob("*/policy.json"))]  # a run's: policy
    raise UserError(
        f"no {folder}/policy.json{'' if folder.is_dir() else beside(folder)}",
        f"a policy folder{others}",
        f"name {' or '.join(below)}" if below else "train one: vlm4vla train --help",
    )


def fetch(name: str) -> Path:
    """Download ``hub:owner/name[@revision]``, or what of it is not here yet; returns the local folder.

    Raises:
        UserError: no such repository, none that this account may read, or no way to the hub.
    """
    return snapshot(name, FILES)


def snapshot(name: str, patterns: Sequence[str], data_set: bool = False, folder: Path | None = None) -> Path:
    """Fetch the files of ``hub:owner/name[@revision]`` that match; what is here and unchanged is not fetched again.

    Args:
        folder: where they are put; without one, into huggingface_hub's cache.

    Raises:
        UserError: no such repository, none that this account may read, or no way to the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    repository, revision = split(name)
    settings: dict[str, Any] = {"repo_type": "dataset"} if data_set else {}
    settings |= {"local_dir": folder} if folder else {}
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns), **settings))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise _failed(name, error, "no such repository, or no access to it: ") from error
    except Exception as error:  # of whichever HTTP library huggingface_hub is built on
        raise UserError(
            f"{name}: not downloaded whole ({(str(error) or type(error).__name__).splitlines()[0]})",
            "a connection to the hub, or a copy on this machine",
            "run the same command again: it goes on where it was interrupted",
        ) from error


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a folder's files as ``owner/name``, which is made where there is none; returns its address.

    Raises:
        UserError: no way to the hub, or no right to write there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, api = name.removeprefix(PREFIX), HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(FILES), commit_message="vlm4vla policy")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _failed(name, error) from error
    return str(address)


def _failed(name: str, error: Exception, what: str = "") -> UserError:
    return UserError(
        f"{name}: {what}{(str(error) or type(error).__name__).splitlines()[0]}",
        "a repository owner/name on a hub that can be reached, and the right to use it",
        "check the name and the account: hf auth whoami",
    )
