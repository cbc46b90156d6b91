"""The two recipes of distillation: every number that they fix, with its reason.

Both have the same fields, so that a run is described by one flat list of numbers, each of
which `earmark distill --set NAME=VALUE` overrides.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

Loss = Literal["softmax-kl", "sigmoid-bce"]
Precision = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class DistilAst:
    """How the published Distil-AST was trained, as far as it is known.

    The numbers are those of its `run.sh` (bookbot/distil-ast-audioset on the Hugging Face
    Hub). The body of its loss could not be read: `softmax-kl` is a reconstruction, from the
    same authors' script for speech recognition and from the size of the published losses.
    What `run.sh` does not state is transformers' default of that time.
    """

    # --- the student
    teacher_layers: tuple[int, ...] | None = (0, 2, 4, 6, 8, 10)  # None: spread, the last kept
    student_layers: int = 6  # how many to spread where `teacher_layers` is None
    # --- the loss
    loss: Loss = "softmax-kl"
    alpha: float = 0.5  # weight of a clip's own labels beside the teacher's scores
    temperature: float = 2.0
    label_floor: float = 0.0  # a clip's own labels are targets of at least this
    # --- the optimiser
    learning_rate: float = 3e-5  # at its peak
    batch: int = 32  # clips at once on a device
    accumulation: int = 4  # batches a step
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: Literal["linear", "cosine"] = "linear"  # to 0 at the end
    warmup_ratio: float = 0.1
    epochs: float = 10.0
    precision: Precision = "float16"  # mixed, on a GPU; a CPU computes in float32
    average_decay: float = 0.0  # of the weights' moving average, a step; 0: the last weights
    early_stop_epochs: int = 0  # stop after so many without a better mAP; 0: never
    seed: int = 0
    # --- what the student hears
    crop_share: float = 0.0  # of the clips, cut to a random piece
    crop_min_s: float = 1.0
    crop_max_s: float = 10.0
    random_start: bool = False  # of what is heard of a clip longer than a chunk; else its start
    mixup_share: float = 0.0  # of the clips, mixed with another of the batch
    mixup_beta: float = 0.5  # both parameters of the Beta distribution of a clip's share
    gain_db: float = 0.0  # louder or softer by up to this
    speed: float = 0.0  # faster or slower by up to this share, pitch and all
    equaliser_db: float = 0.0  # deviation of a smooth curve over frequency
    frequency_mask: float = 0.0  # the widest, as a share of the mel bins
    time_mask: float = 0.0  # the longest, as a share of the frames
    masks: int = 1  # of either kind
    keep_patches: float = 1.0  # share of the patches that a training step sees
    balance: float = 0.0  # share of the clips drawn in favour of rare labels; needs a cache
    labelled_weight: float = 1.0  # how often one with own labels is drawn, to one without; likewise
    # --- what counts
    tag_threshold: float = 0.3  # a teacher's score that is a tag, where clips have no labels
    judge_every_epochs: int = 1  # and log, and keep a checkpoint


@dataclass(frozen=True)
class Consistent:
    """Ours: function matching on everything that can be done to a sound.

    The last layer is kept, as the final norm and the head were trained on what it gives.
    Each label's score is matched by itself (binary cross-entropy to the teacher's sigmoid,
    no temperature), which passes on the level of the scores, and with it thresholds, where a
    softmax passes on differences only. A teacher that runs along hears exactly what the
    student hears, mixed and masked; stored scores are interpolated. Masks are SpecAugment's
    48 of 128 bins and 192 of 1,024 frames; a label weight of 0.1 is EfficientAT's.
    """

    # --- the student
    teacher_layers: tuple[int, ...] | None = None
    student_layers: int = 6
    # --- the loss
    loss: Loss = "sigmoid-bce"
    alpha: float = 0.1
    temperature: float = 1.0
    label_floor: float = 0.0
    # --- the optimiser
    learning_rate: float = 1e-4
    batch: int = 32
    accumulation: int = 4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    schedule: Literal["linear", "cosine"] = "cosine"
    warmup_ratio: float = 0.05
    epochs: float = 30.0
    precision: Precision = "bfloat16"
    average_decay: float = 0.999
    early_stop_epochs: int = 0
    seed: int = 0
    # --- what the student hears
    crop_share: float = 0.5
    crop_min_s: float = 1.0
    crop_max_s: float = 10.0
    random_start: bool = True
    mixup_share: float = 0.5
    mixup_beta: float = 1.0
    gain_db: float = 12.0
    speed: float = 0.0
    equaliser_db: float = 0.0
    frequency_mask: float = 0.375
    time_mask: float = 0.1875
    masks: int = 1
    keep_patches: float = 1.0
    balance: float = 0.0
    labelled_weight: float = 1.0
    # --- what counts
    tag_threshold: float = 0.3
    judge_every_epochs: int = 1


Recipe = DistilAst | Consistent

PRESETS: dict[str, type[DistilAst] | type[Consistent]] = {
    "distil-ast": DistilAst,
    "consistent": Consistent,
}


class RecipeError(ValueError):
    """A number of a recipe that cannot be; the message names it."""


def with_settings(recipe: Recipe, settings: dict[str, str]) -> Recipe:
    """`recipe` with fields set from text, as a command line gives them.

    Raises:
        RecipeError: no such field, or a value that it cannot have.
    """
    kinds = get_type_hints(type(recipe))
    values = {}
    for name, text in settings.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            meant = f" (is {near[0]} meant?)" if near else ""
            known = ", ".join(field.name for field in fields(recipe))
            raise RecipeError(f"a recipe has no {name!r}{meant}; it has {known}")
        values[name] = _parsed(name, text.strip(), kinds[name])
    changed = replace(recipe, **values)
    check(changed)
    return changed


def check(recipe: Recipe) -> None:
    """Refuses numbers that cannot be.

    Raises:
        RecipeError: names the field, its value and what it may be.
    """

    for name, value in asdict(recipe).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{name} is {value}, expected a number")

    def within(name: str, low: float, high: float) -> None:
        value = getattr(recipe, name)
        if not low <= value <= high:
            expected = f"{low:g} to {high:g}" if high < float("inf") else f"{low:g} or more"
            raise RecipeError(f"{name} is {value:g}, expected {expected}")

    for name in (
        "alpha label_floor warmup_ratio crop_share mixup_share frequency_mask time_mask balance "
        "tag_threshold"
    ).split():
        within(name, 0.0, 1.0)
    for name in "adam_beta1 adam_beta2 average_decay".split():
        within(name, 0.0, 0.999999)
    within("speed", 0.0, 0.5)
    within("keep_patches", 0.01, 1.0)
    for name in "temperature learning_rate adam_epsilon epochs crop_min_s mixup_beta labelled_weight".split():
        if not getattr(recipe, name) > 0:
            raise RecipeError(f"{name} is {getattr(recipe, name):g}, expected more than 0")
    for name in "batch accumulation student_layers judge_every_epochs".split():
        within(name, 1, float("inf"))
    for name in (
        "weight_decay max_grad_norm gain_db equaliser_db early_stop_epochs masks seed"
    ).split():
        within(name, 0, float("inf"))
    if recipe.teacher_layers == ():
        raise RecipeError(
            "teacher_layers is '', expected layer numbers such as 0 2 4 6 8 10, or None"
        )
    if recipe.crop_max_s < recipe.crop_min_s:
        raise RecipeError(
            f"crop_max_s is {recipe.crop_max_s:g}, less than crop_min_s {recipe.crop_min_s:g}"
        )


def as_settings(recipe: Recipe) -> dict[str, Any]:
    """Every number of a recipe, in order, as JSON holds it."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(recipe).items()
    }


def _parsed(name: str, text: str, kind: Any) -> Any:
    try:
        if name == "teacher_layers":
            return None if text == "None" else tuple(int(n) for n in text.replace(",", " ").split())
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if get_args(kind):
            if text not in get_args(kind):
                raise ValueError(text)
            return text
        return kind(text)
    except (KeyError, ValueError) as error:
        expected = (
            "layer numbers such as 0 2 4 6 8 10, or None"
            if name == "teacher_layers"
            else " or ".join(get_args(kind))
            or {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        )
        raise RecipeError(f"{name} is {text!r}, expected {expected}") from error
