"""Writes the bundled student's model card and attributions from facts, not from memory.

    python -m training.card --corpus ../shared/corpus --checkpoint student/bundled

The numbers are those of `metrics.json`, which the training measured; authors and
licences are those that the corpus states per clip.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from training.corpus import corpus_facts
from training.sounds import SOUNDS


def main(argv: list[str] | None = None) -> None:
    """Writes README.md and ATTRIBUTION.md into the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    args = parser.parse_args(argv)
    write_card(args.checkpoint, args.corpus)


def write_card(checkpoint: Path, corpus: Path) -> None:
    """Writes the card and the attributions of what a checkpoint was trained on."""
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    size = (checkpoint / "model.safetensors").stat().st_size
    (checkpoint / "README.md").write_text(card(metrics, size), "utf-8")
    (checkpoint / "ATTRIBUTION.md").write_text(attributions(corpus_facts(corpus)), "utf-8")


def card(metrics: dict[str, Any], size_bytes: int) -> str:
    """The model card."""

    def percent(name: str) -> str:
        return f"{100 * metrics[name]:.1f} %"

    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: audio-classification
tags: [audio, audioset, distillation]
---

# Earmark's bundled demonstration student

A small Audio Spectrogram Transformer with AudioSet's 527 labels, so that Earmark runs
with no network. **It is a demonstration, not a good tagger**: it learned from a few
hours of audio and the scores of a small teacher. For real work use
`bookbot/distil-ast-audioset`.

| | |
|---|---|
| architecture | `ASTForAudioClassification`: {metrics["parameters"]:,} parameters, 6 layers, 192 wide, 3 heads, 16 x 16 patches without overlap |
| input | 16 kHz mono, 5.12 s at once, 64 mel bins |
| weights | float16, {size_bytes / 1e6:.1f} MB |
| licence | Apache-2.0 |

## How good it is

Measured on clips that it never saw, with the stored weights. Clips of one source
recording are all on one side of the split.

| on | measure | value |
|---|---|---|
| {metrics["esc10_clips"]} clips of ESC-10, fold 4 | one of the clip's own labels among the 5 highest of 527 | {percent("esc10_own_label_in_top5")} |
| the same | right class of ten | {percent("esc10_right_class_of_ten")} |
| {metrics["held_out_clips"]} held-out clips | the teacher's first label among the 5 highest | {percent("teacher_top1_in_top5")} |
| those whose first label the teacher gives more than 0.5 | the same | {percent("teacher_top1_in_top5_where_above_0.5")} |
| {metrics["teacher_labels"]} labels with 3 or more held-out clips | mean average precision against the teacher's scores above 0.3 | {metrics["teacher_mean_average_precision"]:.3f} |
| {metrics["synthetic_clips"]} new synthetic sounds | the sound's own label among the 3 highest | {percent("synthetic_own_label_in_top3")} |

None of these is comparable with published AudioSet results. The teacher itself has
one of the clip's own labels in its top 5 for 86.0 % of ESC-10.

## What it was trained on

- {metrics["corpus_clips"]:,} clips of openly licensed sounds (CC0, CC BY, public domain, BSD, MIT,
  Apache-2.0), cut, mixed to mono, resampled to 16 kHz: modified from their sources.
  `ATTRIBUTION.md` names authors and licences. Nothing share-alike was used.
- Their scores by EfficientAT `mn04_as` (0.98 M parameters, MIT licence, published
  AudioSet mAP 0.432), as soft targets; for the training folds of ESC-10 also its own
  class labels.
- {metrics["synthetic_train_clips"]:,} sounds of {len(SOUNDS)} kinds made from arithmetic (`training/sounds.py`), labels
  known by construction.

Music dominates the corpus, in particular single instrument notes; speech is thin.
Most of the 527 labels had few or no examples, and their scores mean little. No
thresholds are stated: 0.2 is the default, not a calibration.

## How it was trained

`python -m training.bundled --corpus CORPUS --output student/bundled`, seed {metrics["seed"]}:
{metrics["steps"]:,} steps of {metrics["batch"]} clips on two CPU cores (a cosine schedule towards 0 at {metrics["schedule_steps"]:,}),
AdamW, weight averaging, binary cross-entropy to the targets; random crops, mixtures of two clips,
gain, equalisation and masks; {100 * (1 - metrics["keep_patches"]):.0f} % of the patches dropped at each step.
"""


def attributions(facts: list[dict[str, Any]]) -> str:
    """Authors by repository and licence."""
    authors: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for clip in facts:
        author = clip.get("author") or "not named"
        if author.startswith("["):  # a link inside its repository
            author = "others, listed in the repository"
        authors[clip["repo"]][clip["licence"]].add(author)
    lines = [
        "# Whose sounds the bundled student learned from",
        "",
        "All clips were cut, mixed to mono and resampled: modified from their sources.",
        "Repositories are on GitHub.",
    ]
    for repo in sorted(authors):
        lines += ["", f"## {repo}", ""]
        for licence in sorted(authors[repo]):
            lines.append(f"- {licence}: {'; '.join(sorted(authors[repo][licence]))}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
