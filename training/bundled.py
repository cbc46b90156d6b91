"""Makes the bundled demonstration student.

    python -m training.bundled --corpus ../shared/corpus --output student/bundled

A small AST is distilled from a tagger's scores for a few thousand openly
licensed clips (WebDataset tars beside a `teacher_scores.parquet`), and from
sounds that this project synthesises with labels known by construction. The
share-alike tars are left out, so that the weights can be Apache-2.0. Everything
is drawn from one seed; the number of steps is fixed, not the time. About an hour
on two cores. A quick look that it runs: `--steps 20 --clips 300`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

from student.features import POWER_FLOOR, FeatureSpec
from student.labels import audioset_labels
from training.card import write_card
from training.corpus import MAX_CLIP_FRAMES, Clips, join, read_corpus, synthetic

SYNTHETIC_PER_SOUND = 75
SYNTHETIC_VALIDATION_PER_SOUND = 10
TEACHER_POSITIVE = 0.3  # a teacher score that counts as "has the label" in validation
LOG_EVERY = 250  # steps
VALIDATE_EVERY = 1_500  # steps


def main(argv: list[str] | None = None) -> None:
    """Reads the corpus, trains, validates, writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="folder with tars and teacher_scores.parquet")
    add("--output", type=Path, required=True, help="folder for the checkpoint")
    add("--steps", type=int, default=7_500, help="optimiser steps")
    add("--schedule-steps", type=int, default=9_000, help="steps at which the rate reaches 0")
    add("--clips", type=int, default=0, help="only the first N clips of the corpus (0: all)")
    add("--batch", type=int, default=32, help="clips a step")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--weight-decay", type=float, default=0.05, help="0 switches it off")
    add("--keep-patches", type=float, default=0.4, help="share of patches a step sees; 1: all")
    add("--mix", type=float, default=0.5, help="share of clips mixed with another; 0: none")
    add("--seed", type=int, default=0)
    add("--measure-only", action="store_true", help="measure the checkpoint that is in --output")
    args = parser.parse_args(argv)

    random = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)

    # ------------------------------------------------------------------ data
    started = time.monotonic()
    spec = FeatureSpec(num_mel_bins=64, max_length=512)  # 5.12 s
    train, held_out = read_corpus(args.corpus, spec, args.clips)
    corpus_clips = len(train)
    train = join(train, synthetic(spec, random, SYNTHETIC_PER_SOUND))
    held_out_synthetic = synthetic(spec, random, SYNTHETIC_VALIDATION_PER_SOUND)
    spec = with_mean_and_std(spec, train)
    print(
        f"{len(train)} clips to train on, {len(held_out)} held out, {len(held_out_synthetic)} "
        f"synthetic held out; read in {time.monotonic() - started:.0f} s",
        flush=True,
    )

    # -------------------------------------------------------------- training
    if not args.measure_only:
        for step, student in train_student(train, spec, random, args):
            save(student, spec, args.output)
            measured = validate(student, held_out, held_out_synthetic, spec)
            print(json.dumps({"step": step} | measured), flush=True)

    # ------------------------------------------------------------ validation
    student = ASTForAudioClassification.from_pretrained(args.output, dtype=torch.float32)
    metrics = validate(student, held_out, held_out_synthetic, spec)
    metrics |= {
        "parameters": student.num_parameters(),
        "corpus_clips": corpus_clips,
        "synthetic_train_clips": len(train) - corpus_clips,
        "steps": args.steps,
        "schedule_steps": args.schedule_steps,
        "batch": args.batch,
        "keep_patches": args.keep_patches,
        "seed": args.seed,
    }
    print(json.dumps(metrics, indent=2))
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (args.output / "held_out.txt").write_text("".join(f"{clip}\n" for clip in held_out.ids))
    write_card(args.output, args.corpus)


def train_student(
    clips: Clips, spec: FeatureSpec, random: np.random.Generator, args: argparse.Namespace
) -> Iterator[tuple[int, ASTForAudioClassification]]:
    """Trains, and yields `(steps done, averaged student)` now and then and at the end."""
    model = ASTForAudioClassification(config(spec))
    positions = model.audio_spectrogram_transformer.embeddings.position_embeddings
    nn.init.trunc_normal_(positions, std=0.02)
    nn.init.constant_(model.classifier.dense.bias, math.log(0.003 / 0.997))  # the targets' mean
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    warm_up, end = min(500, args.schedule_steps // 10 + 1), args.schedule_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / end)),
    )

    weights = sampling_weights(clips)
    started, running = time.monotonic(), 0.0
    for step in range(1, args.steps + 1):
        rows = torch.from_numpy(random.choice(len(clips), args.batch, p=weights))
        partners = torch.from_numpy(random.choice(len(clips), args.batch, p=weights))
        inputs, inside, targets = augmented(clips, rows, partners, spec, random, args.mix)
        logits = logits_of(model, inputs, inside, args.keep_patches)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        loss = loss / args.batch
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(model)
        running += loss.item() / LOG_EVERY
        if step % LOG_EVERY == 0:
            rate = step * args.batch / (time.monotonic() - started)
            print(f"step {step}/{args.steps}  loss {running:.3f}  {rate:.0f} clips/s", flush=True)
            running = 0.0
        if step % VALIDATE_EVERY == 0 or step == args.steps:
            yield step, average.module


