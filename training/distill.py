"""Distils a student from a teacher: clips and a recipe in, a checkpoint directory out.

The directory is one that transformers and `earmark annotate --checkpoint` load as it is.
While it is made, `checkpoints/` in it holds what a resumption needs, `logs/` what
TensorBoard shows, and `distill.json` what was asked for.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    ASTFeatureExtractor,
    ASTForAudioClassification,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging as transformers_logging

from evaluation.metrics import card_metrics, field_metrics
from evaluation.provenance import (
    HELD_OUT_FILE,
    LEARNED_FILE,
    held_out_csv,
    read_learned,
    write_learned,
)
from evaluation.thresholds import FEWEST_POSITIVES, fit_thresholds
from student.checkpoint import DEFAULT_THRESHOLD, read_checkpoint
from student.feature_spec import FeatureSpec
from student.labels import Label
from student.model import DeviceError, choose_device
from training.clips import HASH, MEMBER, Batches, CachedClips, ClipTable, audio_s_of
from training.curves import Row, draw_curves, write_metrics_csv
from training.lesson import OWN, Lesson, layers_of_student, prepare
from training.model_card import Data, Evaluation, ModelCard, model_facts, write_model_card
from training.presets import as_settings
from training.request import (
    CACHE_FOLDER,
    CHECKPOINTS_FOLDER,
    SETTINGS_FILE,
    STATE_FILE,
    Request,
    begin,
    epoch_of,
    is_first_process,
    settings_of,
)
from training.trainer import (
    BEST_FILE,
    DistillationTrainer,
    Judged,
    KeepBest,
    Listener,
    Seldom,
    TrainingFailed,
    Validation,
    WeightAverage,
    put_weights,
)
from transforms.records import Shard

THRESHOLDS_FILE = "thresholds.json"
METRICS_FILE = "metrics.csv"
CURVES_FILE = "curves.png"
TRAINING_METRICS = "f1 roc_auc accuracy mAP macro_map macro_auc d_prime weighted_map lwlrap".split()

_FOLDS = 5  # of the thresholds' fit; fewer clips than that have none
_VERSIONED = ("transformers", "torch", "datasets", "accelerate", "safetensors")


@dataclass(frozen=True)
class Distilled:
    """What came of it."""

    output: Path
    student: Judged
    teacher: Judged | None
    skipped: Counter[str]
    train_clips: int
    validation_clips: int
    truth_is: str
    card: ModelCard


def distill(
    request: Request,
    say: Callable[[str], None] = print,
    callbacks: Sequence[TrainerCallback] = (),
) -> Distilled:
    """Makes a student, and everything that is kept of it.

    Args:
        request: what to do.
        say: receives a line for whoever watches, now and then.
        callbacks: of transformers, for progress.

    Raises:
        DistillError: the request contradicts itself, or the output's earlier run.
        ClipsError: nothing is left to learn from or to judge by.
        CheckpointError, EvaluationError, DeviceError: as those who read them raise.
        TrainingFailed: the loss is no number, or memory did not suffice.
    """
    output, first = request.output, is_first_process()
    if not first:
        say = _in_silence
    datasets.disable_progress_bars()  # what is done is said in lines
    transformers_logging.disable_progress_bar()
    torch.manual_seed(request.recipe.seed)
    device = device_of(request, say)
    resumed_from = begin(request)
    if resumed_from is not None:
        say(f"Going on after epoch {epoch_of(resumed_from):g} of {request.recipe.epochs:g}")
    elif request.resume:
        say("No epoch had been judged, so nothing was kept: this run begins at the start")
    try:
        lesson = prepare(request, device, say)
        if not lesson.validation.truth.any():
            say(
                "Of the held-out clips none has a label (true is: "
                f"{lesson.validation.truth_is}): F1, mAP and AUC cannot say how good the student is. "
                "Hold out more clips."
            )
        if lesson.learned_before:
            say(lesson.learned_before)
        if first and resumed_from is None:
            # Of a run that was killed while it wrote one: under other settings it may seem whole.
            shutil.rmtree(output / CHECKPOINTS_FOLDER, ignore_errors=True)
        trainer = trainer_of(request, lesson, device, resumed_from, callbacks)
        if first and resumed_from is None:
            output.mkdir(parents=True, exist_ok=True)
            settings = json.dumps(settings_of(request), indent=2)
            (output / SETTINGS_FILE).write_text(settings + "\n", "utf-8")
        if first:
            write_sides(request, lesson)
        trainer.train(resume_from_checkpoint=str(resumed_from) if resumed_from else None)
        if trainer.unheard:
            lesson.found.skipped["undecodable, or too long or short"] += len(trainer.unheard)
        return keep(request, lesson, trainer, say)
    except RuntimeError as error:
        # A CPU's lack of memory has no class of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        recipe = request.recipe
        raise TrainingFailed(
            f"the memory of {device} does not hold a batch of {recipe.batch} clips: halve batch and "
            f"double accumulation ({recipe.accumulation}), which gives the same steps"
        ) from error
    finally:
        if request.cache is None and first:
            shutil.rmtree(output / CACHE_FOLDER, ignore_errors=True)


def trainer_of(
    request: Request,
    lesson: Lesson,
    device: torch.device,
    resumed_from: Path | None,
    callbacks: Sequence[TrainerCallback],
) -> DistillationTrainer:
    """The Trainer, with what keeps averages, the best, and logs."""
    recipe, output, train = request.recipe, request.output, lesson.found.train
    every = recipe.judge_every_epochs
    average, best = None, None
    if recipe.average_decay:
        average = WeightAverage(lesson.student, recipe.average_decay, resumed_from)
    if recipe.early_stop_epochs:
        best = KeepBest(recipe.early_stop_epochs, every, output)
    logs = [TensorBoardCallback(SummaryWriter(str(output / "logs")))] if is_first_process() else []
    trainer = DistillationTrainer(
        Listener.of(lesson.student, lesson.spec),
        lesson.runs_along,
        bool(request.teacher_scores),
        recipe,
        lesson.validation,
        average,
        lesson.draw_weights,
        training_arguments(request, device, len(lesson.train_set)),  # type: ignore[arg-type]
        lesson.train_set,
        Batches(train.truths, train.scores, len(lesson.labels), lesson.spec, recipe),
        [Seldom(every), *logs, *([best] if best else []), *callbacks],
    )
    if best:
        best.trainer = trainer
    return trainer


def keep(
    request: Request, lesson: Lesson, trainer: DistillationTrainer, say: Callable[[str], None]
) -> Distilled:
    """Writes the student, judged as it is stored, and what is known of it."""
    output, student, validation = request.output, lesson.student, lesson.validation
    # Without the wrapper of mixed precision that training put around it.
    trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)
    best = output / CHECKPOINTS_FOLDER / BEST_FILE
    if request.recipe.early_stop_epochs and best.exists():
        put_weights(student, load_file(best))
    elif trainer.average:
        put_weights(student, trainer.average.weights)
    first = is_first_process()
    if first:
        save(student, lesson.spec, request)
    # What is judged is what is stored: its rounding included.
    put_weights(student, dict(rounded(student, request.save_dtype).named_parameters()))
    judged = trainer.judge()
    theirs = teachers_opinion(validation) if validation.truth_is == OWN else None
    epochs = epochs_of(trainer.state.log_history)
    train_clips = len(lesson.train_set) - len(trainer.unheard)  # type: ignore[arg-type]
    card = card_of(request, lesson, trainer, epochs, judged, theirs, train_clips)
    if first:
        weights_sha256 = read_checkpoint(str(output)).weights_sha256
        fitted = thresholds_of(validation, judged, lesson.labels, weights_sha256)
        if fitted is None:
            (output / THRESHOLDS_FILE).unlink(missing_ok=True)  # of an earlier end of this run
            say(
                f"No {THRESHOLDS_FILE}: {len(validation.cached):,} held-out clips with "
                f"{int(validation.truth.sum()):,} labels in all are too few to choose by (five groups "
                f"and {FEWEST_POSITIVES} labels are not). Tags come from {DEFAULT_THRESHOLD:g}, "
                "or from what --threshold says."
            )
        else:
            (output / THRESHOLDS_FILE).write_text(fitted, "utf-8")
        write_model_card(output, replace(card, own_thresholds=fitted is not None))
        if epochs:
            write_metrics_csv(output / METRICS_FILE, epochs)
            draw_curves(epochs, output / CURVES_FILE, request.title or output.name)
        trainer.state.save_to_json(str(output / STATE_FILE))  # last: now it is finished
    return Distilled(
        output,
        judged,
        theirs,
        lesson.found.skipped,
        train_clips,
        len(validation.cached),
        validation.truth_is,
        card,
    )


# ------------------------------------------------------------------ the beginning


def device_of(request: Request, say: Callable[[str], None]) -> torch.device:
    """Where to train.

    Raises:
        DeviceError: it is not there, or is one of several by number.
    """
    device = choose_device(request.device)
    if device.type == "cuda":
        if device.index is not None:
            raise DeviceError(
                f"--device {request.device}: training takes cuda; CUDA_VISIBLE_DEVICES={device.index} "
                "says which"
            )
        # Of several processes each has its own.
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
            say(
                f"One of {torch.cuda.device_count()} GPUs is used; for all: accelerate launch -m "
                "pipeline distill ..."
            )
    return device


def _in_silence(line: str) -> None:
    pass


def teachers_opinion(validation: Validation) -> Judged:
    """How the teacher does on the held-out clips."""
    scores = validation.table.take(validation.cached["row"]).scores
    assert scores is not None
    return Judged(
        math.nan,
        card_metrics(validation.truth, scores),
        field_metrics(validation.truth, scores),
        scores,
    )


# ------------------------------------------------------------------ the training


def training_arguments(
    request: Request, device: torch.device, train_clips: int
) -> TrainingArguments:
    """The recipe's numbers as transformers wants them."""
    recipe = request.recipe
    on_gpu = device.type == "cuda"
    # Each process that reads a stream has a last batch that is not full, and an epoch ends after
    # as many batches as full ones would be: what is left over then must be little.
    at_most = max(1, train_clips // (20 * recipe.batch)) if request.cache is None else math.inf
    arguments = TrainingArguments(
        output_dir=str(request.output / CHECKPOINTS_FOLDER),
        per_device_train_batch_size=recipe.batch,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        adam_epsilon=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=min(recipe.warmup_ratio, 1 - 1e-9),  # from 1 on it would be steps
        num_train_epochs=recipe.epochs,
        max_steps=request.max_steps or -1,
        seed=recipe.seed,
        fp16=on_gpu and recipe.precision == "float16",
        bf16=on_gpu and recipe.precision == "bfloat16",
        use_cpu=not on_gpu,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_nan_inf_filter=False,  # a loss that is no number stops the run
        dataloader_num_workers=int(min(request.workers, at_most)),
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # every weight is used in every step
        report_to=[],  # TensorBoard's callback is given, with its folder
        disable_tqdm=True,
    )
    # Of several GPUs a process would split its batch over all; `accelerate launch` is for that.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def epochs_of(history: Sequence[Mapping[str, float]]) -> list[Row]:
    """The Trainer's log as one row an epoch, in the names of `training.curves`."""
    rows: dict[float, dict[str, float]] = {}
    for entry in history:
        row = rows.setdefault(entry["epoch"], {"epoch": entry["epoch"], "step": entry["step"]})
        if "loss" in entry:
            row["training_loss"] = entry["loss"]
        if "eval_loss" in entry:
            row["validation_loss"] = entry["eval_loss"]
        row |= {m: entry[f"eval_{m}"] for m in TRAINING_METRICS if f"eval_{m}" in entry}
    return [row for row in rows.values() if "validation_loss" in row]


# ------------------------------------------------------------------ what is kept


def rounded(student: ASTForAudioClassification, dtype: str) -> ASTForAudioClassification:
    """A copy of a student whose weights are those that are stored."""
    return copy.deepcopy(student).to(getattr(torch, dtype))


def save(student: ASTForAudioClassification, spec: FeatureSpec, request: Request) -> None:
    """Writes config, weights and feature numbers."""
    rounded(student, request.save_dtype).save_pretrained(request.output)
    # safetensors writes for its owner alone; the config beside it has the usual rights.
    usual = (request.output / "config.json").stat().st_mode
    for file in request.output.glob("*.safetensors"):
        file.chmod(usual)
    with warnings.catch_warnings():
        # It says that some of AST's own 128 mel filters are empty, which they are.
        warnings.simplefilter("ignore", UserWarning)
        extractor = ASTFeatureExtractor(
            sampling_rate=spec.sample_rate,
            num_mel_bins=spec.num_mel_bins,
            max_length=spec.max_length,
            mean=spec.mean,
            std=spec.std,
            do_normalize=spec.do_normalize,
        )
    extractor.save_pretrained(request.output)


def thresholds_of(
    validation: Validation, judged: Judged, labels: Sequence[Label], weights_sha256: str
) -> str | None:
    """`thresholds.json`, fitted on the held-out clips; None where there are too few."""
    table = validation.table.take(validation.cached["row"])
    if len(set(table.groups)) < _FOLDS or validation.truth.sum() < FEWEST_POSITIVES:
        return None
    fitted = fit_thresholds(
        validation.truth,
        judged.scores,
        labels,
        folds=_FOLDS,
        groups=table.groups,
        hashes=[next(iter(names[HASH]), None) for names in table.names],
        weights_sha256=weights_sha256,
        truth_name=f"held-out clips; true is: {validation.truth_is}",
        clip_ids=table.ids,
    )
    return fitted.to_json()


def write_sides(request: Request, lesson: Lesson) -> None:
    """Lists the clips that are learned from, and those held out that can be heard: who did which.

    Once, before the training: a student that was stopped may be evaluated too. What a student
    that learns on had learned from before, it has learned from too.
    """
    validation, shards = lesson.validation, request.shards
    judging = validation.table.take(validation.cached["row"])
    held_out = _rows_of(judging, request.validation_shards or shards)
    (request.output / HELD_OUT_FILE).write_text(held_out_csv(held_out), "utf-8")
    learned = _rows_of(lesson.found.train, shards)
    if request.student is not None:
        before = read_learned(Path(request.student) / LEARNED_FILE)
        learned = list(dict.fromkeys([*before, *learned]))
    write_learned(request.output / LEARNED_FILE, learned)


def _rows_of(table: ClipTable, shards: Sequence[Shard]) -> list[tuple[str, ...]]:
    """Rows of `evaluation.provenance.COLUMNS`."""
    return [
        (clip_id, next(iter(names[MEMBER])), next(iter(names[HASH]), ""), shards[place].uri)
        for clip_id, names, place in zip(table.ids, table.names, table.shards, strict=True)
    ]


def card_of(
    request: Request,
    lesson: Lesson,
    trainer: DistillationTrainer,
    epochs: Sequence[Row],
    judged: Judged,
    theirs: Judged | None,
    train_clips: int,
) -> ModelCard:
    """The facts of the model card."""
    recipe, teacher, student = request.recipe, request.teacher, request.student
    base = student or (teacher if request.fresh is None else None)  # whose weights it began with
    name = request.title or request.output.name
    validation_data = request.validation_data or f"{request.data}, held out"
    notes = []
    if lesson.validation.truth_is != OWN:
        notes.append(
            "What is true of these clips is what the teacher says of them, so that it has no row: "
            "the numbers say how near to it the student comes."
        )
    if lesson.learned_before:
        notes.append(lesson.learned_before)
    if recipe.early_stop_epochs:
        notes.append(
            "The weights are those of the epoch that did best on these same clips, which flatters "
            "the numbers a little."
        )
    return ModelCard(
        title=name,
        student=model_facts(name, lesson.student),
        labels=lesson.labels,
        features=lesson.spec,
        preset=request.preset,
        hyperparameters=used(request, lesson, trainer),
        data=[
            Data(
                request.data,
                "training",
                train_clips,
                request.data_licence,
                audio_s_of(lesson.train_set.cached, lesson.spec.sample_rate)
                if isinstance(lesson.train_set, CachedClips)
                else None,  # of a stream nobody counts them
            ),
            Data(
                validation_data,
                "validation",
                len(lesson.validation.cached),
                request.data_licence,
                audio_s_of(lesson.validation.cached, lesson.spec.sample_rate),
            ),
        ],
        epochs=epochs,
        versions={
            "Earmark": importlib.metadata.version("earmark-audio"),
            **{package: importlib.metadata.version(package) for package in _VERSIONED},
        },
        licence=request.licence,
        teacher=None if lesson.teacher is None else model_facts(teacher or "", lesson.teacher),
        teacher_scores=", ".join(request.teacher_scores) or None,
        base_model=base
        if base and not Path(base).exists() and "://" not in base and base.count("/") == 1
        else None,
        teacher_layers=None
        if lesson.teacher is None
        else layers_of_student(request, lesson.teacher),
        began_as=student and (Path(student).name if Path(student).exists() else student),
        skipped=dict(lesson.found.skipped),
        evaluated_on=f"{validation_data}; true is: {lesson.validation.truth_is}",
        evaluated_clips=len(lesson.validation.cached),
        evaluation=Evaluation(judged.card, judged.field),
        teacher_evaluation=Evaluation(theirs.card, theirs.field) if theirs else None,
        further_results=" ".join(notes),
        curves=CURVES_FILE if epochs else None,
    )


def used(request: Request, lesson: Lesson, trainer: DistillationTrainer) -> dict[str, Any]:
    """Every number of the recipe as it was used, and those of the machine."""
    recipe, arguments = request.recipe, trainer.args
    settings = as_settings(recipe)
    settings["precision"] = "float32"
    if arguments.fp16 or arguments.bf16:
        settings["precision"] = f"{recipe.precision}, mixed"
    del settings["teacher_layers"], settings["student_layers"]
    layers = layers_of_student(request, lesson.teacher) if lesson.teacher is not None else None
    if layers is not None:
        settings = {"teacher_layers": list(layers)} | settings
    settings["steps"] = trainer.state.global_step
    if request.max_steps:
        settings["max_steps"] = request.max_steps
    settings["device"] = arguments.device.type
    settings["processes"] = arguments.world_size
    settings["total_batch"] = recipe.batch * recipe.accumulation * arguments.world_size
    return settings
