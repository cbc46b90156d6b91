"""How close the student comes to what the machine can do.

    python bench/roofline.py
    python bench/roofline.py --device cuda --record

Measured in turn, five rounds, medians:

- the rate of matrix products of the model's own shapes (on a CPU the tokens of one clip, on a
  GPU those of a batch, times 768 x 768, 768 x 2,304, 768 x 3,072 and 3,072 x 768): float32,
  bfloat16, float16 on a GPU, and int8; by `F.linear`, and on a CPU with weights packed by
  oneDNN. The rate of a dtype is that of one layer's products, each done in the best way.
- the rate of memory: a large copy, bytes read and written.
- the student: features, one layer, its MLP, the model alone, and the whole, waveform to scores.
  Attention is the layer without its MLP; norms and sums are counted to it.

The operations of a clip are counted from the checkpoint's config, two a multiplication with its
addition: those of the network as it is written, and those that the scores need. Only two tokens
of the last layer are looked at, so there the others need keys and values and nothing else. A
student that leaves the rest away can pass 100 % of the first count; the second is the honest
one. Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import ASTConfig

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this folder is first in the path, the checkout is not in it
    sys.path.insert(0, str(ROOT))

from bench.record import append_results, machine, table  # noqa: E402
from student.engine import Engine, choose_kernel  # noqa: E402
from student.feature_spec import FRAME_SAMPLES, HOP_SAMPLES  # noqa: E402
from student.features import FFT_SAMPLES  # noqa: E402
from student.model import (  # noqa: E402
    DeviceError,
    Student,
    choose_device,
    load_model,
    load_network,
)
from student.openvino import compile_network  # noqa: E402

CLIP_S = 10
POOLED_TOKENS = 2  # the class token and the distillation token
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Call = Callable[[], Any]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a folder; made where none is given")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtypes", nargs="+", help="of the student; default: all that there are")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure-s", type=float, default=0.3, help="of one thing, in a round")
    parser.add_argument("--gpu-clips", type=int, default=64, help="whose tokens a GPU multiplies")
    parser.add_argument("--copy-mb", type=int, default=1_024, help="that memory's rate is taken of")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    on_gpu = device.type == "cuda"

    with contextlib.ExitStack() as stack:
        checkpoint = args.checkpoint
        if checkpoint is None:
            from bench.peers import make_checkpoint

            checkpoint = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            make_checkpoint(checkpoint, seed=0)
        config = ASTConfig.from_pretrained(checkpoint)
        calls: dict[str, Call] = {}
        tokens = tokens_of(config) * (args.gpu_clips if on_gpu else 1)
        calls |= {
            f"gemm {dtype} {inner}x{outer} {way}": call
            for inner, outer in shapes_of(config)
            for dtype, way, call in products(tokens, inner, outer, device)
        }
        source = torch.ones(args.copy_mb << 18, device=device)
        target = torch.empty_like(source)
        calls["copy"] = lambda: target.copy_(source)

        students: dict[str, Student] = {}
        skipped = []
        for dtype in args.dtypes or (
            ["bfloat16", "float16"] if on_gpu else ["float32", "bfloat16", "reduced"]
        ):
            try:
                students[dtype] = Student.load(str(checkpoint), args.device, dtype)
            except DeviceError as error:
                skipped.append(f"student in {dtype}: {error}")
                print(f"skipped: {skipped[-1]}", file=sys.stderr)
                continue
            for part, call in parts_of(students[dtype], config).items():
                calls[f"student {dtype} {part}"] = call
        with torch.inference_mode():
            seconds = measured(calls, args.rounds, args.measure_s, on_gpu)

    rates, products_found = rates_of(config, tokens, seconds)
    memory = 2 * 4 * source.numel() / seconds["copy"] / 1e9
    written, needed = flops_of(config), flops_of(config, last_queries=POOLED_TOKENS)
    result = {
        "machine": machine(),
        "device": args.device,
        "checkpoint": str(args.checkpoint or "made"),
        "rounds": args.rounds,
        "skipped": skipped,
        "gemm_rows": tokens,
        "gemm_gflop_s": {dtype: round(rate, 1) for dtype, rate in rates.items()},
        "gemm_by_shape": products_found,
        "memory_gb_s": round(memory, 2),
        "gflop_a_clip": {
            "as_written": {name: round(value / 1e9, 3) for name, value in written.items()},
            "needed": {name: round(value / 1e9, 3) for name, value in needed.items()},
            "as_written_in_all": round(sum(written.values()) / 1e9, 2),
            "needed_in_all": round(sum(needed.values()) / 1e9, 2),
        },
        "student": {
            name: student_facts(name, student, config, seconds, rates, memory)
            for name, student in students.items()
        },
    }
    print(json.dumps(result, indent=1))
    if args.record:
        title = f"`roofline.py` on {args.device}"
        append_results(title, result["machine"], markdown(result))


# ------------------------------------------------------------------ what there is to do


def tokens_of(config: ASTConfig) -> int:
    """Patches of a spectrogram, and the two tokens before them: 1,214."""
    across = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    along = (config.max_length - config.patch_size) // config.time_stride + 1
    return across * along + 2


def flops_of(config: ASTConfig, last_queries: int | None = None) -> dict[str, int]:
    """Floating-point operations of the matrix products of one clip, by part.

    Args:
        config: of the model.
        last_queries: tokens of the last layer whose result is looked at; None: all.
    """
    tokens, width, inner = tokens_of(config), config.hidden_size, config.intermediate_size
    parts = {
        "patches": 2 * (tokens - 2) * config.patch_size**2 * width,
        "projections": 0,
        "attention": 0,
        "mlp": 0,
        "head": 2 * width * config.num_labels,
    }
    for layer in range(config.num_hidden_layers):
        is_last = layer == config.num_hidden_layers - 1
        queries = last_queries if is_last and last_queries is not None else tokens
        parts["projections"] += 2 * width * width * (2 * tokens + 2 * queries)
        parts["attention"] += 2 * 2 * queries * tokens * width
        parts["mlp"] += 2 * 2 * queries * width * inner
    return parts


def feature_flops(samples: int, num_mel_bins: int) -> int:
    """Of a real FFT of 2.5 n log2 n, its power, the mel filters, and six passes over each frame."""
    frames = 1 + (samples - FRAME_SAMPLES) // HOP_SAMPLES
    bins = FFT_SAMPLES // 2 + 1
    fft = round(2.5 * FFT_SAMPLES * math.log2(FFT_SAMPLES))
    return frames * (fft + 3 * bins + 2 * bins * num_mel_bins + 6 * FRAME_SAMPLES)


# ------------------------------------------------------------------- the machine's rates


def shapes_of(config: ASTConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's products; the second is query, key and value in one."""
    width, inner = config.hidden_size, config.intermediate_size
    return [(width, width), (width, 3 * width), (width, inner), (inner, width)]


