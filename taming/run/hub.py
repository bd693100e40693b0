"""Shared models on the Hugging Face hub, by its client ``huggingface_hub`` (extra ``hub``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from taming.run.parts import CONFIG, WEIGHTS
from taming.run.pretrained import CARD

_REMEDY = (
    "without a network connection, download the repository elsewhere and give the path of its "
    "folder"
)


def _client() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ValueError(
            "the hub needs the package huggingface_hub: pip install 'loopy-taming[hub]'"
        ) from error
    return huggingface_hub


@contextmanager
def _reported(name: str) -> Iterator[ModuleType]:
    """Yield the client; turn whatever it and its HTTP library raise into one line."""
    client = _client()
    try:
        yield client
    except client.errors.RepositoryNotFoundError as error:
        message = f"the hub has no model {name}, or it is private: log in with `hf auth login`"
        raise FileNotFoundError(message) from error
    except client.errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"the model {name} has no such revision on the hub") from error
    except client.errors.HFValidationError as error:
        raise ValueError(f"{name} is no name of a model on the hub: {error}") from error
    except Exception as error:  # each version of the client has another HTTP library
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"the hub refuses {name}, or is away ({reason}); {_REMEDY}"
        ) from error


def download(name: str, revision: str | None = None) -> Path:
    """Download a shared model, or what changed since; return its folder in the hub's cache.

    Args:
        name: ``owner/name``.
        revision: Branch, tag or commit; None for the main branch.

    Raises:
        ConnectionError: The hub cannot be reached, and the cache does not hold the model.
        FileNotFoundError: There is no such model or revision.
        ValueError: The client is not installed, or the name is none.
    """
    with _reported(name) as client:
        files = [CONFIG, WEIGHTS]
        return Path(client.snapshot_download(name, revision=revision, allow_patterns=files))


def upload(folder: Path, name: str, private: bool | None = None, message: str = "") -> str:
    """Upload a shared folder in one commit; create the repository if there is none.

    A ``README.md`` that is there already stays, since someone may have written it.

    Args:
        folder: The folder.
        name: ``owner/name``; without an owner, it is who is logged in.
        private: Show a new repository to its owner alone; None follows the owner's settings.
        message: Message of the commit.

    Returns:
        Address of the commit.

    Raises:
        ConnectionError: The hub cannot be reached, or refuses.
        ValueError: The client is not installed, or the name is none.
    """
    with _reported(name) as client:
        hub = client.HfApi()
        place = hub.create_repo(name, private=private, exist_ok=True).repo_id  # with its owner
        kept = [CARD] if hub.file_exists(place, CARD) else []
        message = message or f"Upload {name.rpartition('/')[2]}"
        return str(
            hub.upload_folder(
                repo_id=place, folder_path=folder, ignore_patterns=kept, commit_message=message
            )
        )
