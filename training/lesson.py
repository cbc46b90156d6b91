"""What a training is made of: the models, the clips, and what the teacher says of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import ASTForAudioClassification

from evaluation.scores import Source, batches, open_source
from evaluation.truth import Truth, read_truth
from student.checkpoint import Checkpoint, read_checkpoint
from student.feature_spec import FRAME_SAMPLES, FeatureSpec
from student.features import POWER_FLOOR, LogMel
from student.labels import Label
from student.model import load_model
from training.clips import (
    CachedClips,
    ClipsError,
    ClipTable,
    Found,
    StreamedClips,
    Wanted,
    audible,
    cache_sounds,
    drawing_weights,
    find_clips,
    join_scores,
    join_truth,
)
from training.initialise import MULTI_LABEL, evenly_spread, fresh_student, student_from_teacher
from training.presets import Recipe
from training.request import (
    CACHE_FOLDER,
    SETTINGS_FILE,
    DistillError,
    Request,
    Split,
    settings_of,
)
from training.trainer import Listener, Validation, scores_of
from transforms.checkpoint import local_checkpoint
from transforms.storage import Access

OWN = "the clips' own labels"

# That judge at most: they are decoded beforehand (3 GB of 10 s), and scored at each judgement.
MAX_HELD_OUT_CLIPS = 10_000
_MEASURED_CLIPS = 1_000  # that a fresh student's features are normalised by


@dataclass
class Lesson:
    """Everything that a training is made of, but for the recipe."""

    labels: tuple[Label, ...]
    spec: FeatureSpec  # of the student
    student: ASTForAudioClassification
    teacher: ASTForAudioClassification | None
    runs_along: Listener | None  # the teacher where it has no stored scores, or the assistant
    found: Found
    train_set: torch.utils.data.Dataset[Any]
    draw_weights: NDArray[np.float64] | None  # of a cache's clips
    validation: Validation
    learned_before: str | None = None  # of a student that learns on: what that says of the numbers


def prepare(request: Request, device: torch.device, say: Callable[[str], None]) -> Lesson:
    """Loads the teacher, begins the student, finds the clips and reads those that judge.

    Raises:
        As `distill`.
    """
    # ------------------------------------------------------------- the models
    checkpoint = read(request.teacher, request.access) if request.teacher else None
    begun = read(request.student, request.access) if request.student else None
    teacher = load_model(checkpoint) if checkpoint else None
    named = checkpoint or begun
    sources = [
        open_source(place, request.access, named and named.labels)
        for place in request.teacher_scores
    ]
    labels = labels_of([one for one in (checkpoint, begun) if one], sources)
    try:
        student = beginning(request, begun, teacher, labels).to(device)
    except ValueError as error:
        raise DistillError(str(error)) from error

    # -------------------------------------------------------------- the clips
    found = sides(request, sources, labels, say)
    if request.fresh is None:
        facts = begun or checkpoint
        assert facts is not None  # `begin` wants one of the three
        spec = facts.features
        if not sources:
            check_rates(begun, checkpoint)
    else:
        spec = FeatureSpec(
            sample_rate=checkpoint.features.sample_rate if checkpoint else 16_000,
            num_mel_bins=request.fresh["num_mel_bins"],
            max_length=request.fresh["max_length"],
        )
    folder = request.cache or request.output / CACHE_FOLDER
    reading = (spec.sample_rate, folder, request.workers, request.access)
    held_out = audible(
        cache_sounds(
            Wanted.of(found.validation, request.validation_shards or request.shards), *reading
        ),
        len(found.validation),
        found.skipped,
    )
    if len(held_out) == 0:
        raise ClipsError("none of the held-out clips can be decoded: there is nothing to judge by")
    train_set: CachedClips | StreamedClips
    wanted = Wanted.of(found.train, request.shards)
    weights = None
    if request.cache is not None:
        cached = audible(cache_sounds(wanted, *reading), len(found.train), found.skipped)
        if len(cached) == 0:
            raise ClipsError(f"no clip can be learned from; left out: {counts(found.skipped)}")
        train_set = CachedClips(cached)
        weights = weights_of(found.train.take(cached["row"]), request.recipe, len(labels))
    else:
        train_set = StreamedClips(wanted, spec.sample_rate, request.recipe.seed, request.access)
    say(
        f"{len(train_set):,} clips to learn from, {len(held_out):,} held out"
        + (f"; left out: {counts(found.skipped)}" if found.skipped else "")
    )
    if request.fresh is not None:
        spec = with_measured_level(spec, train_set, request.recipe.seed)

    # ------------------------------------------------------ what the teacher says
    runs_along = request.assistant
    if teacher is not None and checkpoint is not None and not sources:
        teacher.to(device).eval().requires_grad_(False)
        runs_along = Listener.of(teacher, checkpoint.features)
        found.validation.scores = np.zeros((len(found.validation), len(labels)), np.float32)
        say("The teacher scores the held-out clips")
        found.validation.scores[held_out["row"]] = scores_of(runs_along, held_out)[0]
    validation = judged_by(held_out, found.validation, labels, request.recipe)
    return Lesson(
        labels,
        spec,
        student,
        teacher,
        runs_along,
        found,
        train_set,
        weights,
        validation,
        None if begun is None else what_it_learned_before(begun, request),
    )


def read(name: str, access: Access) -> Checkpoint:
    """The facts of a checkpoint: a local one, of the hub, or at a URL.

    Raises:
        CheckpointError: it cannot be found, read or used.
    """
    return replace(read_checkpoint(local_checkpoint(name, access)), name=name)


def what_it_learned_before(begun: Checkpoint, request: Request) -> str:
    """A sentence on whether the held-out clips are new to a student that learns on."""
    file = begun.directory / SETTINGS_FILE
    if not file.exists():
        return (
            "What this student had learned from before is not known here: clips that judge may be "
            "among it, and flatter the numbers."
        )
    before, now = json.loads(file.read_text("utf-8")), settings_of(request)
    if not set(before["shards"]) & set(now["shards"] + now["validation_shards"]):
        return ""
    if all(before[name] == now[name] for name in ("split", "limit", "validation_shards")):
        return ""
    return (
        "Before, this student learned from some of the same shards, of which other clips were held "
        "out: clips that judge now are among what it knows, and flatter the numbers."
    )


def weights_of(table: ClipTable, recipe: Recipe, labels: int) -> NDArray[np.float64] | None:
    """How often each clip of a cache is drawn; None: each once an epoch."""
    if not recipe.balance and recipe.labelled_weight == 1:
        return None
    targets = recipe.label_floor * table.truth(labels)
    if table.scores is not None:
        targets = np.maximum(table.scores, targets)
    return drawing_weights(targets, table.labelled, recipe.balance, recipe.labelled_weight)


def labels_of(checkpoints: Sequence[Checkpoint], sources: Sequence[Source]) -> tuple[Label, ...]:
    """The labels that the teacher, the student that learns on and the stored scores agree on.

    Raises:
        DistillError: they do not.
    """
    stated = [(checkpoint.name, checkpoint.labels) for checkpoint in checkpoints]
    stated += [(source.uri, source.labels) for source in sources]
    first, labels = stated[0]
    for other, theirs in stated[1:]:
        if [label.name for label in theirs] != [label.name for label in labels]:
            raise DistillError(
                f"{other!r} has other labels ({len(theirs)}) than {first!r} ({len(labels)}): scores "
                "are learned from by their place, so the labels must be the same in the same order"
            )
    return labels


def check_rates(begun: Checkpoint | None, checkpoint: Checkpoint | None) -> None:
    """Refuses a teacher that hears at another sample rate than the student that learns on.

    Raises:
        DistillError: names both.
    """
    if begun is None or checkpoint is None:
        return
    ours, theirs = begun.features.sample_rate, checkpoint.features.sample_rate
    if ours != theirs:
        raise DistillError(
            f"--student {begun.name} hears at {ours} Hz, --teacher {checkpoint.name} at {theirs} Hz: "
            "annotate the clips with the teacher, and give its output with --teacher-scores"
        )


def beginning(
    request: Request,
    begun: Checkpoint | None,
    teacher: ASTForAudioClassification | None,
    labels: Sequence[Label],
) -> ASTForAudioClassification:
    """The student before its training.

    Raises:
        ValueError: it cannot have that shape, or the teacher has no such layers.
    """
    if request.fresh is not None:
        return fresh_student(**request.fresh, labels=labels)
    if begun is not None:
        student = load_model(begun).train()
        student.config.problem_type = MULTI_LABEL
    else:
        assert teacher is not None  # `begin` wants one of the three
        student = student_from_teacher(teacher, layers_of_student(request, teacher) or ())
    student.config.label_mids = [label.mid for label in labels]
    return student


def layers_of_student(
    request: Request, teacher: ASTForAudioClassification
) -> tuple[int, ...] | None:
    """The teacher's layers that the student begins as; None for one that has others."""
    if request.fresh is not None or request.student is not None:
        return None
    return request.recipe.teacher_layers or evenly_spread(
        teacher.config.num_hidden_layers, request.recipe.student_layers
    )


