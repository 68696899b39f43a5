"""Policies on the Hugging Face hub: ``hub:owner/name``, or ``hub:owner/name@revision``.

Only JSON, text and safetensors travel, in both directions: a repository's pickles are not even downloaded. The hub's
address and token are huggingface_hub's (``HF_ENDPOINT``, ``hf auth login``).
"""

from pathlib import Path

from vlm4vla.errors import UserError

PREFIX = "hub:"
FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.md")


def split(name: str) -> tuple[str, str]:
    """``hub:owner/name@revision`` -> ``("owner/name", "revision")``; the revision is empty where none is named."""
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    return repository, revision


def local(source: Path | str) -> Path:
    """A folder as it is; of ``hub:owner/name`` the local copy, see ``fetch``."""
    return fetch(str(source)) if str(source).startswith(PREFIX) else Path(source)


def fetch(name: str) -> Path:
    """Download ``hub:owner/name[@revision]``, or what of it is not here yet; returns the local folder.

    Raises:
        UserError: no such repository, none that this account may read, or no way to the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, revision = split(name)
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _failed(name, error) from error


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


def _failed(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name}: {(str(error) or type(error).__name__).splitlines()[0]}",
        "a repository owner/name on a hub that can be reached, and the right to use it",
        "check the name and the account: hf auth whoami",
    )
