"""What is asked of a training, and what can be told of it before anything heavy is loaded.

Contradictions, an output that is in use and a run that is finished are found here, in
milliseconds: torch and transformers take seconds to import.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.presets import Recipe, as_settings
from transforms.records import Shard
from transforms.storage import DEFAULT_ACCESS, Access

if TYPE_CHECKING:  # loads torch
    from training.trainer import Listener

SETTINGS_FILE = "distill.json"  # in a student's folder: what was asked for
# Beside each checkpoint; in a student's folder it is written last, when all else is there.
STATE_FILE = "trainer_state.json"
AVERAGE_FILE = "average.safetensors"  # beside each checkpoint, where an average is kept
CHECKPOINTS_FOLDER = "checkpoints"
CACHE_FOLDER = "cache"  # of the held-out clips, where the user keeps none


class DistillError(ValueError):
    """What was asked for cannot be done; the message says why and what to do instead."""


@dataclass(frozen=True)
class Split:
    """Which clips are kept for validation: nothing is learned from them.

    Clips whose `group_by` is the same go to the same side; without one, a clip is by itself.
    A clip that has `hold_out`'s field goes where its value says; the share is for the others.
    """

    share: float = 0.1
    group_by: str | None = None  # a field of the clips' metadata
    hold_out: tuple[str, str] | None = None  # a field, and the value of the clips that are held out

    def is_held_out(self, member: str, metadata: Mapping[str, Any]) -> bool:
        """Whether a clip is for validation; wherever its shard lies, and whatever else is there."""
        if self.hold_out is not None:
            name, value = self.hold_out
            if metadata.get(name) is not None:
                return str(metadata[name]) == value
        group = metadata.get(self.group_by) if self.group_by else None
        digest = hashlib.sha256(str(member if group is None else group).encode()).hexdigest()
        return int(digest[:8], 16) / 2**32 < self.share


@dataclass(frozen=True)
class Request:
    """What to distil, from what, and where to; the recipe says how."""

    output: Path
    recipe: Recipe
    preset: str
    shards: Sequence[Shard]
    data: str  # the data by the name that people know
    split: Split = field(default_factory=Split)
    validation_shards: Sequence[Shard] = ()  # none: the split's share of `shards`
    validation_data: str | None = None  # those by name
    teacher: str | None = None  # a checkpoint, run along where there are no stored scores
    teacher_scores: Sequence[str] = ()  # outputs or Parquet files
    fresh: Mapping[str, int] | None = None  # the shape of a student that has learned nothing
    student: str | None = None  # a checkpoint that learns on, whole
    assistant: Listener | None = None  # runs along beside stored scores
    truth: str | None = None  # own labels: a file, or metadata:FIELD
    cache: Path | None = None  # None: every epoch decodes anew
    workers: int = 0
    device: str = "auto"
    max_steps: int | None = None
    resume: bool = False
    save_dtype: str = "float32"
    licence: str | None = None  # of the student
    data_licence: str | None = None
    limit: int | None = None
    title: str | None = None
    access: Access = DEFAULT_ACCESS


def settings_of(request: Request) -> dict[str, Any]:
    """What a resumed run must have in common with the one that it resumes."""
    return {
        "preset": request.preset,
        "recipe": as_settings(request.recipe),
        "shards": [shard.id for shard in request.shards],
        "validation_shards": [shard.id for shard in request.validation_shards],
        "split": [request.split.share, request.split.group_by, list(request.split.hold_out or ())],
        "teacher": request.teacher,
        "teacher_scores": list(request.teacher_scores),
        "fresh": dict(request.fresh) if request.fresh is not None else None,
        "student": request.student,
        "assistant": request.assistant is not None,
        "truth": request.truth,
        "cached": request.cache is not None,
        # Who reads a stream decides its order; a cache is drawn from by number.
        "processes": None
        if request.cache is not None
        else [request.workers, int(os.environ.get("WORLD_SIZE", "1"))],
        "max_steps": request.max_steps,
        "limit": request.limit,
    }


def begin(request: Request) -> Path | None:
    """Checks the request against itself and against what the output holds.

    Returns:
        The checkpoint to go on from; None at the start.

    Raises:
        DistillError: see `distill`.
    """
    _refuse_contradictions(request)
    if request.output.exists() and not request.output.is_dir():
        raise DistillError(f"--output {str(request.output)!r} is a file; expected a folder")
    asked = settings_of(request)
    file = request.output / SETTINGS_FILE
    if not request.resume:
        if not is_first_process():  # the first one looks, and begins
            return None
        # What was begun and has learned nothing that is kept may be begun anew, otherwise.
        nothing_kept = (
            file.exists()
            and last_checkpoint(request.output) is None
            and not is_finished(request.output)
        )
        # Another process may already read the held-out clips; so may one have that was killed.
        held = set(os.listdir(request.output)) if request.output.is_dir() else set()
        if held - {CACHE_FOLDER} and not nothing_kept:
            place, instead = str(request.output), ", or go on with --resume" * file.exists()
            if is_finished(request.output):
                instead = f"; it holds a finished student, which learns on with --student {place}"
            raise DistillError(f"--output {place!r} is not empty: choose another{instead}")
        return None
    if not file.exists():
        raise DistillError(
            f"--resume: {str(request.output)!r} holds no {SETTINGS_FILE}; nothing was begun there"
        )
    try:
        begun = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DistillError(
            f"--resume: {file} is damaged ({error}), so that what was asked for is not known: choose "
            "another --output"
        ) from error
    before, now = ({**settings, **settings["recipe"]} for settings in (begun, asked))
    for name in now:
        if name not in before:
            continue  # a setting that there was not when the run was begun
        if name == "processes" and before[name] != now[name]:
            raise DistillError(
                f"--resume: --workers and processes were {before[name]}, are {now[name]}; who reads "
                "a stream decides its order, so a run goes on with as many"
            )
        if name != "recipe" and before[name] != now[name]:
            raise DistillError(
                f"--resume: {name} was {before[name]!r}, is {now[name]!r}; a run goes on with "
                "the settings that it was begun with"
            )
    return last_checkpoint(request.output)


def _refuse_contradictions(request: Request) -> None:
    if not request.teacher and not request.teacher_scores:
        raise DistillError(
            "there is nothing to learn from: name a teacher with --teacher CHECKPOINT, or stored "
            "scores with --teacher-scores OUTPUT"
        )
    if request.fresh is None and not request.teacher and not request.student:
        raise DistillError(
            "stored scores have no layers to begin with: give --teacher CHECKPOINT for them, "
            "--student CHECKPOINT for one that learns on, or --fresh for one that has learned nothing"
        )
    if request.assistant is not None and not request.teacher_scores:
        raise DistillError("an assistant runs along beside stored scores, and there are none")
    if request.fresh is not None and request.student:
        raise DistillError("--fresh begins with nothing, --student with a checkpoint: give one")
    for name, usual in (("balance", 0.0), ("labelled_weight", 1.0)):
        value = getattr(request.recipe, name)
        if value != usual and request.cache is None:
            raise DistillError(
                f"{name} is {value:g}, but a stream is drawn in its own order: give --cache"
            )


def _checkpoints(output: Path) -> list[Path]:
    """The folders of checkpoints, also of those that were being written when a run was killed."""
    return sorted(
        (output / CHECKPOINTS_FOLDER).glob("checkpoint-*"),
        key=lambda folder: int(folder.name.rpartition("-")[2]),
    )


def last_checkpoint(output: Path) -> Path | None:
    """The last whole checkpoint that a run into `output` kept; None where there is none."""
    try:
        recipe = json.loads((output / SETTINGS_FILE).read_text("utf-8"))["recipe"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        recipe = {}  # damaged: whether there was an average is not known, but what is kept is
    needed = [STATE_FILE] + ([AVERAGE_FILE] if recipe.get("average_decay") else [])
    whole = [c for c in _checkpoints(output) if all((c / name).exists() for name in needed)]
    return whole[-1] if whole else None


def epoch_of(folder: Path) -> float:
    """The epochs that were done when the state in `folder` was written."""
    state = json.loads((folder / STATE_FILE).read_text("utf-8"))
    return float(state["epoch"])


def is_finished(output: Path) -> bool:
    """Whether a run into `output` came to its end, and everything that is kept of it is there."""
    return (output / SETTINGS_FILE).exists() and (output / STATE_FILE).exists()


def is_first_process() -> bool:
    """Whether this is the process that writes, of those that `accelerate launch` starts."""
    return os.environ.get("RANK", "0") == "0"
