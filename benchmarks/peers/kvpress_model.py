"""The small fixed model and prompt on which kvpress and we are compared; no weights to fetch, the same numbers in every
environment (numpy's PCG64, parameters in the order of their names)."""

from __future__ import annotations

import random

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

NUM_TOKENS = 160
CONFIG = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


def make_model(attention: str) -> LlamaForCausalLM:
    """attention: the implementation it runs. Float32, in sharp, varied logits."""
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation=attention)).eval()
    generator = np.random.Generator(np.random.PCG64(0))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 2:
                drawn = generator.standard_normal(parameter.shape).astype(np.float32) * 0.25
                parameter.copy_(torch.from_numpy(drawn))
    return model


def make_prompt() -> torch.Tensor:
    """int64 [1, NUM_TOKENS]. No token twice: in the first layer its keys would differ in RoPE alone, and so their norms
    in nothing but rounding."""
    return torch.tensor([random.Random(0).sample(range(256), NUM_TOKENS)])
