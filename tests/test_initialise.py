"""Students before their training: what they take from a teacher, and fresh ones."""

import itertools

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

from student.checkpoint import read_checkpoint
from student.labels import Label, audioset_labels
from student.model import Student
from training.initialise import (
    evenly_spread,
    fresh_student,
    layers_of,
    sine_positions,
    student_from_teacher,
)

TINY = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_mel_bins": 32,
    "max_length": 64,
    "patch_size": 16,
    "frequency_stride": 16,
    "time_stride": 16,
}
LABELS = audioset_labels()[:5]


@pytest.fixture
def teacher():
    """A teacher of 4 layers whose every weight is random, norms and biases too."""
    torch.manual_seed(5)
    model = ASTForAudioClassification(
        ASTConfig(
            **TINY,
            num_hidden_layers=4,
            id2label={label.index: label.name for label in LABELS},
            label_mids=[label.mid for label in LABELS],
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


@pytest.fixture
def fresh():
    def make(**other):
        torch.manual_seed(6)
        return fresh_student(**{**TINY, "num_hidden_layers": 2, "labels": LABELS, **other})

    return make


def named(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (0, 2), (1, 3), (3,)])
def test_a_student_has_the_named_layers_and_all_else_bit_for_bit(teacher, layers):
    before = named(teacher)
    student = student_from_teacher(teacher, layers)
    ours, theirs = layers_of(student), layers_of(teacher)
    assert len(ours) == len(layers)
    for layer, index in zip(ours, layers, strict=True):
        assert same(named(layer), named(theirs[index]))
    for part in ("embeddings", "layernorm"):
        assert same(
            named(getattr(student.audio_spectrogram_transformer, part)),
            named(getattr(teacher.audio_spectrogram_transformer, part)),
        )
    assert same(named(student.classifier), named(teacher.classifier))
    assert same(named(teacher), before)


def test_a_student_of_all_layers_gives_the_teachers_logits(teacher):
    inputs = torch.randn(3, 64, 32)
    student = student_from_teacher(teacher, range(4)).eval()
    with torch.inference_mode():
        assert torch.equal(student(inputs).logits, teacher(inputs).logits)
        assert not torch.allclose(
            student_from_teacher(teacher, [0, 1, 2]).eval()(inputs).logits, teacher(inputs).logits
        )


def test_a_students_config_is_the_teachers_but_for_its_depth(teacher):
    teacher.config.problem_type = None  # as MIT's checkpoint has it
    student = student_from_teacher(teacher, [0, 3])
    assert student.config.num_hidden_layers == 2
    assert student.config.problem_type == "multi_label_classification"
    assert student.config.id2label == teacher.config.id2label
    assert student.config.label_mids == [label.mid for label in LABELS]
    assert student.config.hidden_size == teacher.config.hidden_size
    assert (teacher.config.num_hidden_layers, teacher.config.problem_type) == (4, None)


def test_training_a_student_leaves_its_frozen_teacher_alone(teacher):
    teacher.requires_grad_(False)
    before = named(teacher)
    student = student_from_teacher(teacher, [0, 3])
    assert student.training and not teacher.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    student(torch.randn(2, 64, 32), labels=torch.ones(2, 5)).loss.backward()
    torch.optim.SGD(student.parameters(), lr=1.0).step()
    assert same(named(teacher), before)


def test_a_student_keeps_the_teachers_dtype(teacher):
    student = student_from_teacher(teacher.to(torch.bfloat16), [0, 3])
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}


