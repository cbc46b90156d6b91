"""The two losses, against their formulas written out in numpy."""

import numpy as np
import pytest
import torch

from training.losses import LOSSES, sigmoid_bce, softmax_kl

CLIPS, LABELS = 5, 7


@pytest.fixture
def batch():
    """Logits, scores and labels of a few clips, of which two have no labels of their own."""
    random = np.random.default_rng(3)
    logits = random.normal(0, 3, (CLIPS, LABELS))
    scores = random.uniform(0.02, 0.98, (CLIPS, LABELS))
    truth = (random.random((CLIPS, LABELS)) < 0.3).astype(float)
    return logits, scores, truth, np.array([True, True, False, True, False])


def tensors(batch):
    return [torch.from_numpy(array) for array in batch]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)


def bce(logits, targets):
    """Binary cross-entropy, [clips, labels]."""
    p = sigmoid(logits)
    return -(targets * np.log(p) + (1 - targets) * np.log(1 - p))


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 2.0), (0.2, 1.0), (0.0, 4.0), (1.0, 2.0)])
def test_softmax_kl_is_its_formula(batch, alpha, temperature):
    logits, scores, truth, labelled = batch
    theirs = softmax(np.log(scores / (1 - scores)) / temperature)
    ours = softmax(logits / temperature)
    divergence = (theirs * np.log(theirs / ours)).sum(axis=1)
    expected = (1 - alpha) * temperature**2 * divergence
    expected += alpha * bce(logits, truth).mean(axis=1) * labelled

    loss = softmax_kl(*tensors(batch), alpha=alpha, temperature=temperature)

    assert loss.dtype == torch.float32 and loss.shape == (CLIPS,)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)


def test_softmax_kl_is_from_the_teacher_to_the_student():
    """KL(teacher || student): a label that only the teacher hears costs, the reverse does not."""
    heard, unheard = torch.tensor([[6.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    settings = {"truth": torch.zeros(1, 2), "labelled": torch.tensor([False])}
    settings |= {"alpha": 0.0, "temperature": 1.0}
    missed = float(softmax_kl(unheard, heard.sigmoid(), **settings))
    invented = float(softmax_kl(heard, unheard.sigmoid(), **settings))
    p = softmax(np.array([[6.0, 0.0]]))[0]
    assert missed == pytest.approx((p * np.log(p / 0.5)).sum(), rel=1e-4)
    assert invented == pytest.approx((0.5 * np.log(0.5 / p)).sum(), rel=1e-4)
    assert invented > 3 * missed


def test_softmax_kl_knows_differences_only():
    """What a softmax cannot tell: every logit of the student moved by the same."""
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    rest = {"truth": torch.zeros(1, 3), "labelled": torch.tensor([False])}
    losses = [
        float(softmax_kl(logits + shift, logits.sigmoid(), **rest, alpha=0.5, temperature=2.0))
        for shift in (0.0, 5.0)
    ]
    assert losses == pytest.approx([0.0, 0.0], abs=1e-5)
    levels = [
        float(sigmoid_bce(logits + shift, logits.sigmoid(), **rest, alpha=0.5, temperature=1.0))
        for shift in (0.0, 5.0)
    ]
    assert levels[1] > levels[0] + 1


@pytest.mark.parametrize(("alpha", "temperature"), [(0.1, 1.0), (0.5, 1.0), (0.3, 2.0), (1.0, 1.0)])
def test_sigmoid_bce_is_its_formula(batch, alpha, temperature):
    logits, scores, truth, labelled = batch
    soft = sigmoid(np.log(scores / (1 - scores)) / temperature)
    logits = logits / temperature
    expected = bce(logits, soft).sum(axis=1)
    mixed = (1 - alpha) * bce(logits, soft) + alpha * bce(logits, truth)  # two terms, as one
    expected[labelled] = mixed.sum(axis=1)[labelled]

    loss = sigmoid_bce(*tensors(batch), alpha=alpha, temperature=temperature)

    assert loss.dtype == torch.float32 and loss.shape == (CLIPS,)
    np.testing.assert_allclose(loss, expected * temperature**2, rtol=1e-4)


def test_sigmoid_bce_is_least_at_the_teachers_own_logits(batch):
    _, scores, truth, _ = tensors(batch)
    logits = torch.logit(scores).requires_grad_()
    unlabelled = torch.zeros(CLIPS, dtype=torch.bool)
    sigmoid_bce(logits, scores, truth, unlabelled, alpha=0.1, temperature=1.0).sum().backward()
    assert float(logits.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_clip_without_labels_learns_from_the_teacher_alone(batch, name, temperature):
    logits, scores, truth, labelled = tensors(batch)
    given = {"alpha": 0.4, "temperature": temperature}
    loss = LOSSES[name](logits, scores, truth, labelled, **given)
    other = LOSSES[name](logits, scores, 1 - truth, labelled, **given)
    torch.testing.assert_close(loss[~labelled], other[~labelled], rtol=0, atol=0)
    assert (loss[labelled] != other[labelled]).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scores_of_0_and_1_stay_finite(name, temperature, dtype):
    scores = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0] * 4, [1.0] * 4], dtype=dtype)
    logits = torch.tensor([[30.0, -30.0, -30.0, 30.0]] * 3, dtype=dtype, requires_grad=True)
    truth = torch.tensor([[1.0, 0.0, 0.0, 1.0]] * 3, dtype=dtype)
    labelled = torch.tensor([True, False, True])
    loss = LOSSES[name](logits, scores, truth, labelled, alpha=0.5, temperature=temperature)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all() and logits.grad.isfinite().all()
    # That the first two labels are as wrong as can be is still seen.
    assert float(loss[0].detach()) > 10
