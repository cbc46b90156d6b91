"""AST's forward pass, arranged for speed: the same numbers as transformers', sooner.

Four things differ from `ASTForAudioClassification`, none of them in what is computed but for the
last half of the second:

- Of the last layer only what its first two tokens need is computed: AST classifies their
  mean, and all the other tokens of the last layer are thrown away. That is a seventh of a
  six-layer student's work.
- Query, key and value are one matrix product, and GELU is part of the one before it; on a GPU
  in 16 bits it is GELU's tanh formula, 5e-4 from the exact one at most.
- Patches are one matrix product, not a convolution.
- On a CPU the weights are laid out once as oneDNN wants them. torch's own float32 product
  is MKL's, which uses half of an AMD processor.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from student.weights import (
    Activation,
    Affine,
    Network,
    NetworkLayer,
    gelu_tanh,
    network_of,
)

if TYPE_CHECKING:
    from transformers import ASTForAudioClassification

logger = logging.getLogger(__name__)

Kernel = Literal["torch", "onednn", "openvino"]
Step = Callable[[torch.Tensor], torch.Tensor]
# Gets the residual stream and what is to be added to it; gives the sum and its norm.
AddNorm = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
_GELU_LOWEST = -0.17  # GELU's minimum is -0.16997, at -0.7518
_SMALLEST = 1e-12  # a scale for tokens and weights that are all zero
_READ_BY_HEAD = 2  # tokens: the class token and the distillation token
_OPENVINO_LEAST_WIDTH = 512  # narrower students take less time for a clip than a call of it


@dataclass(frozen=True)
class _Layer:
    before: AddNorm
    query: Step | None  # of the last layer, which asks for two tokens alone
    project: Step  # query, key and value; in the last layer key and value
    join: Step  # the heads' outputs
    after: AddNorm
    widen: Step  # with the activation
    narrow: Step


class Engine:
    """The forward pass of one model on one device.

    Args:
        model: float32; what it needs of it is copied.
        device: where it computes.
        dtype: of the matrix products. The sums between the layers stay float32: rounded, they
            would double the scores' difference to float32's.
        kernel: who multiplies matrices on a CPU, of `choose_kernel`; of `openvino` see
            `student.openvino`.
    """

    def __init__(
        self,
        model: Network | ASTForAudioClassification,
        device: torch.device,
        dtype: torch.dtype,
        kernel: Literal["torch", "onednn"],
    ) -> None:
        on_cpu = device.type == "cpu"
        # What the layers' inputs are made; whole numbers are made of them where they are multiplied.
        self._dtype = torch.float32 if dtype is torch.int8 else dtype
        self._whole = dtype is torch.int8
        self._kernel = kernel
        self._device = device
        self._rounds = not on_cpu and dtype in (torch.bfloat16, torch.float16)
        network = model if isinstance(model, Network) else network_of(model)
        self._one_pass = (
            add_norm_in_one_pass(device, dtype, network.hidden_size) if self._rounds else None
        )
        self._heads, self._tokens = network.heads, network.tokens
        self._tokens_of = self._tokens_from(network)
        self._positions = self._positions_of(network)
        self._layers = [
            self._arranged(layer, network.norm_eps, last=layer is network.layers[-1])
            for layer in network.layers
        ]
        self._norm = self._norm_of(network.norm, network.norm_eps)
        self._head_norm = self._norm_of(network.head_norm, network.norm_eps)
        self._head = self._product_of(network.head)
        # A CPU gains nothing from a batch past its caches: one chunk's widest layer is 15 MB.
        self._at_once = 1 if on_cpu and self._tokens > 512 else None

    def __call__(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and embeddings.

        Args:
            features: float32 [n, frames, mel bins], of `LogMel`.

        Returns:
            float32 logits [n, labels] and float32 [n, hidden size]: the pooled vector
            after the final norm.
        """
        if self._at_once is None or len(features) <= self._at_once:
            return self._forward(features)
        parts = [self._forward(part) for part in features.split(self._at_once)]
        return torch.cat([logits for logits, _ in parts]), torch.cat(
            [pooled for _, pooled in parts]
        )

    def _forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, added = self._positions, self._tokens_of(features)
        for layer in self._layers:
            hidden, added = self._one_layer(layer, hidden, added)
        normal = self._norm(hidden + added)
        pooled = (normal[:, 0] + normal[:, 1]) / 2
        return self._head(self._head_norm(pooled)).float(), pooled.float()

    def _one_layer(
        self, layer: _Layer, hidden: torch.Tensor, added: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream before the layer's last sum, and what is added there."""
        hidden, normal = layer.before(hidden, added)
        count, _, width = hidden.shape
        parts = layer.project(normal)
        if layer.query is not None:
            asking = layer.query(normal[:, :_READ_BY_HEAD])
            hidden = hidden[:, :_READ_BY_HEAD]
        else:
            asking, parts = parts[..., :width], parts[..., width:]
        query, key, value = (
            part.reshape(count, part.shape[1], self._heads, width // self._heads).transpose(1, 2)
            for part in (asking, parts[..., :width], parts[..., width:])
        )
        heard = F.scaled_dot_product_attention(query, key, value)
        joined = layer.join(heard.transpose(1, 2).reshape(count, -1, width))
        hidden, normal = layer.after(hidden, joined)
        return hidden, layer.narrow(layer.widen(normal))

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device: what was read from a file may be a view of the file."""
        return tensor.to(self._device, torch.float32, copy=True)

    def _joined(
        self, parts: list[Affine], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One weight and bias of all of `parts`: copies, on the device."""
        weight = torch.cat([part.weight for part in parts]).to(self._device, dtype)
        biases = [part.bias for part in parts if part.bias is not None]
        return weight, torch.cat(biases).to(self._device, dtype) if biases else None

    def _tokens_from(self, network: Network) -> Step:
        """Features [n, frames, mel bins] to tokens [n, tokens, hidden], without `_positions_of`.

        The convolution as one matrix product of the patches; the first two tokens have empty
        ones. A GPU's convolution, with what it takes to lay out the rest, takes ten times as
        long.
        """
        dtype = self._dtype if self._rounds else torch.float32
        weight = network.patches.weight.to(self._device, dtype, copy=True)
        patch, (bins_on, frames_on) = weight.shape[-1], network.stride
        weight = weight.transpose(2, 3).flatten(1)  # [hidden, frames x bins of a patch]

        def tokens(features: torch.Tensor) -> torch.Tensor:
            cut = features.unfold(1, patch, frames_on).unfold(2, patch, bins_on).transpose(1, 2)
            patches = weight.new_zeros((len(features), self._tokens, patch * patch))
            patches[:, _READ_BY_HEAD:].view(cut.shape).copy_(cut)  # bins by bins, as AST has them
            return F.linear(patches, weight)

        return tokens

    def _positions_of(self, network: Network) -> torch.Tensor:
        """What is the same in all clips: float32 [1, tokens, hidden]."""
        positions = self._placed(network.positions)
        positions[:, :1] += self._placed(network.class_token)
        positions[:, 1:_READ_BY_HEAD] += self._placed(network.distillation_token)
        if network.patches.bias is not None:
            positions[:, _READ_BY_HEAD:] += self._placed(network.patches.bias)
        return positions

    def _norm_of(self, norm: Affine, eps: float) -> Step:
        weight, bias = self._joined([norm], torch.float32)
        return lambda inputs: F.layer_norm(inputs, weight.shape, weight, bias, eps)

    def _add_norm_of(self, norm: Affine, eps: float) -> AddNorm:
        weight, bias = self._joined([norm], torch.float32)

        def in_turn(hidden: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden = hidden + added
            normal = F.layer_norm(hidden, weight.shape, weight, bias, eps)
            return hidden, normal.to(self._dtype)

        add_norm = self._one_pass
        if add_norm is None or bias is None:
            return in_turn

        def at_once(hidden: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            # In the last layer they are a part.
            return add_norm(hidden.contiguous(), added.contiguous(), weight, bias, eps)

        return at_once

    def _product_of(self, product: Affine) -> Step:
        weight, bias = self._joined([product], torch.float32)
        return lambda inputs: F.linear(inputs, weight, bias)

    def _arranged(self, layer: NetworkLayer, eps: float, last: bool) -> _Layer:
        of_one_input = [layer.key, layer.value]
        if not last:
            of_one_input.insert(0, layer.query)
        activation = layer.activation
        if isinstance(activation, torch.nn.Module):  # some have weights of their own
            activation = copy.deepcopy(activation).to(self._device, self._dtype)
            activation.eval().requires_grad_(False)
        return _Layer(
            before=self._add_norm_of(layer.before, eps),
            query=self._linear([layer.query], few=True) if last else None,
            project=self._linear(of_one_input),
            join=self._linear([layer.join], few=last),
            after=self._add_norm_of(layer.after, eps),
            widen=self._linear([layer.widen], activation=activation, few=last),
            narrow=self._linear([layer.narrow], few=last, after_gelu=activation is F.gelu),
        )

    def _linear(
        self,
        parts: list[Affine],
        activation: Activation | None = None,
        few: bool = False,
        after_gelu: bool = False,
    ) -> Step:
        """One matrix product that gives all of `parts`, then `activation`.

        Args:
            few: it sees two tokens, for which arranged weights do not pay.
            after_gelu: its inputs have been through GELU, so none is below `_GELU_LOWEST`.
        """
        weight, bias = self._joined(parts, self._dtype)
        if few or self._kernel == "torch":
            if activation is None:
                return lambda inputs: F.linear(inputs, weight, bias)
            if self._rounds and activation in (F.gelu, gelu_tanh) and bias is not None:
                return _with_gelu(weight, bias)
            return lambda inputs: activation(F.linear(inputs, weight, bias))
        if self._whole:
            return _in_whole_numbers(weight, bias, activation, self._tokens, after_gelu)
        gelu = activation is F.gelu
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, self._tokens)
        after, how = ("gelu", "none") if gelu else ("none", "")

        def multiply(inputs: torch.Tensor) -> torch.Tensor:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                inputs, packed, bias, after, [], how
            )
            if not gelu and activation is not None:
                product = activation(product)
            return product

        return multiply


def add_norm_in_one_pass(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, width: int = 768
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """`student.add_norm.add_norm`; None where it cannot run.

    Triton compiles when it is first called, with the machine's C compiler, for the cards that it
    knows, into a folder of the user's: what of these is missing shows only then.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from student.add_norm import add_norm

        one = torch.ones((1, 1, width), device=device)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            _, normal = add_norm(one, one.to(dtype), one[0, 0], one[0, 0], 1e-12)
        normal.cpu()  # waits for it
    except Exception as error:  # of Triton's, its compilers' and the driver's many kinds
        reason = str(error).strip().partition("\n")[0]
        logger.warning(
            "Triton cannot compile for %s here, so that sums and norms are computed apart, a few "
            "percent slower (%s: %s)", device, type(error).__name__, reason,
        )  # fmt: skip
        return None
    return add_norm


def _with_gelu(weight: torch.Tensor, bias: torch.Tensor) -> Step:
    """A product with GELU by its tanh formula, which a GPU's products have at their end.

    By itself GELU would read and write a layer's widest tensor once more.
    """
    across = weight.t()

    def multiply(inputs: torch.Tensor) -> torch.Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])
        product: torch.Tensor = torch._addmm_activation(bias, flat, across, use_gelu=True)
        return product.view(*inputs.shape[:-1], -1)

    return multiply


def _in_whole_numbers(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation | None,
    tokens: int,
    after_gelu: bool,
) -> Step:
    """A matrix product of 8-bit whole numbers, which a CPU with VNNI does four times as fast.

    Each output of the weights has a scale of its own, found once, and each token of the
    inputs, found as it comes: nothing is calibrated, and a clip's scores do not depend on
    the clips beside it.
    """
    rows, columns = weight.shape
    weight_scale = weight.abs().amax(dim=1).clamp_min(_SMALLEST) / 127
    whole = (weight / weight_scale[:, None]).round().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(whole, [tokens, columns])
    no_offsets = torch.zeros(rows, dtype=torch.int32)
    shift = torch.zeros(rows) if bias is None else bias
    # Unsigned numbers, because VNNI multiplies those by signed ones; 128 stands for 0.
    zero, middle = (0 if after_gelu else 128), torch.tensor(128.5)
    if after_gelu:
        # GELU's lowest value stands for 0, so that all 256 numbers are of use.
        shift = shift + _GELU_LOWEST * (whole.sum(dim=1, dtype=torch.int32) * weight_scale)

    def multiply(inputs: torch.Tensor) -> torch.Tensor:
        flat = inputs.reshape(-1, columns)
        if after_gelu:
            scale = (flat.amax(dim=1, keepdim=True) - _GELU_LOWEST) / 255
            centre = 0.5 - _GELU_LOWEST / scale
        else:
            scale = flat.abs().amax(dim=1, keepdim=True).clamp_min_(_SMALLEST) / 127
            centre = middle
        # The half that it begins with rounds: what follows cuts off.
        numbers = torch.addcmul(centre, flat, 1 / scale).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            numbers, 1.0, zero, packed, weight_scale, no_offsets, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        product = torch.addcmul(shift, product, scale).view(*inputs.shape[:-1], rows)
        return product if activation is None else activation(product)

    return multiply


def choose_kernel(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    hidden_size: int = 768,
    has_openvino: bool | None = None,
) -> Kernel:
    """Who multiplies matrices.

    Args:
        device: where.
        dtype: in what.
        hidden_size: how wide the student is.
        has_openvino: whether it may be chosen; None: where the package is installed.

    Returns:
        `openvino` for float32 of a wide student on a CPU where the package is installed;
        `onednn` on a CPU whose torch has oneDNN for `dtype`; else `torch`, its own products.
    """
    if device.type != "cpu":
        return "torch"
    wide = hidden_size >= _OPENVINO_LEAST_WIDTH
    if has_openvino is None:
        has_openvino = importlib.util.find_spec("openvino") is not None
    if dtype is torch.float32 and wide and has_openvino:
        return "openvino"
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
    if not has_onednn:
        return "torch"
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "torch"
    return "onednn"
