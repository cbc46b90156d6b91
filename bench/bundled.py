"""How much faster the bundled student is than one of Distil-AST's size, side by side.

    python bench/bundled.py

Both score the same clips of 10 s, from waveform to scores, in turn, five rounds, on the CPU
in float32. The large one has random weights, which cost as much as trained ones. Prints JSON.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time

import numpy as np
import torch
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

from student import Student
from student.labels import audioset_labels
from training.bundled import score

ROUNDS, CLIP_S, SAMPLE_RATE = 5, 10.0, 16_000


def main() -> None:
    """Times both and prints the ratio of the medians."""
    random = np.random.default_rng(0)
    clip = random.normal(0, 0.1, int(CLIP_S * SAMPLE_RATE)).astype(np.float32)
    students = {"bundled": Student.load("bundled", device="cpu"), "Distil-AST's size": large()}
    seconds: dict[str, list[float]] = {name: [] for name in students}
    for number in range(ROUNDS + 1):
        for name, student in students.items():
            clips = 20 if name == "bundled" else 2
            started = time.perf_counter()
            for _ in range(clips):
                score(student, clip)
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - started) / clips)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    small, big = medians.values()
    print(
        json.dumps(
            {
                "machine": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "parameters": {name: one.parameters for name, one in students.items()},
                "ms_a_clip": {name: round(1_000 * value, 1) for name, value in medians.items()},
                "times_as_fast": round(big / small, 1),
            },
            indent=2,
        )
    )


def large() -> Student:
    """A student of Distil-AST's shape: 6 layers of 768, 1,214 tokens."""
    labels = {label.index: label.name for label in audioset_labels()}
    with tempfile.TemporaryDirectory() as folder:
        config = ASTConfig(num_hidden_layers=6, id2label=labels)
        ASTForAudioClassification(config).save_pretrained(folder)
        ASTFeatureExtractor().save_pretrained(folder)
        return Student.load(folder, device="cpu")


if __name__ == "__main__":
    main()