def sides(
    request: Request, sources: Sequence[Source], labels: Sequence[Label], say: Callable[[str], None]
) -> Found:
    """The clips of both sides, with the teacher's scores where they are stored.

    Raises:
        ClipsError: a side is empty.
    """
    say("Looking at the clips")
    label_field = None
    if request.truth and request.truth.startswith("metadata:"):
        label_field = request.truth.partition(":")[2]
    at = {"label_field": label_field, "access": request.access}
    truth: Truth | None = None
    if request.truth and label_field is None:  # before all shards are gone through
        named = sources[0] if sources else _labels_only(labels)
        truth = read_truth(request.truth, named, request.access)
    split = request.split
    if request.validation_shards:
        split = Split(share=0.0, group_by=split.group_by)
    found = find_clips(request.shards, split, limit=request.limit, **at)
    check_fields(request.split, found)
    if request.validation_shards:
        others = find_clips(request.validation_shards, split, only_validation=True, **at)
        found.validation = others.validation
        found.skipped.update(others.skipped)
        also = set(found.validation.ids)
        kept = [row for row, clip_id in enumerate(found.train.ids) if clip_id not in also]
        if len(kept) < len(found.train):
            found.skipped["also held out"] += len(found.train) - len(kept)
            found.train = found.train.take(kept)
    total = len(found.train) + len(found.validation)
    some = next(iter([*found.train.ids, *found.validation.ids]), "")
    if sources:
        join_scores(found, sources)
    for side, table, cure in (
        ("to learn from", found.train, "is everything held out?"),
        (
            "held out to judge by",
            found.validation,
            "raise --validation-share, or give --validation",
        ),
    ):
        if len(table) == 0:
            raise ClipsError(
                f"of {total:,} clips none is {side}"
                + (f" (left out: {counts(found.skipped)})" if found.skipped else "")
                + (
                    f"; the clips have names such as {some!r}, the scores are of clips such as "
                    f"{_a_clip_of(sources[0])!r}"
                    if sources and found.skipped["without teacher scores"] == total
                    else f"; {cure}"
                )
            )
    if len(found.validation) > MAX_HELD_OUT_CLIPS:
        reason = f"held out beyond the {MAX_HELD_OUT_CLIPS:,} that judge"
        found.skipped[reason] += len(found.validation) - MAX_HELD_OUT_CLIPS
        drawn = np.random.default_rng(0).permutation(len(found.validation))[:MAX_HELD_OUT_CLIPS]
        found.validation = found.validation.take(sorted(drawn.tolist()))
    if request.truth:
        unknown = join_truth(found, labels, truth)
        own = sum(int(table.labelled.sum()) for table in (found.train, found.validation))
        if own == 0 and label_field is not None:
            known = ", ".join(repr(key) for key, _ in found.fields.most_common(20)) or "no field"
            raise ClipsError(
                f"--truth {request.truth!r}: none of the {total:,} clips has a field "
                f"{label_field!r} in its metadata, which has {known}"
            )
        if own == 0:
            raise ClipsError(
                f"--truth {request.truth!r} names none of the {total:,} clips, which are known by "
                f"names such as {next(iter(found.train.names[0][-1]))!r}"
            )
        say(f"{own:,} clips have labels of their own")
        if unknown:
            say(f"labels that the teacher does not know, left out: {counts(unknown)}")
    else:
        for table in (found.train, found.validation):
            table.truths = [None] * len(table)
    return found


