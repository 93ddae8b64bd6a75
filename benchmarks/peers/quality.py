"""The same samples, the same model, the same bytes: our plans, kvpress, and transformers' QuantizedCache.

    qpkv-python -m benchmarks.peers.quality ours  --plan plans/tiny__1-32.yaml --contexts 8 --output run.json
    peer-python -m benchmarks.peers.quality peers --run run.json          (quality-requirements.txt's environment)
    qpkv-python -m benchmarks.peers.quality table --run run.json --csv benchmarks/results/peers_tiny.csv

`ours` makes test samples (facts in real text, asked at the prompt's end), measures the full cache, the plans and their
uniform rivals through the runtime, and writes them with the samples; `peers` adds its rows under the same limit, each
as it is done, and leaves out those that are there.
Everyone gets each prompt but its last token in one prefill with a fresh cache, then the answer token by token with
explicit positions. Bytes are those of the tensors that live after the answer, floats counted as 16 bit (all run in
float32): answers are paid for by everyone. A press keeps the most tokens for which that stays within the limit; a
QuantizedCache only takes whole groups (of 64 or 32, whichever leaves room for more tokens). kvpress scores the
unquantized prompt, then what it keeps is quantized once. AdaKV and KVzip only mask: their tensors stay whole,
`masked_bytes` says what the unmasked would weigh. A QuantizedCache alone keeps every token and is over any small limit:
its bytes say by how much. Presses look at 16 last queries, or at half of what they may keep where that is less;
kvpress's pyramid falls back to SnapKV where its last layer would keep fewer tokens than that window.
Peak memory is what the process grows by from before a prompt to its answer's end (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Answer:
    """What came of one sample. logprobs: [C, V]; num_bytes: of the cache after it; peak_bytes: what the process grew
    by meanwhile."""

    logprobs: torch.Tensor
    num_bytes: int
    peak_bytes: int
    prefill_seconds: float
    seconds_per_token: float


def answers(model: Any, samples: list[dict[str, Any]], prefill: Prefill, weigh: Callable[[Any], int]) -> list[Answer]:
    """One more before the clock starts: quanto compiles its unpacking when it is first used."""
    answer(model, samples[0]["prompt"], samples[0]["continuation"], prefill)
    found = []
    for sample in samples:
        before = forget_peak()
        logprobs, cache, *seconds = answer(model, sample["prompt"], sample["continuation"], prefill)
        found.append(Answer(logprobs, weigh(cache), _resident("VmHWM") - before, *seconds))
        del cache
    return found


def summary(name: str, samples: list[dict[str, Any]], found: list[Answer], full: list[Answer]) -> dict[str, Any]:
    """A row: means over kinds of means over samples, as the planner's loss."""
    rows: dict[str, list[Any]] = {}
    for sample, one, reference in zip(samples, found, full, strict=True):
        wanted = torch.tensor(sample["continuation"])
        ce = float(-one.logprobs.gather(1, wanted[:, None]).mean())
        kl = float((reference.logprobs.exp() * (reference.logprobs - one.logprobs)).sum(-1).mean())
        rows.setdefault(sample["kind"], []).append((ce, kl, float((one.logprobs.argmax(-1) == wanted).all())))
    means = {kind: torch.tensor(values).mean(0) for kind, values in rows.items()}
    ce, kl, _ = torch.stack(list(means.values())).mean(0).tolist()
    return {
        "name": name,
        "cross_entropy": ce,
        "kl": kl,
        "exact": float(torch.stack([mean[2] for kind, mean in means.items() if kind != "text"]).mean()),
        "bytes": max(one.num_bytes for one in found),
        "prefill_seconds": sum(one.prefill_seconds for one in found) / len(found),
        "seconds_per_token": sum(one.seconds_per_token for one in found) / len(found),
        "peak_bytes": max(one.peak_bytes for one in found),
        "cross_entropies": {kind: [value[0] for value in values] for kind, values in rows.items()},
    }


