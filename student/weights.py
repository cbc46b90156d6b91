"""A checkpoint's weights as plain tensors, read without transformers, whose import takes seconds.

What is read here is what `ASTForAudioClassification` would load, from the same files. Whatever
differs from that in the least, `read_network` leaves to transformers, and to its errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from student.checkpoint import Checkpoint, CheckpointError, read_json

if TYPE_CHECKING:
    from transformers import ASTForAudioClassification

Activation = Callable[[torch.Tensor], torch.Tensor]


def gelu_tanh(inputs: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh formula, which `gelu_new` writes out."""
    return F.gelu(inputs, approximate="tanh")


# Of transformers' names of `hidden_act`, those whose function torch has.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}

_BODY = "audio_spectrogram_transformer"
# transformers renamed a layer's parts in version 5, but stores them by their old names.
_STORED_LAYER = re.compile(rf"{_BODY}\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
# Entries of config.json with which transformers does more than to load an AST.
_UNUSUAL_ENTRIES = {"quantization_config", "head_dim"}


@dataclass(frozen=True)
class Affine:
    """A matrix product's, a convolution's or a norm's weight, and its bias if it has one."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class NetworkLayer:
    """One of the transformer's layers."""

    before: Affine  # the norm, [hidden]
    query: Affine  # [hidden, hidden], as the next three
    key: Affine
    value: Affine
    join: Affine  # of the heads' outputs
    after: Affine  # the norm, [hidden]
    widen: Affine  # [intermediate, hidden]
    narrow: Affine  # [hidden, intermediate]
    activation: Activation  # between the last two; `F.gelu` itself where it is the exact GELU


@dataclass(frozen=True)
class Network:
    """What an AST computes with: float32 tensors, not to be changed."""

    class_token: torch.Tensor  # [1, 1, hidden]
    distillation_token: torch.Tensor  # [1, 1, hidden]
    patches: Affine  # the convolution, [hidden, 1, patch, patch]
    stride: tuple[int, int]  # mel bins, frames
    positions: torch.Tensor  # [1, tokens, hidden]
    layers: tuple[NetworkLayer, ...]
    norm: Affine
    head_norm: Affine
    head: Affine  # [labels, hidden]
    heads: int  # of the attention
    norm_eps: float
    parameters: int

    @property
    def tokens(self) -> int:
        """Patches of a spectrogram, and the two tokens that are read by the head."""
        return int(self.positions.shape[1])

    @property
    def hidden_size(self) -> int:
        """Width of the layers."""
        return int(self.positions.shape[2])


@dataclass(frozen=True)
class _Config:
    """The entries of config.json that say how to compute, with `ASTConfig`'s defaults."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    patch_size: int = 16
    qkv_bias: bool = True
    frequency_stride: int = 10
    time_stride: int = 10
    max_length: int = 1024
    num_mel_bins: int = 128


def read_network(checkpoint: Checkpoint) -> Network | None:
    """Reads a checkpoint's weights.

    Returns:
        float32 on the CPU, which may be views of the files; None where only transformers
        can say what to make of them: an activation that is not in `ACTIVATIONS`, a tensor
        that is missing, unknown or of another shape, files that cannot be read.
    """
    directory = checkpoint.directory
    config = _usual_config(read_json(directory / "config.json"))
    if config is None:
        return None
    tensors = _read_tensors(directory)
    if tensors is None:
        return None
    shapes = _expected_shapes(config, len(checkpoint.labels))
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        return None
    if not {tensor.dtype for tensor in tensors.values()} <= _FLOATS:
        return None
    tensors = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    activations = [ACTIVATIONS[config.hidden_act]] * config.num_hidden_layers
    return _network(tensors, config, activations)


def network_of(model: ASTForAudioClassification) -> Network:
    """The tensors of a float32 model that transformers loaded; they stay the model's."""
    known = model.config
    config = _Config(**{field.name: getattr(known, field.name) for field in fields(_Config)})
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    layers = model.audio_spectrogram_transformer.layers
    activations = [_plain(layer.mlp.activation_fn) for layer in layers]
    return _network(parameters, config, activations)


def _plain(activation: Any) -> Activation:
    """torch's own exact GELU in place of transformers' module that calls it."""
    return F.gelu if type(activation).__name__ == "GELUActivation" else activation


def _usual_config(entries: Mapping[str, Any]) -> _Config | None:
    """The config, or None where an entry is not of its usual type, or may mean more."""
    if _UNUSUAL_ENTRIES & entries.keys():
        return None
    stated = {f.name: entries[f.name] for f in fields(_Config) if f.name in entries}
    if any(type(value) is not type(getattr(_Config, name)) for name, value in stated.items()):
        return None
    config = _Config(**stated)
    sizes = [value for value in vars(config).values() if type(value) is int]
    whole = min(sizes) > 0 and config.hidden_size % config.num_attention_heads == 0
    return config if whole and config.hidden_act in ACTIVATIONS else None


def _read_tensors(directory: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a directory by the names that they have in memory, or None if one fails."""
    single = directory / "model.safetensors"
    files = {single}
    tensors = {}
    try:
        if not single.exists():
            shards = read_json(directory / f"{single.name}.index.json").get("weight_map")
            if not isinstance(shards, dict):
                return None
            files = {directory / str(name) for name in shards.values()}
        for file in sorted(files):
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118 - no mapping
                    tensors[_in_memory(name)] = content.get_tensor(name)
    except (CheckpointError, SafetensorError, OSError):
        return None
    return tensors


def _in_memory(stored: str) -> str:
    found = _STORED_LAYER.fullmatch(stored)
    if not found:
        return stored
    number, part, kind = found.groups()
    return f"{_BODY}.layers.{number}.{_RENAMED.get(part, part)}.{kind}"


def _expected_shapes(config: _Config, labels: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model, by its name in memory."""
    width, patch = config.hidden_size, config.patch_size
    rows = (config.num_mel_bins - patch) // config.frequency_stride + 1
    columns = (config.max_length - patch) // config.time_stride + 1
    shapes: dict[str, tuple[int, ...]] = {
        f"{_BODY}.embeddings.cls_token": (1, 1, width),
        f"{_BODY}.embeddings.distillation_token": (1, 1, width),
        f"{_BODY}.embeddings.position_embeddings": (1, rows * columns + 2, width),
    }

    def add(name: str, *weight: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    add(f"{_BODY}.embeddings.patch_embeddings.projection", width, 1, patch, patch)
    for number in range(config.num_hidden_layers):
        layer = f"{_BODY}.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj"):
            add(f"{layer}.attention.{part}", width, width, bias=config.qkv_bias)
        add(f"{layer}.attention.o_proj", width, width)
        add(f"{layer}.mlp.fc1", config.intermediate_size, width)
        add(f"{layer}.mlp.fc2", width, config.intermediate_size)
        add(f"{layer}.layernorm_before", width)
        add(f"{layer}.layernorm_after", width)
    add(f"{_BODY}.layernorm", width)
    add("classifier.layernorm", width)
    add("classifier.dense", labels, width)
    return shapes


def _network(
    tensors: Mapping[str, torch.Tensor], config: _Config, activations: list[Activation]
) -> Network:
    def affine(name: str) -> Affine:
        return Affine(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    layers = []
    for number, activation in enumerate(activations):
        layer = f"{_BODY}.layers.{number}"
        layers.append(
            NetworkLayer(
                before=affine(f"{layer}.layernorm_before"),
                query=affine(f"{layer}.attention.q_proj"),
                key=affine(f"{layer}.attention.k_proj"),
                value=affine(f"{layer}.attention.v_proj"),
                join=affine(f"{layer}.attention.o_proj"),
                after=affine(f"{layer}.layernorm_after"),
                widen=affine(f"{layer}.mlp.fc1"),
                narrow=affine(f"{layer}.mlp.fc2"),
                activation=activation,
            )
        )
    return Network(
        class_token=tensors[f"{_BODY}.embeddings.cls_token"],
        distillation_token=tensors[f"{_BODY}.embeddings.distillation_token"],
        patches=affine(f"{_BODY}.embeddings.patch_embeddings.projection"),
        stride=(config.frequency_stride, config.time_stride),
        positions=tensors[f"{_BODY}.embeddings.position_embeddings"],
        layers=tuple(layers),
        norm=affine(f"{_BODY}.layernorm"),
        head_norm=affine("classifier.layernorm"),
        head=affine("classifier.dense"),
        heads=config.num_attention_heads,
        norm_eps=config.layer_norm_eps,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
    )