def _a_clip_of(source: Source) -> str:
    for batch in batches(source, ["clip_id"]):
        if batch.num_rows:
            return str(batch.column(0)[0])
    return ""


def check_fields(split: Split, found: Found) -> None:
    """Refuses a split by a field or value that no clip has: it would be none, and not say so.

    Raises:
        ClipsError: names the field and those that there are, or the value.
    """
    hold_out = split.hold_out and split.hold_out[0]
    for option, name in (("--hold-out", hold_out), ("--group-by", split.group_by)):
        if name and not found.fields[name]:
            known = ", ".join(repr(key) for key, _ in found.fields.most_common(20)) or "none"
            raise ClipsError(f"{option}: no clip's metadata has a field {name!r}; it has {known}")
    if split.hold_out and not found.held_by_value:
        raise ClipsError(f"--hold-out: no clip's metadata has {'='.join(split.hold_out)}")


def _labels_only(labels: Sequence[Label]) -> Source:
    """A source of nothing but labels, for `read_truth` to understand names by."""
    return Source("", "", None, (), tuple(labels))  # type: ignore[arg-type]


def judged_by(
    held_out: datasets.Dataset, table: ClipTable, labels: Sequence[Label], recipe: Recipe
) -> Validation:
    """What is true of the held-out clips: their own labels where all have some, else the teacher's tags."""
    of = table.take(held_out["row"])
    assert of.scores is not None  # stored, or made by the teacher that runs along
    if of.labelled.all():
        return Validation(held_out, table, of.truth(len(labels)), OWN)
    return Validation(
        held_out,
        table,
        of.scores >= recipe.tag_threshold,
        f"the teacher's scores of at least {recipe.tag_threshold:g}",
    )