def test_a_teacher_loads_from_either_naming_and_so_does_its_student(teacher, tmp_path):
    """Files have old names or new ones; transformers reads both, whichever it has in memory."""
    teacher.save_pretrained(tmp_path / "a")
    written = load_file(tmp_path / "a" / "model.safetensors")
    old = {old_name(name): tensor for name, tensor in written.items()}
    new = named(teacher)  # as transformers has it in memory
    expected = student_from_teacher(teacher, [0, 3])
    for number, tensors in enumerate([old, new]):
        folder = tmp_path / str(number)
        teacher.config.save_pretrained(folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        loaded, report = ASTForAudioClassification.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        student = student_from_teacher(loaded, [0, 3])
        assert same(named(student), named(expected))

        student.save_pretrained(folder / "student")
        again, report = ASTForAudioClassification.from_pretrained(
            folder / "student", output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert same(named(again), named(expected))
    assert "audio_spectrogram_transformer.encoder.layer.3.attention.attention.query.weight" in old
    with safe_open(tmp_path / "0" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(old)


def old_name(name):
    """The name that a file of transformers 4 gives to a weight; one that is old stays."""
    for ours, theirs in {
        "transformer.layers.": "transformer.encoder.layer.",
        "attention.q_proj.": "attention.attention.query.",
        "attention.k_proj.": "attention.attention.key.",
        "attention.v_proj.": "attention.attention.value.",
        "attention.o_proj.": "attention.output.dense.",
        "mlp.fc1.": "intermediate.dense.",
        "mlp.fc2.": "output.dense.",
    }.items():
        name = name.replace(ours, theirs)
    return name


def test_the_layers_are_found_under_another_name(teacher):
    inner = teacher.audio_spectrogram_transformer
    layers = layers_of(teacher)
    inner.encoder = nn.Module()
    inner.encoder.layer = layers
    for name, module in list(inner.named_children()):
        if module is layers:
            delattr(inner, name)
    assert layers_of(teacher) is layers


def test_a_model_without_one_list_of_layers_is_refused(teacher):
    teacher.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="0 lists of 7 modules"):
        layers_of(teacher)


def test_a_wrapped_teacher_is_refused(teacher):
    teacher.classifier.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'classifier\.extra\.\w+' is only in the teacher"):
        student_from_teacher(teacher, [0])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "no teacher layers were given: name at least one of 0 to 3"),
        ([0, 4], "teacher layers 0 4: the teacher has no layer 4, its 4 layers are 0 to 3"),
        ([-1], "the teacher has no layer -1"),
        ([0, 2, 2], "teacher layers 0 2 2: 2 comes twice"),
        ([0, 3, 1], "teacher layers 0 3 1: 1 comes after 3"),
    ],
)
def test_layers_that_cannot_be_taken_are_refused(teacher, layers, message):
    with pytest.raises(ValueError, match=message):
        student_from_teacher(teacher, layers)


def test_layers_are_spread_with_the_last_kept():
    assert evenly_spread(12, 6) == (0, 2, 4, 6, 8, 11)
    assert evenly_spread(12, 1) == (11,)
    assert evenly_spread(12, 2) == (0, 11)
    for of in range(1, 25):
        for n in range(1, of + 1):
            spread = evenly_spread(of, n)
            assert len(spread) == n and spread[-1] == of - 1
            assert all(before < after for before, after in itertools.pairwise(spread))
    for n in range(2, 13):
        assert evenly_spread(12, n) == tuple(np.linspace(0, 11, n, dtype=int))


@pytest.mark.parametrize("layers", [0, 13])
def test_more_layers_than_the_teachers_cannot_be_spread(layers):
    with pytest.raises(ValueError, match=f"a student of {layers} layers .* take 1 to 12"):
        evenly_spread(12, layers)


def test_the_published_sizes():
    """86.6 M and 44.1 M: MIT's AST and bookbot's Distil-AST."""
    with torch.device("meta"):
        teacher = ASTForAudioClassification(ASTConfig(num_labels=527))
        student = student_from_teacher(teacher, (0, 2, 4, 6, 8, 10))
    assert sum(p.numel() for p in teacher.parameters()) == 86_594_063
    assert sum(p.numel() for p in student.parameters()) == 44_066_831


@pytest.mark.parametrize("mimetic", [False, True])
def test_a_fresh_student_is_repeatable_and_begins_at_the_prior(fresh, mimetic):
    student = fresh(mimetic=mimetic, prior=0.01)
    assert same(named(student), named(fresh(mimetic=mimetic, prior=0.01)))
    with torch.inference_mode():
        scores = student(torch.randn(8, 64, 32)).logits.sigmoid()
    assert scores.mean().item() == pytest.approx(0.01, rel=0.1)


def test_each_label_may_have_a_prior_of_its_own(fresh):
    rates = [0.5, 0.1, 0.01, 0.001, 0.9]
    bias = fresh(prior=rates).classifier.dense.bias
    assert bias.sigmoid().tolist() == pytest.approx(rates)


def test_a_fresh_student_is_a_checkpoint_that_earmark_loads(fresh, tmp_path):
    fresh().save_pretrained(tmp_path)
    ASTFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(tmp_path)
    assert read_checkpoint(str(tmp_path)).labels == LABELS
    assert Student.load(str(tmp_path), device="cpu").score([np.zeros(8_000)]).shape == (1, 5)
    assert (
        ASTConfig.from_pretrained(tmp_path).problem_type == "multi_label_classification"
        and ASTConfig.from_pretrained(tmp_path).intermediate_size == 32
    )
    assert fresh(intermediate_size=None).config.intermediate_size == 4 * 16


