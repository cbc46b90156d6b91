"""A student's model card: `README.md` in the form of the published Distil-AST's.

Every number is one that was given: what was not measured is left out, and a sentence says
that it is. Names of data and checkpoints are shown as they are, whatever is in them.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.metrics import CardMetrics, FieldMetrics
from student.labels import Label, is_audioset
from training.curves import Row

if TYPE_CHECKING:
    from transformers import ASTForAudioClassification

    from student.feature_spec import FeatureSpec

_ABSENT = "-"
_PLACEHOLDER = "PATH_OF_THIS_FOLDER"  # in the examples

# What Markdown would take for markup in the middle of a line. An underscore within a word is
# none, and names are full of them.
_MARKUP = re.compile(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])")


@dataclass(frozen=True)
class ModelFacts:
    """A row of the table of models; see `model_facts`."""

    name: str
    parameters: int | None = None
    architecture: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What a model came to on the clips that the card evaluates on."""

    card: CardMetrics | None = None
    field: FieldMetrics | None = None


@dataclass(frozen=True)
class Data:
    """Clips that the student was trained or validated on."""

    name: str
    use: str  # "training", "validation"
    clips: int
    licence: str | None = None
    audio_s: float | None = None


@dataclass(frozen=True)
class ModelCard:
    """The facts of a card.

    `notes` and `further_results` are Markdown, written by a program; all other text is plain,
    and is escaped.
    """

    title: str
    student: ModelFacts
    labels: Sequence[Label]
    features: FeatureSpec
    preset: str
    hyperparameters: Mapping[str, Any]  # every number of the preset, as it was used
    data: Sequence[Data]
    epochs: Sequence[Row]  # as `training.curves` has them
    versions: Mapping[str, str]  # of a framework by its name
    checkpoint: str | None = None  # the Hub id that the examples load, where it has one
    licence: str | None = None  # a Hub id of a licence: `apache-2.0`
    teacher: ModelFacts | None = None
    teacher_scores: str | None = None  # the name of stored scores that it learned from
    base_model: str | None = None  # Hub id of what its weights began as: `owner/name[@revision]`
    teacher_layers: Sequence[int] | None = None  # that the student's began as; None: others
    began_as: str | None = None  # the checkpoint that learned on, by name; else it was fresh
    skipped: Mapping[str, int] = field(default_factory=dict)  # clips by the reason why
    evaluated_on: str | None = None  # the name of the clips of both evaluations
    evaluated_clips: int | None = None
    evaluation: Evaluation | None = None  # of the student
    teacher_evaluation: Evaluation | None = None  # on the same clips
    own_thresholds: bool = False  # whether a thresholds.json lies beside the card
    curves: str | None = None  # file name of the picture beside the card
    attribution: str | None = None  # file name of the list of authors beside the card
    notes: str = ""  # after the first paragraph
    further_results: str = ""  # after the tables of evaluation


def model_facts(name: str, model: ASTForAudioClassification) -> ModelFacts:
    """Size and architecture of a model, counted and read off its config."""
    config = model.config
    patch = config.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return ModelFacts(
        name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        architecture=(
            f"AST: {config.num_hidden_layers} layers, {config.hidden_size} wide, "
            f"{config.num_attention_heads} heads; {height} x {width} patches every "
            f"{config.frequency_stride} mel bins and {config.time_stride} frames"
        ),
    )


def write_model_card(folder: Path, card: ModelCard) -> Path:
    """Writes `README.md` into `folder`, whole or not at all, and gives its path.

    Raises:
        ValueError: `base_model` is no Hub id.
    """
    file = folder / "README.md"
    partial = folder / ".README.md.partial"
    partial.write_text(model_card(card), "utf-8")
    partial.replace(file)
    return file


