"""The model card that a training writes."""

import ast
import contextlib
import dataclasses
import io
import itertools
import math
import re

import huggingface_hub
import numpy as np
import pytest
import soundfile
import yaml
from markdown_it import MarkdownIt
from transformers import ASTFeatureExtractor, logging

from evaluation.metrics import CardMetrics, FieldMetrics
from pipeline.cli import cli
from student.feature_spec import FeatureSpec
from student.labels import Label, audioset_labels
from training.initialise import fresh_student
from training.model_card import (
    Data,
    Evaluation,
    ModelCard,
    ModelFacts,
    model_card,
    model_facts,
    write_model_card,
)

CARD = ModelCard(
    title="six-layers",
    student=ModelFacts("six-layers", 44_066_831, "AST: 6 layers"),
    teacher=ModelFacts("MIT/ast-finetuned-audioset-10-10-0.4593", 86_594_063, "AST: 12 layers"),
    base_model="MIT/ast-finetuned-audioset-10-10-0.4593",
    teacher_layers=(0, 2, 4, 6, 8, 11),
    labels=audioset_labels(),
    features=FeatureSpec(),
    licence="apache-2.0",
    preset="distil-ast",
    hyperparameters={
        "learning_rate": 3e-5,
        "betas": (0.9, 0.999),
        "teacher_layers": (0, 2, 4, 6, 8, 11),
        "fp16": True,
        "max_steps": None,
        "schedule": "linear",
    },
    data=(
        Data("corpus", "training", 2_400, "CC0 and CC BY", audio_s=9_000),
        Data("corpus, fold 4", "validation", 80),
    ),
    skipped={"no score of the teacher": 3, "DecodeError": 1_200},
    epochs=(
        {"epoch": 1, "step": 153, "training_loss": 1.5521, "validation_loss": 0.7759, "f1": 0.3929},
        {"epoch": 2.0, "step": 306, "training_loss": 0.7088, "mAP": math.nan, "accuracy": 0.0},
    ),
    evaluated_on="corpus, fold 4",
    evaluated_clips=80,
    evaluation=Evaluation(
        CardMetrics(0.48761, 0.714, 0.0714, 0.4743),
        FieldMetrics(0.39, 0.95, 2.3, 0.46, 0.6, labels=211),
    ),
    teacher_evaluation=Evaluation(
        CardMetrics(0.4989, 0.6905, 0.1247, 0.5603),
        FieldMetrics(0.459, 0.97856, math.inf, 0.545, math.nan, labels=211),
    ),
    own_thresholds=True,
    curves="training_curves.png",
    attribution="ATTRIBUTION.md",
    versions={"Transformers": "5.23.0", "torch": "2.13.0+cpu"},
)
BARE = ModelCard(
    title="bare",
    student=ModelFacts("bare"),
    labels=(Label(0, "", "bark"), Label(1, "", "purr")),
    features=FeatureSpec(),
    preset="consistent",
    hyperparameters={},
    data=(),
    epochs=(),
    versions={},
)
HOSTILE = [
    "a|b",
    "a | b ||",
    r"back\slash\|",
    "`code` **bold** _under_ ~~gone~~",
    "[link](http://example.org) ![picture](x) [x]: y",
    "<script>alert(1)</script> &amp; &lt;",
    "# heading",
    "- item",
    "1. item",
    "```",
    "a: b: {c} [d] 'e' \"f\" %g @h !i",
    "--- x",
    "$x$ snake_case __init__",
    "Übung 音 🔊",
    "null",
]


def front_matter(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL).group(1))


