"""How fast clips are tagged by earmark and by what one would reach for instead, side by side.

    python bench/peers.py
    python bench/peers.py --device cuda --record

All ways score the same clips of 10 s (16 kHz FLAC in a WebDataset tar, cut from the corpus)
with the same checkpoint of 44,066,831 parameters, in turn, five rounds, in this process:

- earmark: on a CPU `annotate_shard`, which reads, decodes, scores and publishes the Parquet file,
  as `earmark annotate` does on a worker; exact and reduced. On a GPU the command itself over
  `SHARDS_ON_GPU` shards, from the first published file to the last: decoding processes and those
  that share the GPU are what a GPU needs. The start of Python and of Beam is told apart.
- `transformers.pipeline("audio-classification")`, fed with waveforms that were decoded before
  the clock starts, and with encoded clips that earmark's decoder decodes as they are asked for.
- Beam's `RunInference` with `PytorchModelHandlerTensor`, after a `beam.Map` that decodes (with
  earmark's decoder) and runs `ASTFeatureExtractor`. The clock starts with the first clip.
- a loop: soundfile, `ASTFeatureExtractor`, the model in batches of 8.

Peers compute in float32, and on a GPU in float16 too. Models are loaded and warm before the
clock starts; loading is told apart. Scores are compared with those of the first
`transformers.pipeline`. Prints JSON.

The checkpoint, where none is given, is made: AST with six layers and random weights, wide
enough that attention looks at something. The logits are scaled so that a label's have a
deviation of 1.5 over 16 of the clips, the labels are shifted against each other with a deviation
of 1, and all together so that a clip's highest score is 0.3 in the median: as a real tagger's
logits are over the corpus. Most scores are near 0; `reference_scores` says how they lie.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch
import transformers
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor
from numpy.typing import NDArray
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this folder is first in the path, the checkout is not in it
    sys.path.insert(0, str(ROOT))

from bench.command import annotated  # noqa: E402
from bench.record import append_results, machine, table  # noqa: E402
from pipeline.options import DEFAULT_RUNNER, AnnotateOptions  # noqa: E402
from pipeline.run import annotation_of, execute, prepare  # noqa: E402
from student.labels import audioset_labels  # noqa: E402
from student.model import DeviceError, Student, choose_device  # noqa: E402
from transforms.annotate import annotate_shard  # noqa: E402
from transforms.decode import AudioDecoder  # noqa: E402
from transforms.meter import Meter  # noqa: E402
from transforms.progress import ProgressFile  # noqa: E402

SAMPLE_RATE, CLIP_S, BATCH = 16_000, 10, 8
SHARDS_ON_GPU = 64
INITIALIZER_RANGE = 0.04  # queries and keys of about unit variance: attention is not flat
# Of a real tagger's logits over 5,000 sounds: deviation of a label, of the labels' means, and the
# median of a clip's highest score.
LABEL_DEVIATION, LABELS_APART, HIGHEST = 1.5, 1.0, 0.3
FITTED_ON = 16  # clips
NEAR_TIE = 0.01  # labels whose reference scores are no further apart may change places

Waveform = NDArray[np.float32]
Scores = NDArray[np.float32]  # [clips, 527]


@dataclass(frozen=True)
class Material:
    """The clips, in the forms that the ways take."""

    tar: Path
    many: Path  # the tar with each clip as often as earmark has to score it
    times: int
    waveforms: list[Waveform]  # decoded


@dataclass(frozen=True)
class Way:
    """One way to tag clips, its model loaded."""

    name: str
    load_s: float
    tag: Callable[[Material], tuple[float, Scores]]  # seconds a clip, and scores
    in_this_process: bool = True


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a folder; made where none is given")
    parser.add_argument("--corpus", type=Path, default=ROOT.parent / "shared" / "corpus")
    parser.add_argument("--work", type=Path, help="keeps the clips and the checkpoint made")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--clips", type=int, help="default: 8, on a GPU 64")
    parser.add_argument(
        "--times", type=int, help="each clip in a shard of earmark's; default: 1, on a GPU 4"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", help="those whose name begins so; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    args = parser.parse_args(argv)
    on_gpu = choose_device(args.device).type == "cuda"
    clips = args.clips or (64 if on_gpu else 8)
    times = args.times or (4 if on_gpu else 1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Two of AST's 128 mel filters are narrower than a bin of the spectrum, in every one of the ways.
    warnings.filterwarnings("ignore", message="At least one mel filter")

    with contextlib.ExitStack() as stack:
        work = args.work or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="earmark-peers-"))
        )
        outputs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="earmark-tags-")))
        work.mkdir(parents=True, exist_ok=True)
        waveforms = list(itertools.islice(corpus_clips(args.corpus), max(clips, FITTED_ON)))
        if len(waveforms) < clips:
            raise SystemExit(f"{args.corpus} makes {len(waveforms)} clips, fewer than {clips}")
        checkpoint = args.checkpoint or work / f"checkpoint-{args.seed}"
        if not (checkpoint / "config.json").exists():
            make_checkpoint(checkpoint, args.seed, waveforms[:FITTED_ON])
        material = make_material(work, waveforms[:clips], times)
        # A GPU is warm once it has seen a whole round; a CPU after a clip.
        first = material if on_gpu else make_material(work, waveforms[:1], 1)

        skipped: list[str] = []
        ways = []
        for way in all_ways(checkpoint, args.device, on_gpu, outputs, skipped):
            if args.ways is None or way.name.startswith(tuple(args.ways)):
                ways.append(way)
                say(f"{way.name}: loaded in {way.load_s:.1f} s")
                if way.in_this_process:
                    way.tag(first)
        seconds: dict[str, list[float]] = {way.name: [] for way in ways}
        scores: dict[str, Scores] = {}
        for number in range(args.rounds):
            turn = number % len(ways)
            for way in ways[turn:] + ways[:turn]:  # so that none always follows the same one
                one, scores[way.name] = way.tag(material)
                seconds[way.name].append(one)
                say(f"round {number + 1}, {way.name}: {1_000 * one:.1f} ms a clip")
        around_s = None
        if not on_gpu:
            around_s = beside_the_clips(checkpoint, ways, material, args.device, outputs)
        elif _command_beside_s:
            around_s = round(statistics.median(_command_beside_s), 2)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peers = [name for name in medians if not name.startswith("earmark")]
    reference = next((name for name in peers if name.startswith("transformers")), None)
    result = {
        "machine": machine(),
        "transformers": transformers.__version__,
        "beam": beam.__version__,
        "device": args.device,
        "checkpoint": str(args.checkpoint or f"made, seed {args.seed}"),
        "clips": clips,
        "clip_s": CLIP_S,
        "each_clip_for_earmark": times,
        "rounds": args.rounds,
        "skipped": skipped,
        "load_s": {way.name: round(way.load_s, 2) for way in ways},
        "earmark_run_beside_load_and_clips_s": around_s,
        "ms_a_clip": {
            name: {
                "median": round(1_000 * medians[name], 2),
                "all": [round(1_000 * value, 2) for value in values],
            }
            for name, values in seconds.items()
        },
        "times_as_fast": {
            name: {peer: round(medians[peer] / medians[name], 2) for peer in peers}
            for name in medians
            if name not in peers
        },
        "scores_beside": reference,
        "reference_scores": spread_of(scores[reference]) if reference else None,
        "scores": {name: compared(scores[name], scores[reference]) for name in scores if reference},
    }
    print(json.dumps(result, indent=1))
    if args.record:
        append_results(f"`peers.py` on {args.device}", result["machine"], markdown(result))


# ------------------------------------------------------------- clips and checkpoint


def corpus_clips(corpus: Path) -> Iterator[Waveform]:
    """Clips of 10 s, cut from the corpus's sounds put one behind the other."""
    tars = sorted(corpus.glob("*.tar"))
    if not tars:
        raise SystemExit(f"{corpus} holds no tars: --corpus names a folder of WebDataset shards")
    samples, pieces, held = CLIP_S * SAMPLE_RATE, [], 0
    for name, content in itertools.chain.from_iterable(map(members, tars)):
        if not name.endswith(".ogg"):
            continue
        pieces.append(decoded(content))
        held += len(pieces[-1])
        while held >= samples:
            whole = np.concatenate(pieces)
            yield whole[:samples]
            pieces, held = [whole[samples:]], held - samples