def save(student: ASTForAudioClassification, spec: FeatureSpec, folder: Path) -> None:
    """Writes the checkpoint in float16, half the size for a score difference below 0.001."""
    copy.deepcopy(student).to(torch.float16).save_pretrained(folder)
    ASTFeatureExtractor(
        num_mel_bins=spec.num_mel_bins, max_length=spec.max_length, mean=spec.mean, std=spec.std
    ).save_pretrained(folder)


def config(spec: FeatureSpec) -> ASTConfig:
    """A 2.8 M parameter AST: 192 wide, 6 layers, 16 x 16 patches without overlap."""
    labels = audioset_labels()
    return ASTConfig(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        patch_size=16,
        frequency_stride=16,
        time_stride=16,
        num_mel_bins=spec.num_mel_bins,
        max_length=spec.max_length,
        id2label={label.index: label.name for label in labels},
        label2id={label.name: label.index for label in labels},
        label_mids=[label.mid for label in labels],
        problem_type="multi_label_classification",
    )


def with_mean_and_std(spec: FeatureSpec, clips: Clips) -> FeatureSpec:
    """`spec` with the training clips' own mean and deviation, as AST's numbers are AudioSet's."""
    inside = torch.arange(MAX_CLIP_FRAMES) < clips.frames[:, None]
    values = clips.log_mel[inside].float()
    mean, std = values.mean().item(), values.std().item()
    return FeatureSpec(
        spec.sample_rate, spec.num_mel_bins, spec.max_length, round(mean, 4), round(std, 4)
    )


def sampling_weights(clips: Clips) -> NDArray[np.float64]:
    """Half uniform, half in favour of clips whose labels are rare."""
    targets = clips.targets.numpy().astype(np.float64)
    rarity = 1 / (targets.sum(axis=0) + 10)
    balanced = (np.where(targets > 0.1, targets, 0) * rarity).sum(axis=1)
    return 0.5 / len(clips) + 0.5 * balanced / balanced.sum()