def tables(text):
    """The cells of each table, header first, as a reader sees them."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(without_front_matter(text)):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append("")
        elif token.type == "inline" and found and found[-1][-1][-1:] == [""]:
            found[-1][-1][-1] = shown(token)
    return found


def shown(inline):
    return "".join(
        child.content if child.type in ("text", "text_special") else f"<{child.type}>"
        for child in inline.children
    )


def headings(text):
    tokens = MarkdownIt("commonmark").enable("table").parse(without_front_matter(text))
    return [
        (token.tag, shown(inline))
        for token, inline in itertools.pairwise(tokens)
        if token.type == "heading_open"
    ]


def without_front_matter(text):
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)


def assert_is_sound(text):
    """Front matter that parses, and tables whose rows have as many cells as their header."""
    assert huggingface_hub.ModelCard(text).data.to_dict() == front_matter(text)
    lines = without_front_matter(text).splitlines()
    width = None
    for line in lines:
        cells = len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) - 1 if line.startswith("|") else None
        assert cells is None or width is None or cells == width, line
        width = cells
    assert "None" not in text and "nan" not in text


@pytest.mark.parametrize("card", [CARD, BARE], ids=["full", "bare"])
def test_a_card_is_sound(card):
    assert_is_sound(model_card(card))


def test_the_front_matter_states_what_the_hub_wants():
    data = huggingface_hub.ModelCard(model_card(CARD)).data
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "audio-classification"
    assert data.tags == ["audio", "audioset", "distillation"]
    assert data.metrics == ["f1", "roc_auc", "accuracy", "mAP"]
    assert data.base_model == "MIT/ast-finetuned-audioset-10-10-0.4593"
    assert data.model_name == "six-layers"
    assert [(r.metric_type, r.metric_value, r.dataset_name) for r in data.eval_results] == [
        ("f1", 0.4876, "corpus, fold 4"),
        ("roc_auc", 0.714, "corpus, fold 4"),
        ("accuracy", 0.0714, "corpus, fold 4"),
        ("mAP", 0.4743, "corpus, fold 4"),
    ]


def test_the_sections_are_those_of_the_published_card_and_more():
    assert headings(model_card(CARD)) == [
        ("h1", "six-layers"),
        ("h2", "Model"),
        ("h2", "Evaluation results"),
        ("h2", "How to use it"),
        ("h2", "Training"),
        ("h3", "Data"),
        ("h3", "Training hyperparameters"),
        ("h3", "Training results"),
        ("h2", "Disclaimer"),
        ("h3", "Framework versions"),
    ]


def test_the_tables_hold_the_facts():
    assert tables(model_card(CARD)) == [
        [
            ["Model", "#params", "Arch.", "Training/Validation data"],
            [
                "six-layers",
                "44,066,831",
                "AST: 6 layers",
                "corpus (training, 2,400 clips); corpus, fold 4 (validation, 80 clips)",
            ],
            [
                "MIT/ast-finetuned-audioset-10-10-0.4593",
                "86,594,063",
                "AST: 12 layers",
                "not stated here",
            ],
        ],
        [
            ["Model", "F1", "ROC AUC", "Accuracy", "mAP"],
            ["six-layers", "0.4876", "0.7140", "0.0714", "0.4743"],
            ["MIT/ast-finetuned-audioset-10-10-0.4593", "0.4989", "0.6905", "0.1247", "0.5603"],
        ],
        [
            ["Model", "macro mAP", "macro AUC", "d'", "weighted mAP", "lwlrap"],
            ["six-layers", "0.3900", "0.9500", "2.3000", "0.4600", "0.6000"],
            ["MIT/ast-finetuned-audioset-10-10-0.4593", "0.4590", "0.9786", "inf", "0.5450", "-"],
        ],
        [
            ["Data", "Use", "Clips", "Hours", "Licence"],
            ["corpus", "training", "2,400", "2.50", "CC0 and CC BY"],
            ["corpus, fold 4", "validation", "80", "-", "not stated"],
        ],
        [
            # Its words are those of Trainer's own cards.
            "Training Loss,Epoch,Step,Validation Loss,F1,Roc Auc,Accuracy,Map".split(","),
            ["1.5521", "1", "153", "0.7759", "0.3929", "-", "-", "-"],
            ["0.7088", "2", "306", "-", "-", "-", "0.0000", "-"],
        ],
    ]


def test_the_text_says_how_it_was_made():
    text = model_card(CARD)
    for part in [
        "layers 0 2 4 6 8 11, counted from 0",
        "teacher, MIT/ast-finetuned-audioset-10-10-0.4593.",
        "16,000 Hz, 128 mel bins, 1,024 frames (10.24 s)",
        "Measured on corpus, fold 4, 80 clips.",
        "not on AudioSet's usual scale",
        "the 211 of 527 labels that have a positive",
        "Preset distil-ast",
        "- learning_rate: 3e-05\n- betas: 0.9 0.999\n- teacher_layers: 0 2 4 6 8 11\n- fp16: yes\n"
        "- max_steps: none\n- schedule: linear\n",
        "1,203 clips were skipped:\n\n- 3: no score of the teacher\n- 1,200: DecodeError\n",
        "![Losses and metrics by epoch](<training_curves.png>)",
        "by source: ATTRIBUTION.md.",
        "- Transformers 5.23.0\n- torch 2.13.0+cpu\n",
        "their threshold in `thresholds.json`",
    ]:
        assert part in text


def test_what_was_not_measured_is_said_and_not_made_up():
    text = model_card(BARE)
    for part in [
        "2 labels",
        "No teacher of it is stated. Its training began from fresh weights.",
        "This student has not been evaluated.",
        "The data are not stated.",
        "No clip was skipped.",
        "No epoch was recorded.",
        "They are not stated.",
        "states no thresholds",
    ]:
        assert part in text
    data = front_matter(text)
    assert set(data) == {"library_name", "pipeline_tag", "tags"} and data["tags"] == ["audio"]
    assert "AudioSet" not in text
    assert [table[1] for table in tables(text)] == [["bare", "-", "-", "not stated"]]


def test_a_teacher_that_was_not_evaluated_has_no_row():
    half = Evaluation(field=CARD.teacher_evaluation.field)
    text = model_card(dataclasses.replace(CARD, teacher_evaluation=half))
    assert_is_sound(text)
    assert [len(table) for table in tables(text)] == [3, 2, 3, 3, 3]
    assert text.count("The teacher was not measured on these clips") == 1
    text = model_card(dataclasses.replace(CARD, teacher_evaluation=None))
    assert text.count("The teacher was not measured on these clips") == 2


def test_stored_scores_are_named_and_may_be_measured():
    card = dataclasses.replace(
        CARD, teacher=None, base_model=None, teacher_layers=None, teacher_scores="scores/teacher"
    )
    text = model_card(card)
    assert_is_sound(text)
    assert "learned to give were stored before: scores/teacher. Its training began from" in text
    assert "distillation" in front_matter(text)["tags"]
    assert [table[-1][0] for table in tables(text)[:3]] == ["six-layers"] + ["scores/teacher"] * 2
    text = model_card(dataclasses.replace(card, teacher_evaluation=None))
    assert text.count("The teacher was not measured on these clips") == 2


def test_a_revision_is_no_part_of_a_base_model():
    text = model_card(dataclasses.replace(CARD, base_model="MIT/ast@main"))
    assert front_matter(text)["base_model"] == "MIT/ast"


def test_a_kind_of_metrics_that_was_not_measured_is_said():
    only = Evaluation(field=CARD.evaluation.field)
    text = model_card(dataclasses.replace(CARD, evaluation=only))
    assert_is_sound(text)
    assert "F1, ROC AUC, Accuracy, mAP were not measured." in text
    assert "model-index" not in front_matter(text) and "metrics" not in front_matter(text)
    only = Evaluation(card=CARD.evaluation.card)
    text = model_card(dataclasses.replace(CARD, evaluation=only))
    assert "macro mAP, macro AUC, d', weighted mAP, lwlrap were not measured." in text


def test_a_metric_that_is_undefined_is_not_given_to_the_hub():
    undefined = Evaluation(card=CardMetrics(0.0, math.nan, 0.0, math.nan))
    text = model_card(dataclasses.replace(CARD, evaluation=undefined))
    assert_is_sound(text)
    assert front_matter(text)["metrics"] == ["f1", "accuracy"]
    assert tables(text)[1][1] == ["six-layers", "0.0000", "-", "0.0000", "-"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_as_they_are_whatever_is_in_them(name):
    card = dataclasses.replace(
        CARD,
        title=name,
        student=ModelFacts(name, 1, name),
        teacher=ModelFacts(name),
        teacher_scores=name,
        licence=name,
        preset=name,
        hyperparameters={"text": name},
        data=[Data(name, name, 1, name)],
        skipped={name: 1},
        evaluated_on=name,
        attribution=name,
        versions={"Framework": name},
        checkpoint=name,
        curves=name,
    )
    text = model_card(card)
    assert_is_sound(text)
    assert len(headings(text)) == len(headings(model_card(CARD)))
    assert headings(text)[0] == ("h1", name)
    models, ours, theirs, data, _ = tables(text)
    assert models[1] == [name, "1", name, f"{name} ({name}, 1 clips)"]
    assert [row[0] for row in models + ours + theirs][1:3] == [name, name]
    assert ours[1][0] == theirs[2][0] == name
    assert data[1] == [name, name, "1", "-", name]

    matter = front_matter(text)
    assert matter["license"] == name and matter["model-index"][0]["name"] == name
    tokens = MarkdownIt("commonmark").enable("table").parse(without_front_matter(text))
    lines = [shown(token) for token in tokens if token.type == "inline"]
    for line in [
        f"1: {name}",
        f"text: {name}",
        f"Framework {name}",
        f"Measured on {name}, 80 clips.",
    ]:
        assert line in lines
    python, _ = [token.content for token in tokens if token.type == "fence"]
    written = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.keyword)]
    assert [node.value.value for node in written if node.arg == "model"] == [name]


def test_line_breaks_and_bytes_that_are_no_text_stay_out(tmp_path):
    name = "a\n---\n\n# b\r\n| c\t\x00\x1b[0m\udcff\u2028d"
    card = dataclasses.replace(
        CARD, title=name, student=ModelFacts(name), data=[Data(name, "training", 1)], curves=name
    )
    text = write_model_card(tmp_path, card).read_text("utf-8")
    assert_is_sound(text)
    assert headings(text)[0] == ("h1", "a --- # b | c [0m d")
    assert len(headings(text)) == len(headings(model_card(CARD)))


def test_notes_are_markdown():
    card = dataclasses.replace(
        CARD, notes="**A demonstration.**\n", further_results="| a |\n|---|\n| 1 |\n"
    )
    text = model_card(card)
    assert "\n\n**A demonstration.**\n\n## Model" in text
    assert "\n\n| a |\n|---|\n| 1 |\n\n## How to use it" in text


@pytest.mark.parametrize("base_model", ["/home/me/teacher", "a/b/c", "has space", "", "@main"])
def test_a_base_model_that_is_no_hub_id_is_refused(tmp_path, base_model):
    with pytest.raises(ValueError, match=r"base_model .* is no Hugging Face id"):
        write_model_card(tmp_path, dataclasses.replace(CARD, base_model=base_model))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a fresh student of AudioSet's labels, and its model."""
    model = fresh_student(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=16,
        frequency_stride=16, time_stride=8, num_mel_bins=32, max_length=64,
        labels=audioset_labels(), prior=0.25,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    ASTFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(tmp_path)
    return tmp_path, model


def test_the_facts_of_a_model_are_its_own(checkpoint):
    _, model = checkpoint
    assert model_facts("x", model) == ModelFacts(
        "x",
        model.num_parameters(),
        "AST: 1 layers, 16 wide, 2 heads; 16 x 16 patches every 16 mel bins and 8 frames",
    )


def test_the_examples_run(checkpoint, monkeypatch):
    folder, _ = checkpoint
    monkeypatch.chdir(folder)
    soundfile.write("clip.wav", 0.1 * np.random.default_rng(0).standard_normal((8_000, 2)), 16_000)
    text = model_card(dataclasses.replace(CARD, checkpoint=str(folder)))
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    logging.set_verbosity_error()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "card", "exec"), {})
    lines = printed.getvalue().splitlines()
    names = {label.name for label in audioset_labels()}
    assert len(lines) == 5
    for line in lines:
        name, score = line.rsplit(" ", 1)
        assert name in names
        assert float(score) == pytest.approx(0.25, abs=0.1)  # a softmax would give 1 / 527

    command = re.search(r"\$ earmark annotate DATA (.*)\n", text).group(1)
    options = {option for item in cli.commands["annotate"].params for option in item.opts}
    assert (
        set(re.findall(r"--[a-z-]+", command.replace(str(folder), ""))) | {"--threshold"} <= options
    )