def members(tar: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file of a tar."""
    with tarfile.open(tar) as opened:
        for info in opened:
            if (file := opened.extractfile(info)) is not None:
                yield info.name, file.read()


def decoded(content: bytes) -> Waveform:
    """A clip as earmark decodes it."""
    return np.concatenate(list(AudioDecoder(io.BytesIO(content)).mono(SAMPLE_RATE)))


def make_material(work: Path, waveforms: Sequence[Waveform], times: int) -> Material:
    """Writes the tars."""
    encoded = []
    for waveform in waveforms:
        audio = io.BytesIO()
        soundfile.write(audio, waveform, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        encoded.append(audio.getvalue())

    def write(tar: Path, often: int) -> Path:
        with tarfile.open(tar, "w") as opened:
            for number, (clip, content) in itertools.product(range(often), enumerate(encoded)):
                info = tarfile.TarInfo(f"{number:03d}-{clip:05d}.flac")
                info.size = len(content)
                opened.addfile(info, io.BytesIO(content))
        return tar

    tar = write(work / f"clips-{len(waveforms)}.tar", 1)
    many = tar if times == 1 else write(work / f"clips-{len(waveforms)}-times-{times}.tar", times)
    return Material(tar, many, times, [decoded(content) for content in encoded])


def make_checkpoint(folder: Path, seed: int, fitted_on: Sequence[Waveform] = ()) -> None:
    """Saves an AST of Distil-AST's shape, 44,066,831 random parameters.

    Args:
        folder: where.
        seed: of the weights.
        fitted_on: clips over which the logits are made to lie as a real tagger's; with none,
            they stay as they fall.
    """
    torch.manual_seed(seed)
    config = ASTConfig(
        num_hidden_layers=6,
        initializer_range=INITIALIZER_RANGE,
        id2label={label.index: label.name for label in audioset_labels()},
    )
    model = ASTForAudioClassification(config).eval()
    extractor = ASTFeatureExtractor()
    if len(fitted_on) > 1:
        with torch.no_grad():
            inputs = [
                extractor(waveform, sampling_rate=SAMPLE_RATE, return_tensors="pt")
                for waveform in fitted_on
            ]
            logits = torch.cat([model(**one).logits for one in inputs])
            centre, scale = logits.mean(0), LABEL_DEVIATION / logits.std(0).mean()
            offsets = LABELS_APART * torch.randn(config.num_labels)
            fitted = scale * (logits - centre) + offsets
            offsets += math.log(HIGHEST / (1 - HIGHEST)) - fitted.max(1).values.median()
            head = model.classifier.dense
            head.weight *= scale
            head.bias.copy_(scale * (head.bias - centre) + offsets)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)


# -------------------------------------------------------------------------- the ways


def all_ways(
    checkpoint: Path, device: str, on_gpu: bool, outputs: Path, skipped: list[str]
) -> Iterator[Way]:
    for dtype in ["bfloat16"] if on_gpu else ["float32", "reduced"]:
        try:
            if on_gpu:
                yield earmark_command(checkpoint, device, dtype, outputs)
                continue
            yield earmark(checkpoint, device, dtype, outputs)
        except DeviceError as error:
            skipped.append(f"earmark {dtype}: {error}")
            say(f"skipped: {skipped[-1]}")
    for dtype in [torch.float32, torch.float16] if on_gpu else [torch.float32]:
        yield from pipelines(checkpoint, device, dtype)
        yield run_inference(checkpoint, device, dtype, outputs)
        yield loop(checkpoint, device, dtype)


def earmark(checkpoint: Path, device: str, dtype: str, outputs: Path) -> Way:
    started = time.perf_counter()
    student = Student.load(str(checkpoint), device, dtype)
    load_s = time.perf_counter() - started
    runs = itertools.count()

    def tag(material: Material) -> tuple[float, Scores]:
        output = outputs / f"{dtype}-{next(runs)}"
        job = prepare(options_of(checkpoint, material, output, device, dtype))
        annotation = annotation_of(job, None)
        started = time.perf_counter()
        for shard in job.todo:
            annotate_shard(shard, student, annotation, job.output, ProgressFile(None), Meter())
        seconds = time.perf_counter() - started
        clips = len(material.waveforms)
        rows = pq.read_table(output / "clips", columns=["member", "scores"]).to_pylist()
        rows.sort(key=lambda row: row["member"])
        scores = np.array([row["scores"] for row in rows], np.float32)
        for again in range(1, material.times):  # the other times are no other clips
            np.testing.assert_allclose(scores[again * clips :][:clips], scores[:clips], atol=0.01)
        return seconds / len(rows), scores[:clips]

    return Way(f"earmark {dtype}", load_s, tag)


_command_beside_s: list[float] = []  # of each run, what was not between the files


def earmark_command(checkpoint: Path, device: str, dtype: str, outputs: Path) -> Way:
    runs = itertools.count()

    def tag(material: Material) -> tuple[float, Scores]:
        shards, output = outputs / "shards", outputs / f"{dtype}-{next(runs)}"
        if not shards.exists():
            shards.mkdir()
            for number in range(SHARDS_ON_GPU):
                shutil.copy(material.many, shards / f"clips-{number:04d}.tar")
        run = annotated(shards, output, checkpoint, device, dtype=dtype)
        _command_beside_s.append(run["process_s"] - run["clips"] / run["clips_s"])
        file = min((output / "clips").glob("*.parquet"))
        rows = pq.read_table(file, columns=["member", "scores"]).to_pylist()
        rows.sort(key=lambda row: row["member"])
        scores = np.array([row["scores"] for row in rows], np.float32)
        return 1 / run["clips_s"], scores[: len(material.waveforms)]

    return Way(f"earmark {dtype}", 0.0, tag, in_this_process=False)


def options_of(
    checkpoint: Path, material: Material, output: Path, device: str, dtype: str
) -> AnnotateOptions:
    return AnnotateOptions(
        inputs=(str(material.many),),
        output=str(output),
        checkpoint=str(checkpoint),
        device=device,
        dtype=dtype,
    )


def beside_the_clips(
    checkpoint: Path, ways: Sequence[Way], material: Material, device: str, outputs: Path
) -> float | None:
    """Seconds of a run, by `pipeline.run`, that are neither loading nor a shard's: Beam, planning."""
    ours = [way.name for way in ways if way.name.startswith("earmark")]
    if not ours:
        return None
    options = options_of(
        checkpoint, material, outputs / "whole", device, ours[0].removeprefix("earmark ")
    )
    started = time.perf_counter()
    execute(
        prepare(options), lambda job, folder: contextlib.nullcontext(), lambda job, places: None
    )
    whole_s = time.perf_counter() - started
    metrics = json.loads((outputs / "whole" / "summary.json").read_text())["metrics"]
    parts_ms = metrics["load_model_latency_milli_secs"]["sum"] + metrics["shard_msec"]["sum"]
    return round(whole_s - parts_ms / 1_000, 2)


def pipelines(checkpoint: Path, device: str, dtype: torch.dtype) -> Iterator[Way]:
    started = time.perf_counter()
    classifier = transformers.pipeline(
        "audio-classification", model=str(checkpoint), device=device, dtype=dtype
    )
    load_s = time.perf_counter() - started
    index = {name: number for number, name in classifier.model.config.id2label.items()}

    def way(name: str, batch_size: int, clips: Callable[[Material], Any]) -> Way:
        def tag(material: Material) -> tuple[float, Scores]:
            started = time.perf_counter()
            given = list(
                classifier(
                    clips(material),
                    batch_size=batch_size,
                    top_k=None,
                    function_to_apply="sigmoid",
                )
            )
            seconds = time.perf_counter() - started
            scores = np.empty((len(given), len(index)), np.float32)
            for row, labels in enumerate(given):
                for label in labels:
                    scores[row, index[label["label"]]] = label["score"]
            return seconds / len(given), scores

        return Way(f"transformers.pipeline {dtype_name(dtype)}, {name}", load_s, tag)

    for batch_size in (1, BATCH):
        yield way(f"batch {batch_size}, waveforms", batch_size, lambda m: list(m.waveforms))
        yield way(
            f"batch {batch_size}, encoded",
            batch_size,
            lambda m: (decoded(content) for _, content in members(m.tar)),
        )


def loop(checkpoint: Path, device: str, dtype: torch.dtype) -> Way:
    started = time.perf_counter()
    model = ASTForAudioClassification.from_pretrained(checkpoint, dtype=dtype).eval().to(device)
    extractor = ASTFeatureExtractor.from_pretrained(checkpoint)
    load_s = time.perf_counter() - started

    @torch.inference_mode()
    def tag(material: Material) -> tuple[float, Scores]:
        started = time.perf_counter()
        clips = members(material.tar)
        scores = []
        while batch := [content for _, content in itertools.islice(clips, BATCH)]:
            waves = [soundfile.read(io.BytesIO(one), dtype="float32")[0] for one in batch]
            inputs = extractor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt")
            logits = model(inputs["input_values"].to(device, dtype)).logits
            scores.append(logits.float().sigmoid().cpu().numpy())
        seconds = time.perf_counter() - started
        found = np.concatenate(scores)
        return seconds / len(found), found

    return Way(f"loop {dtype_name(dtype)}, batch {BATCH}", load_s, tag)


# Beam's steps are pickled, and find here what this process has loaded: `main` is called in the
# imported module, so that they are pickled by name.
_loaded: dict[str, Any] = {}
_started_at: list[float] = []
_results: dict[str, Scores] = {}


class LoadedHandler(PytorchModelHandlerTensor):
    """The handler as it is, with a model that is loaded before the clock starts."""

    def load_model(self) -> torch.nn.Module:
        name = f"{self._state_dict_path}"
        if name not in _loaded:
            _loaded[name] = super().load_model()
            if name.endswith("float16.pt"):
                _loaded[name].half()
        return _loaded[name]


def run_inference(checkpoint: Path, device: str, dtype: torch.dtype, outputs: Path) -> Way:
    state = outputs / f"{dtype_name(dtype)}.pt"
    model = ASTForAudioClassification.from_pretrained(checkpoint)
    torch.save(model.state_dict(), state)
    started = time.perf_counter()
    handler = LoadedHandler(
        state_dict_path=str(state),
        model_class=ASTForAudioClassification,
        model_params={"config": model.config},
        device="GPU" if device.startswith("cuda") else "CPU",
    )
    handler.load_model()
    _loaded["extractor"] = ASTFeatureExtractor.from_pretrained(checkpoint)
    load_s = time.perf_counter() - started

    def tag(material: Material) -> tuple[float, Scores]:
        _started_at.clear()
        _results.clear()
        with beam.Pipeline(runner=DEFAULT_RUNNER) as root:
            _ = (
                root
                | beam.Create([str(material.tar)])
                | "Read" >> beam.FlatMap(_members)
                | "Decode" >> beam.Map(_keyed_features, dtype_name(dtype))
                | RunInference(KeyedModelHandler(handler))
                | "Keep" >> beam.Map(_keep)
            )
        seconds = _results.pop("until") - _started_at[0]
        scores = np.stack([_results[name] for name in sorted(_results)])
        return seconds / len(scores), scores

    return Way(f"RunInference {dtype_name(dtype)}", load_s, tag)


def _members(tar: str) -> Iterator[tuple[str, bytes]]:
    _started_at.append(time.perf_counter())
    yield from members(Path(tar))


def _keyed_features(clip: tuple[str, bytes], dtype: str) -> tuple[str, torch.Tensor]:
    name, content = clip
    inputs = _loaded["extractor"](decoded(content), sampling_rate=SAMPLE_RATE, return_tensors="pt")
    return name, inputs["input_values"][0].to(getattr(torch, dtype))


def _keep(keyed: tuple[str, Any]) -> None:
    name, result = keyed
    _results[name] = result.inference["logits"].float().sigmoid().cpu().numpy()
    _results["until"] = time.perf_counter()


# ---------------------------------------------------------------------- comparison


def compared(scores: Scores, reference: Scores) -> dict[str, Any]:
    """How far scores are from the reference's, and in how many clips the top 5 differ.

    A top 5 differs beyond near-ties where a label that left it has a reference score of more
    than `NEAR_TIE` above that of a label that came in.
    """
    difference = np.abs(scores.astype(np.float64) - reference)
    sets = beyond = 0
    for ours, theirs in zip(scores, reference, strict=True):
        top, expected = (set(np.argsort(-one, kind="stable")[:5]) for one in (ours, theirs))
        left, came = list(expected - top), list(top - expected)
        sets += bool(left)
        beyond += bool(left) and theirs[left].max() - theirs[came].min() > NEAR_TIE
    return {
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "clips_with_another_top_5": sets,
        "of_these_beyond_near_ties": int(beyond),
    }


def spread_of(scores: Scores) -> dict[str, float]:
    """What the scores are like: most near 0, a few far from it."""
    return {
        "median": round(float(np.median(scores)), 5),
        "share_below_0.05": round(float((scores < 0.05).mean()), 4),
        "highest_of_a_clip_median": round(float(np.median(scores.max(1))), 3),
        "deviation_of_a_label_over_clips": round(float(scores.std(0).mean()), 4),
    }


def markdown(result: dict[str, Any]) -> list[str]:
    ours = list(result["times_as_fast"])
    rows = []
    for name, times in result["ms_a_clip"].items():
        ratios = [result["times_as_fast"][one].get(name, "") for one in ours]
        score = result["scores"].get(name)
        told = ["", "", ""]
        if score:
            told = [
                f"{score['largest_difference']:.1e}",
                f"{score['mean_difference']:.1e}",
                f"{score['clips_with_another_top_5']}, {score['of_these_beyond_near_ties']}",
            ]
        spread = f"{min(times['all']):.1f} to {max(times['all']):.1f}"
        rows.append([f"{name}", times["median"], spread, *ratios, result["load_s"][name], *told])
    head = ["way", "ms a clip, median", "all rounds", *(f"{one}: times as fast" for one in ours)]
    head += ["load, s", "largest difference", "mean difference", "another top 5, beyond near-ties"]
    about = (
        f"{result['clips']} clips of {result['clip_s']} s, {result['rounds']} rounds in turn; checkpoint: "
        f"{result['checkpoint']}; earmark scores each clip {result['each_clip_for_earmark']} times; "
        f"transformers {result['transformers']}, Beam {result['beam']}. A run of earmark takes "
        f"{result['earmark_run_beside_load_and_clips_s']} s beside loading and clips. Differences are to "
        f"the scores of {result['scores_beside']}."
    )
    if spread := result["reference_scores"]:
        about += (
            f" Of those {100 * spread['share_below_0.05']:.1f} % are below 0.05, the median is "
            f"{spread['median']}, and the highest of a clip {spread['highest_of_a_clip_median']}."
        )
    return [about, *(f"Skipped: {line}." for line in result["skipped"]), "", *table(head, rows)]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    from bench.peers import main as main_of_the_module

    main_of_the_module()
