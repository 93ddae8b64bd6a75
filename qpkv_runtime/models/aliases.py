"""The models that have a short name: where their weights are, and their shape, so that a budget can be worked out
without any weights. Numbers are those of each model's published config.json. No torch.

`smollm2` (SmolLM2-135M from the package index) and `tiny` (ours, in this repository) need no hub; see `resolve`.
"""

from __future__ import annotations

from dataclasses import dataclass

from qpkv_runtime.models.shape import ModelShape


@dataclass(frozen=True)
class KnownModel:
    """hub_id: `owner/name` on the Hugging Face hub, or None for a model that does not come from there.

    ties_embeddings: whether the output head is the input embedding.
    """

    hub_id: str | None
    shape: ModelShape
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    ties_embeddings: bool

    @property
    def num_parameters(self) -> int:
        """Of a decoder with a gated MLP, two norms a layer and no biases; qwen3: norms of queries and keys too."""
        shape, hidden = self.shape, self.hidden_size
        heads = 2 * shape.num_query_heads + 2 * shape.num_kv_heads  # queries and output, keys and values
        layer = hidden * (heads * shape.head_size + 3 * self.intermediate_size + 2)
        layer += 2 * shape.head_size if shape.model_type == "qwen3" else 0
        return shape.num_layers * layer + hidden + hidden * self.vocab_size * (1 if self.ties_embeddings else 2)


def _all_global(
    model_type: str, num_layers: int, num_query_heads: int, num_kv_heads: int, head_size: int, max_context_tokens: int
) -> ModelShape:
    windows = (None,) * num_layers
    return ModelShape(model_type, num_layers, num_query_heads, num_kv_heads, head_size, max_context_tokens, windows)


_SMOLLM2_135M = _all_global("llama", 30, 9, 3, 64, 8192)

KNOWN_MODELS: dict[str, KnownModel] = {
    "tiny": KnownModel(
        None,
        _all_global("qwen3", 8, 8, 4, 64, 4096),
        hidden_size=256,
        intermediate_size=768,
        vocab_size=4096,
        ties_embeddings=True,
    ),
    "smollm2": KnownModel(
        None, _SMOLLM2_135M, hidden_size=576, intermediate_size=1536, vocab_size=49152, ties_embeddings=True
    ),
    "smollm2-135m": KnownModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        _SMOLLM2_135M,
        hidden_size=576,
        intermediate_size=1536,
        vocab_size=49152,
        ties_embeddings=True,
    ),
    "smollm2-360m": KnownModel(
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        _all_global("llama", 32, 15, 5, 64, 8192),
        hidden_size=960,
        intermediate_size=2560,
        vocab_size=49152,
        ties_embeddings=True,
    ),
    "smollm2-1.7b": KnownModel(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        _all_global("llama", 24, 32, 32, 64, 8192),
        hidden_size=2048,
        intermediate_size=8192,
        vocab_size=49152,
        ties_embeddings=True,
    ),
    "mistral-7b": KnownModel(
        "mistralai/Mistral-7B-Instruct-v0.2",
        _all_global("mistral", 32, 32, 8, 128, 32768),
        hidden_size=4096,
        intermediate_size=14336,
        vocab_size=32000,
        ties_embeddings=False,
    ),
    "llama-3-8b": KnownModel(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        _all_global("llama", 32, 32, 8, 128, 8192),
        hidden_size=4096,
        intermediate_size=14336,
        vocab_size=128256,
        ties_embeddings=False,
    ),
    "llama-3-70b": KnownModel(
        "meta-llama/Meta-Llama-3-70B-Instruct",
        _all_global("llama", 80, 64, 8, 128, 8192),
        hidden_size=8192,
        intermediate_size=28672,
        vocab_size=128256,
        ties_embeddings=False,
    ),
    "llama-3.2-1b": KnownModel(
        "meta-llama/Llama-3.2-1B-Instruct",
        _all_global("llama", 16, 32, 8, 64, 131072),
        hidden_size=2048,
        intermediate_size=8192,
        vocab_size=128256,
        ties_embeddings=True,
    ),
    "llama-3.2-3b": KnownModel(
        "meta-llama/Llama-3.2-3B-Instruct",
        _all_global("llama", 28, 24, 8, 128, 131072),
        hidden_size=3072,
        intermediate_size=8192,
        vocab_size=128256,
        ties_embeddings=True,
    ),
    "qwen3-0.6b": KnownModel(
        "Qwen/Qwen3-0.6B",
        _all_global("qwen3", 28, 16, 8, 128, 40960),
        hidden_size=1024,
        intermediate_size=3072,
        vocab_size=151936,
        ties_embeddings=True,
    ),
    "qwen3-8b": KnownModel(
        "Qwen/Qwen3-8B",
        _all_global("qwen3", 36, 32, 8, 128, 40960),
        hidden_size=4096,
        intermediate_size=12288,
        vocab_size=151936,
        ties_embeddings=False,
    ),
}
