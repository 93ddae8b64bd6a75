"""What kvpress 0.5.5 scores and keeps on a small fixed model, as numbers in a JSON file that our tests compare with.

    python3 -m venv kvpress-env
    kvpress-env/bin/pip install -r benchmarks/peers/kvpress-requirements.txt
    kvpress-env/bin/python benchmarks/peers/kvpress_presses.py tests/data/kvpress.json

Every press runs as kvpress runs it, over a prefill with a fresh cache; scores are taken as its `score` returns them and
kept sets as its `compress` takes them from those. Not here: timings, and anything of ours.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from kvpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress_model import NUM_TOKENS, make_model, make_prompt
from transformers import DynamicCache

RATIO = 0.45  # of the tokens are dropped: 88 of 160 stay
PRESSES = {
    "streamingllm": lambda: StreamingLLMPress(RATIO, n_sink=4),
    "snapkv": lambda: SnapKVPress(RATIO, window_size=64, kernel_size=5),
    "knorm": lambda: KnormPress(RATIO),
    "tova": lambda: TOVAPress(RATIO),
    "keydiff": lambda: KeyDiffPress(RATIO),
    "expected_attention": lambda: ExpectedAttentionPress(RATIO, n_future_positions=512, n_sink=4),
    "observed_attention": lambda: ObservedAttentionPress(RATIO),
}
ADAKV = {  # name -> (the press whose scores it shares out, alpha)
    "snapkv": (lambda: SnapKVPress(RATIO, window_size=16, kernel_size=5), 0.3),
    "knorm": (lambda: KnormPress(RATIO), 0.2),
    "expected_attention": (lambda: ExpectedAttentionPress(RATIO, n_future_positions=512, n_sink=4), 0.2),
}
BUDGETS = [  # (layers, tokens, dropped share, window, beta)
    (32, 4096, 0.75, 64, 20),
    (32, 2048, 0.9, 16, 20),
    (12, 1000, 0.5, 32, 10),
    (30, 1024, 0.3, 16, 20),
    (30, 1024, 0.25, 16, 2),
    (8, 600, 0.6, 8, 20),
]


def run(press: Any, attention: str) -> list[torch.Tensor]:
    """The press's scores [H_kv, T] of every layer, of one prefill."""
    model, scores = make_model(attention), []
    scorer = press.press if isinstance(press, AdaKVPress) else press
    score = scorer.score

    def record(*args: Any) -> torch.Tensor:
        scored = score(*args)
        scores.append(scored[0].clone())
        return scored

    scorer.score = record
    with torch.no_grad(), press(model):
        model(make_prompt(), past_key_values=DynamicCache())
    run.masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    return scores


def kept(scores: torch.Tensor) -> list[list[int]]:
    """As `ScorerPress.compress` takes them."""
    num_kept = int(NUM_TOKENS * (1 - RATIO))
    return [sorted(head.topk(num_kept).indices.tolist()) for head in scores]


def unmasked(masked: Any) -> list[list[int]]:
    """The tokens of every head that AdaKV does not mask."""
    _, heads, tokens = masked
    dropped = {(int(head), int(token)) for head, token in zip(heads, tokens, strict=True)}
    return [[j for j in range(NUM_TOKENS) if (head, j) not in dropped] for head in range(2)]


def main() -> None:
    out: dict[str, Any] = {
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
        "ratio": RATIO,
        "presses": {},
        "adakv": {},
        "pyramidkv": [],
    }
    for name, make in PRESSES.items():
        scores = run(make(), "eager" if name == "observed_attention" else "sdpa")
        out["presses"][name] = {
            "kept": [kept(layer) for layer in scores],
            "scores_of_the_last_layer": [[float(f"{x:.7g}") for x in head] for head in scores[-1].tolist()],
        }
    for name, (make, alpha) in ADAKV.items():
        run(AdaKVPress(make(), alpha_safeguard=alpha), "sdpa")
        out["adakv"][name] = {"alpha": alpha, "kept": [unmasked(masked) for masked in run.masked]}
    for layers, tokens, ratio, window, beta in BUDGETS:
        press = PyramidKVPress(ratio, window_size=window, beta=beta)
        config = SimpleNamespace(num_hidden_layers=layers)
        budgets = [press.get_layer_budget(SimpleNamespace(config=config, layer_idx=i), tokens) for i in range(layers)]
        out["pyramidkv"].append(
            {"layers": layers, "tokens": tokens, "ratio": ratio, "window": window, "beta": beta, "budgets": budgets}
        )
    Path(sys.argv[1]).write_text(json.dumps(out, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
