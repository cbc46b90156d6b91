"""Which parts of a recipe matter: a small teacher, and students that differ in one thing each.

    python bench/distillation.py --corpus ../shared/corpus --work work/ablation

A 12-layer AST of small width learns from the corpus's stored scores. Students of six of its
layers are distilled from it, running along, on a part of the corpus: which layers they begin
as, which loss they have, and whether their sounds are changed, three seeds each; and with
both presets, for as many epochs. True is what the corpus's tagger gives at least 0.3. Writes
`ablation.json` and prints the tables of docs/distillation.md. About half an hour on a core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from evaluation.evaluate import agreement_of
from training.clips import Split
from training.distill import Request, distill
from training.presets import Consistent, DistilAst, Recipe
from transforms.shards import plan_shards

SHAPE = {
    "hidden_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "patch_size": 16,
    "frequency_stride": 16,
    "time_stride": 16,
    "num_mel_bins": 32,
    "max_length": 256,  # 2.56 s
}
SPLIT = Split(share=0.1, group_by="group", hold_out=("esc10_fold", "4"))

TEACHER = Consistent(
    learning_rate=1e-3, accumulation=1, epochs=30, alpha=0.0, keep_patches=0.7, balance=0.5,
    frequency_mask=0.15, time_mask=0.1, crop_share=0.3, speed=0.15, equaliser_db=3.0,
    weight_decay=0.05, judge_every_epochs=5,
)  # fmt: skip

# The same for all arms, at a rate that suits a small model.
COMMON = {
    "alpha": 0.0,  # nothing but the teacher: the losses weigh a clip's own labels differently
    "learning_rate": 5e-4,
    "accumulation": 1,
    "epochs": 5.0,
    "schedule": "linear",
    "warmup_ratio": 0.1,
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "average_decay": 0.0,
    "judge_every_epochs": 5,
}
LAYERS = {"0 2 4 6 8 10": (0, 2, 4, 6, 8, 10), "0 2 4 6 8 11": (0, 2, 4, 6, 8, 11)}
LOSSES = {
    "softmax KL": {"loss": "softmax-kl", "temperature": 2.0},
    "per-class BCE": {"loss": "sigmoid-bce", "temperature": 1.0},
}
_WITH, _WITHOUT = Consistent(), DistilAst()
_CHANGES = (
    "crop_share", "random_start", "mixup_share", "mixup_beta", "gain_db", "frequency_mask", "time_mask",
)  # fmt: skip
SOUNDS = {
    "as they are": {name: getattr(_WITHOUT, name) for name in _CHANGES},
    "changed": {name: getattr(_WITH, name) for name in _CHANGES},
}
# Against what the tagger says, and against what the teacher says.
SHOWN = ("mAP", "macro_map", "f1", "lwlrap", "top1", "kl")


def main() -> None:
    """Trains the teacher once, then the students that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=2_200, help="of the corpus, for the students")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "ablation.json"
    results = json.loads(file.read_text()) if file.exists() else {}

    def kept(name: str, facts: dict[str, Any]) -> None:
        results[name] = facts
        file.write_text(json.dumps(results, indent=1) + "\n")

    if not (args.work / "teacher" / "model.safetensors").exists():
        run(args, "teacher", TEACHER, None, fresh=SHAPE)
    arms = list(itertools.product(LAYERS, LOSSES, SOUNDS))
    for seed, (layers, loss, sounds) in itertools.product(range(args.seeds), arms):
        name = f"{layers} / {loss} / {sounds} / seed {seed}"
        if name not in results:
            settings = {**COMMON, **LOSSES[loss], **SOUNDS[sounds]}
            recipe = replace(Consistent(**settings), teacher_layers=LAYERS[layers], seed=seed)  # type: ignore[arg-type]
            kept(name, run(args, name.replace(" / ", "_").replace(" ", "-"), recipe, args.clips))
    for preset, seed in itertools.product((DistilAst(), Consistent()), range(args.seeds)):
        kind = "distil-ast" if isinstance(preset, DistilAst) else "consistent"
        # Its own numbers but for the epochs, which are the same for both, and what is judged.
        recipe = replace(preset, epochs=5.0, judge_every_epochs=5, seed=seed)
        name = f"preset {kind} / seed {seed}"
        if name not in results:
            kept(name, run(args, f"preset-{kind}-{seed}", recipe, args.clips))
    print(tables(results, args.seeds))