def test_both_tokens_of_a_fresh_student_learn_something_of_their_own(fresh):
    student = fresh()
    student(torch.randn(2, 64, 32), labels=torch.ones(2, 5)).loss.backward()
    embeddings = student.audio_spectrogram_transformer.embeddings
    assert not torch.allclose(embeddings.cls_token.grad, embeddings.distillation_token.grad)


def test_positions_are_nearest_to_their_neighbours_and_lie_as_the_patches_do(fresh):
    bands, spans = 5, 20
    positions = sine_positions(bands, spans, 64)
    assert positions.std(correction=0).item() == pytest.approx(0.02)
    grid = positions.view(bands, spans, 64)
    assert torch.equal(grid[:1, :, :32].expand(bands, spans, 32), grid[..., :32])  # time
    assert torch.equal(grid[:, :1, 32:].expand(bands, spans, 32), grid[..., 32:])  # frequency
    likeness = (positions @ positions.T).view(bands, spans, bands, spans)[2, 10]
    assert likeness.argmax() == 2 * spans + 10
    assert (likeness[2, 10:15].diff() < 0).all() and (likeness[2:, 10].diff() < 0).all()

    # Patches come band by band: the second is of the next span, not of the next band.
    student = fresh()
    placed = student.audio_spectrogram_transformer.embeddings.position_embeddings[0]
    assert torch.equal(placed[2:], sine_positions(2, 4, 16))
    assert not placed[:2].any()
    projection = student.audio_spectrogram_transformer.embeddings.patch_embeddings
    lit = torch.zeros(1, 64, 32)
    lit[0, 16:32, :16] = 1.0  # the second span of the first band
    moved = (projection(lit) - projection(torch.zeros(1, 64, 32)))[0].abs().sum(1)
    assert moved.nonzero().flatten().tolist() == [1]


def test_mimetic_attention_has_the_diagonals_of_the_paper(fresh):
    width, heads = 64, 4
    student = fresh(hidden_size=width, num_attention_heads=heads, mimetic=True)
    plain = fresh(hidden_size=width, num_attention_heads=heads)
    for layer, other in zip(layers_of(student), layers_of(plain), strict=True):
        attention = layer.attention
        through = attention.v_proj.weight.T @ attention.o_proj.weight.T
        assert through.diagonal().mean().item() == pytest.approx(-0.4, abs=0.04)
        off = through[~torch.eye(width, dtype=bool)]
        assert off.std().item() == pytest.approx(0.4 / width**0.5, rel=0.1)
        for head in range(heads):
            rows = slice(head * width // heads, (head + 1) * width // heads)
            product = attention.q_proj.weight[rows].T @ attention.k_proj.weight[rows]
            assert torch.linalg.matrix_rank(product) == width // heads
            assert product.diagonal().mean() > 0.25  # a quarter of the rank, the largest of it
        assert not attention.q_proj.bias.any()
        assert (other.attention.v_proj.weight.T @ other.attention.o_proj.weight.T).std() < 0.01


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"hidden_size": 190, "num_attention_heads": 3},
            "hidden_size 190 .* num_attention_heads 3: .* take 192",
        ),
        ({"hidden_size": 18}, "hidden_size 18 .* take 20"),
        ({"hidden_size": 4}, "hidden_size 4 .* take 8"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected at least 1"),
        ({"time_stride": -1}, "time_stride is -1"),
        ({"patch_size": 33}, "patch_size 33 is larger than num_mel_bins 32"),
        ({"patch_size": 16, "max_length": 10}, "patch_size 16 is larger than max_length 10"),
        ({"prior": 0.0}, r"prior holds 0\.0"),
        ({"prior": float("nan")}, "prior holds nan"),
        ({"prior": [0.1, 0.1, 1.0, 0.1, 0.1]}, r"prior holds 1\.0"),
        ({"prior": [0.1]}, r"prior has shape \(1,\), expected one rate or 5"),
        ({"labels": ()}, "the 0 labels"),
        ({"labels": LABELS[1:]}, "the 4 labels must be in the order"),
        ({"labels": (Label(0, "", "A"), Label(1, "", "A"))}, "names 'A' more than once"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fresh, wrong, message):
    with pytest.raises(ValueError, match=message):
        fresh(**wrong)