def products(
    rows: int, inputs: int, outputs: int, device: torch.device
) -> Iterator[tuple[str, str, Call]]:
    """(dtype, way, call) of each way that torch has here to multiply [rows, inputs] by weights."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn((rows, inputs), generator=random)
    weight, bias = torch.randn((outputs, inputs), generator=random), torch.zeros(outputs)
    on_gpu = device.type == "cuda"
    for name, dtype in DTYPES.items():
        if dtype is torch.float16 and not on_gpu:
            continue
        a, w, b = (tensor.to(device, dtype) for tensor in (x, weight, bias))
        yield name, "F.linear", lambda a=a, w=w, b=b: F.linear(a, w, b)
        if not on_gpu and has_onednn(dtype):
            packed = torch.ops.mkldnn._reorder_linear_weight(w, rows)
            multiply = torch.ops.mkldnn._linear_pointwise
            yield (
                name,
                "packed",
                lambda a=a, p=packed, b=b, m=multiply: m(a, p, b, "none", [], ""),
            )
    whole = torch.randint(-127, 128, (outputs, inputs), generator=random, dtype=torch.int8)
    if on_gpu:
        a = torch.randint(-127, 128, (rows, inputs), generator=random, dtype=torch.int8)
        a, w = a.to(device), whole.to(device).t()
        yield "int8", "_int_mm", lambda: torch._int_mm(a, w)
    elif has_onednn(torch.int8):
        a = torch.randint(0, 256, (rows, inputs), generator=random, dtype=torch.uint8)
        packed = torch.ops.onednn.qlinear_prepack(whole, [rows, inputs])
        scales, zeros = torch.full((outputs,), 0.01), torch.zeros(outputs, dtype=torch.int64)
        yield (
            "int8",
            "packed, float32 out",
            lambda: torch.ops.onednn.qlinear_pointwise(
                a, 0.01, 128, packed, scales, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
            ),
        )


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this torch multiplies by packed weights of `dtype` on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.int8:
        return hasattr(torch.ops.onednn, "qlinear_prepack")
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def measured(
    calls: dict[str, Call], rounds: int, measure_s: float, on_gpu: bool
) -> dict[str, float]:
    """Median over the rounds of the seconds of each call; all have a turn in every round."""
    wait: Call = torch.cuda.synchronize if on_gpu else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            if not number:  # warms up; a GPU's student makes its graph of the third batch
                for _ in range(4 if on_gpu else 1):
                    call()
                continue
            wait()
            done, started = 0, time.perf_counter()
            while not done or time.perf_counter() - started < measure_s:
                for _ in range(max(1, done)):  # twice as many each time: a GPU is not waited for
                    call()
                done += max(1, done)
                wait()
            seconds[name].append((time.perf_counter() - started) / done)
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in seconds.items()}


def rates_of(
    config: ASTConfig, rows: int, seconds: dict[str, float]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(GFLOP/s of a layer's products by dtype, GFLOP/s of each product by shape and way)."""
    by_shape: dict[str, dict[str, float]] = {}
    best: dict[tuple[str, str], float] = {}
    for name, value in seconds.items():
        if not name.startswith("gemm "):
            continue
        _, dtype, shape, way = name.split(" ", 3)
        inner, outer = map(int, shape.split("x"))
        rate = 2 * rows * inner * outer / value / 1e9
        by_shape.setdefault(f"{dtype}, {way}", {})[shape] = round(rate, 1)
        best[dtype, shape] = min(value, best.get((dtype, shape), math.inf))
    square, three, up, down = (f"{inner}x{outer}" for inner, outer in shapes_of(config))
    width, inner = config.hidden_size, config.intermediate_size
    flops = 2 * rows * width * (4 * width + 2 * inner)
    rates = {}
    for dtype in {dtype: None for dtype, _ in best}:
        layer_s = min(3 * best[dtype, square], best[dtype, three]) + sum(
            best[dtype, shape] for shape in (square, up, down)
        )
        rates[dtype] = flops / layer_s / 1e9
    return rates, by_shape


