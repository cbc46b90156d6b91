"""`earmark demo`: sounds with known labels, annotated, truth beside tags."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import soundfile
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from training.sounds import SAMPLE_RATE, SOUNDS, synthesise
from transforms.write import CLIPS_FOLDER

SHARDS = 2
FORMATS = ("wav", "flac", "mp3")
SEED = 2024  # not that of the bundled student's training: it never heard these


def write_demo_shards(folder: Path) -> list[Path]:
    """Writes WebDataset tars with one instance of each synthetic sound, and one broken clip.

    Each sample is `<name>.<wav|flac|mp3>` and `<name>.json`, whose `truth` lists the
    labels, the most specific one first.
    """
    random = np.random.default_rng(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    shards = [folder / f"demo-{number:05d}.tar" for number in range(SHARDS)]
    with contextlib.ExitStack() as stack:
        tars = [stack.enter_context(tarfile.open(shard, "w")) for shard in shards]
        for number, sound in enumerate(SOUNDS):
            waveform = synthesise(sound, random, random.uniform(3.0, 12.0))
            kind = FORMATS[number % len(FORMATS)]
            audio = io.BytesIO()
            soundfile.write(audio, waveform, SAMPLE_RATE, format=kind)
            tar = tars[number % SHARDS]
            _add(tar, f"{sound.name}.{kind}", audio.getvalue())
            _add(tar, f"{sound.name}.json", json.dumps({"truth": sound.labels}).encode())
        _add(tars[0], "broken-on-purpose.flac", b"fLaC and then nothing that a decoder knows")
    return shards


def show_truth(output: Path, console: Console, tags: int = 3) -> None:
    """Prints what each demo clip is, beside its highest scores."""
    names = pq.read_table(output / "labels.parquet")["name"].to_pylist()
    table = Table(
        "clip", "truth", f"highest {tags} of {len(names)} scores", box=None, header_style="bold"
    )
    right = total = 0
    for file in sorted((output / CLIPS_FOLDER).glob("*.parquet")):
        for row in pq.read_table(
            file, columns=["member", "scores", "metadata", "error"]
        ).to_pylist():
            if row["error"] is not None:
                shown = f"[red]error: {escape(row['error']['type'])}: {escape(row['error']['message'])}[/red]"
                table.add_row(escape(row["member"]), "", shown)
                continue
            truth = json.loads(row["metadata"])["truth"]
            best = np.argsort(-np.array(row["scores"]))[:tags]
            found = [names[index] for index in best]
            total += 1
            right += bool(set(found) & set(truth))
            shown = ", ".join(
                f"[green]{escape(name)}[/green] {row['scores'][index]:.2f}"
                if name in truth
                else f"{escape(name)} {row['scores'][index]:.2f}"
                for name, index in zip(found, best, strict=True)
            )
            table.add_row(escape(row["member"]), escape(", ".join(truth)), shown)
    console.print(table)
    console.print(
        f"A true label is among the highest {tags} in {right} of {total} clips.", highlight=False
    )


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
