"""Checkpoints wherever they lie."""

from __future__ import annotations

from student.checkpoint import CHECKPOINT_SUFFIXES, CheckpointError
from transforms.storage import Access, fetch_folder, is_local


def local_checkpoint(checkpoint: str, access: Access) -> str:
    """What `student` can load: a checkpoint in remote storage is copied here first.

    Raises:
        CheckpointError: it is not there, or cannot be read.
    """
    if is_local(checkpoint):
        return checkpoint
    try:
        return str(fetch_folder(checkpoint, CHECKPOINT_SUFFIXES, access))
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"checkpoint {checkpoint!r} cannot be fetched: {error}") from error
