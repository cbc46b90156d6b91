"""The thresholds that a user asks for with `--threshold` or `--thresholds`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pipeline.options import UsageError
from student.checkpoint import CheckpointError, parse_thresholds, thresholds_warnings
from student.labels import Label
from transforms.storage import Access, read_all

_EXPECTED = (
    "expected an object of label name or mid to number, or what earmark evaluate --thresholds wrote"
)

Thresholds = tuple[float | None, ...]  # one a label; None: never a tag


def asked_thresholds(
    threshold: float | None,
    file: str | None,
    labels: Sequence[Label],
    weights_sha256: str,
    access: Access,
) -> tuple[Thresholds, list[str]] | None:
    """(thresholds, one a label; what is to be said about them), or None where none were asked for.

    Args:
        threshold: of `--threshold`, for all labels.
        file: of `--thresholds`: a path or URL.
        labels: of the checkpoint that made the scores.
        weights_sha256: of its weights.
        access: how remote storage is used.

    Raises:
        UsageError: both were given, `threshold` is not from 0 to 1, or the file cannot be read
            or used.
    """
    if threshold is not None and file is not None:
        raise UsageError("--threshold and --thresholds both say when a score is a tag: give one")
    if threshold is not None:
        if not 0 <= threshold <= 1:  # the option's own range lets NaN through
            raise UsageError(f"--threshold is {threshold}, expected a score from 0 to 1")
        return (threshold,) * len(labels), []
    if file is None:
        return None
    try:
        stated = json.loads(read_all(file, access))
    except json.JSONDecodeError as error:
        raise UsageError(f"--thresholds {file!r} is no JSON ({error}); {_EXPECTED}") from error
    except (OSError, ValueError, ImportError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--thresholds {file!r} cannot be read: {reason}") from error
    if not isinstance(stated, dict):
        raise UsageError(f"--thresholds {file!r} holds a JSON {type(stated).__name__}; {_EXPECTED}")
    try:
        thresholds = parse_thresholds(stated, labels, file)
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    return thresholds, list(thresholds_warnings(stated, thresholds, weights_sha256, file))
