"""Makes the bundled demonstration student.

    python -m training.bundled --corpus ../shared/corpus --output student/bundled

A small AST is distilled from a tagger's scores for a few thousand openly
licensed clips (WebDataset tars beside a `teacher_scores.parquet`), and from
sounds that this project synthesises with labels known by construction. The
share-alike tars are left out, so that the weights can be Apache-2.0. Everything
is drawn from one seed; the number of steps is fixed, not the time. About an hour
on two cores. A quick look that it runs: `--steps 20 --clips 200`.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import math
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

from student.features import POWER_FLOOR, FeatureSpec, LogMel
from student.labels import audioset_labels
from training.sounds import SAMPLE_RATE, SOUNDS, synthesise
from transforms.decode import AudioDecoder

MAX_CLIP_FRAMES = 1_000  # 10 s, the longest clip of the corpus
SYNTHETIC_PER_SOUND = 75
SYNTHETIC_VALIDATION_PER_SOUND = 10
ESC10_VALIDATION_FOLD = 4
HELD_OUT_SHARE = 0.1  # of the other clip groups
TEACHER_POSITIVE = 0.3  # a teacher score that counts as "has the label" in validation


@dataclass
class Clips:
    """Clips as log-mel power with their targets."""

    ids: list[str]
    log_mel: Tensor  # float16 [clips, MAX_CLIP_FRAMES, mel bins], log power, floor where empty
    frames: Tensor  # int64 [clips]
    targets: Tensor  # float32 [clips, labels], what the student learns
    own_labels: list[tuple[int, ...]]  # true labels where known (ESC-10, synthetic), else ()
    own_class: list[str]  # the true class where known, else ""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.bool_]) -> Clips:
        """The clips where `rows` is true."""
        keep = np.flatnonzero(rows).tolist()
        return Clips(
            [self.ids[i] for i in keep],
            self.log_mel[keep],
            self.frames[keep],
            self.targets[keep],
            [self.own_labels[i] for i in keep],
            [self.own_class[i] for i in keep],
        )


def main(argv: list[str] | None = None) -> None:
    """Reads the corpus, trains, validates, writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--corpus", type=Path, required=True, help="folder with tars and teacher_scores.parquet"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=9_000, help="optimiser steps")
    parser.add_argument(
        "--clips", type=int, default=0, help="use only the first N clips of the corpus (0: all)"
    )
    parser.add_argument("--batch", type=int, default=32, help="clips a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="0 switches it off")
    parser.add_argument(
        "--keep-patches", type=float, default=0.4, help="share of patches a step sees; 1 keeps all"
    )
    parser.add_argument(
        "--mix",
        type=float,
        default=0.5,
        help="share of clips mixed with another; 0 switches it off",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    random = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    spec = FeatureSpec(num_mel_bins=64, max_length=512)  # 5.12 s

    # ------------------------------------------------------------------ data
    started = time.monotonic()
    corpus, held_out = read_corpus(args.corpus, spec, args.clips)
    train = join(corpus.take(~held_out), synthetic(spec, random, SYNTHETIC_PER_SOUND))
    validation = corpus.take(held_out)
    validation_synthetic = synthetic(spec, random, SYNTHETIC_VALIDATION_PER_SOUND)
    spec = with_mean_and_std(spec, train)
    print(
        f"{len(train)} clips to train on, {len(validation)} held out, "
        f"{len(validation_synthetic)} synthetic held out; read in {time.monotonic() - started:.0f} s"
    )

    # ----------------------------------------------------------------- model
    model = ASTForAudioClassification(config(spec))
    nn.init.trunc_normal_(
        model.audio_spectrogram_transformer.embeddings.position_embeddings, std=0.02
    )
    nn.init.constant_(model.classifier.dense.bias, math.log(0.003 / 0.997))  # the targets' mean
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": args.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    warm_up = min(500, args.steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / args.steps)),
    )

    # -------------------------------------------------------------- training
    weights = sampling_weights(train)
    started, running = time.monotonic(), 0.0
    for step in range(args.steps):
        rows = torch.from_numpy(random.choice(len(train), args.batch, p=weights))
        partners = torch.from_numpy(random.choice(len(train), args.batch, p=weights))
        # The last steps see all patches, as in use.
        keep = args.keep_patches if step < 0.88 * args.steps else 1.0
        inputs, inside, targets = augmented(train, rows, partners, spec, random, args.mix)
        logits = logits_of(model, inputs, inside, keep)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        loss = loss / args.batch
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(model)
        running += loss.item()
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            rate = (step + 1) * args.batch / (time.monotonic() - started)
            print(
                f"step {step + 1}/{args.steps}  loss {running / min(250, step + 1):.3f}  {rate:.0f} clips/s",
                flush=True,
            )
            running = 0.0
        if (step + 1) % 1_500 == 0:
            print(
                json.dumps(validate(average.module, validation, validation_synthetic, spec)),
                flush=True,
            )
            save(copy.deepcopy(average.module), spec, args.output)

    # ------------------------------------------------------------ validation
    student = average.module.to(torch.float16).to(torch.float32)  # what is stored
    metrics = validate(student, validation, validation_synthetic, spec)
    metrics |= {
        "train_clips": len(train),
        "steps": args.steps,
        "batch": args.batch,
        "seed": args.seed,
    }
    print(json.dumps(metrics, indent=2))

    # ------------------------------------------------------------ checkpoint
    save(student, spec, args.output)
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (args.output / "held_out.txt").write_text("".join(f"{clip}\n" for clip in validation.ids))


def save(student: ASTForAudioClassification, spec: FeatureSpec, folder: Path) -> None:
    """Writes the checkpoint in float16, half the size for a score difference below 0.001."""
    student.to(torch.float16).save_pretrained(folder)
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


def read_corpus(folder: Path, spec: FeatureSpec, limit: int) -> tuple[Clips, NDArray[np.bool_]]:
    """The permissively licensed clips, and which of them are held out.

    Held out are ESC-10's fold 4 and a tenth of all other groups: a group shares a
    source recording, so a split by clip would leak.
    """
    table = pq.read_table(folder / "teacher_scores.parquet", columns=["clip_id", "scores"])
    scores = np.stack(table["scores"].combine_chunks().to_numpy(zero_copy_only=False)).astype(
        np.float32
    )
    teacher = dict(zip(table["clip_id"].to_pylist(), scores, strict=True))
    index_of = {label.mid: label.index for label in audioset_labels()}
    mel = LogMel(spec)

    ids, features, targets, own_labels, own_class, held_out = [], [], [], [], [], []
    for path in sorted(folder.glob("permissive-*.tar")):
        for clip_id, audio, facts in tar_samples(path):
            if limit and len(ids) >= limit:
                break
            waveform = np.concatenate(list(AudioDecoder(io.BytesIO(audio)).mono(SAMPLE_RATE)))
            target = teacher[clip_id].copy()
            true = tuple(index_of[mid] for mid in facts.get("labels", ()))
            fold = facts.get("esc10_fold")
            share = int(hashlib.sha256(facts["group"].encode()).hexdigest()[:8], 16) / 2**32
            ids.append(clip_id)
            features.append(log_mel_of(mel, waveform))
            own_labels.append(true)
            own_class.append(facts.get("esc10_class", ""))
            held_out.append(fold == ESC10_VALIDATION_FOLD if fold else share < HELD_OUT_SHARE)
            if (
                true
            ):  # a hard label lifts the first of its class's labels, where the teacher missed it
                target[true[0]] = max(target[true[0]], 0.8)
            targets.append(target)
    return stack(ids, features, targets, own_labels, own_class), np.array(held_out)


def tar_samples(path: Path):
    """Yields (clip id, encoded audio, facts) of a WebDataset tar."""
    with tarfile.open(path) as tar:
        audio: dict[str, bytes] = {}
        for member in tar:
            name, _, extension = member.name.partition(".")
            data = tar.extractfile(member).read()
            if extension == "json":
                yield name, audio.pop(name), json.loads(data)
            else:
                audio[name] = data


def synthetic(spec: FeatureSpec, random: np.random.Generator, count: int) -> Clips:
    """`count` instances of each synthetic sound, 1 to 8 s, with hard targets."""
    index_of = {label.name: label.index for label in audioset_labels()}
    mel = LogMel(spec)
    ids, features, targets, own_labels, own_class = [], [], [], [], []
    for sound in SOUNDS:
        true = tuple(index_of[name] for name in sound.labels)
        for number in range(count):
            target = np.zeros(len(index_of), np.float32)
            target[list(true)] = 0.7
            target[true[0]] = 0.9
            ids.append(f"synthetic-{sound.name}-{number}")
            features.append(log_mel_of(mel, synthesise(sound, random, random.uniform(1.0, 8.0))))
            targets.append(target)
            own_labels.append(true)
            own_class.append(sound.name)
    return stack(ids, features, targets, own_labels, own_class)


def log_mel_of(mel: LogMel, waveform: NDArray[np.float32]) -> Tensor:
    """float16 [frames, mel bins], log power before any normalisation."""
    if len(waveform) < 400:
        return torch.zeros((0, mel.spec.num_mel_bins), dtype=torch.float16)
    power = mel.power(torch.from_numpy(waveform)[None])[0, :MAX_CLIP_FRAMES]
    return power.clamp_min(POWER_FLOOR).log().to(torch.float16)


def stack(ids, features, targets, own_labels, own_class) -> Clips:
    """Pads features of unequal length into one tensor."""
    frames = torch.tensor([len(feature) for feature in features])
    log_mel = torch.full(
        (len(ids), MAX_CLIP_FRAMES, features[0].shape[1]),
        math.log(POWER_FLOOR),
        dtype=torch.float16,
    )
    for row, feature in enumerate(features):
        log_mel[row, : len(feature)] = feature
    return Clips(ids, log_mel, frames, torch.from_numpy(np.stack(targets)), own_labels, own_class)


def join(a: Clips, b: Clips) -> Clips:
    """`a` followed by `b`."""
    return Clips(
        a.ids + b.ids,
        torch.cat([a.log_mel, b.log_mel]),
        torch.cat([a.frames, b.frames]),
        torch.cat([a.targets, b.targets]),
        a.own_labels + b.own_labels,
        a.own_class + b.own_class,
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
            low, start = (
                int(random.integers(0, bins - width)),
                int(random.integers(0, length - span)),
            )
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
        kept = (
            torch.multinomial(chance, int(keep * chance.shape[1])) + 2
        )  # class, distillation first
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