def with_measured_level(
    spec: FeatureSpec, clips: CachedClips | StreamedClips, seed: int
) -> FeatureSpec:
    """`spec` with the clips' own mean and deviation, where a fresh student begins without any."""
    sounds: Any = iter(clips)
    if isinstance(clips, CachedClips):
        order = np.random.default_rng(seed).permutation(len(clips))
        sounds = (clips.cached[int(row)] for row in order)
    mel = LogMel(spec, torch.float32)
    count, total, squares = 0, 0.0, 0.0
    for _, example in zip(range(_MEASURED_CLIPS), sounds, strict=False):
        waveform = np.frombuffer(example["waveform"], np.int16)[: spec.chunk_samples]
        if len(waveform) < FRAME_SAMPLES:
            continue
        power = mel.power(torch.from_numpy(waveform.astype(np.float32) / 32_767)[None])
        values = power.clamp_min(POWER_FLOOR).log().double()
        count += values.numel()
        total += float(values.sum())
        squares += float(values.square().sum())
    if count == 0:
        raise ClipsError("none of the clips looked at has a sound")
    mean = total / count
    std = max((squares / count - mean**2) ** 0.5, 1e-3)
    return FeatureSpec(
        spec.sample_rate, spec.num_mel_bins, spec.max_length, round(mean, 4), round(std, 4)
    )


def counts(reasons: Counter[str]) -> str:
    """ "3 without teacher scores, 1 undecodable: NoAudio"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
