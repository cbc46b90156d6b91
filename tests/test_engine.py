"""The arranged forward pass beside transformers' own, in every way that it is offered."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

from student.checkpoint import read_checkpoint
from student.engine import Engine, Kernel, add_norm_in_one_pass, choose_kernel
from student.feature_spec import FeatureSpec
from student.features import LogMel
from student.model import Student, has_int8, load_model, made_sounds
from student.openvino import can_compile, compile_network
from student.weights import Activation, gelu_tanh, network_of

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_mel_bins": 32,
    "max_length": 128,
    "num_labels": 11,
}

with_onednn = pytest.mark.skipif(
    choose_kernel(CPU, has_openvino=False) != "onednn",
    reason="this torch has no oneDNN, so nothing is arranged for it",
)
with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA")
with_int8 = pytest.mark.skipif(not has_int8(), reason="this processor has no VNNI")
with_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
)
KERNELS = ["torch", pytest.param("onednn", marks=with_onednn)]
with_bfloat16 = pytest.mark.skipif(
    choose_kernel(CPU, torch.bfloat16) != "onednn", reason="oneDNN has no bfloat16 here"
)
BFLOAT16_KERNELS = ["torch", pytest.param("onednn", marks=with_bfloat16)]


@pytest.fixture
def make() -> Callable[..., tuple[ASTForAudioClassification, torch.Tensor]]:
    """(a model whose logits differ from clip to clip, features of five clips)."""

    def make(**changes: Any) -> tuple[ASTForAudioClassification, torch.Tensor]:
        torch.manual_seed(3)
        model = ASTForAudioClassification(ASTConfig(**{**SMALL, **changes})).eval()
        for name, parameter in model.named_parameters():
            # transformers begins with biases of 0, which would hide one that is lost.
            scales = "layernorm" in name and name.endswith("weight")
            torch.nn.init.normal_(parameter, mean=float(scales), std=0.15)
        bins = torch.randn(5, 1, model.config.num_mel_bins)  # what a clip sounds like
        return model, bins + 0.5 * torch.randn(5, model.config.max_length, bins.shape[2])

    return make


def by_transformers(
    model: ASTForAudioClassification, features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        pooled = model.audio_spectrogram_transformer(features).pooler_output
        return model(features).logits, pooled


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 1},
        {"qkv_bias": False},
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new"},  # not the GELU that oneDNN would put in its place
        {"patch_size": 8, "frequency_stride": 4, "time_stride": 2},  # 893 tokens: clip by clip
    ],
)
def test_float32_is_what_transformers_computes(
    make: Callable[..., Any], kernel: Kernel, changes: dict[str, Any]
) -> None:
    model, features = make(**changes)
    logits, pooled = by_transformers(model, features)
    assert logits.std(dim=0).min() > 0.05  # the clips differ
    engine = Engine(copy.deepcopy(model), CPU, torch.float32, kernel)
    with torch.inference_mode():
        found, embeddings = engine(features)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(embeddings, pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_clip_has_the_same_logits_alone_and_among_others(
    make: Callable[..., Any], kernel: Kernel
) -> None:
    model, features = make()
    engine = Engine(model, CPU, torch.float32, kernel)
    with torch.inference_mode():
        together = engine(features)[0]
        alone = torch.cat([engine(features[row : row + 1])[0] for row in range(len(features))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", BFLOAT16_KERNELS)
def test_bfloat16_keeps_scores_within_a_hundredth(make: Callable[..., Any], kernel: Kernel) -> None:
    model, features = make()
    expected = by_transformers(model, features)[0].sigmoid()
    engine = Engine(copy.deepcopy(model), CPU, torch.bfloat16, kernel)
    with torch.inference_mode():
        found, embeddings = engine(features)
    assert found.dtype == embeddings.dtype == torch.float32
    assert 0 < (found.sigmoid() - expected).abs().max() < 0.01


@pytest.mark.parametrize("kernel", BFLOAT16_KERNELS)
def test_an_engine_leaves_its_model_as_it_is(make: Callable[..., Any], kernel: Kernel) -> None:
    model, features = make(hidden_act="prelu")  # which has a weight of its own
    expected = by_transformers(model, features)[0]
    engine = Engine(model, CPU, torch.bfloat16, kernel)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad, name
    exact = Engine(model, CPU, torch.float32, kernel)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with torch.inference_mode():
        torch.testing.assert_close(exact(features)[0], expected, rtol=0, atol=1e-5)
    assert engine._layers and not by_transformers(model, features)[0].any()


@with_openvino
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 1},
        {"qkv_bias": False},
        {"patch_size": 8, "frequency_stride": 4, "time_stride": 2},
    ],
)
def test_openvino_is_what_transformers_computes(
    make: Callable[..., Any], changes: dict[str, Any]
) -> None:
    model, features = make(**changes)
    logits, pooled = by_transformers(model, features)
    spec = FeatureSpec(num_mel_bins=features.shape[2], max_length=features.shape[1])
    network = network_of(model)
    assert can_compile(network)
    found, embeddings = compile_network(network, spec)(features)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(embeddings, pooled, rtol=0, atol=1e-5)


@with_openvino
@pytest.mark.parametrize("activation", [F.relu, F.silu, gelu_tanh])
def test_openvino_has_the_activation(make: Callable[..., Any], activation: Activation) -> None:
    model, features = make()
    network = network_of(model)
    layers = tuple(dataclasses.replace(layer, activation=activation) for layer in network.layers)
    network = dataclasses.replace(network, layers=layers)
    spec = FeatureSpec(num_mel_bins=features.shape[2], max_length=features.shape[1])
    assert can_compile(network)
    with torch.inference_mode():
        expected = Engine(network, CPU, torch.float32, "torch")(features)[0]
    found = compile_network(network, spec)(features)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@with_openvino
def test_an_answer_of_openvino_outlives_the_next_call_and_threads(make: Callable[..., Any]) -> None:
    model, features = make()
    logits, _ = by_transformers(model, features)
    spec = FeatureSpec(num_mel_bins=features.shape[2], max_length=features.shape[1])
    forward = compile_network(network_of(model), spec)
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda row: forward(features[row : row + 1])[0], [0, 1, 2, 3, 4] * 20)
        )
    torch.testing.assert_close(torch.cat(found), logits.repeat(20, 1), rtol=0, atol=1e-5)


def test_openvino_leaves_an_unknown_activation_to_torch(make: Callable[..., Any]) -> None:
    assert not can_compile(network_of(make(hidden_act="prelu")[0]))


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "has_openvino", "expected"),
    [
        (torch.float32, 768, True, "openvino"),
        (torch.float32, 192, True, "onednn"),
        (torch.float32, 768, False, "onednn"),
        (torch.int8, 768, True, "onednn"),
    ],
)
@with_onednn
def test_openvino_is_for_float32_of_wide_students(
    dtype: torch.dtype, hidden_size: int, has_openvino: bool, expected: Kernel
) -> None:
    assert choose_kernel(CPU, dtype, hidden_size, has_openvino) == expected


@with_openvino
def test_a_wide_student_is_scored_by_openvino_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = {**SMALL, "hidden_size": 512, "num_hidden_layers": 1, "num_mel_bins": 128}
    config["id2label"] = {index: f"sound {index}" for index in range(config.pop("num_labels"))}
    ASTForAudioClassification(ASTConfig(**config)).save_pretrained(tmp_path)
    ASTFeatureExtractor(max_length=128).save_pretrained(tmp_path)
    student = Student.load(str(tmp_path), "cpu")
    assert student.kernel == "openvino"
    sound = made_sounds(student.features)
    features = LogMel(student.features)(
        torch.from_numpy(sound), torch.full((len(sound),), sound.shape[1])
    )
    logits, _ = by_transformers(load_model(student.checkpoint), features)
    np.testing.assert_allclose(student.score(sound), logits.sigmoid(), rtol=0, atol=1e-5)


@with_int8
def test_int8_keeps_a_trained_students_scores_within_a_hundredth() -> None:
    checkpoint = read_checkpoint("bundled")
    features = LogMel(checkpoint.features)
    sounds = torch.from_numpy(made_sounds(checkpoint.features))
    with torch.inference_mode():
        heard = features(sounds, torch.full((len(sounds),), sounds.shape[1]))
        exact, coarse = (
            Engine(load_model(checkpoint), CPU, dtype, "onednn")(heard)[0].sigmoid()
            for dtype in (torch.float32, torch.int8)
        )
    assert exact.max() > 0.5  # it hears something
    assert 0 < (coarse - exact).abs().max() < 0.01


@with_int8
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"hidden_act": "relu"}])
def test_int8_is_float32_but_for_rounding_and_a_clips_scales_are_its_own(
    make: Callable[..., Any], changes: dict[str, Any]
) -> None:
    model, features = make(**changes)
    logits, _ = by_transformers(model, features)
    engine = Engine(copy.deepcopy(model), CPU, torch.int8, "onednn")
    with torch.inference_mode():
        found, embeddings = engine(features)
        alone = engine(features[2:3])[0]
    assert found.dtype == embeddings.dtype == torch.float32
    assert 0 < (found - logits).abs().max() < 0.2 * logits.std()
    torch.testing.assert_close(found[2:3], alone, rtol=0, atol=1e-5)


@with_cuda
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 0.01), (torch.float16, 0.01)]
)
def test_a_gpu_gives_what_the_cpu_gives(
    make: Callable[..., Any], dtype: torch.dtype, most: float
) -> None:
    model, features = make()
    expected = by_transformers(model, features)[0].sigmoid()
    cuda = torch.device("cuda")
    with torch.inference_mode():
        found = Engine(model, cuda, dtype, "torch")(features.to(cuda))[0].sigmoid().cpu()
    assert (found - expected).abs().max() < most


@with_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [48, 768])
@pytest.mark.parametrize("shared", [True, False])
def test_a_gpu_adds_and_norms_in_one_pass(dtype: torch.dtype, width: int, shared: bool) -> None:
    pytest.importorskip("triton")
    from student.add_norm import add_norm

    torch.manual_seed(0)
    hidden = 5 * torch.randn(1 if shared else 3, 7, width, device="cuda")
    added = torch.randn(3, 7, width, device="cuda", dtype=dtype)
    weight, bias = torch.randn(2, width, device="cuda")
    before = hidden.clone()
    total, normal = add_norm(hidden, added, weight, bias, 1e-12)
    assert torch.equal(hidden, before)
    expected = hidden + added
    torch.testing.assert_close(total, expected)
    expected = torch.nn.functional.layer_norm(expected, (width,), weight, bias, 1e-12)
    torch.testing.assert_close(normal, expected.to(dtype))


def test_where_triton_cannot_compile_sums_and_norms_are_computed_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert add_norm_in_one_pass(CPU) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())

    def refuses(*_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler\nand more")

    monkeypatch.setitem(sys.modules, "student.add_norm", SimpleNamespace(add_norm=refuses))
    assert add_norm_in_one_pass(CPU) is None
    assert "computed apart" in caplog.text and "Failed to find C compiler)" in caplog.text

    def adds(hidden: Any, added: Any, *_: Any) -> Any:
        return hidden, added

    monkeypatch.setitem(sys.modules, "student.add_norm", SimpleNamespace(add_norm=adds))
    assert add_norm_in_one_pass(CPU) is adds


def test_work_of_the_last_layer_is_done_for_two_tokens(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, features = make()
    seen: list[tuple[int, int]] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        seen.append((query.shape[2], key.shape[2]))
        return attention(query, key, value)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.inference_mode():
        Engine(model, CPU, torch.float32, "torch")(features)
    tokens = model.audio_spectrogram_transformer.embeddings.position_embeddings.shape[1]
    assert seen == [(tokens, tokens), (tokens, tokens), (2, tokens)]


def test_a_cpu_without_onednn_multiplies_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose_kernel(CPU, has_openvino=False) == choose_kernel(CPU, torch.bfloat16) == "torch"
    assert choose_kernel(torch.device("cuda")) == "torch"