# ----------------------------------------------------------------------------- the student


def parts_of(student: Student, config: ASTConfig) -> dict[str, Call]:
    """What is timed of a student, and of what it is made of: calls of `clips_at_once` clips."""
    clips, random = clips_at_once(student), np.random.default_rng(0)
    samples = CLIP_S * student.features.sample_rate
    waves = random.normal(0, 0.1, (clips, samples)).astype(np.float32)
    on_device = torch.from_numpy(waves).to(student.device)
    lengths = torch.full((clips,), samples, device=student.device)
    log_mel = student._log_mel
    # OpenVINO gives no times of its parts: there they are those of torch with oneDNN.
    with_openvino = student.kernel == "openvino"
    kernel = choose_kernel(student.device, student.dtype, has_openvino=False)
    engine = Engine(load_model(student.checkpoint), student.device, student.dtype, kernel)
    network = load_network(student.checkpoint)
    model = compile_network(network, student.features) if with_openvino else engine
    features = log_mel(on_device, lengths)
    first = engine._layers[0]
    hidden = torch.randn((clips, tokens_of(config), config.hidden_size), device=student.device)
    inside = hidden.to(engine._dtype)
    many = np.tile(waves, (student.under_way * 2, 1)) if student.under_way > 1 else waves
    return {
        "features": lambda: log_mel(on_device, lengths),
        "layer": lambda: engine._one_layer(first, hidden, inside),
        "mlp": lambda: first.narrow(first.widen(inside)),
        "model": lambda: model(features),
        "whole": lambda: student.score(many),
    }


