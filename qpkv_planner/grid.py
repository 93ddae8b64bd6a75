"""The uniform settings that a plan must beat: every layer alike, equal exact bytes.

The papers' trade of tokens against bits (1x16, 2x8, 4x4, 8x2 with KIVI, token counts shrunk to what their scales,
zeros and reserve really leave), and our quantizer at key and value bits apart. The best of them on the search split
is the plan's baseline, and where the search starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qpkv_planner.allocation import PRESETS, Allocation, Space, default_reserve, format_named
from qpkv_runtime.errors import BudgetError
from qpkv_runtime.plan import Decode, Scorer

PAPER_FORMATS = ("16bit", "kivi-k8v8", "kivi-k4v4", "kivi-k2v2")
QUICK_FORMATS = (*PAPER_FORMATS, "rotated-k4v4", "rotated-k4v2", "rotated-k3v3", "rotated-k3v2")
FORMATS = (*QUICK_FORMATS, "rotated-k8v8", "rotated-k4v3", "rotated-k2v2", "kivi-k4v2", "flexgen-k4v4")


@dataclass(frozen=True)
class Setting:
    """A uniform setting: its name (scorer:preset:format), and the space and allocation that make it a plan."""

    name: str
    format: str
    space: Space
    allocation: Allocation


def reserve_format(format: str) -> str:
    """Appended tokens are 4 bit per token; rotated only where the layer pays for its vectors anyway."""
    return "rotated-k4v4" if format_named(format).keys.quantizer == "rotated" else "flexgen-k4v4"


def with_format(space: Space, format: str, max_new_tokens: int | None) -> Space:
    """The space with a reserve that suits this format; max_new_tokens sets its size, else `default_reserve`."""
    appended = reserve_format(format)
    tokens = max_new_tokens or default_reserve(space.shape, space.limit_bytes, appended)
    return replace(space, decode=Decode(reserve_tokens=tokens, format=appended, then=space.decode.then))


def make_setting(space: Space, scorer: str, preset: str, format: str, max_new_tokens: int | None) -> Setting | None:
    """A uniform setting on the exact budget.

    Where sinks and window alone are over the budget in this format, they are halved until they fit, and the name says
    so; None where nothing fits.
    """
    named = replace(with_format(space, format, max_new_tokens), scorer=_scorer(space, scorer))
    name = f"{scorer}:{preset}:{format}"
    while True:
        allocation = PRESETS[preset](named, format)
        if allocation is not None:
            shrunk = "" if named.window == space.window else f" (window {named.window})"
            return Setting(name + shrunk, format, named, allocation)
        if named.window == 1:
            return None
        named = replace(named, window=named.window // 2, sinks=named.sinks // 2)


def setting_named(space: Space, name: str) -> Setting:
    """The uniform setting of a name that `make_setting` gave, with as large a reserve as the space's own.

    Raises BudgetError where it does not fit.
    """
    scorer, preset, format = name.partition(" ")[0].split(":")
    made = make_setting(space, scorer, preset, format, space.decode.reserve_tokens)
    if made is None:
        raise BudgetError(f"{name} does not fit into {space.requested} = {space.limit_bytes}B")
    return made


def _scorer(space: Space, name: str) -> Scorer:
    return space.scorer if space.scorer.name == name else Scorer(name=name)


def make_grid(
    space: Space, scorers: Sequence[str], formats: Sequence[str], max_new_tokens: int | None
) -> list[Setting]:
    """Every format under the first scorer, then the other scorers and the pyramid at a few formats."""
    wanted = [(scorers[0], "uniform", format) for format in formats]
    wanted += [(scorers[0], "pyramidkv", format) for format in ("kivi-k4v4", "rotated-k4v2") if format in formats]
    wanted += [(scorer, "uniform", "rotated-k4v2") for scorer in scorers[1:]]
    settings = [make_setting(space, *setting, max_new_tokens) for setting in wanted]
    return [setting for setting in settings if setting is not None]
