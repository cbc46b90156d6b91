"""AST's forward pass in OpenVINO, which fuses more of it on a CPU than torch does.

The graph is written down here from the weights. Tracing the torch model gives the same graph,
but takes 20 s at the start of every run.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from student.batches import Forward
from student.feature_spec import FeatureSpec
from student.weights import Affine, Network, NetworkLayer, gelu_tanh

_READ_BY_HEAD = 2  # tokens, as in `student.engine`


def can_compile(network: Network) -> bool:
    """Whether its activations are among those that are written down here."""
    known = (F.gelu, gelu_tanh, F.relu, F.silu)
    return all(layer.activation in known for layer in network.layers)


def compile_network(network: Network, spec: FeatureSpec) -> Forward:
    """Makes the forward pass in float32, clip by clip, by as many threads as torch would use.

    Args:
        network: what is computed.
        spec: how many frames and mel bins a spectrogram has.

    Returns:
        What gives float32 logits [n, labels] and embeddings [n, hidden size]. Several
        threads may call it.
    """
    import openvino

    compiled = openvino.Core().compile_model(
        _graph(network, spec.max_length, spec.num_mel_bins),
        "CPU",
        {
            # Said, because bfloat16 would be taken where the processor is faster in it.
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    )
    of_thread = threading.local()  # a request is one caller's

    def forward(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not hasattr(of_thread, "request"):
            of_thread.request = compiled.create_infer_request()
        rows: list[list[torch.Tensor]] = []
        for clip in features.split(1):
            found = of_thread.request.infer([clip.contiguous().numpy()], share_inputs=True)
            # Copied: the next clip's are written over them.
            rows.append([torch.from_numpy(np.array(found[output])) for output in compiled.outputs])
        logits, pooled = (torch.cat(tensors) for tensors in zip(*rows, strict=True))
        return logits, pooled

    return forward


def _graph(network: Network, frames: int, mel_bins: int) -> Any:
    """The network as an OpenVINO model of one input and two outputs."""
    from openvino import Model, Type
    from openvino import opset13 as ops

    def constant(tensor: torch.Tensor) -> Any:
        return ops.constant(np.ascontiguousarray(tensor.numpy()), Type.f32)

    def whole(*numbers: int) -> Any:
        return ops.constant(np.array(numbers, np.int64))

    def product(inputs: Any, affine: Affine) -> Any:
        result = ops.matmul(inputs, constant(affine.weight), False, True)
        return result if affine.bias is None else ops.add(result, constant(affine.bias))

    def norm(inputs: Any, affine: Affine) -> Any:
        result = ops.mvn(inputs, whole(-1), True, network.norm_eps, "INSIDE_SQRT")
        result = ops.multiply(result, constant(affine.weight))
        return result if affine.bias is None else ops.add(result, constant(affine.bias))

    def first_tokens(inputs: Any) -> Any:
        return ops.slice(inputs, whole(0), whole(_READ_BY_HEAD), whole(1), whole(1))

    def by_head(inputs: Any) -> Any:
        split = ops.reshape(inputs, whole(1, -1, heads, width // heads), False)
        return ops.transpose(split, whole(0, 2, 1, 3))

    def activated(inputs: Any, layer: NetworkLayer) -> Any:
        if layer.activation is F.relu:
            return ops.relu(inputs)
        if layer.activation is F.silu:
            return ops.swish(inputs)
        return ops.gelu(inputs, "erf" if layer.activation is F.gelu else "tanh")

    heads, width = network.heads, network.hidden_size
    features = ops.parameter([1, frames, mel_bins], Type.f32, name="features")
    spectrum = ops.unsqueeze(ops.transpose(features, whole(0, 2, 1)), whole(1))
    patches = ops.convolution(
        spectrum, constant(network.patches.weight), list(network.stride), [0, 0], [0, 0], [1, 1]
    )
    if network.patches.bias is not None:
        patches = ops.add(patches, constant(network.patches.bias.reshape(1, -1, 1, 1)))
    patches = ops.transpose(ops.reshape(patches, whole(1, width, -1), False), whole(0, 2, 1))
    tokens = [constant(network.class_token), constant(network.distillation_token), patches]
    hidden = ops.add(ops.concat(tokens, 1), constant(network.positions))
    for number, layer in enumerate(network.layers):
        normal = asking = norm(hidden, layer.before)
        if number == len(network.layers) - 1:  # of the last layer only these are read
            hidden, asking = first_tokens(hidden), first_tokens(normal)
        heard = ops.scaled_dot_product_attention(
            by_head(product(asking, layer.query)),
            by_head(product(normal, layer.key)),
            by_head(product(normal, layer.value)),
        )
        joined = ops.reshape(ops.transpose(heard, whole(0, 2, 1, 3)), whole(1, -1, width), False)
        hidden = ops.add(hidden, product(joined, layer.join))
        widened = activated(product(norm(hidden, layer.after), layer.widen), layer)
        hidden = ops.add(hidden, product(widened, layer.narrow))
    pooled = ops.reduce_mean(first_tokens(norm(hidden, network.norm)), whole(1))
    logits = product(norm(pooled, network.head_norm), network.head)
    return Model([logits, pooled], [features], "student")