def run(
    args: argparse.Namespace, folder: str, recipe: Recipe, limit: int | None, fresh: Any = None
) -> dict[str, Any]:
    """Distils once and gives what came of it."""
    scores = str(args.corpus / "teacher_scores.parquet")
    started = time.monotonic()
    done = distill(
        Request(
            output=args.work / folder,
            recipe=recipe,
            preset="distil-ast" if isinstance(recipe, DistilAst) else "consistent",
            shards=plan_shards([str(args.corpus / "*.tar")]).shards,
            data="corpus",
            split=SPLIT,
            teacher=None if fresh else str(args.work / "teacher"),
            teacher_scores=(scores,) if fresh else (),
            fresh=fresh,
            truth=scores,  # what it gives at least 0.3
            cache=args.work / "cache",
            device="cpu",
            limit=limit,
        ),
        say=lambda line: None,
    )
    assert done.teacher is not None  # the clips have labels of their own
    top1, _, _, kl, _ = agreement_of(done.student.scores, done.teacher.scores)
    facts = {
        "student": vars(done.student.card) | vars(done.student.field) | {"top1": top1, "kl": kl},
        "teacher": vars(done.teacher.card) | vars(done.teacher.field) | {"top1": 1.0, "kl": 0.0},
        "train_clips": done.train_clips,
        "validation_clips": done.validation_clips,
        "wall_s": round(time.monotonic() - started, 1),
        "machine": platform.processor() or platform.machine(),
    }
    print(
        folder,
        {name: round(facts["student"][name], 3) for name in SHOWN},
        facts["wall_s"],
        flush=True,
    )
    return facts


def tables(results: dict[str, Any], seeds: int) -> str:
    """The results as Markdown: mean and standard deviation over the seeds."""
    teacher = next(iter(results.values()))["teacher"]
    head = "| begins as | loss | sounds | " + " | ".join(SHOWN) + " |"
    lines = [head, "|---" * (3 + len(SHOWN)) + "|"]
    lines.append("| teacher | | | " + " | ".join(f"{teacher[name]:.3f}" for name in SHOWN) + " |")

    def row(start: str, names: list[str]) -> str:
        cells = []
        for metric in SHOWN:
            values = [results[name]["student"][metric] for name in names]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        return f"| {start} | " + " | ".join(cells) + " |"

    for layers, loss, sounds in itertools.product(LAYERS, LOSSES, SOUNDS):
        names = [f"{layers} / {loss} / {sounds} / seed {seed}" for seed in range(seeds)]
        lines.append(row(f"{layers} | {loss} | {sounds}", names))
    for kind in ("distil-ast", "consistent"):
        names = [f"preset {kind} / seed {seed}" for seed in range(seeds)]
        lines.append(row(f"preset `{kind}` | | ", names))
    return "\n".join(lines) + "\n\n" + effects(results, seeds)


def effects(results: dict[str, Any], seeds: int) -> str:
    """What each change does by itself: the mean of the paired differences, with their deviation."""
    factors = [list(LAYERS), list(LOSSES), list(SOUNDS)]
    lines = ["| from | to | " + " | ".join(SHOWN) + " |", "|---" * (2 + len(SHOWN)) + "|"]
    for place, (before, after) in enumerate(factors):
        others = factors[:place] + factors[place + 1 :]
        cells = []
        for metric in SHOWN:
            differences = []
            for seed, *rest in itertools.product(range(seeds), *others):
                pair = [[*rest[:place], level, *rest[place:]] for level in (before, after)]
                old, new = (
                    results[f"{' / '.join(levels)} / seed {seed}"]["student"][metric]
                    for levels in pair
                )
                differences.append(new - old)
            cells.append(
                f"{statistics.mean(differences):+.3f} ± {statistics.stdev(differences):.3f}"
            )
        lines.append(f"| {before} | {after} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
