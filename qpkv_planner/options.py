"""How much a search does and everything it depends on besides the model and the budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qpkv_planner.allocation import DEFAULT_CONTEXT_TOKENS, HEADS, SEARCHED, Space
from qpkv_planner.calibration import BUILT_IN, Data
from qpkv_planner.grid import FORMATS, QUICK_FORMATS, with_format
from qpkv_planner.measurement import Objective
from qpkv_runtime.errors import BudgetError, InputError
from qpkv_runtime.models.shape import ModelShape
from qpkv_runtime.plan import Scorer

QUICK_CONTEXT_TOKENS = 1024

SHORT = {"name": "snapkv", "queries": 16, "kernel": 9, "lead": 4, "pooling": "average"}
LONG = {"name": "snapkv", "queries": 16, "kernel": 15, "lead": 7, "pooling": "average"}
SAMPLERS = ("tpe", "gp", "random")
SCORERS = (Scorer.model_validate(SHORT), Scorer.model_validate(LONG))


@dataclass(frozen=True)
class Effort:
    """How much a search does. search_contexts: at most, see `Options.effort`; times_budget: where elimination starts,
    after so many roomy_rounds of the knapsack."""

    search_contexts: int
    validation_contexts: int
    num_parts: int
    formats: tuple[str, ...]
    scorers: tuple[Scorer, ...]
    times_budget: float
    roomy_rounds: int
    rounds: int
    trials: int
    additivity_plans: int


QUICK = Effort(12, 9, 3, QUICK_FORMATS, SCORERS, 1.5, 0, 2, 8, 0)
THOROUGH = Effort(24, 24, 3, FORMATS, SCORERS, 2.0, 2, 4, 8, 24)
HEADS_A_CONTEXT, FEWEST_CONTEXTS = 3, 12


@dataclass(frozen=True)
class Options:
    """Everything a search depends on besides the model and the budget.

    context_tokens: the length a ratio refers to, None for 2048 (quick: 1024) or the model's if that is smaller;
    calibration_tokens, search_tokens: the lengths of the contexts that finalists are measured on, and of those that the
    search looks at, as of `Lengths`; data: where the contexts come from; max_new_tokens: the reserve's size; heads: how
    KV heads share a layer's tokens (searched: each its own count, as the knapsack finds; uniform; adaptive; or
    weighted, measured on the search contexts); revision: the model's on the hub, to be loaded by; timeout_seconds: the
    search's, validation comes on top; sampler, storage: Optuna's; prefill_memory: bytes of memory that prefills may
    take, None for what is free: what is more goes to disk.
    """

    context_tokens: int | None = None
    calibration_tokens: int | None = None
    search_tokens: int | None = None
    quick: bool = False
    objective: Objective = "kl"
    data: Data = BUILT_IN
    max_new_tokens: int | None = None
    then: str = "evict"
    sinks: int = 4
    window: int = 4
    heads: str = SEARCHED
    trials: int | None = None
    sampler: str = "tpe"
    storage: str | None = None
    revision: str | None = None
    prefill_memory: int | None = None
    timeout_seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for a value that an option does not have."""
        if self.heads not in HEADS:
            raise InputError(f"heads must be one of {', '.join(HEADS)}, got {self.heads!r}")
        if self.sampler not in SAMPLERS:
            raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be 0 to {2**32 - 1}, got {self.seed}")

    def effort(self, shape: ModelShape) -> Effort:
        """For this model: a search chooses every KV head's share, and the fewer there are, the fewer contexts tell what
        is good for them."""
        effort = QUICK if self.quick else THOROUGH
        enough = max(FEWEST_CONTEXTS, shape.num_layers * shape.num_kv_heads // HEADS_A_CONTEXT)
        effort = replace(effort, search_contexts=min(effort.search_contexts, enough))
        return effort if self.trials is None else replace(effort, trials=self.trials)


@dataclass(frozen=True)
class Lengths:
    """In tokens, none longer than the one before. context: of the plan; calibration: of the contexts on which finalists
    and uniform settings are measured, the same unless given; search: of the contexts that the search looks at, at the
    same ratio of the cache, the same unless given. What is found is stretched, the same share of each layer, from one
    to the next; a user's own samples are as long for both."""

    context: int
    calibration: int
    search: int

    def of_split(self, split: str) -> int:
        """Of a split's contexts."""
        return self.search if split == "search" else self.calibration


def check_lengths(options: Options, shape: ModelShape) -> Lengths:
    """Raises InputError where the lengths are not the model's, or a part of another is longer than that."""
    default_tokens = QUICK_CONTEXT_TOKENS if options.quick else DEFAULT_CONTEXT_TOKENS
    context, calibration, search = options.context_tokens, options.calibration_tokens, options.search_tokens
    context = min(default_tokens, shape.max_context_tokens) if context is None else context
    calibration = context if calibration is None else calibration
    if options.data.file is not None and options.search_tokens is not None:
        raise InputError("--search-length is of the built-in samples: leave it out with --calibration")
    search = calibration if search is None else search
    for what, tokens in (("context", context), ("calibration", calibration), ("search", search)):
        if not 0 < tokens <= shape.max_context_tokens:
            raise InputError(
                f"the {what} length must be 1 to the model's {shape.max_context_tokens} tokens, got {tokens}"
            )
    for what, tokens, name, most in (
        ("calibration", calibration, "context", context),
        ("search", search, "calibration", calibration),
    ):
        if tokens > most:
            raise InputError(f"the {what} length must be at most the {name} length {most}, got {tokens}")
    return Lengths(context, calibration, search)


def check_holds(space: Space, lengths: Lengths, reserve_tokens: int | None) -> None:
    """Raise BudgetError unless some plan of the space fits, and of each shorter length that it is to be searched or
    measured at: the reserve does not shrink with the context. reserve_tokens: its size, None for the default."""
    with_format(space, QUICK_FORMATS[-1], reserve_tokens).check_holds(QUICK_FORMATS)
    for option, tokens in (("--calibration-length", lengths.calibration), ("--search-length", lengths.search)):
        if tokens == space.context_tokens:
            continue
        try:
            with_format(space.at_length(tokens), QUICK_FORMATS[-1], reserve_tokens).check_holds(QUICK_FORMATS)
        except BudgetError as error:
            raise BudgetError(
                f"{option} {tokens} is too short for {space.requested} of {space.context_tokens} tokens, make it "
                f"longer, or lower --max-new-tokens: {error}"
            ) from None
