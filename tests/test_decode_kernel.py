"""The decode kernel, in Triton's interpreter where there is no GPU, against float64 attention over the same block.

Blocks are written by the runtime. Outputs are poisoned: torch fills what it allocates with NaN in deterministic mode.
Tolerances are relative to the norm of the output: 2e-3 for float16 operands (2**-11 for each rounded weight and query),
1e-5 for float32, 6e-3 for bfloat16, whose output alone is rounded by 2**-9.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import make_model, prompts, random_plan
from test_ledger import make_shape, tensor_format

from qpkv_kernels import decode
from qpkv_kernels.decode_reference import attend_reference
from qpkv_runtime.backend import block_layout, block_places, use_kernels
from qpkv_runtime.cache import PlannedCache
from qpkv_runtime.compression import TierTensors, write_block
from qpkv_runtime.errors import BackendError
from qpkv_runtime.ledger import Holdings, layer_ledger
from qpkv_runtime.plan import Format

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float16: 2e-3, torch.float32: 1e-5, torch.bfloat16: 6e-3}


def fmt(keys: str, values: str | None = None) -> Format:
    """ "kivi4/64" -> kivi, 4 bits, groups of 64."""
    sides = []
    for text in (keys, values or keys):
        name, _, group = text.partition("/")
        bits = 16 if name == "16bit" else int(name[-1])
        sides.append(tensor_format(name if bits == 16 else name[:-1], bits, int(group) if group else None))
    return Format(keys=sides[0], values=sides[1])


RESERVE = (fmt("rotated4"), 7)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_block(
    holdings: Holdings, heads: int, gqa: int, head_size: int, dtype, window=None, batch=2, missing=0, seed=0
):
    """(block, layout, places): random keys with an offset per channel, `missing` fewer tokens than room in some heads.
    The last of `holdings` is the reserve, which stays empty; generation fills it."""
    generator = torch.Generator().manual_seed(seed)
    shape = make_shape(heads, head_size, (window,), gqa)
    ledger = layer_ledger(0, holdings, shape)
    block = torch.zeros(batch, ledger.stored_bytes, dtype=torch.uint8)
    tiers, before = [], 0
    for _, tokens in holdings[:-1]:
        normal = torch.randn(2, batch, heads, tokens, head_size, generator=generator)
        keys = 1.5 * normal[0] + torch.randn(batch, heads, 1, head_size, generator=generator)
        held = torch.randint(max(tokens - missing, 0), tokens + 1, (batch, heads, 1), generator=generator)
        valid = torch.arange(tokens) < held
        positions = (before + torch.arange(tokens)).expand(batch, heads, tokens).to(torch.int32)
        kept = (x.to(dtype).masked_fill(~valid[..., None], 0) for x in (keys, normal[1]))
        tiers.append(TierTensors(*kept, positions, valid))
        before += tokens
    write_block(block, ledger, tiers, torch.rand(batch, heads, 2, head_size, generator=generator) + 0.1)
    block = block.to(DEVICE)
    number = str(dtype).removeprefix("torch.")
    return block, block_layout(0, holdings, shape, number), block_places(0, holdings, shape, False, DEVICE)


def counters(batch: int, prompt_tokens: int, num_appended: int) -> tuple[torch.Tensor, torch.Tensor]:
    prompt = torch.full((batch,), prompt_tokens, dtype=torch.int32, device=DEVICE)
    return prompt, torch.tensor([num_appended], dtype=torch.int32, device=DEVICE)


def error_of(
    holdings, heads=2, gqa=2, head_size=64, dtype=torch.float16, query=torch.float16, softcap=None, **settings
):
    """Relative to the norm of float64 attention."""
    block, layout, places = make_block(holdings, heads, gqa, head_size, dtype, **settings)
    tokens = sum(tokens for _, tokens in holdings)
    queries = torch.randn(len(block), heads * gqa, head_size, generator=torch.Generator().manual_seed(5)).to(
        DEVICE, query
    )
    arguments = (block, layout, places, *counters(len(block), tokens, 3), head_size**-0.5, softcap)
    expected = attend_reference(queries.double(), *arguments)
    out = decode.attend(queries, *arguments)
    assert out.dtype == query and bool(out.isfinite().all()), "an output was left as it was found"
    return ((out.double() - expected).norm() / expected.norm()).item()


FORMATS = {
    "16bit": fmt("16bit"),
    "flexgen4/64": fmt("flexgen4/64"),
    "flexgen2/32": fmt("flexgen2/32"),
    "kivi8/32": fmt("kivi8/32"),
    "kivi4/64": fmt("kivi4/64"),
    "kivi2/64": fmt("kivi2/64"),
    "rotated4": fmt("rotated4"),
    "rotated3": fmt("rotated3"),
    "rotated4-rotated2": fmt("rotated4", "rotated2"),
    "kivi1-rotated8": fmt("kivi1/64", "rotated8"),
    "16bit-kivi3": fmt("16bit", "flexgen3/64"),
    "mikv4": fmt("mikv4/64", "mikv2/64"),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("query", [torch.float16, torch.float32], ids=str)
def test_every_format_attends_as_its_reference(name: str, query: torch.dtype):
    reserve = RESERVE if not name.startswith("mikv") else (fmt("16bit"), 7)
    error = error_of(((FORMATS[name], 75), reserve), heads=1, query=query, missing=20)
    print(f"{error:.1e}")
    assert error < TOLERANCE[query]


@pytest.mark.parametrize("name", ["16bit", "kivi4/64", "rotated4"])
def test_bfloat16_models(name: str):
    error = error_of(((FORMATS[name], 75), RESERVE), heads=1, dtype=torch.bfloat16, query=torch.bfloat16)
    assert error < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("head_size", [16, 80, 96, 128, 256])
def test_head_sizes(head_size: int):
    group = 16 if head_size == 80 else min(head_size, 32)
    error = error_of(((fmt("kivi4/64", f"flexgen4/{group}"), 70), RESERVE), heads=1, batch=1, head_size=head_size)
    assert error < TOLERANCE[torch.float16]


@pytest.mark.parametrize("gqa", [1, 3, 7, 16])
def test_query_heads_of_a_kv_head_in_any_number(gqa: int):
    error = error_of(((fmt("kivi2/64"), 130), RESERVE), heads=2 if gqa == 3 else 1, gqa=gqa, batch=1)
    assert error < TOLERANCE[torch.float16]


@pytest.mark.parametrize(("tokens", "missing"), [(1, 0), (63, 0), (65, 0), (40, 40)])
def test_one_token_partial_tiles_and_heads_that_hold_nothing(tokens: int, missing: int):
    holdings = ((fmt("kivi4/48"), tokens), (fmt("rotated2"), tokens), RESERVE)
    error = error_of(holdings, heads=2, missing=missing, seed=3)
    assert error < TOLERANCE[torch.float16]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sliding_windows_and_softcapped_logits(softcap: float | None):
    error = error_of(((fmt("flexgen4/64"), 70), RESERVE), heads=1, window=30, softcap=softcap)
    assert error < TOLERANCE[torch.float16]


@pytest.mark.parametrize("scale", [2.0**-14, 2.0**10])
def test_tiny_and_huge_values_keep_their_precision(scale: float):
    """Scales near float16's subnormals, or logits whose query would overflow it."""
    holdings = ((fmt("rotated4", "flexgen4/64"), 64), RESERVE)
    block, layout, places = make_block(holdings, 1, 2, 64, torch.bfloat16, batch=1)
    queries = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float32) * scale
    queries = queries.to(DEVICE, torch.bfloat16)
    arguments = (block, layout, places, *counters(1, 99, 0), 0.125 / scale)
    expected = attend_reference(queries.double(), *arguments)
    out = decode.attend(queries, *arguments)
    assert ((out.double() - expected).norm() / expected.norm()).item() < TOLERANCE[torch.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 80, 96, 128])
