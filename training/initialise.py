"""Students before their training: layers taken from a teacher, or fresh ones.

Nothing here names a parameter of a layer. The layers are the one list of modules that is
as long as `config.num_hidden_layers`, because transformers has renamed what is in them
and may again; the names in a file on disk are `from_pretrained`'s business.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import ASTConfig, ASTForAudioClassification

from student.labels import Label, checkpoint_labels

MULTI_LABEL = "multi_label_classification"

# AST's own deviation for a fresh weight, and that of its fresh position embeddings.
INITIALISER_STD = 0.02
# The longest wave of a position embedding is 2 pi times this many patches.
POSITION_TEMPERATURE = 10_000.0

# Of Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (2023,
# arXiv 2305.09828): how much noise, and how much of the identity, in a product of weights.
MIMETIC_QUERY_KEY = (0.7, 0.7)
MIMETIC_VALUE_OUTPUT = (0.4, -0.4)


def evenly_spread(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """Which layers of a teacher a student takes when none are named.

    Layer j of n is `floor(j * (teacher_layers - 1) / (n - 1))`: from the first to the last in
    equal steps, rounded down. The last is kept, since the final norm and the head were
    trained on what it gives. A single layer is the teacher's last.

    >>> evenly_spread(12, 6)
    (0, 2, 4, 6, 8, 11)

    Distil-Whisper takes the same: numpy's linspace cut to integers, with the last one set
    (`training/create_student_model.py` of huggingface/distil-whisper).

    Raises:
        ValueError: there are not 1 to `teacher_layers` layers to take.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(
            f"a student of {student_layers} layers cannot be taken from a teacher of "
            f"{teacher_layers}: take 1 to {teacher_layers}"
        )
    if student_layers == 1:
        return (teacher_layers - 1,)
    return tuple(j * (teacher_layers - 1) // (student_layers - 1) for j in range(student_layers))


def student_from_teacher(
    teacher: ASTForAudioClassification, layers: Sequence[int]
) -> ASTForAudioClassification:
    """A new model with some of a teacher's layers, and all else of it, bit for bit.

    Args:
        teacher: stays as it is; its device and dtype are also the student's.
        layers: which of its layers, counted from 0, ascending: the student's layer j is the
            teacher's `layers[j]`.

    Returns:
        The student, every weight trainable, in training mode. Its config is the teacher's but
        for `num_hidden_layers`, and for `problem_type`, which is multi-label.

    Raises:
        ValueError: `layers` is empty, names a layer that the teacher lacks, or is not
            ascending.
    """
    theirs = layers_of(teacher)
    layers = tuple(layers)
    _check_layers(layers, len(theirs))

    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layers)
    config.problem_type = MULTI_LABEL
    student = ASTForAudioClassification(config)
    weight = next(teacher.parameters())
    student.to(device=weight.device, dtype=weight.dtype)

    ours = layers_of(student)
    within = _name_of(student, ours) + "."
    rest = {
        name: tensor
        for name, tensor in teacher.state_dict().items()
        if not name.startswith(_name_of(teacher, theirs) + ".")
    }
    loaded = student.load_state_dict(rest, strict=False)
    left = [name for name in loaded.missing_keys if not name.startswith(within)]
    if left or loaded.unexpected_keys:
        name = (left + loaded.unexpected_keys)[0]
        raise ValueError(
            f"the teacher is no plain ASTForAudioClassification: {name!r} is only in "
            f"{'the student' if left else 'the teacher'}; load it with "
            "ASTForAudioClassification.from_pretrained"
        )
    for layer, index in zip(ours, layers, strict=True):
        layer.load_state_dict(theirs[index].state_dict())
    return student.train()


def _check_layers(layers: Sequence[int], count: int) -> None:
    """Raises ValueError where `layers` cannot be taken from a teacher of `count` layers."""
    shown = " ".join(map(str, layers))
    if not layers:
        raise ValueError(
            f"no teacher layers were given: name at least one of 0 to {count - 1}, "
            f"for instance {' '.join(map(str, evenly_spread(count, (count + 1) // 2)))}"
        )
    for index in layers:
        if not 0 <= index < count:
            raise ValueError(
                f"teacher layers {shown}: the teacher has no layer {index}, "
                f"its {count} layers are 0 to {count - 1}"
            )
    for before, after in itertools.pairwise(layers):
        if before >= after:
            fault = "twice" if before == after else f"after {before}"
            raise ValueError(
                f"teacher layers {shown}: {after} comes {fault}; a layer is trained on what the "
                "ones before it give, so name each once, in ascending order"
            )


