"""What a student is told to come near to, in two forms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Scores come from Parquet, perhaps as float16: 0 and 1 have no logit.
_LEAST_SCORE = 1e-7


def softmax_kl(
    logits: Tensor,
    scores: Tensor,
    truth: Tensor,
    labelled: Tensor,
    *,
    alpha: float,
    temperature: float,
) -> Tensor:
    """The published recipe's loss, reconstructed: one number a clip, float32 [clips].

    `alpha * BCE(student, labels) + (1 - alpha) * T^2 * KL(teacher / T || student / T)`, where
    the first is the mean over the labels and the second is over the softmax of all labels.
    Its form is that of knowledge distillation for one label of many; with many labels a clip
    a softmax knows differences of logits only, and their level is left to the first term. A
    clip without labels of its own has only the second.

    Args:
        logits: of the student, [clips, labels].
        scores: of the teacher (sigmoids), [clips, labels].
        truth: the clips' own labels, 0 to 1, [clips, labels].
        labelled: which clips have labels of their own, [clips].
        alpha: weight of the labels.
        temperature: T.
    """
    logits, scores = logits.float(), scores.float()
    theirs = torch.logit(scores, eps=_LEAST_SCORE)
    divergence = functional.kl_div(
        functional.log_softmax(logits / temperature, dim=1),
        functional.log_softmax(theirs / temperature, dim=1),
        reduction="none",
        log_target=True,
    ).sum(dim=1)
    own = functional.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none")
    hard = alpha * own.mean(dim=1)
    return hard * labelled.float() + (1 - alpha) * temperature**2 * divergence


def sigmoid_bce(
    logits: Tensor,
    scores: Tensor,
    truth: Tensor,
    labelled: Tensor,
    *,
    alpha: float,
    temperature: float,
) -> Tensor:
    """Binary cross-entropy to the teacher's scores, label by label: float32 [clips].

    Summed over the labels, in nats a clip. A clip with labels of its own has the target
    `(1 - alpha) * score + alpha * label`, which is the same as two terms with those weights.
    A temperature above 1 softens both sides.

    Args and shapes as for `softmax_kl`.
    """
    logits, scores = logits.float(), scores.float()
    if temperature != 1.0:
        scores = torch.sigmoid(torch.logit(scores, eps=_LEAST_SCORE) / temperature)
        logits = logits / temperature
    weight = alpha * labelled.float()[:, None]
    targets = (1 - weight) * scores + weight * truth.float()
    per_label = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return per_label.sum(dim=1) * temperature**2


LOSSES = {"softmax-kl": softmax_kl, "sigmoid-bce": sigmoid_bce}