@pytest.mark.parametrize("values", ["16bit", "flexgen8/16", "rotated4", "flexgen3/16", "rotated2", "rotated1"])
@pytest.mark.parametrize("keys", ["16bit", "kivi8/32", "kivi4/64", "rotated3", "kivi2/32", "flexgen1/16"])
def test_every_pair_of_formats(keys: str, values: str, head_size: int):
    for query in (torch.float16, torch.float32):
        error = error_of(((fmt(keys, values), 141), RESERVE), head_size=head_size, gqa=3, query=query, missing=30)
        assert error < TOLERANCE[query]


@pytest.mark.parametrize("family", ["llama_odd_heads", "gemma2"])
def test_generate_gives_the_tokens_of_the_reference_backend(family: str, monkeypatch: pytest.MonkeyPatch):
    torch.use_deterministic_algorithms(False)
    model, ids = make_model(family, num_hidden_layers=2).to(DEVICE), prompts(1, 40).to(DEVICE)
    plan = random_plan(model, 4, "1/3")
    answers = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("QPKV_BACKEND", backend)
        cache = PlannedCache.from_plan(plan, model)
        answers[backend] = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=7)
    assert torch.equal(answers["triton"], answers["reference"])
    assert len(set(answers["triton"][0, 40:].tolist())) > 3, "the model repeats itself: the test shows nothing"


# --- what is not covered -------------------------------------------------------------------------------------------


def test_the_device_chooses_the_backend_and_the_variable_forces_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("QPKV_BACKEND", raising=False)
    assert not use_kernels(torch.device("cpu"))
    monkeypatch.setenv("QPKV_BACKEND", "triton")
    if decode.is_interpreted():
        assert use_kernels(torch.device("cpu"))
    monkeypatch.setenv("QPKV_BACKEND", "cuda")
    with pytest.raises(BackendError, match="QPKV_BACKEND must be one of reference, triton, got 'cuda'"):
        use_kernels(torch.device("cpu"))


@pytest.mark.parametrize(
    ("holdings", "heads", "head_size", "message"),
    [
        (((fmt("16bit"), 8),), 1, 48, "head sizes .*got 48"),
        (((fmt("kvquant4"), 8),), 1, 64, "kvquant 4 bit"),
        (((fmt("paper_hqq4/64"), 8),), 1, 64, "groups that run across heads"),
        (((fmt("flexgen4/8"), 8),), 1, 64, "multiples of 16, got 8"),
        (((fmt("mikv4/64"), 8), RESERVE), 1, 64, "one transform of the keys"),
    ],
)
def test_what_the_kernels_do_not_cover_is_named_with_the_way_out(holdings, heads, head_size, message):
    with pytest.raises(BackendError, match=rf"layer 0.*{message}.*QPKV_BACKEND=reference"):
        block_layout(0, holdings, make_shape(heads, head_size, (None,)), "float16")
