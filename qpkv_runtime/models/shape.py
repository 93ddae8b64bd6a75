"""What the byte accounting needs to know of a model: how many layers, heads and tokens its cache has. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from qpkv_runtime.errors import UnsupportedModelError


@dataclass(frozen=True)
class ModelShape:
    """The shape of a decoder's KV cache, the same for every sequence.

    head_size: channels of one key or value head. sliding_windows: per layer, how many tokens a query sees counting
    itself (Hugging Face's `sliding_window`), or None where the layer attends to everything.

    SmolLM2-135M: ModelShape("llama", num_layers=30, num_query_heads=9, num_kv_heads=3, head_size=64,
    max_context_tokens=8192, sliding_windows=(None,) * 30).

    Raises UnsupportedModelError for numbers that no decoder can have.
    """

    model_type: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    max_context_tokens: int
    sliding_windows: tuple[int | None, ...]

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_query_heads", "num_kv_heads", "head_size", "max_context_tokens"):
            if (value := getattr(self, name)) < 1:
                raise UnsupportedModelError(f"{name} must be at least 1, got {value}")
        if self.num_query_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"num_query_heads must be a multiple of num_kv_heads,"
                f" got {self.num_query_heads} and {self.num_kv_heads}"
            )
        if len(self.sliding_windows) != self.num_layers:
            raise UnsupportedModelError(
                f"sliding_windows must have {self.num_layers} entries, one per layer, got {len(self.sliding_windows)}"
            )
        for layer, window in enumerate(self.sliding_windows):
            if window is not None and window < 1:
                raise UnsupportedModelError(f"sliding_windows[{layer}] must be at least 1 token, got {window}")
