"""Uploads a student to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, errors
from huggingface_hub.utils import validate_repo_id

# What belongs to a student; checkpoints and logs of the training stay at home.
UPLOADED = (
    "README.md config.json model.safetensors preprocessor_config.json thresholds.json "
    "trainer_state.json metrics.csv curves.png"
).split()

_ID = re.compile(r"[\w.-]+/[\w.-]+")


class HubError(ValueError):
    """It cannot be uploaded; the message says why and what to do."""


def push(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Uploads a student's files in one commit, and gives the address of it.

    Args:
        folder: what `training.distill` wrote.
        repo_id: `owner/name`; made where there is none.
        private: whether a repository that is made is private.

    Raises:
        HubError: no login, no right, no network, or no such name.
    """
    check_id(repo_id)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=UPLOADED,
            commit_message="Student distilled with Earmark",
        )
    except errors.LocalTokenNotFoundError as error:
        raise HubError(
            f"--push-to-hub {repo_id}: not logged in; run `hf auth login`, or set HF_TOKEN. "
            f"The student is in {folder}"
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HubError(
            f"--push-to-hub {repo_id}: {reason}. The student is in {folder}; `hf upload {repo_id} "
            f"{folder}` tries again"
        ) from error
    return done.commit_url


def check_id(repo_id: str) -> None:
    """Refuses what is no `owner/name`, before a training rather than after it.

    Raises:
        HubError: it is none.
    """
    if not _ID.fullmatch(repo_id):
        raise HubError(f"--push-to-hub {repo_id!r}: expected owner/name")
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise HubError(f"--push-to-hub {repo_id!r}: {error}") from error