def augmented(
    clips: Clips,
    rows: Tensor,
    partners: Tensor,
    spec: FeatureSpec,
    random: np.random.Generator,
    mix: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A training batch: inputs, which of their frames are audio, targets.

    Made by crops, mixtures, gain, equalisation and masks.

    Two clips are mixed in mel power, which is what adding their waveforms does
    but for the cross term; targets are mixed in the same proportion.
    """
    power, inside = crops(clips, rows, spec, random)
    targets = clips.targets[rows]
    other, other_inside = crops(clips, partners, spec, random)
    batch, length, bins = power.shape

    share = torch.from_numpy(random.beta(1.0, 1.0, batch).astype(np.float32))
    share = torch.maximum(share, 1 - share)
    share[torch.from_numpy(random.random(batch) >= mix)] = 1.0
    # Bring both to the same loudness first, so that the share means what it says.
    level = power.sum((1, 2)) / inside.sum(1).clamp_min(1)
    other_level = other.sum((1, 2)) / other_inside.sum(1).clamp_min(1)
    gain = ((1 - share) / share * level / other_level.clamp_min(1e-9)).clamp(0, 1e6)
    power = power + other * gain[:, None, None]
    inside = inside | (other_inside & (share < 1)[:, None])
    targets = targets * share[:, None] + clips.targets[partners] * (1 - share[:, None])

    features = power.clamp_min(POWER_FLOOR).log()
    gain_db = random.uniform(-10, 10, (batch, 1, 1))
    curve = np.stack(
        [
            np.interp(np.arange(bins), np.linspace(0, bins - 1, 5), random.normal(0, 3, 5))
            for _ in range(batch)
        ]
    )
    shift = torch.from_numpy((gain_db + curve[:, None]) * math.log(10) / 10).float()
    features = (features + shift).clamp_min(math.log(POWER_FLOOR))
    roll = int(random.integers(-2, 3))  # a semitone or so up or down
    features = torch.roll(features, roll, dims=2)

    features = torch.where(inside[..., None], features, 0.0)  # AST's padding
    features = (features - spec.mean) / (2 * spec.std)
    for row in range(batch):  # SpecAugment: two bands, two spans, each filled with the mean
        for _ in range(2):
            width, span = int(random.integers(0, 10)), int(random.integers(0, 64))
            low = int(random.integers(0, bins - width))
            start = int(random.integers(0, length - span))
            features[row, :, low : low + width] = 0.0
            features[row, start : start + span] = 0.0
    return features, inside, targets


def crops(
    clips: Clips, rows: Tensor, spec: FeatureSpec, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mel power [batch, max_length, bins] of a random stretch of each clip, and where it is audio."""
    length = spec.max_length
    power = torch.zeros((len(rows), length, spec.num_mel_bins))
    inside = torch.zeros((len(rows), length), dtype=torch.bool)
    for place, row in enumerate(rows.tolist()):
        frames = int(clips.frames[row])
        start = int(random.integers(0, max(1, frames - length + 1)))
        piece = clips.log_mel[row, start : min(start + length, frames)].float().exp()
        power[place, : len(piece)] = piece
        inside[place, : len(piece)] = True
    return power, inside


def logits_of(
    model: ASTForAudioClassification, inputs: Tensor, inside: Tensor, keep: float
) -> Tensor:
    """Logits from a random share of each clip's patches (patchout); all of them when `keep` is 1.

    Patches of padding are mostly dropped first: they cost as much as the others
    and say little.
    """
    ast = model.audio_spectrogram_transformer
    tokens = ast.embeddings(inputs)
    if keep < 1.0:
        patch = model.config.patch_size
        bands = model.config.num_mel_bins // patch  # patches are ordered band by band
        audible = inside.unfold(1, patch, patch).any(dim=2).repeat(1, bands)  # [batch, patches]
        chance = torch.where(audible, 1.0, 0.15)
        kept = torch.multinomial(chance, int(keep * chance.shape[1]))
        kept = kept + 2  # the class and distillation tokens come first
        first = torch.arange(2).expand(len(kept), 2)
        index = torch.cat([first, kept], dim=1)[..., None].expand(-1, -1, tokens.shape[2])
        tokens = tokens.gather(1, index)
    for layer in ast.layers:
        tokens = layer(tokens)
    pooled = ast.layernorm(tokens)[:, :2].mean(dim=1)
    return model.classifier(pooled)


@torch.inference_mode()
def scores_of(model: nn.Module, clips: Clips, spec: FeatureSpec) -> NDArray[np.float32]:
    """Scores [clips, labels] as in use: chunks of max_length, the last one aligned to the end, maximum."""
    model.eval()
    scores = []
    for row in range(len(clips)):
        frames = int(clips.frames[row])
        starts = list(range(0, max(1, frames - spec.max_length + 1), spec.max_length))
        if starts[-1] + spec.max_length < frames:
            starts.append(frames - spec.max_length)
        chunks = torch.zeros((len(starts), spec.max_length, spec.num_mel_bins))
        for place, start in enumerate(starts):
            piece = clips.log_mel[row, start : min(start + spec.max_length, frames)].float()
            chunks[place, : len(piece)] = piece
        logits = model((chunks - spec.mean) / (2 * spec.std)).logits
        scores.append(logits.sigmoid().amax(dim=0).numpy())
    model.train()
    return np.stack(scores)


def validate(
    model: nn.Module, clips: Clips, synthetic_clips: Clips, spec: FeatureSpec
) -> dict[str, float]:
    """How the student does on clips that it never saw."""
    scores = scores_of(model, clips, spec)
    teacher = clips.targets.numpy()
    top5 = np.argsort(-scores, axis=1)[:, :5]
    esc10 = [row for row, name in enumerate(clips.own_class) if name]
    classes = {clips.own_class[row]: clips.own_labels[row] for row in esc10}
    names = sorted(classes)
    by_class = (
        np.stack([scores[:, list(classes[name])].max(axis=1) for name in names], axis=1)
        if names
        else None
    )
    present = teacher > TEACHER_POSITIVE
    enough = present.sum(axis=0) >= 3
    confident = teacher.max(axis=1) > 0.5
    own = scores_of(model, synthetic_clips, spec)
    true_first = np.array([labels[0] for labels in synthetic_clips.own_labels])
    return {
        "esc10_clips": len(esc10),
        "esc10_own_label_in_top5": _share(
            bool(set(top5[row]) & set(clips.own_labels[row])) for row in esc10
        ),
        "esc10_right_class_of_ten": _share(
            names[by_class[row].argmax()] == clips.own_class[row] for row in esc10
        ),
        "teacher_labels": int(enough.sum()),
        "teacher_mean_average_precision": float(
            np.mean(
                [
                    average_precision_score(present[:, k], scores[:, k])
                    for k in np.flatnonzero(enough)
                ]
            )
        )
        if enough.any()
        else 0.0,
        "teacher_top1_in_top5": _share((top5 == teacher.argmax(axis=1)[:, None]).any(axis=1)),
        "teacher_top1_in_top5_where_above_0.5": _share(
            (top5 == teacher.argmax(axis=1)[:, None]).any(axis=1)[confident]
        ),
        "held_out_clips": len(clips),
        "synthetic_clips": len(synthetic_clips),
        "synthetic_own_label_in_top3": _share(
            (np.argsort(-own, axis=1)[:, :3] == true_first[:, None]).any(axis=1)
        ),
    }


def _share(values) -> float:
    values = list(values)
    return round(float(np.mean(values)), 4) if values else 0.0


if __name__ == "__main__":
    main()
