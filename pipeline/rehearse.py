"""A dry run: does once, here, what the workers will do, and shows the job that would be sent."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import dataflow
from pipeline.options import UsageError
from pipeline.run import Job, annotate, annotation_of, empty_pipeline, limits_of, row_options
from student.checkpoint import CheckpointError
from student.model import DeviceError, Student
from transforms.checkpoint import local_checkpoint
from transforms.chunk import hop_samples_of
from transforms.decode_clip import decode_clips
from transforms.output import check_writable
from transforms.read import read_clips
from transforms.records import ScoredClip
from transforms.score import score_clips
from transforms.storage import public_url
from transforms.write import tags_of

_TRIED_CLIPS = 8  # of the first shard, until one can be tagged


@dataclass(frozen=True)
class Rehearsal:
    """What a dry run found out."""

    left: str | None  # what was written to try it and could not be removed again
    clip: ScoredClip | None  # the clip that was tagged here; None where there is none
    tags: list[dict[str, Any]]
    load_s: float
    score_s: float
    description: dict[str, Any] | None  # the job that Dataflow would get


def rehearse(job: Job) -> Rehearsal:
    """Does once, here, what the workers will do: writes to the output, loads the student, tags a clip.

    What was written is removed again.

    Raises:
        UsageError: one of them does not work.
    """
    try:
        left = check_writable(job.output)
    except OSError as error:
        raise UsageError(
            f"--output {job.options.output!r} cannot be written: {error.strerror or error}"
        ) from error
    started = time.monotonic()
    device = "auto" if job.on_dataflow else job.workers.device
    dtype = "auto" if job.on_dataflow else job.workers.dtype
    try:
        checkpoint = local_checkpoint(job.options.checkpoint, job.access)
        student = Student.load(checkpoint, device, dtype, job.options.pad)
    except (CheckpointError, DeviceError) as error:
        raise UsageError(str(error)) from error
    load_s = time.monotonic() - started
    started = time.monotonic()
    clip = _tag_one(job, student)
    score_s = time.monotonic() - started
    tags = (
        tags_of(clip.scores, student.labels, row_options(job))
        if clip is not None and clip.scores is not None
        else []
    )
    described = None
    if job.on_dataflow:
        root = empty_pipeline(job.beam_options)
        annotate(root, job.todo, annotation_of(job, None))
        described = dataflow.job_description(root, job.beam_options)
    return Rehearsal(left, clip, tags, load_s, score_s, described)


def _tag_one(job: Job, student: Student) -> ScoredClip | None:
    """The first clip of the first shard that can be tagged, or the last that could not."""
    found = None
    hop = hop_samples_of(job.options.chunk_hop_s, student.features)
    shard = next(iter(job.todo), None)
    if shard is None:
        return None
    try:
        with closing(read_clips(shard, job.access)) as clips:
            for _, clip in zip(range(_TRIED_CLIPS), clips, strict=False):
                decoded = decode_clips([clip], student.features, limits_of(job.options), hop)
                (found,) = score_clips(decoded, student, job.options.pool)
                if found.scores is not None and np.isfinite(found.scores).all():
                    break
    except OSError as error:
        raise UsageError(
            f"{public_url(shard.uri)!r} cannot be read: {error.strerror or error}"
        ) from error
    return found
