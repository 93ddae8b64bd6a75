"""On a CUDA device: the kernels against the reference path, over whole layers and whole answers; and the benchmarks'
command on the CPU path. `benchmarks/gpu.sh` runs those marked gpu, and the kernels' own tests, on a GPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model, prompts, random_plan

from qpkv_planner.allocation import Choice, Space, model_section
from qpkv_runtime import PlannedCache
from qpkv_runtime.compression import TierTensors, write_block
from qpkv_runtime.ledger import make_ledger
from qpkv_runtime.models.aliases import KNOWN_MODELS
from qpkv_runtime.packed import PackedLayer
from qpkv_runtime.plan import Decode, Plan, Scorer

ROOT = Path(__file__).parent.parent
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FORMATS = ["16bit", "kivi-k8g64v8g64", "kivi-k4g64v4g64", "kivi-k2g64v2g64", "flexgen-k3v3", "rotated-k4v2"]
TOLERANCE = 2e-2  # bfloat16 outputs (2**-8) of the kernels against bfloat16 outputs of the reference


def plan_of(model: str, format: str, reserve: str = "flexgen-k4v4", tokens: int = 200) -> Plan:
    """One layer of a real model's shape."""
    shape = replace(KNOWN_MODELS[model].shape, num_layers=1, sliding_windows=(None,))
    space = Space(
        model_section("random", shape, "bfloat16", "bfloat16"), "1GiB", 512, Scorer(name="snapkv"), 4, 4,
        Decode(reserve_tokens=8, format=reserve),
    )  # fmt: skip
    return space.plan([Choice(tokens, format)])


def block_of(plan: Plan, device: str, batch: int = 3) -> torch.Tensor:
    """A block of random tokens, drawn on the CPU and written on `device`."""
    shape, tokens = plan.model.shape, plan.layers[0].tokens
    generator = torch.Generator().manual_seed(1)
    size = (batch, shape.num_kv_heads, tokens, shape.head_size)
    keys, values = (torch.randn(size, generator=generator).bfloat16().to(device) for _ in range(2))
    stats = torch.rand(batch, shape.num_kv_heads, 2, shape.head_size, generator=generator).to(device) + 0.5
    tier = TierTensors(
        keys, values,
        torch.arange(tokens, dtype=torch.int32, device=device).expand(size[:3]),
        torch.ones(size[:3], dtype=torch.bool, device=device),
    )  # fmt: skip
    layout = make_ledger(plan).layers[0]
    block = torch.zeros(batch, layout.stored_bytes, dtype=torch.uint8, device=device)
    write_block(block, layout, [tier], stats)
    return block


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("format", FORMATS)
def test_a_block_written_on_the_gpu_is_the_one_written_on_the_cpu(format: str):
    plan = plan_of("mistral-7b", format)
    one, other = block_of(plan, "cpu"), block_of(plan, "cuda").cpu()
    differing = (one != other).sum().item()
    print(f"{differing} of {one.numel()} bytes differ")
    assert differing == 0


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", ["smollm2", "mistral-7b"])
def test_attending_and_appending_past_the_reserve_agree_with_the_reference(
    model: str, format: str, monkeypatch: pytest.MonkeyPatch
):
    plan = plan_of(model, format)
    shape, written = plan.model.shape, block_of(plan, "cuda")
    blocks = {"triton": written.clone(), "reference": written.clone()}
    for num_appended in range(11):
        query = torch.randn(3, shape.num_query_heads, 1, shape.head_size, device="cuda").bfloat16()
        new = torch.randn(2, 3, shape.num_kv_heads, 1, shape.head_size, device="cuda").bfloat16()
        out = {}
        for backend, block in blocks.items():
            monkeypatch.setenv("QPKV_BACKEND", backend)
            packed = PackedLayer(plan, make_ledger(plan).layers[0], block)
            out[backend] = packed.attend(query, *new, num_appended, [200] * 3, shape.head_size**-0.5, None).double()
        error = ((out["triton"] - out["reference"]).norm() / out["reference"].norm()).item()
        print(f"step {num_appended}: {error:.1e}")
        assert error < TOLERANCE
    assert torch.equal(blocks["triton"], blocks["reference"]), "appended codes must agree bit for bit"


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("family", ["llama_odd_heads", "gemma2", "qwen3"])
def test_generate_gives_the_tokens_of_the_reference_backend_on_the_gpu(family: str, monkeypatch: pytest.MonkeyPatch):
    model, ids = make_model(family).cuda(), prompts(2, 60).cuda()
    plan, answers = random_plan(model, 4, "1/3"), {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("QPKV_BACKEND", backend)
        cache = PlannedCache.from_plan(plan, model)
        answers[backend] = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=12)
    assert torch.equal(answers["triton"], answers["reference"])


# --- the command that runs on a GPU, on the CPU path ---------------------------------------------------------------


@pytest.mark.slow
def test_the_gpu_command_runs_end_to_end_on_the_cpu_path(tmp_path: Path):
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    environment.pop("TRITON_INTERPRET", None)
    command = ["benchmarks/gpu.sh", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    for table in ("layer", "end_to_end", "prefill"):
        rows = list(csv.DictReader((tmp_path / f"gpu_{table}.csv").open()))
        assert rows and not any("FAILED" in row.get("note", "") for row in rows)
        assert (tmp_path / f"gpu_{table}.json").exists()
    assert "exit 0" in (tmp_path / "gpu.log").read_text()


def test_the_gpu_command_names_what_is_missing():
    command = ["benchmarks/gpu.sh", "--fast"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--fast" in done.stderr and len(done.stderr.splitlines()) == 1
