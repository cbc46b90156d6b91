"""What the benchmark of the machine's limits counts, against torch's own counter."""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import ASTConfig, ASTForAudioClassification

from bench.roofline import flops_of, tokens_of

CONFIG = ASTConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=64,
    num_mel_bins=32,
    max_length=128,
    num_labels=7,
    initializer_range=0.5,
    attn_implementation="eager",
)


def model_and_input():
    torch.manual_seed(0)
    return ASTForAudioClassification(CONFIG).eval(), torch.randn(1, 128, 32)


def test_the_operations_as_written_are_those_that_torch_counts():
    model, features = model_and_input()
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(features)
    assert counted.get_total_flops() == sum(flops_of(CONFIG).values())


def test_the_operations_needed_give_the_same_logits():
    model, features = model_and_input()
    with torch.no_grad():
        expected = model(features).logits
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        logits = logits_of_two_tokens(model, features)
    torch.testing.assert_close(logits, expected)
    assert counted.get_total_flops() == sum(flops_of(CONFIG, last_queries=2).values())


def test_distil_asts_clip():
    config = ASTConfig(num_hidden_layers=6, num_labels=527)
    assert tokens_of(config) == 1_214
    assert round(sum(flops_of(config).values()) / 1e9, 1) == 130.8
    assert round(sum(flops_of(config, last_queries=2).values()) / 1e9, 1) == 111.9


def logits_of_two_tokens(model, features):
    """The last layer's keys and values of all tokens, and the rest of it of the first two."""
    encoder = model.audio_spectrogram_transformer
    hidden = encoder.embeddings(features)
    *others, last = encoder.layers
    for layer in others:
        hidden = layer(hidden, None)
    attention = last.attention
    normed = last.layernorm_before(hidden)

    def heads(projection, tokens):
        return projection(tokens).view(1, -1, 2, 16).transpose(1, 2)

    keys, values = heads(attention.k_proj, normed), heads(attention.v_proj, normed)
    weights = heads(attention.q_proj, normed[:, :2]) @ keys.transpose(2, 3) / 4
    mixed = (F.softmax(weights, -1) @ values).transpose(1, 2).reshape(1, 2, 32)
    two = hidden[:, :2] + attention.o_proj(mixed)
    two = two + last.mlp(last.layernorm_after(two))
    return model.classifier(encoder.layernorm(two).mean(1))
