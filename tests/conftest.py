"""Random small models of every family, and random plans for them."""

from __future__ import annotations

import os
import random
from importlib import metadata

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a module with kernels is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs in deterministic mode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import qpkv_runtime.attention  # noqa: F401  (registers the attention function "qpkv")
from qpkv_planner.allocation import Choice, Space
from qpkv_planner.allocation import model_section as section_of
from qpkv_runtime.errors import BudgetError
from qpkv_runtime.methods import SCORERS
from qpkv_runtime.models import model_shape
from qpkv_runtime.models.resolve import SMOLLM2_PACKAGE
from qpkv_runtime.plan import Decode, Heads, Model, Plan, Scorer

torch.set_num_threads(1)  # small models: a second thread costs more in waiting than it brings


@pytest.fixture
def two_threads():
    """torch's, for a test of what a search then does side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama"},
    "llama_odd_heads": {
        "model_type": "llama",
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 16,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral_sliding": {"model_type": "mistral", "sliding_window": 24},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"},
    "gemma": {"model_type": "gemma"},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 24,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 5.0,
    },
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 24, "query_pre_attn_scalar": 32},
}
SLIDING = ("mistral_sliding", "qwen2_sliding", "gemma2", "gemma3")


def make_model(family: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A random model with sharp, varied logits, running qpkv attention."""
    settings = {**BASE, **FAMILIES[family], **changes}
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="qpkv").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.25)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model.to(dtype)


def model_section(model: PreTrainedModel) -> Model:
    """The plan's `model` for a random model: its shape, no hashes."""
    shape = model_shape(model)
    dtype = str(model.dtype).removeprefix("torch.")
    return section_of("random", shape, dtype, "float16" if dtype == "float32" else dtype)


def make_space(model: PreTrainedModel, budget: str = "1/4", **changes: object) -> Space:
    settings: dict[str, object] = {
        "requested": budget,
        "context_tokens": 96,
        "scorer": Scorer.model_validate({"name": "snapkv"}),
        "sinks": 2,
        "window": 6,
        "decode": Decode(reserve_tokens=8, format="rotated-k4v4"),
        **changes,
    }
    return Space(model=model_section(model), **settings)


def lossless_space(model: PreTrainedModel, reserve_tokens: int = 64) -> Space:
    """Room for the whole prompt and its continuation at 16 bit: the budget is a size, larger than the full cache."""
    return make_space(model, "64MiB", decode=Decode(reserve_tokens=reserve_tokens, format="16bit"))


def keep_all(space: Space) -> Plan:
    layers = range(space.shape.num_layers)
    return space.plan([Choice(space.most_tokens(layer), "16bit") for layer in layers])


FORMATS = [
    "16bit",
    *(f"{q}-k{k}v{v}" for q in ("flexgen", "kivi", "rotated") for k, v in ((8, 8), (4, 4), (4, 2), (3, 3), (2, 3))),
    "rotated-k16v4",
]


def random_heads(num_heads: int, seed: int) -> Heads:
    chance = random.Random(-1 - seed)
    share = chance.choice(["uniform", "adaptive", "weighted"])
    if share == "weighted":
        weights = tuple(chance.choice([0.1, 1.0, 3.0]) for _ in range(num_heads))
        return Heads(share=share, weights=weights, alpha=chance.random())
    return Heads(share=share)


def random_plan(model: PreTrainedModel, seed: int, budget: str | None = None, **changes: object) -> Plan:
    """A plan with random counts and formats per layer, heads shared at random, on the exact budget."""
    chance = random.Random(seed)
    reserve = Decode(
        reserve_tokens=chance.choice([1, 4, 7, 8]), format=chance.choice(["16bit", "flexgen-k4v4", "rotated-k3v2"])
    )
    space = make_space(
        model,
        budget or chance.choice(["1/2", "1/3", "30%", "1/4", "0.4"]),
        **{
            "decode": reserve,
            "scorer": Scorer(name=chance.choice(list(SCORERS))),
            "heads": random_heads(model.config.num_key_value_heads, seed),
            **changes,
        },
    )
    num_layers = space.shape.num_layers
    weights = [chance.uniform(0.2, 3) for _ in range(num_layers)]
    formats = [chance.choice(FORMATS) for _ in range(num_layers)]
    allocation = space.project(weights, formats)
    if allocation is None:
        lightest = ["rotated-k2v3"] * num_layers
        allocation = space.project(weights, lightest)
    if allocation is None:
        raise BudgetError("random plan does not fit")
    return space.plan(allocation)


def prompts(batch: int = 2, tokens: int = 70, vocabulary: int = 128, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def has_smollm2() -> bool:
    try:
        return metadata.version(SMOLLM2_PACKAGE) is not None
    except metadata.PackageNotFoundError:
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not has_smollm2():
        skip = pytest.mark.skip(reason="the SmolLM2 weights are not installed (make install)")
        for item in items:
            if item.get_closest_marker("smollm2"):
                item.add_marker(skip)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param