def layers_of(model: ASTForAudioClassification) -> nn.ModuleList:
    """The transformer layers of a model, first to last, whatever transformers calls them.

    Raises:
        ValueError: no list of modules, or more than one, is `config.num_hidden_layers` long.
    """
    count = model.config.num_hidden_layers
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} lists of {count} modules, expected one, "
            "its num_hidden_layers layers: it is no AST that transformers made"
        )
    return found[0]


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def fresh_student(
    *,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    patch_size: int,
    frequency_stride: int,
    time_stride: int,
    num_mel_bins: int,
    max_length: int,
    labels: Sequence[Label],
    intermediate_size: int | None = None,
    prior: float | Sequence[float] = 0.003,
    mimetic: bool = False,
) -> ASTForAudioClassification:
    """A student that has learned nothing, with weights to begin on little data from.

    What differs from transformers' fresh AST, in which positions and both tokens are zero:
    a position embedding says where its patch is; the class and the distillation token differ,
    since equal ones would have equal gradients and stay one token; and every score begins
    at `prior`, not at 0.5, so that no steps are spent on learning that labels are rare.

    Random numbers are torch's: `torch.manual_seed` before it makes it repeatable.

    Args:
        hidden_size: width, a multiple of `num_attention_heads` and of 4.
        num_hidden_layers: depth.
        num_attention_heads: heads in each layer.
        patch_size: side of a patch, in mel bins and in frames.
        frequency_stride: mel bins from one patch to the next.
        time_stride: frames from one patch to the next.
        num_mel_bins: mel bins of the input.
        max_length: frames of the input.
        labels: in the order of the scores.
        intermediate_size: width of the layers' MLPs; 4 times `hidden_size` by default.
        prior: the score that a label begins with: the targets' mean rate, of all labels or
            one a label, within (0, 1). 0.003 is about AudioSet's: 2.5 of 527 labels a clip
            are 0.0048, and most labels are rarer.
        mimetic: attention weights whose products resemble those of trained models
            (Trockman and Kolter 2023, arXiv 2305.09828).

    Raises:
        ValueError: a number that cannot be, or labels that `checkpoint_labels` refuses.
    """
    _check_shape(
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        patch_size=patch_size,
        frequency_stride=frequency_stride,
        time_stride=time_stride,
        num_mel_bins=num_mel_bins,
        max_length=max_length,
        intermediate_size=4 * hidden_size if intermediate_size is None else intermediate_size,
    )
    if [label.index for label in labels] != list(range(len(labels))) or not labels:
        raise ValueError(
            f"the {len(labels)} labels must be in the order of their indices, from 0 without gaps"
        )
    id2label = {label.index: label.name for label in labels}
    mids = [label.mid for label in labels]
    checkpoint_labels(id2label, mids)  # what cannot be read back must not be written
    bias = _logit_of(prior, len(labels))

    model = ASTForAudioClassification(
        ASTConfig(
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            intermediate_size=4 * hidden_size if intermediate_size is None else intermediate_size,
            initializer_range=INITIALISER_STD,
            patch_size=patch_size,
            frequency_stride=frequency_stride,
            time_stride=time_stride,
            num_mel_bins=num_mel_bins,
            max_length=max_length,
            id2label=id2label,
            label2id={name: index for index, name in id2label.items()},
            label_mids=mids,
            problem_type=MULTI_LABEL,
        )
    )
    embeddings = model.audio_spectrogram_transformer.embeddings
    bands = (num_mel_bins - patch_size) // frequency_stride + 1
    spans = (max_length - patch_size) // time_stride + 1
    with torch.no_grad():
        for token in (embeddings.cls_token, embeddings.distillation_token):
            token.normal_(std=INITIALISER_STD)
        # The two tokens come first; they have no place in the spectrogram.
        embeddings.position_embeddings[0, 2:] = sine_positions(bands, spans, hidden_size)
        model.classifier.dense.bias.copy_(bias)
        if mimetic:
            for layer in layers_of(model):
                _make_mimetic(layer.attention, num_attention_heads)
    return model


