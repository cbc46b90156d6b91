"""Hugging Face's Trainer, taught to distil: what a step computes, and how an epoch is judged."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ASTForAudioClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from evaluation.metrics import CardMetrics, FieldMetrics, card_metrics, field_metrics
from student.feature_spec import HOP_SAMPLES, FeatureSpec
from student.features import LogMel
from training.augment import Sounds, augment_sounds, disguise, draw_disguise
from training.clips import ClipTable, Draws
from training.losses import LOSSES
from training.presets import Recipe
from training.request import AVERAGE_FILE, CHECKPOINTS_FOLDER
from transforms.chunk import cut_chunks

BEST_FILE = "best.safetensors"

_JUDGED_AT_ONCE = 32  # clips


class TrainingFailed(RuntimeError):
    """The training cannot go on; the message says what happened and what to change."""


@dataclass(frozen=True)
class Listener:
    """A model and the features that it hears by."""

    model: nn.Module  # called as transformers' models are
    spec: FeatureSpec
    log_mel: LogMel

    @classmethod
    def of(cls, model: nn.Module, spec: FeatureSpec) -> Listener:
        """With features in float32, which train as well as float64 and are faster."""
        return cls(model, spec, LogMel(spec, torch.float32).to(model.device))

    def hear(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Features, float32 [clips, max_length, mel bins], whatever autocast is about.

        float16 does not hold the power of a loud sound, and bfloat16 not its digits.
        """
        with torch.autocast(waveforms.device.type, enabled=False):
            features: Tensor = self.log_mel(waveforms, lengths)
        return features