def forget_peak() -> int:
    """Bytes that are resident now; the peak counts from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def dense(cache: Any) -> int:
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * FLOAT_BYTES


def full_cache(model: Any, samples: list[dict[str, Any]]) -> list[Answer]:
    from transformers import DynamicCache

    def prefill(ids: torch.Tensor) -> Any:
        cache = DynamicCache()
        model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    return answers(model, samples, prefill, dense)


# --- ours ----------------------------------------------------------------------------------------------------------


def ours(args: argparse.Namespace) -> None:
    from benchmarks.where import commit
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
    kept = [
        (sample, one)
        for sample, one in zip(samples, full_cache(model, samples), strict=True)
        if sample["kind"] == "text"
        or -float(one.logprobs.gather(1, torch.tensor(sample["continuation"])[:, None]).mean()) <= 1
    ]  # questions that the full cache cannot answer are left out
    samples, full = ([pair[i] for pair in kept] for i in (0, 1))
    contestants = dict(zip(args.plan, plans, strict=True))
    for plan in plans:
        if plan.calibration is not None:
            setting = setting_named(Space.of_plan(plan), plan.calibration.best_uniform)
            contestants[f"best uniform ({setting.name})"] = setting.space.plan(setting.allocation)
    rows = [summary("full cache (DynamicCache)", samples, full, full)]
    for name, plan in contestants.items():

        def prefill(ids: torch.Tensor, plan: Any = plan) -> Any:
            cache = PlannedCache.from_plan(plan, model)
            model(ids, past_key_values=cache, logits_to_keep=1)
            return cache

        found = answers(model, samples, prefill, lambda cache: cache.allocated_bytes)
        rows.append(summary(name, samples, found, full))
        _say(rows[-1])
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
        "commit": commit(),
    }
    args.output.write_text(json.dumps(run))


# --- peers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """press: makes what drops a share of the tokens and looks at so many last queries (None: nothing is dropped);
    quantized: the QuantizedCache's settings (None: 16 bit); only_masks: what is dropped stays in the tensors."""

    name: str
    press: Callable[[float, int], Any] | None = None
    quantized: dict[str, Any] | None = None
    only_masks: bool = False


def contestants() -> list[Peer]:
    import kvpress

    def snapkv(share: float, window: int) -> Any:
        return kvpress.SnapKVPress(share, window_size=window)

    def kivi(bits: int) -> dict[str, Any]:
        """True KIVI groups: keys per channel, values per token."""
        return {"backend": "quanto", "nbits": bits, "axis_key": -1, "axis_value": 0, "q_group_size": 64}

    def hqq(bits: int) -> dict[str, Any]:
        """Groups of 64 channels of one token."""
        return {"backend": "hqq", "nbits": bits, "axis_key": 1, "axis_value": 1, "q_group_size": 64}

    return [
        Peer("kvpress StreamingLLM", lambda share, _: kvpress.StreamingLLMPress(share)),
        Peer("kvpress SnapKV", snapkv),
        Peer("kvpress PyramidKV", lambda share, window: kvpress.PyramidKVPress(share, window_size=window)),
        Peer("kvpress ExpectedAttention", lambda share, _: kvpress.ExpectedAttentionPress(share)),
        Peer("kvpress AdaKV (SnapKV)", lambda *args: kvpress.AdaKVPress(snapkv(*args)), only_masks=True),
        Peer("kvpress KVzip", lambda share, _: kvpress.KVzipPress(share), only_masks=True),
        Peer("kvpress SnapKV + quanto KIVI 4 bit", snapkv, kivi(4)),
        Peer("kvpress SnapKV + quanto KIVI 2 bit", snapkv, kivi(2)),
        Peer("kvpress SnapKV + hqq 4 bit", snapkv, hqq(4)),
        Peer("kvpress PyramidKV + quanto KIVI 4 bit",
             lambda share, window: kvpress.PyramidKVPress(share, window_size=window), kivi(4)),
        Peer("QuantizedCache, quanto KIVI 4 bit", None, kivi(4)),
        Peer("QuantizedCache, quanto KIVI 2 bit", None, kivi(2)),
        Peer("QuantizedCache, hqq 4 bit", None, hqq(4)),
    ]  # fmt: skip


