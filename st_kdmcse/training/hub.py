"""A finished run on the Hugging Face hub: the model, its card and the heads."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined, unused-ignore]

from st_kdmcse.files import LOCK
from st_kdmcse.training.run_folder import (
    CHECKPOINTS_NAME,
    EVENTS_NAME,
    FEATURES_NAME,
    LAST_NAME,
    RUN_NAME,
    SCORES_NAME,
    SUMMARY_NAME,
)

logger = logging.getLogger(__name__)

_NOT_PUSHED = (
    *(f"{folder}/*" for folder in (CHECKPOINTS_NAME, LAST_NAME, FEATURES_NAME, EVENTS_NAME, SCORES_NAME)),
    *(RUN_NAME, SUMMARY_NAME, LOCK, ".*"),  # the records name paths of this machine
)


class PushError(OSError):
    """A run is finished and saved, and could not be pushed; the message has the command that does it later.

    Attributes:
        summary: of the run.
    """

    def __init__(self, message: str, summary: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.summary = summary


def check_repository(name: str, private: bool) -> str:
    """Find out whether a model can be pushed, before hours of training.

    Args:
        name: of the repository, with or without the user or organization.
        private: whether nobody else is to see it.

    Returns:
        The name with the user or organization.

    Raises:
        ValueError: for an impossible name, without a token that may write, for a user or an organization that the
            token does not belong to, or if the repository is there and public where a private one is asked for.
        OSError: if the hub does not answer.
    """
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"`push_to_hub` {name}: {error}") from error
    api = HfApi()
    with _asking(name):
        try:
            account = api.whoami()
        except LocalTokenNotFoundError as error:
            raise ValueError(
                f"`push_to_hub` {name} needs a token that may write: log in with `hf auth login`, or set HF_TOKEN"
            ) from error
    token = account.get("auth", {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise ValueError(f"`push_to_hub` {name}: the token of {account['name']} may read only; take one that may write")
    own = [account["name"], *(each["name"] for each in account.get("orgs", []))]
    namespace, _, _ = name.rpartition("/")
    if namespace and namespace not in own:
        raise ValueError(
            f"`push_to_hub` {name}: {namespace} is neither the user nor an organization of the token, which are "
            f"{', '.join(own)}"
        )
    full = name if namespace else f"{account['name']}/{name}"
    with _asking(full):
        try:
            is_public = api.model_info(full).private is False
        except RepositoryNotFoundError:
            return full
    if private and is_public:
        raise ValueError(f"`push_to_hub` {full} is there already and public: choose another name for a private one")
    return full


def create_repository(name: str, private: bool) -> None:
    """Make a repository for a model; one that is there stays as it is.

    Args:
        name: what :func:`check_repository` returns.
        private: whether nobody else is to see it; without, the organization decides.

    Raises:
        OSError: if the hub refuses or does not answer.
    """
    with _asking(name):
        HfApi().create_repo(name, private=private or None, exist_ok=True)


def push(name: str, private: bool, folder: Path, summary: Mapping[str, Any], export: Path | None = None) -> None:
    """Upload model, card and heads of a finished run, and nothing else of its folder.

    Args:
        name: what :func:`check_repository` returns.
        private: whether nobody else is to see it.
        folder: of the run.
        summary: of the run, for the error.
        export: a folder in that of the run, which is left out as well.

    Raises:
        PushError: if that failed; the folder is as it was.
    """
    excluded = [*_NOT_PUSHED, *([f"{export}/*"] if export is not None else [])]
    message = f"{summary['method']} after {summary['steps']} steps"
    try:
        commit = HfApi().upload_folder(
            repo_id=name, folder_path=folder, ignore_patterns=list(excluded), commit_message=message
        )
    except Exception as error:  # whatever befalls the upload, the run is not lost
        raise PushError(
            f"the run is finished and whole in {folder}, but it could not be pushed to {name}: {_reason(error)}. "
            f"Push it later with\n    {upload_command(name, private, folder, excluded)}",
            summary,
        ) from error
    logger.info("pushed to %s", commit.commit_url)


def upload_command(name: str, private: bool, folder: Path, excluded: Sequence[str] = _NOT_PUSHED) -> str:
    """The command line that pushes a run as :func:`push` does."""
    patterns = [part for pattern in excluded for part in ("--exclude", pattern)]
    return shlex.join(["hf", "upload", name, str(folder), ".", *(["--private"] if private else []), *patterns])


@contextmanager
def _asking(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RepositoryNotFoundError):
        raise
    except Exception as error:  # of several HTTP libraries
        raise OSError(f"`push_to_hub` {name}: the hub refuses, or cannot be reached: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