class PatchDropout:
    """Lets a training step see a share of each clip's patches (patchout, as in PaSST).

    A hook on the embeddings: the model's own `forward` stays what is called. Patches of
    padding are mostly the first to go: they cost as much as the others and say little.
    """

    def __init__(self, model: ASTForAudioClassification) -> None:
        config = model.config
        self._stride = config.time_stride
        self._bands = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        self._spans = (config.max_length - config.patch_size) // config.time_stride + 1
        self._kept: Tensor | None = None
        model.audio_spectrogram_transformer.embeddings.register_forward_hook(self._drop)

    @contextmanager
    def keeping(self, share: float, frames: Tensor, random: torch.Generator) -> Iterator[None]:
        """Within, the model sees `share` of the patches of clips of so many `frames` [clips]."""
        if share >= 1.0:
            yield
            return
        starts = torch.arange(self._spans) * self._stride
        audible = (starts < frames[:, None]).repeat(1, self._bands)  # patches lie band by band
        chance = torch.where(audible, 1.0, 0.15)
        count = max(1, int(share * chance.shape[1]))
        self._kept = torch.multinomial(chance, count, generator=random)
        try:
            yield
        finally:
            self._kept = None

    def _drop(self, module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor | None:
        if self._kept is None:
            return None
        # The class and the distillation token come first and stay.
        first = torch.arange(2).expand(len(self._kept), 2)
        index = torch.cat([first, self._kept + 2], dim=1).to(tokens.device)
        return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


class WeightAverage(TrainerCallback):
    """Keeps an exponential moving average of the weights, and saves it beside each checkpoint."""

    def __init__(self, model: nn.Module, decay: float, resumed_from: Path | None) -> None:
        self._model, self._decay, self._steps = model, decay, 0
        self._resumed_from = resumed_from
        self.weights: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts from the weights, or from where the average stood."""
        self._steps = state.global_step
        if self._resumed_from is None:
            self.weights = {name: p.detach().clone() for name, p in self._named()}
        else:
            stored = load_file(self._resumed_from / AVERAGE_FILE)
            self.weights = {name: stored[name].to(p.device) for name, p in self._named()}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Follows the weights: closely at first, when they move far."""
        self._steps += 1
        decay = min(self._decay, self._steps / (self._steps + 10))
        for name, weight in self._named():
            self.weights[name].lerp_(weight.detach(), 1 - decay)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Puts the average where the checkpoint is."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_whole(self.weights, folder / AVERAGE_FILE)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield from averaged_tensors(self._model)


class Seldom(TrainerCallback):
    """Judges, logs and saves at the end of every `every`-th epoch, and of the last."""

    def __init__(self, every: int) -> None:
        self._every = every

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes back what the Trainer wants at the end of each."""
        if round(state.epoch) % self._every and state.global_step < state.max_steps:
            control.should_evaluate = control.should_log = control.should_save = False


class KeepBest(TrainerCallback):
    """Keeps the weights with the best mAP, and stops after some epochs without a better one.

    Args:
        patience_epochs: so many.
        every: epochs from one judgement to the next.
        output: where `checkpoints/` is.
    """

    def __init__(self, patience_epochs: int, every: int, output: Path) -> None:
        self._patience, self._every = patience_epochs, every
        self._file = output / CHECKPOINTS_FOLDER / BEST_FILE
        self.trainer: DistillationTrainer | None = None  # whose weights are judged

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_: Any
    ) -> None:
        """Compares with all earlier epochs, which the log knows after a resumption too."""
        if self.trainer is None:
            return
        earlier = [entry["eval_mAP"] for entry in state.log_history if "eval_mAP" in entry][:-1]
        if not earlier or metrics["eval_mAP"] > max(earlier):
            average = self.trainer.average
            weights = average.weights if average else self.trainer.student.model.state_dict()
            if state.is_world_process_zero:
                save_whole(weights, self._file)
        elif (len(earlier) - int(np.argmax(earlier))) * self._every >= self._patience:
            control.should_training_stop = True


def averaged_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What an average is of: parameters, and what normalisations know of their inputs."""
    yield from model.named_parameters()
    yield from (
        (name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point()
    )


def save_whole(weights: Mapping[str, Tensor], file: Path) -> None:
    """Writes weights so that the file is there whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    save_file({name: weight.contiguous() for name, weight in weights.items()}, partial)
    partial.replace(file)


@contextmanager
def weights_set(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, `model` has these weights; afterwards its own again."""
    own = {name: p.detach().clone() for name, p in averaged_tensors(model)}
    put_weights(model, weights)
    try:
        yield
    finally:
        put_weights(model, own)


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights, by name, into a model."""
    for name, tensor in averaged_tensors(model):
        tensor.copy_(weights[name])


@dataclass(frozen=True)
class Validation:
    """The held-out clips, and what counts as true of them."""

    cached: datasets.Dataset
    table: ClipTable  # in which `row` of `cached` looks
    truth: NDArray[np.bool_]  # [clips of `cached`, labels]
    truth_is: str  # for people: whose opinion it is


@dataclass(frozen=True)
class Judged:
    """How a model did on the held-out clips."""

    loss: float
    card: CardMetrics
    field: FieldMetrics
    scores: NDArray[np.float32]  # [clips, labels]


class DistillationTrainer(Trainer):
    """A Trainer whose batches are `training.clips.Batches`, and whose loss has a teacher.

    Args:
        student: what learns.
        teacher: what runs along and is asked about every batch, if anything does.
        stored: whether the batches bring scores. Where a teacher runs along beside them, the
            targets are half its scores and half the stored ones.
        recipe: all numbers.
        validation: the held-out clips.
        average: the weights that are judged and kept, where an average is.
        draw_weights: how often each clip of a cache is drawn.
        arguments, train_dataset, data_collator, callbacks: as of `Trainer`.
    """

    def __init__(
        self,
        student: Listener,
        teacher: Listener | None,
        stored: bool,
        recipe: Recipe,
        validation: Validation,
        average: WeightAverage | None,
        draw_weights: NDArray[np.float64] | None,
        arguments: TrainingArguments,
        train_dataset: Any,
        data_collator: Any,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self.student, self.teacher, self.stored = student, teacher, stored
        self.recipe = recipe
        self.validation, self.average = validation, average
        self.last_loss = math.nan
        self.unheard: set[int] = set()  # rows of clips that had no sound when they were drawn
        self._draw_weights = draw_weights
        self._patches = PatchDropout(student.model) if recipe.keep_patches < 1 else None
        super().__init__(
            model=student.model,
            args=arguments,
            train_dataset=train_dataset,
            eval_dataset=validation.cached,
            data_collator=data_collator,
            callbacks=[*([average] if average else []), *callbacks],
        )
        self.remove_callback(PrinterCallback)  # what is printed is the callers' business
        # A loss is the mean of its batch: the Trainer divides it by the batches of a step.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # transformers stores AST's layers by other names than they have in memory, and its
        # Trainer takes the file as it is: the layers would stay as the teacher has them.
        stored = ASTForAudioClassification.from_pretrained(
            resume_from_checkpoint,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,  # and so no pickle
        )
        put_weights(self.student.model, dict(stored.named_parameters()))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return Draws(len(self.train_dataset), self.recipe.seed, self._draw_weights)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The recipe's loss of a batch: its sounds changed, the student and the teacher heard."""
        recipe = self.recipe
        random = torch.Generator().manual_seed(recipe.seed * 1_000_003 + int(inputs["draws"][0]))
        sounds = Sounds(**{name: inputs[name] for name in Sounds.__dataclass_fields__})
        self.unheard.update(inputs["rows"][sounds.weights == 0].tolist())
        if self.stored:
            sounds.scores = torch.maximum(sounds.scores, recipe.label_floor * sounds.truth)
        sounds = augment_sounds(sounds, recipe, random)
        drawn = draw_disguise(len(sounds.lengths), recipe, random)

        def heard_by(listener: Listener) -> Tensor:
            features = listener.hear(sounds.waveforms, sounds.lengths)
            return disguise(features, sounds.lengths, drawn, listener.spec)

        features = heard_by(self.student)
        if self.teacher is not None:
            alike = self.teacher.spec == self.student.spec
            heard = features if alike else heard_by(self.teacher)
            with torch.no_grad(), self.accelerator.autocast():
                theirs = self.teacher.model(heard).logits.float().sigmoid()
            theirs = torch.maximum(theirs, recipe.label_floor * sounds.truth)
            sounds.scores = (theirs + sounds.scores) / 2 if self.stored else theirs
        frames = (sounds.lengths.cpu() / HOP_SAMPLES).ceil()
        share = recipe.keep_patches
        dropping = self._patches.keeping(share, frames, random) if self._patches else nullcontext()
        with dropping:
            logits = model(features).logits
        loss = self._loss(logits, sounds)
        self.control.last_loss = self.last_loss = float(loss.detach())
        if not math.isfinite(self.last_loss):
            raise TrainingFailed(
                f"the loss is {self.last_loss} at step {self.state.global_step + 1}: "
                f"try a learning_rate below {recipe.learning_rate:g}, or precision=float32"
            )
        return (loss, {"logits": logits}) if return_outputs else loss

    def _loss(self, logits: Tensor, sounds: Sounds) -> Tensor:
        per_clip = LOSSES[self.recipe.loss](
            logits,
            sounds.scores,
            sounds.truth,
            sounds.labelled,
            alpha=self.recipe.alpha,
            temperature=self.recipe.temperature,
        )
        return (per_clip * sounds.weights).sum() / sounds.weights.sum().clamp_min(1)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Judges the student (its average, where there is one) on the held-out clips."""
        started = time.monotonic()
        weights = self.average.weights if self.average else None
        if weights:
            with weights_set(self.student.model, weights):
                judged = self.judge()
        else:
            judged = self.judge()
        metrics = {
            "loss": judged.loss,
            "f1": judged.card.f1,
            "roc_auc": judged.card.roc_auc,
            "accuracy": judged.card.accuracy,
            "mAP": judged.card.mAP,
            "macro_map": judged.field.macro_map,
            "macro_auc": judged.field.macro_auc,
            "d_prime": judged.field.d_prime,
            "weighted_map": judged.field.weighted_map,
            "lwlrap": judged.field.lwlrap,
            "runtime_s": time.monotonic() - started,
        }
        # d' may be infinite, which JSON does not hold.
        metrics = {
            f"{metric_key_prefix}_{name}": float(value)
            for name, value in metrics.items()
            if math.isfinite(value)
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def judge(self) -> Judged:
        """How the student, as its weights are, does on the held-out clips.

        The loss is that of each clip's beginning, as it is: nothing is mixed or hidden.
        """
        model, (table, cached) = self.student.model, (self.validation.table, self.validation.cached)
        model.eval()
        scores, opening = scores_of(self.student, cached)
        model.train()
        of = table.take(cached["row"])
        assert of.scores is not None
        losses = LOSSES[self.recipe.loss](
            opening,
            torch.from_numpy(of.scores),
            torch.from_numpy(of.truth(scores.shape[1])),
            torch.from_numpy(of.labelled),
            alpha=self.recipe.alpha,
            temperature=self.recipe.temperature,
        )
        if not np.isfinite(scores).all():
            raise TrainingFailed(
                f"the student's scores are no numbers at step {self.state.global_step}: try a "
                f"learning_rate below {self.recipe.learning_rate:g}"
            )
        truth = self.validation.truth
        return Judged(
            float(losses.mean()), card_metrics(truth, scores), field_metrics(truth, scores), scores
        )


@torch.no_grad()
def scores_of(listener: Listener, cached: datasets.Dataset) -> tuple[NDArray[np.float32], Tensor]:
    """Scores of clips as `earmark annotate` makes them: by chunks, the maximum.

    Returns:
        Scores, float32 [clips, labels], and the logits of each clip's first chunk, on the CPU.
    """
    labels = listener.model.config.num_labels
    scores = np.zeros((len(cached), labels), np.float32)
    opening = torch.zeros((len(cached), labels))
    for first in range(0, len(cached), _JUDGED_AT_ONCE):
        last = min(first + _JUDGED_AT_ONCE, len(cached))
        chunks, owners = _chunks([cached[row] for row in range(first, last)], listener.spec)
        logits = _logits(listener, chunks).cpu()
        np.maximum.at(scores, first + owners, logits.sigmoid().numpy())
        opening[first:last] = logits[np.unique(owners, return_index=True)[1]]
    return scores, opening


def _chunks(
    examples: Sequence[Mapping[str, Any]], spec: FeatureSpec
) -> tuple[list[NDArray[np.float32]], NDArray[np.int64]]:
    """The chunks of some clips, and which clip each is of."""
    chunks, owners = [], []
    for place, example in enumerate(examples):
        sound = np.frombuffer(example["waveform"], np.int16).astype(np.float32) / 32_767
        for chunk in cut_chunks([sound], spec.chunk_samples, spec.sample_rate):
            chunks.append(chunk.waveform)
            owners.append(place)
    return chunks, np.array(owners, np.int64)


def _logits(listener: Listener, chunks: Sequence[NDArray[np.float32]]) -> Tensor:
    """Logits, float32 [chunks, labels]."""
    device, logits = listener.model.device, []
    for first in range(0, len(chunks), _JUDGED_AT_ONCE):
        batch = chunks[first : first + _JUDGED_AT_ONCE]
        lengths = torch.tensor([len(chunk) for chunk in batch])
        waveforms = torch.zeros((len(batch), int(lengths.max())))
        for row, chunk in enumerate(batch):
            waveforms[row, : len(chunk)] = torch.from_numpy(chunk)
        features = listener.hear(waveforms.to(device), lengths.to(device))
        logits.append(listener.model(features).logits.float())
    return torch.cat(logits)