def model_card(card: ModelCard) -> str:
    """The card as Markdown with YAML front matter.

    Raises:
        ValueError: `base_model` is no Hub id.
    """
    blocks = [
        f"---\n{_front_matter(card)}\n---",
        f"# {_text(card.title)}",
        _introduction(card),
        card.notes.strip(),
        *_model(card),
        *_evaluation(card),
        *_usage(card),
        *_training(card),
        *_disclaimer(card),
        *_versions(card),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _front_matter(card: ModelCard) -> str:
    from huggingface_hub import EvalResult, ModelCardData
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    base_model = None
    if card.base_model is not None:
        base_model, _, _ = card.base_model.partition("@")
        try:
            validate_repo_id(base_model)
        except HFValidationError as error:
            raise ValueError(
                f"base_model {card.base_model!r} is no Hugging Face id such as 'owner/name': leave "
                "it out where the teacher is a folder or a file"
            ) from error
    metrics = {}
    if card.evaluation is not None and card.evaluation.card is not None:
        metrics = _metrics_of(card.evaluation.card)
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    results = [
        EvalResult(
            task_type="audio-classification",
            # The Hub knows data by its own ids; these clips need not be there.
            dataset_type="custom",
            dataset_name=_line(card.evaluated_on or "validation clips"),
            metric_type=name,
            metric_name=_CARD_NAMES[name],
            metric_value=round(float(value), 4),
        )
        for name, value in finite.items()
    ]
    data = ModelCardData(
        license=_line(card.licence) if card.licence else None,
        library_name="transformers",
        pipeline_tag="audio-classification",
        tags=[
            "audio",
            *(["audioset"] if is_audioset(card.labels) else []),
            *(["distillation"] if card.teacher or card.teacher_scores else []),
        ],
        metrics=list(finite) or None,
        base_model=base_model,
        model_name=_line(card.title) if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _introduction(card: ModelCard) -> str:
    count = len(card.labels)
    labels = f"AudioSet's {count} labels" if is_audioset(card.labels) else f"{count} labels"
    sentences = [
        f"This model, {_text(card.title)}, hears which of {labels} apply to a clip of audio; any "
        "number of them may. It is an Audio Spectrogram Transformer "
        "([AST](https://arxiv.org/abs/2104.01778)), a transformer over the patches of a log-mel "
        "spectrogram."
    ]
    if card.teacher is not None:
        sentences.append(
            "It is a student: it learned to give the scores of its teacher, "
            f"{_text(card.teacher.name)}."
        )
    if card.teacher_scores is not None:
        sentences.append(
            f"The scores that it learned to give were stored before: {_text(card.teacher_scores)}."
        )
    if card.teacher is None and card.teacher_scores is None:
        sentences.append("No teacher of it is stated.")
    if card.began_as is not None:
        sentences.append(f"It learned on from the weights of {_text(card.began_as)}.")
    elif card.teacher_layers is None:
        sentences.append("Its training began from fresh weights.")
    else:
        sentences.append(
            f"Its {len(card.teacher_layers)} layers began as the teacher's layers "
            f"{' '.join(map(str, card.teacher_layers))}, counted from 0; its embeddings, final norm "
            "and head began as copies, too."
        )
    return " ".join(sentences)


def _model(card: ModelCard) -> list[str]:
    data = "; ".join(
        f"{_text(data.name)} ({_text(data.use)}, {data.clips:,} clips)" for data in card.data
    )
    rows = [[*_facts(card.student), data or "not stated"]]
    if card.teacher is not None:
        rows.append([*_facts(card.teacher), "not stated here"])
    features = card.features
    return [
        "## Model",
        _table(["Model", "#params", "Arch.", "Training/Validation data"], rows),
        f"Input: mono at {features.sample_rate:,} Hz, {features.num_mel_bins} mel bins, "
        f"{features.max_length:,} frames ({features.chunk_s:g} s) at once. Output: one logit a label; "
        "its sigmoid is the score.",
    ]


def _facts(model: ModelFacts) -> list[str]:
    return [
        _text(model.name),
        _ABSENT if model.parameters is None else f"{model.parameters:,}",
        _text(model.architecture or _ABSENT),
    ]


_CARD_NAMES = {"f1": "F1", "roc_auc": "ROC AUC", "accuracy": "Accuracy", "mAP": "mAP"}
_FIELD_NAMES = {
    "macro_map": "macro mAP",
    "macro_auc": "macro AUC",
    "d_prime": "d'",
    "weighted_map": "weighted mAP",
    "lwlrap": "lwlrap",
}


def _evaluation(card: ModelCard) -> list[str]:
    blocks = ["## Evaluation results"]
    own, teachers = card.evaluation or Evaluation(), card.teacher_evaluation or Evaluation()
    if own.card is None and own.field is None:
        blocks.append("This student has not been evaluated.")
    else:
        where = _text(card.evaluated_on or "the validation clips")
        count = "" if card.evaluated_clips is None else f", {card.evaluated_clips:,} clips"
        blocks.append(f"Measured on {where}{count}.")
        blocks += _comparison(card, "card", own.card, teachers.card)
        if own.card is not None:
            blocks.append(
                "These four are made as in the card of bookbot/distil-ast-audioset, as far as its "
                "numbers tell: micro-averaged, which is over all pairs of clip and label at once; "
                "F1, ROC AUC and accuracy are of scores cut at 0.5, and accuracy counts the clips "
                "whose labels are all right. They are not on AudioSet's usual scale, so compare "
                "them with each other and with that card only."
            )
        blocks += _comparison(card, "field", own.field, teachers.field)
        if own.field is not None:
            blocks.append(
                "These are what AudioSet's taggers are usually compared by. Macro is the mean over "
                f"the {own.field.labels} of {len(card.labels)} labels that have a positive clip "
                "here. They depend on the clips: only numbers on the same ones compare."
            )
    return [*blocks, card.further_results.strip()]


def _comparison(
    card: ModelCard,
    kind: str,
    student: CardMetrics | FieldMetrics | None,
    teacher: CardMetrics | FieldMetrics | None,
) -> list[str]:
    """The table of one kind of metrics, and a sentence of the row that it lacks."""
    names = {"card": _CARD_NAMES, "field": _FIELD_NAMES}[kind]
    if student is None:
        return [f"{', '.join(names.values())} were not measured."]
    measured = [(card.student.name, student)]
    if teacher is not None:
        name = card.teacher.name if card.teacher else card.teacher_scores or "teacher"
        measured.append((name, teacher))
    rows = [
        [_text(name), *map(_number, _metrics_of(metrics).values())] for name, metrics in measured
    ]
    blocks = [_table(["Model", *names.values()], rows)]
    if (card.teacher or card.teacher_scores) and teacher is None:
        blocks.append("The teacher was not measured on these clips, and so has no row.")
    return blocks


def _metrics_of(metrics: CardMetrics | FieldMetrics) -> dict[str, float]:
    names = _CARD_NAMES if isinstance(metrics, CardMetrics) else _FIELD_NAMES
    return {name: getattr(metrics, name) for name in names}


def _usage(card: ModelCard) -> list[str]:
    name = _line(card.checkpoint or _PLACEHOLDER)
    thresholds = (
        "The labels whose score reaches their threshold in `thresholds.json` become tags."
        if card.own_thresholds
        else "The checkpoint states no thresholds, so that one for all labels is used: see "
        "`--threshold`."
    )
    return [
        "## How to use it",
        "With [transformers](https://huggingface.co/docs/transformers), for the five highest scores "
        "of a clip:",
        "```python\n"
        "import soundfile\n"
        "from transformers import pipeline\n\n"
        f'tagger = pipeline("audio-classification", model={json.dumps(name, ensure_ascii=False)})\n'
        'waveform, sample_rate = soundfile.read("clip.wav", dtype="float32", always_2d=True)\n'
        'clip = {"raw": waveform.mean(axis=1), "sampling_rate": sample_rate}\n'
        'for tag in tagger(clip, top_k=5, function_to_apply="sigmoid"):\n'
        '    print(tag["label"], round(tag["score"], 3))\n'
        "```",
        "Scores are sigmoids, each label's own; a softmax, which old versions of transformers take, "
        f"would make the labels compete. The pipeline hears the first {card.features.chunk_s:g} s.",
        "With Earmark, for whole data sets, clips of any length and Parquet:",
        f"```console\n$ earmark annotate DATA --checkpoint {shlex.quote(name)} --output tags\n```",
        thresholds,
    ]


def _training(card: ModelCard) -> list[str]:
    blocks = ["## Training", "### Data"]
    if card.data:
        rows = [
            [
                _text(data.name),
                _text(data.use),
                f"{data.clips:,}",
                _ABSENT if data.audio_s is None else f"{data.audio_s / 3600:,.2f}",
                _text(data.licence or "not stated"),
            ]
            for data in card.data
        ]
        blocks.append(_table(["Data", "Use", "Clips", "Hours", "Licence"], rows))
    else:
        blocks.append("The data are not stated.")
    if card.attribution:
        blocks.append(
            f"Authors and licences, clip by clip or by source: {_text(card.attribution)}."
        )
    if card.skipped:
        reasons = [f"- {count:,}: {_text(reason)}" for reason, count in card.skipped.items()]
        blocks += [f"{sum(card.skipped.values()):,} clips were skipped:", "\n".join(reasons)]
    else:
        blocks.append("No clip was skipped.")

    blocks += [
        "### Training hyperparameters",
        f"Preset {_text(card.preset)}, every number of it as it was used:",
        "\n".join(
            f"- {_text(name)}: {_text(_setting(value))}"
            for name, value in card.hyperparameters.items()
        )
        or "They are not stated.",
        "### Training results",
    ]
    if card.epochs:
        blocks.append(_table(list(_EPOCH_COLUMNS), [_epoch_cells(row) for row in card.epochs]))
        blocks.append(
            "F1, Roc Auc, Accuracy and Map are the first table's, on the validation clips."
        )
    else:
        blocks.append("No epoch was recorded.")
    if card.curves:
        # A link's target in angle brackets may hold anything but these and a line's end.
        target = re.sub(r"([<>\\])", r"\\\1", _line(card.curves))
        blocks.append(f"![Losses and metrics by epoch](<{target}>)")
    return blocks


# Header of the training table, as Trainer writes it, and the name in `training.curves`.
_EPOCH_COLUMNS = {
    "Training Loss": "training_loss",
    "Epoch": "epoch",
    "Step": "step",
    "Validation Loss": "validation_loss",
    "F1": "f1",
    "Roc Auc": "roc_auc",
    "Accuracy": "accuracy",
    "Map": "mAP",
}


def _epoch_cells(row: Row) -> list[str]:
    return [
        f"{row[name]:g}"
        if name in ("epoch", "step") and row.get(name) is not None
        else _number(row.get(name))
        for name in _EPOCH_COLUMNS.values()
    ]


def _disclaimer(card: ModelCard) -> list[str]:
    of_labels = (
        "AudioSet's labels are uneven and incomplete: many clips lack labels that apply, and labels "
        "differ widely in how well they can be learned. "
        if is_audioset(card.labels)
        else ""
    )
    of_teacher = (
        "The student also repeats its teacher's mistakes and biases. "
        if card.teacher or card.teacher_scores
        else ""
    )
    return [
        "## Disclaimer",
        f"{of_labels}{of_teacher}A score is no probability unless it was calibrated on audio like "
        "yours. Look at samples of your own data before you rely on the tags, and choose thresholds "
        "by what a mistake costs; do not let the tags alone decide about people or their safety. "
        "The licences above are those of the data; whether they permit your use of a model trained "
        "on them is yours to judge.",
    ]


def _versions(card: ModelCard) -> list[str]:
    lines = [f"- {_text(name)} {_text(version)}" for name, version in card.versions.items()]
    return ["### Framework versions", "\n".join(lines) or "They are not stated."]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(cell for cell, _ in zip(line, header, strict=True))} |" for line in lines
    )


def _number(value: float | None) -> str:
    return _ABSENT if value is None or math.isnan(value) else f"{value:.4f}"


def _setting(value: Any) -> str:
    """A hyperparameter as one would write it on a command line, or as JSON if it has parts."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, list | tuple) and not any(
        isinstance(part, list | tuple) for part in value
    ):
        return " ".join(map(_setting, value)) or "none"
    if isinstance(value, Mapping):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)


def _line(text: str) -> str:
    """Text as one line of what can be printed: the name of a file need be neither."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _text(text: str) -> str:
    """Text as Markdown that shows it, in the middle of a line or in a table's cell."""
    return _MARKUP.sub(lambda found: "\\" + found.group(), _line(text))
