"""The uniform settings that a plan must beat: every layer alike, equal exact bytes.

The papers' trade of tokens against bits (1x16, 2x8, 4x4, 8x2 with KIVI, token counts shrunk to what their scales,
zeros and reserve really leave), and the search's own scorers, window and quantizer at key and value bits apart. The
best of them on the search split is the plan's baseline, and where the search starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qpkv_planner.allocation import PRESETS, Allocation, Space, default_reserve, format_named
from qpkv_runtime.errors import BudgetError, InputError
from qpkv_runtime.methods import SCORERS
from qpkv_runtime.plan import UNIFORM, Decode, Heads, Scorer

PAPER_WINDOW = 16
PAPER_FORMATS = ("16bit", "kivi-k8v8", "kivi-k4v4", "kivi-k2v2")
QUICK_FORMATS = ("rotated-k4v4", "rotated-k4v3", "rotated-k4v2", "rotated-k3v3", "rotated-k3v2")
FORMATS = (*QUICK_FORMATS, "rotated-k8v8", "rotated-k2v2", "kivi-k4v2", "flexgen-k4v4")


@dataclass(frozen=True)
class Setting:
    """A uniform setting: its name (`setting_named` reads it), and the space and allocation that make it a plan."""

    name: str
    format: str
    space: Space
    allocation: Allocation


def scorer_name(scorer: Scorer) -> str:
    """The scorer and what differs from its defaults: snapkv(kernel=5,pooling=average)."""
    known = SCORERS[scorer.name].parameters
    given = [f"{key}={value}" for key, value in sorted(scorer.parameters.items()) if value != known[key].default]
    return scorer.name + (f"({','.join(given)})" if given else "")


def scorer_named(name: str) -> Scorer:
    """The scorer of a name that `scorer_name` gave."""
    match = re.fullmatch(r"(\w+)(?:\((.*)\))?", name)
    if match is None or match[1] not in SCORERS:
        raise InputError(f"a scorer is named like 'snapkv(kernel=5)', got {name!r}")
    given = dict(pair.split("=") for pair in match[2].split(",")) if match[2] else {}
    known = SCORERS[match[1]].parameters
    return Scorer.model_validate({"name": match[1], **{k: type(known[k].default)(v) for k, v in given.items()}})


def reserve_format(format: str) -> str:
    """Appended tokens are 4 bit per token; rotated only where the layer pays for its vectors anyway."""
    return "rotated-k4v4" if format_named(format).keys.quantizer == "rotated" else "flexgen-k4v4"


def with_format(space: Space, format: str, max_new_tokens: int | None) -> Space:
    """The space with a reserve that suits this format; max_new_tokens sets its size, else `default_reserve`."""
    appended = reserve_format(format)
    tokens = max_new_tokens or default_reserve(space.shape, space.limit_bytes, appended)
    return replace(space, decode=Decode(reserve_tokens=tokens, format=appended, then=space.decode.then))


def make_setting(space: Space, preset: str, format: str, max_new_tokens: int | None) -> Setting | None:
    """A setting on the exact budget, with the space's scorer, window and head sharing.

    Where sinks and window alone are over the budget in this format, they are halved until they fit, and the name says
    so; None where nothing fits.
    """
    sized = with_format(space, format, max_new_tokens)
    while True:
        allocation = PRESETS[preset](sized, format)
        if allocation is not None:
            parts = [scorer_name(sized.scorer), preset, format, f"window {sized.window}"]
            if sized.sinks != space.sinks:
                parts.append(f"sinks {sized.sinks}")
            share = sized.heads_of(0).share
            if share != "uniform":
                parts.append(f"{share} heads")
            return Setting(" ".join(parts), format, sized, allocation)
        if sized.window == 1:
            return None
        sized = replace(sized, window=sized.window // 2, sinks=sized.sinks // 2)


def setting_named(space: Space, name: str) -> Setting:
    """The setting of a name that `make_setting` gave, with the default reserve where the space's own is that, else one
    as large.

    Raises BudgetError where it does not fit.
    """
    match = re.fullmatch(r"(\S+) (\S+) (\S+) window (\d+)(?: sinks (\d+))?(?: (\w+) heads)?", name)
    if match is None:
        raise InputError(f"a uniform setting is named like 'snapkv uniform rotated-k4v2 window 4', got {name!r}")
    scorer, preset, format, window, sinks, share = match.groups()
    sharing = space.heads  # measured weights are the space's own
    if share != "weighted":
        sharing = Heads.model_validate({"share": share}) if share else UNIFORM
    sinks = space.sinks if sinks is None else int(sinks)
    named = replace(space, scorer=scorer_named(scorer), window=int(window), sinks=sinks, heads=sharing)
    decode = space.decode
    is_default = decode.reserve_tokens == default_reserve(space.shape, space.limit_bytes, decode.format)
    made = make_setting(named, preset, format, None if is_default else decode.reserve_tokens)
    if made is None:
        raise BudgetError(f"{name} does not fit into {space.requested} = {space.limit_bytes}B")
    return made


def make_grid(
    space: Space, scorers: Sequence[Scorer], formats: Sequence[str], max_new_tokens: int | None
) -> list[Setting]:
    """Every format under the first scorer; the other scorers and the pyramid at a few formats; the papers' own
    settings. All but the papers' share heads as the space does."""

    def wanted() -> Iterator[tuple[Space, str, str]]:
        first, few = replace(space, scorer=scorers[0]), [*formats[:1], *formats[3:4]]
        for format in formats:
            yield first, "uniform", format
        for scorer in scorers[1:]:
            for format in few:
                yield replace(space, scorer=scorer), "uniform", format
        yield first, "pyramidkv", formats[0]
        paper = replace(space, scorer=Scorer(name="snapkv"), window=PAPER_WINDOW, heads=UNIFORM)
        for format in PAPER_FORMATS:
            yield paper, "uniform", format
        yield paper, "pyramidkv", "kivi-k4v4"

    settings = [make_setting(*one, max_new_tokens) for one in wanted()]
    return [setting for setting in settings if setting is not None]
