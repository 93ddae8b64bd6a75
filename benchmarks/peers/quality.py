"""The same samples, the same model, the same bytes: our plans, kvpress, and transformers' QuantizedCache.

    qpkv-python benchmarks/peers/quality.py ours  --plan plans/tiny__1-32.yaml --contexts 8 --output run.json
    peer-python benchmarks/peers/quality.py peers --run run.json          (quality-requirements.txt's environment)
    qpkv-python benchmarks/peers/quality.py table --run run.json

`ours` makes test samples (facts in real text, asked at the prompt's end), measures the full cache, the plan and its
uniform rival through the runtime, and writes them with the samples; `peers` adds its rows under the same limit.
Everyone gets each prompt but its last token in one prefill with a fresh cache, then the answer token by token with
explicit positions. Bytes are those of the tensors that live after the answer, floats counted as 16 bit (all run in
float32): answers are paid for by everyone. A press keeps the most tokens for which that stays within the limit; a
QuantizedCache only takes whole groups. kvpress scores the unquantized prompt, then what it keeps is quantized once.
AdaKV only masks: its tensors stay whole, `masked_bytes` says what the unmasked would weigh.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Prefill = Callable[[torch.Tensor], Any]  # int64 [1, T] -> a cache
FLOAT_BYTES = 2  # of a number that a peer holds in float32 because the model runs in it


@torch.no_grad()
def answer(model: Any, prompt: list[int], continuation: list[int], prefill: Prefill) -> tuple[Any, Any, float, float]:
    """-> log-probabilities [C, V] of the continuation's places, the cache, seconds of prefill and of each token."""
    ids = torch.tensor([prompt])
    began = time.perf_counter()
    cache = prefill(ids[:, :-1])
    prefilled = time.perf_counter()
    logprobs = []
    for place, token in enumerate([prompt[-1], *continuation[:-1]], len(prompt) - 1):
        position = torch.tensor([[place]])
        logits = model(torch.tensor([[token]]), past_key_values=cache, position_ids=position).logits
        logprobs.append(logits[0, -1].float().log_softmax(-1))
    seconds = (time.perf_counter() - prefilled) / len(continuation)
    return torch.stack(logprobs), cache, prefilled - began, seconds


def measure(
    name: str, model: Any, samples: list[dict[str, Any]], prefill: Any, weigh: Any, full: Any
) -> dict[str, Any]:
    """A row: means over kinds of means over samples, as the planner's loss. full: the full cache's log-probabilities.

    One answer before the clock starts: quanto compiles its unpacking when it is first used.
    """
    answer(model, samples[0]["prompt"], samples[0]["continuation"], prefill)
    rows: dict[str, list[Any]] = {}
    heaviest, times = 0, []
    for sample, reference in zip(samples, full or [None] * len(samples), strict=True):
        found, cache, *seconds = answer(model, sample["prompt"], sample["continuation"], prefill)
        wanted = torch.tensor(sample["continuation"])
        ce = -found.gather(1, wanted[:, None]).mean()
        kl = 0.0
        if reference is not None:
            kl = float((reference.exp() * (reference - found)).sum(-1).mean())
        rows.setdefault(sample["kind"], []).append((float(ce), kl, float((found.argmax(-1) == wanted).all())))
        heaviest, times = max(heaviest, weigh(cache)), [*times, seconds]
    means = [torch.tensor(values).mean(0) for values in rows.values()]
    exact = torch.stack([mean for kind, mean in zip(rows, means, strict=True) if kind != "text"])[:, 2].mean()
    ce, kl, _ = torch.stack(means).mean(0).tolist()
    prefill_seconds, decode_seconds = torch.tensor(times).mean(0).tolist()
    return {
        "name": name,
        "cross_entropy": ce,
        "kl": kl,
        "exact": float(exact),
        "bytes": heaviest,
        "prefill_seconds": prefill_seconds,
        "seconds_per_token": decode_seconds,
        "cross_entropies": {kind: [value[0] for value in values] for kind, values in rows.items()},
    }


def dense(cache: Any) -> int:
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * FLOAT_BYTES