def _check_shape(**sizes: int) -> None:
    """Raises ValueError where no AST of these sizes can be."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, expected at least 1")
    hidden_size, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    step = math.lcm(4, heads)
    if hidden_size % step or hidden_size < 8:
        fitting = max(-(-hidden_size // step), -(-8 // step)) * step
        raise ValueError(
            f"hidden_size {hidden_size} does not fit num_attention_heads {heads}: it must be a "
            "multiple of the heads, which share it, and of 4, as the position embeddings are a "
            "sine and a cosine along each of time and frequency, and at least 8; "
            f"take {fitting}"
        )
    for name in ("num_mel_bins", "max_length"):
        if sizes["patch_size"] > sizes[name]:
            raise ValueError(
                f"patch_size {sizes['patch_size']} is larger than {name} {sizes[name]}: not one "
                "patch fits into the input"
            )


def _logit_of(prior: float | Sequence[float], count: int) -> torch.Tensor:
    """The logits of `prior`, float32 [count]."""
    rates = torch.as_tensor(prior, dtype=torch.float64)
    if rates.ndim and rates.shape != (count,):
        raise ValueError(f"prior has shape {tuple(rates.shape)}, expected one rate or {count}")
    impossible = rates[~((rates > 0) & (rates < 1))]
    if len(impossible):
        raise ValueError(
            f"prior holds {impossible[0].item()}, expected rates above 0 and below 1; a label that "
            "no clip has needs a small rate too, such as 1 / clips"
        )
    return torch.logit(rates).float().expand(count)


def sine_positions(
    bands: int, spans: int, width: int, std: float = INITIALISER_STD
) -> torch.Tensor:
    """Position embeddings of a grid of patches, float32 [bands * spans, width], band by band.

    A quarter of the width each is the sine and the cosine of the place in time, and of that in
    frequency, from short waves to long: those of Beyer, Zhai and Kolesnikov, "Better plain
    ViT baselines for ImageNet-1k" (2022, arXiv 2205.01580). The whole is then scaled to a
    deviation of `std`, for the embeddings of patches begin small as well.
    """
    quarter = width // 4
    rates = POSITION_TEMPERATURE ** -(torch.arange(quarter) / (quarter - 1))
    band, span = torch.meshgrid(torch.arange(bands), torch.arange(spans), indexing="ij")
    along_time, along_frequency = span.flatten()[:, None] * rates, band.flatten()[:, None] * rates
    positions = torch.cat(
        [along_time.sin(), along_time.cos(), along_frequency.sin(), along_frequency.cos()], dim=1
    )
    return positions * (std / positions.std(correction=0))


def _make_mimetic(attention: nn.Module, heads: int) -> None:
    """Sets the weights of one layer's attention; its biases stay as they are, at zero.

    In a trained ViT, W_q W_k^T of a head has a positive diagonal (a token attends to what
    is like it) and W_v W_o of the layer a negative one. Each product is drawn as noise plus a
    share of the identity and split by its singular values. A head is narrower than the model,
    so that its query and key can carry only the largest of them.
    """
    # In this order in every version of transformers, under changing names.
    query, key, value, output = (m for m in attention.modules() if isinstance(m, nn.Linear))
    width = output.out_features
    head = width // heads
    for index in range(heads):
        left, right = _split(_noisy_identity(width, *MIMETIC_QUERY_KEY), head)
        # torch's weights are [out, in]: the transposes of the W of the formulas.
        query.weight[index * head : (index + 1) * head] = left.T.to(query.weight)
        key.weight[index * head : (index + 1) * head] = right.to(key.weight)
    left, right = _split(_noisy_identity(width, *MIMETIC_VALUE_OUTPUT), width)
    value.weight.copy_(left.T)
    output.weight.copy_(right.T)


def _noisy_identity(width: int, noise: float, identity: float) -> torch.Tensor:
    """`noise` Z + `identity` I, float32 [width, width], where Z is normal of variance 1 / width."""
    drawn = torch.randn(width, width) / math.sqrt(width)
    return noise * drawn + identity * torch.eye(width)


def _split(product: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors, [width, rank] and [rank, width], whose product is nearest to `product`."""
    left, values, right = torch.linalg.svd(product)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