def peers(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    run = json.loads(args.run.read_text())
    model = AutoModelForCausalLM.from_pretrained(run["folder"], dtype=torch.float32, attn_implementation="sdpa").eval()
    samples, config = run["samples"], model.config
    full = full_cache(model, samples)
    token_bytes = 2 * FLOAT_BYTES * config.num_key_value_heads * _head_size(config) * config.num_hidden_layers
    longest = max(len(sample["continuation"]) for sample in samples)
    run["peer_versions"] = {p: version(p) for p in ("torch", "transformers", "kvpress", "optimum-quanto", "hqq")}
    done = {row["name"] for row in run["rows"]}
    for peer in contestants():
        if peer.name in done:
            continue
        most = None
        if peer.press is not None:
            most = run["limit_bytes"] // token_bytes - longest
            if peer.quantized is not None:  # in the groups that leave room for more tokens
                room = run["limit_bytes"] - longest * token_bytes
                sizes = [replace(peer, quantized={**peer.quantized, "q_group_size": group}) for group in (64, 32)]
                peer = max(sizes, key=lambda one: _quantized_tokens(one.quantized, config, room))
                most = _quantized_tokens(peer.quantized, config, room)
        if most is not None and most < 1:
            row = {"name": peer.name, "does_not_fit": True}
        else:
            row = summary(peer.name, samples, answers(model, samples, _prefill(model, peer, most), _weigh), full)
            row["tokens"] = most
            row["group_size"] = peer.quantized and peer.quantized["q_group_size"]
            if peer.only_masks and most is not None:
                row["masked_bytes"] = (most + longest) * token_bytes
        run["rows"].append(row)
        _say(row)
        args.run.write_text(json.dumps(run))


def _say(row: dict[str, Any]) -> None:
    print(json.dumps({key: value for key, value in row.items() if key != "cross_entropies"}), flush=True)


def _prefill(model: Any, peer: Peer, most: int | None) -> Prefill:
    """Score and prune over a fresh dense cache; then quantize once what is left. most: tokens a press may keep."""
    from transformers import DynamicCache, QuantizedCache

    def prefill(ids: torch.Tensor) -> Any:
        cache = DynamicCache()
        if peer.press is None or most is None:
            model(ids, past_key_values=cache, logits_to_keep=1)
        else:
            share = 1 - (most + 0.25) / ids.shape[1]  # some presses round down, some to the nearest
            with peer.press(share, max(1, min(16, most // 2)))(model):
                model(ids, past_key_values=cache, logits_to_keep=1)
        if peer.quantized is None:
            return cache
        packed, step = QuantizedCache(config=model.config, **peer.quantized), _step(peer.quantized, model.config)
        for index, layer in enumerate(cache.layers):
            whole = layer.keys.shape[2] // step * step  # what is over waits in 16 bit, as in KIVI
            packed.update(layer.keys[:, :, :whole], layer.values[:, :, :whole], index)
            if whole < layer.keys.shape[2]:
                packed.update(layer.keys[:, :, whole:], layer.values[:, :, whole:], index)
        return packed

    return prefill


def _step(quantized: dict[str, Any], config: Any) -> int:
    """Tokens that a QuantizedCache can only take as a whole: quanto's groups run over a layer's heads and tokens; hqq
    packs as many groups together as codes fit into a byte."""
    group = int(quantized["q_group_size"])
    if quantized["backend"] == "quanto":
        return group // math.gcd(group, config.num_key_value_heads)
    in_a_byte, of_a_token = 8 // int(quantized["nbits"]), config.num_key_value_heads * _head_size(config) // group
    return in_a_byte // math.gcd(in_a_byte, of_a_token)


def _quantized_tokens(quantized: dict[str, Any], config: Any, limit: int) -> int:
    """The most tokens that fit."""
    from transformers import QuantizedCache

    step, most = _step(quantized, config), 0
    while True:
        packed = QuantizedCache(config=config, **quantized)
        made = torch.randn(2, 1, config.num_key_value_heads, most + step, _head_size(config))
        packed.update(made[0], made[1], 0)
        if _weigh_layer(packed.layers[0]) * config.num_hidden_layers > limit:
            return most
        most += step


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _weigh(cache: Any) -> int:
    return sum(_weigh_layer(layer) for layer in cache.layers)


def _weigh_layer(layer: Any) -> int:
    dense_bytes = (layer.keys.numel() + layer.values.numel()) * FLOAT_BYTES
    packed = [getattr(layer, name, None) for name in ("_quantized_keys", "_quantized_values")]
    return int(dense_bytes + sum(_weigh_packed(one) for one in packed if one is not None))


def _weigh_packed(packed: Any) -> int:
    """Codes, scales and zeros of quanto's tensor, or of hqq's codes and what it keeps beside them."""
    if isinstance(packed, tuple):
        codes, meta = packed
        beside = [value for value in meta.values() if isinstance(value, torch.Tensor)]
    else:
        codes, beside = packed._data._data, [packed._scale, packed._shift]
    return int(codes.nbytes + sum(FLOAT_BYTES * tensor.numel() for tensor in beside))


def table(args: argparse.Namespace) -> None:
    from qpkv_runtime.overview import table as columns

    run = json.loads(args.run.read_text())
    lines = [
        ["", "tokens", "cross-entropy", "KL", "exact", "bytes", "of the limit", "prefill s", "ms/token", "peak MB"]
    ]
    for row in run["rows"]:
        if row.get("does_not_fit"):
            lines.append([row["name"], "does not fit", *[""] * 8])
            continue
        lines.append(
            [
                row["name"],
                str(row.get("tokens") or ""),
                f"{row['cross_entropy']:.3f}",
                f"{row['kl']:.3f}",
                f"{100 * row['exact']:.0f} %",
                f"{row['bytes']:,}",
                f"{100 * row['bytes'] / run['limit_bytes']:.1f} %",
                f"{row['prefill_seconds']:.2f}",
                f"{1000 * row['seconds_per_token']:.0f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
            ]
        )
    what = f"{run['model']}, {run['requested']} of {run['context_tokens']} tokens, {len(run['samples'])} test samples"
    print(f"{what}: limit {run['limit_bytes']:,} bytes\n")
    print("\n".join(columns(lines, left={0})))
    if args.csv is not None:
        from benchmarks.where import cpu, write_rows

        where = {
            "model": run["model"], "budget": run["requested"], "context_tokens": run["context_tokens"],
            "limit_bytes": run["limit_bytes"], "samples": len(run["samples"]), "cpu": cpu(), "commit": run["commit"],
            **{f"peers_{name}": value for name, value in run.get("peer_versions", {}).items()},
        }  # fmt: skip
        names = ["name", "tokens", "group_size", "cross_entropy", "kl", "exact", "bytes", "masked_bytes",
                 "prefill_seconds", "seconds_per_token", "peak_bytes", "does_not_fit"]  # fmt: skip
        rows = [[row.get(name, "") for name in names] for row in run["rows"]]
        shown = [[round(cell, 4) if isinstance(cell, float) else cell for cell in row] for row in rows]
        write_rows(args.csv, [{**dict(zip(names, row, strict=True)), **where} for row in shown])


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
        if name == "table":
            command.add_argument("--csv", type=Path, help="write the rows here too, on the machine that ran them")
        command.set_defaults(run_command=function)
    args = parser.parse_args()
    args.run_command(args)


if __name__ == "__main__":
    main()