def full_cache(model: Any, samples: list[dict[str, Any]]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    from transformers import DynamicCache

    def prefill(ids: torch.Tensor) -> Any:
        cache = DynamicCache()
        model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    logprobs = [answer(model, s["prompt"], s["continuation"], prefill)[0] for s in samples]
    return measure("full cache", model, samples, prefill, dense, None), logprobs


# --- ours ----------------------------------------------------------------------------------------------------------


def ours(args: argparse.Namespace) -> None:
    from qpkv_planner.allocation import Space
    from qpkv_planner.calibration import make_split
    from qpkv_planner.grid import setting_named
    from qpkv_runtime.cache import PlannedCache
    from qpkv_runtime.models import load_model
    from qpkv_runtime.models.resolve import resolve
    from qpkv_runtime.plan import load_plan

    plans = [load_plan(path) for path in args.plan]
    budget = plans[0].budget
    assert len({(plan.model.id, plan.budget.limit_bytes) for plan in plans}) == 1, "plans of one model and budget"
    model, tokenizer = load_model(plans[0].model.id, dtype="float32", device="cpu")
    split = make_split(tokenizer, "test", args.contexts, budget.context_tokens, args.seed)
    samples = [
        {"kind": s.kind, "prompt": [*c.tokens, *s.prompt], "continuation": list(s.continuation)}
        for c in split.contexts
        for s in c.samples
    ]
    _, logprobs = full_cache(model, samples)
    losses = [
        -float(found.gather(1, torch.tensor(s["continuation"])[:, None]).mean())
        for found, s in zip(logprobs, samples, strict=True)
    ]
    kept = [i for i, sample in enumerate(samples) if sample["kind"] == "text" or losses[i] <= 1]
    samples = [samples[i] for i in kept]  # questions that the full cache cannot answer are left out
    row, logprobs = full_cache(model, samples)
    contestants = dict(zip(args.plan, plans, strict=True))
    if plans[0].calibration is not None:
        setting = setting_named(Space.of_plan(plans[0]), plans[0].calibration.best_uniform)
        contestants[f"best uniform ({setting.name})"] = setting.space.plan(setting.allocation)
    rows = [row]
    for name, plan in contestants.items():

        def prefill(ids: torch.Tensor, plan: Any = plan) -> Any:
            cache = PlannedCache.from_plan(plan, model)
            model(ids, past_key_values=cache, logits_to_keep=1)
            return cache

        rows.append(measure(name, model, samples, prefill, lambda cache: cache.allocated_bytes, logprobs))
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "cross_entropies"}), flush=True)
    run = {
        "model": plans[0].model.id,
        "folder": str(resolve(plans[0].model.id).path_or_id),
        "limit_bytes": budget.limit_bytes,
        "requested": budget.requested,
        "context_tokens": budget.context_tokens,
        "split": split.hash,
        "samples": samples,
        "rows": rows,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    args.output.write_text(json.dumps(run))


# --- peers ---------------------------------------------------------------------------------------------------------


def peers(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    run = json.loads(args.run.read_text())
    model = AutoModelForCausalLM.from_pretrained(run["folder"], dtype=torch.float32, attn_implementation="sdpa").eval()
    samples, config = run["samples"], model.config
    _, logprobs = full_cache(model, samples)
    token_bytes = 2 * FLOAT_BYTES * config.num_key_value_heads * _head_size(config) * config.num_hidden_layers
    longest = max(len(sample["continuation"]) for sample in samples)
    rows = []
    for name, press, quantized in _contestants():
        most = run["limit_bytes"] // token_bytes - longest
        if quantized is not None:
            most = _quantized_tokens(quantized, config, run["limit_bytes"] - longest * token_bytes)
        if most < 1:
            rows.append({"name": name, "does_not_fit": True})
            continue
        row = measure(name, model, samples, _prefill(model, press, quantized, most), _weigh, logprobs)
        row["tokens"] = most
        if "AdaKV" in name:
            row["masked_bytes"] = (most + longest) * token_bytes
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "cross_entropies"}), flush=True)
    names = {row["name"] for row in rows}
    run["rows"] = [row for row in run["rows"] if row["name"] not in names] + rows
    run["peer_versions"] = {p: version(p) for p in ("torch", "transformers", "kvpress", "optimum-quanto")}
    args.run.write_text(json.dumps(run))