def clips_at_once(student: Student) -> int:
    """A full batch on a GPU; a CPU takes one at a time."""
    return student.max_batch if student.device.type == "cuda" else 1


def student_facts(
    name: str,
    student: Student,
    config: ASTConfig,
    seconds: dict[str, float],
    rates: dict[str, float],
    memory: float,
) -> dict[str, Any]:
    """Milliseconds a clip, GFLOP/s, and the share of the machine's rate of each part."""
    clips = clips_at_once(student)
    dtype = str(student.dtype).removeprefix("torch.")
    layers, samples = config.num_hidden_layers, CLIP_S * student.features.sample_rate
    written, needed = flops_of(config), flops_of(config, last_queries=POOLED_TOKENS)
    features = feature_flops(samples, student.features.num_mel_bins)
    a_layer = {
        "attention": (written["projections"] + written["attention"]) // layers,
        "mlp": written["mlp"] // layers,
    }
    counts = {
        "features": {"as_written": features},
        **{part: {"as_written": count} for part, count in a_layer.items()},
        "model": {"as_written": sum(written.values()), "needed": sum(needed.values())},
        "whole": {
            "as_written": features + sum(written.values()),
            "needed": features + sum(needed.values()),
        },
    }
    facts: dict[str, Any] = {
        "computes_in": dtype,
        "kernel": student.kernel,
        "clips_at_once": clips,
    }
    took = {
        part: seconds[f"student {name} {part}"] / clips
        for part in ("features", "layer", "mlp", "model", "whole")
    }
    if student.under_way > 1:  # batches that overlap are scored in one call
        took["whole"] /= 2 * student.under_way
    took["attention"] = took["layer"] - took["mlp"]
    for part, count in counts.items():
        one_s = took[part]
        facts[part] = {"ms": round(1_000 * one_s, 3)}
        for which, flops in count.items():
            rate = flops / one_s / 1e9
            facts[part][f"gflop_s_{which}"] = round(rate, 1)
            facts[part][f"percent_of_gemm_rate_{which}"] = round(100 * rate / rates[dtype], 1)
    # What cannot be left out: the waveform is read and the features are written.
    moved = 4 * (samples + student.features.max_length * student.features.num_mel_bins)
    percent = 100 * moved / memory / 1e9 / took["features"]
    facts["features"]["percent_of_memory_rate"] = round(percent, 2)
    return facts


def markdown(result: dict[str, Any]) -> list[str]:
    gflop = result["gflop_a_clip"]
    about = (
        f"A clip of {CLIP_S} s is {gflop['as_written_in_all']} GFLOP as the network is written, "
        f"{gflop['needed_in_all']} GFLOP of which the scores need. Memory: {result['memory_gb_s']} GB/s "
        f"copied. Products of {result['gemm_rows']:,} rows, GFLOP/s; medians of {result['rounds']} rounds."
    )
    ways = result["gemm_by_shape"]
    shapes = list(next(iter(ways.values())))
    rates = [
        [way, *(found[shape] for shape in shapes), result["gemm_gflop_s"][way.partition(",")[0]]]
        for way, found in ways.items()
    ]
    parts = [
        [
            f"{name} ({facts['computes_in']}, {facts['kernel']})",
            part,
            facts[part]["ms"],
            facts[part]["gflop_s_as_written"],
            facts[part]["percent_of_gemm_rate_as_written"],
            facts[part].get("percent_of_gemm_rate_needed", ""),
        ]
        for name, facts in result["student"].items()
        for part in ("features", "attention", "mlp", "model", "whole")
    ]
    head = ["student", "part", "ms a clip", "GFLOP/s", "% of the rate", "% of it, needed alone"]
    return [
        about,
        *(f"Skipped: {line}." for line in result["skipped"]),
        "",
        *table(["product", *shapes, "a layer's, in the best ways"], rates),
        "",
        *table(head, parts),
    ]


if __name__ == "__main__":
    main()
