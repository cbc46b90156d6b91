"""The assistant of the bundled student's training: a small convolutional network.

From a few thousand clips, a transformer that begins with nothing is slow to find out what
convolutions have by construction: that what is near belongs together, and that a sound is the
same a little later. So a convolutional network learns from the stored scores first. Then it
runs along while the transformer learns, and says of every mixed and masked sound what it hears,
which the stored scores of whole clips cannot. That such teachers help transformers most where
data is little is known from pictures (Touvron et al. 2021, arXiv 2012.12877) and from sounds
(Gong et al. 2022, arXiv 2203.06760).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from training.distill import device_of, trainer_of
from training.lesson import prepare
from training.progress import Progress
from training.request import SETTINGS_FILE, Request, begin, settings_of
from training.trainer import Listener, put_weights, save_whole

ASSISTANT_FILE = "assistant.safetensors"

_STEM = 32  # channels
_BLOCKS = ((48, 2), (96, 2), (192, 2), (320, 1))  # channels, stride
_DROPOUT = 0.2
_PRIOR = 0.003  # the score that a label begins with


class _Block(nn.Module):
    """Two 3 x 3 convolutions, and what they add to."""

    def __init__(self, channels: int, wanted: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, wanted, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(wanted)
        self.second = nn.Conv2d(wanted, wanted, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(wanted)
        self.shortcut = nn.Conv2d(channels, wanted, 1, stride, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        inner = torch.relu(self.first_norm(self.first(image)))
        return torch.relu(self.second_norm(self.second(inner)) + self.shortcut(image))


class Assistant(nn.Module):
    """Logits of features, called as a transformers model is; 2.4 M parameters with 527 labels."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.config = PretrainedConfig(num_labels=labels)
        self.stem = nn.Sequential(
            nn.Conv2d(1, _STEM, 5, 2, 2, bias=False), nn.BatchNorm2d(_STEM), nn.ReLU()
        )
        blocks, channels = [], _STEM
        for wanted, stride in _BLOCKS:
            blocks.append(_Block(channels, wanted, stride))
            channels = wanted
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(_DROPOUT)
        self.head = nn.Linear(channels, labels)
        nn.init.constant_(self.head.bias, math.log(_PRIOR / (1 - _PRIOR)))
        self.to(memory_format=torch.channels_last)  # a third faster on a CPU
        self.register_state_dict_post_hook(_contiguous)  # as safetensors wants it

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.head.weight.device

    def forward(self, input_values: Tensor) -> SequenceClassifierOutput:
        """Logits, float32 [clips, labels], of features [clips, frames, mel bins]."""
        image = self.blocks(self.stem(input_values[:, None]))
        over_time = image.mean(dim=3)
        heard = over_time.mean(dim=2) + over_time.amax(dim=2)
        return SequenceClassifierOutput(logits=self.head(self.dropout(heard)))


def _contiguous(module: nn.Module, state: dict[str, Tensor], *_: object) -> None:
    state.update({name: tensor.contiguous() for name, tensor in state.items()})


def train_assistant(request: Request, say: Callable[[str], None] = print) -> Listener:
    """Trains an assistant on a request's clips and stored scores, and keeps it in its folder.

    With `resume`, one that is kept there is taken as it is, and one that was not finished begins
    anew. Its features are those of the request's student.

    Raises:
        As `training.distill.distill`, but for a lack of memory.
    """
    torch.manual_seed(request.recipe.seed)
    device = device_of(request, say)
    begin(request)  # which refuses one that was begun otherwise
    file = request.output / ASSISTANT_FILE
    lesson = prepare(request, device, say)
    model = Assistant(len(lesson.labels)).to(device)
    if file.exists():
        model.load_state_dict(load_file(file))
    else:
        request.output.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(settings_of(request), indent=2)
        (request.output / SETTINGS_FILE).write_text(settings + "\n", "utf-8")
        trainer = trainer_of(request, replace(lesson, student=model), device, None, [Progress(say)])
        trainer.train()
        if trainer.average:
            put_weights(model, trainer.average.weights)
        save_whole(model.state_dict(), file)
    # It learns no more.
    return Listener.of(model.eval().requires_grad_(False), lesson.spec)