def _contestants() -> list[tuple[str, Any, dict[str, Any] | None]]:
    """Name, how to make a press that drops a share, and the QuantizedCache's settings (None: 16 bit)."""
    import kvpress

    def snapkv(share: float) -> Any:
        return kvpress.SnapKVPress(share, window_size=16)

    def kivi(bits: int) -> dict[str, Any]:
        """True KIVI groups: keys per channel, values per token."""
        return {"backend": "quanto", "nbits": bits, "axis_key": -1, "axis_value": 0, "q_group_size": 64}

    return [
        ("kvpress StreamingLLM", lambda share: kvpress.StreamingLLMPress(share), None),
        ("kvpress SnapKV", snapkv, None),
        ("kvpress PyramidKV", lambda share: kvpress.PyramidKVPress(share, window_size=16), None),
        ("kvpress ExpectedAttention", lambda share: kvpress.ExpectedAttentionPress(share), None),
        ("kvpress AdaKV (SnapKV), masks", lambda share: kvpress.AdaKVPress(snapkv(share)), None),
        ("kvpress SnapKV + quanto KIVI 4 bit", snapkv, kivi(4)),
        ("kvpress SnapKV + quanto KIVI 2 bit", snapkv, kivi(2)),
    ]  # fmt: skip


def _prefill(model: Any, make_press: Any, quantized: dict[str, Any] | None, most: int) -> Prefill:
    """Score and prune over a fresh dense cache; then quantize once what is left."""
    from transformers import DynamicCache, QuantizedCache

    def prefill(ids: torch.Tensor) -> Any:
        cache = DynamicCache()
        with make_press(1 - (most + 0.5) / ids.shape[1])(model):  # half a token: presses round down
            model(ids, past_key_values=cache, logits_to_keep=1)
        if quantized is None:
            return cache
        packed = QuantizedCache(config=model.config, **quantized)
        for index, layer in enumerate(cache.layers):
            packed.update(layer.keys, layer.values, index)
        return packed

    return prefill


def _quantized_tokens(quantized: dict[str, Any], config: Any, limit: int) -> int:
    """The most tokens that fit: whole groups of 64 per channel over a layer's heads."""
    from transformers import QuantizedCache

    heads, group = config.num_key_value_heads, quantized["q_group_size"]
    most = 0
    for tokens in range(1, 4096):
        if heads * tokens % group:
            continue
        packed = QuantizedCache(config=config, **quantized)
        made = torch.randn(2, 1, heads, tokens, _head_size(config))
        packed.update(made[0], made[1], 0)
        if _weigh_layer(packed.layers[0]) * config.num_hidden_layers > limit:
            break
        most = tokens
    return most


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _weigh(cache: Any) -> int:
    return sum(_weigh_layer(layer) for layer in cache.layers)


def _weigh_layer(layer: Any) -> int:
    if not hasattr(layer, "_quantized_keys"):
        return (layer.keys.numel() + layer.values.numel()) * FLOAT_BYTES
    residual = (layer.keys.numel() + layer.values.numel()) * FLOAT_BYTES
    for packed in (layer._quantized_keys, layer._quantized_values):
        residual += packed._data._data.numel() + (packed._scale.numel() + packed._shift.numel()) * FLOAT_BYTES
    return residual


def table(args: argparse.Namespace) -> None:
    from qpkv_runtime.overview import table as columns

    run = json.loads(args.run.read_text())
    lines = [["", "cross-entropy", "KL", "exact", "bytes", "of the limit", "prefill s", "ms/token"]]
    for row in run["rows"]:
        if row.get("does_not_fit"):
            lines.append([row["name"], "does not fit", *[""] * 6])
            continue
        lines.append(
            [
                row["name"] + (f" ({row['tokens']} tokens)" if "tokens" in row else ""),
                f"{row['cross_entropy']:.3f}",
                f"{row['kl']:.3f}",
                f"{100 * row['exact']:.0f} %",
                f"{row['bytes']:,}",
                f"{100 * row['bytes'] / run['limit_bytes']:.1f} %",
                f"{row['prefill_seconds']:.2f}",
                f"{1000 * row['seconds_per_token']:.0f}",
            ]
        )
    what = f"{run['model']}, {run['requested']} of {run['context_tokens']} tokens, {len(run['samples'])} test samples"
    print(f"{what}: limit {run['limit_bytes']:,} bytes\n")
    print("\n".join(columns(lines, left={0})))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("ours")
    command.add_argument("--plan", nargs="+", required=True)
    command.add_argument("--contexts", type=int, default=8)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--output", type=Path, required=True)
    command.set_defaults(run_command=ours)
    for name, function in (("peers", peers), ("table", table)):
        command = commands.add_parser(name)
        command.add_argument("--run", type=Path, required=True)
        command.set_defaults(run_command=function)
    args = parser.parse_args()
    args.run_command(args)


if __name__ == "__main__":
    main()
