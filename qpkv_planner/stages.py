"""From one budget to its plan: uniform grid, elimination, knapsack, Optuna, validation.

Every stage works on the search split and hands the next one its allocation. The stages' results meet on the validation
split, stretched to its length where the search looked at shorter contexts, and `_winner` says which one ships. The plan
has the paired interval of its cross-entropy against the best uniform setting, and what each stage predicted and
measured in `calibration.search`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from qpkv_planner import lagrangian, search
from qpkv_planner.allocation import Allocation, Space, format_named
from qpkv_planner.elimination import eliminate, larger, roomy
from qpkv_planner.grid import Setting, with_format
from qpkv_planner.knapsack import Round, additivity, improve
from qpkv_planner.measurement import Change, Evaluator, Losses, OutOfTime, compare, interval, worst_tenth
from qpkv_planner.provenance import made_with
from qpkv_planner.session import LastFound, Session, scorings_of
from qpkv_runtime.errors import InputError
from qpkv_runtime.plan import Calibration, Plan

COMES_LAST = ("mean of trials", "search", "knapsack")  # of the search, latest first
LEAST_SHARE = 4  # no layer goes below this part of the uniform setting's tokens: few contexts overfit


class TooLittleTimeError(InputError):
    """The search ran out of time before there was anything to ship."""


@dataclass(frozen=True)
class Candidate:
    """A finalist: the stage that made it (or the uniform setting's name), and what makes it a plan."""

    stage: str
    space: Space
    allocation: Allocation


def plan_budget(session: Session, budget: str) -> Plan:
    """The plan of one budget, then the last of the session's `plans`. Raises BudgetError where nothing fits,
    TooLittleTimeError or KeyboardInterrupt where the search was stopped before there was anything to ship."""
    shipped = session.space(budget)
    plan = session.lossless(shipped)
    if plan is None:
        session.check_holds(budget)
        if not session.plans:
            session.say_estimate()
        limit, full = shipped.limit_bytes, shipped.full_bytes
        session.progress.say(f"budget {budget} of {session.lengths.context} tokens: {limit:,} of {full:,} bytes")
        for evaluator in session.evaluators.values():
            evaluator.forget()
        plan = Search(session, shipped).run()
    session.plans.append(plan)
    return plan


class Search:
    """The stages for one budget. shipped: the space of the plan; space: that of the search, where contexts may be
    shorter."""

    def __init__(self, session: Session, shipped: Space) -> None:
        self.session, self.shipped = session, shipped
        self.space = shipped.at_length(session.lengths.search)
        self.grid = session.grid(self.space)
        self.effort, self.options, self.progress = session.effort, session.options, session.progress
        self.objective = session.options.objective
        self.record: dict[str, Any] = {"context_tokens": session.lengths.search}
        self.best_uniform: Candidate | None = None
        self.candidates: list[Candidate] = []
        self.slope: float | None = None  # not known yet
        held = session.evaluators.get("search")
        self.spent_before = 0.0 if held is None else held.spent  # on other budgets
        self.scorings = scorings_of(self.grid)

    def run(self) -> Plan:
        try:
            try:
                self._stages(self.session.evaluator("search", self.scorings))
            except OutOfTime:
                if not self.candidates:
                    raise TooLittleTimeError(
                        f"{self.options.timeout_seconds:g} seconds must be enough to measure the uniform settings of "
                        f"{self.space.requested}, and are not: raise --timeout, or add --quick"
                    ) from None
                self._stop("timeout", "validation")
            return self._ship("validation")
        except KeyboardInterrupt:
            if not self.candidates:
                raise
            self._stop("interrupted", "search")  # the user is waiting
            return self._ship("search")

    def _stop(self, why: Literal["interrupted", "timeout"], split: str) -> None:
        self.session.stopped = why
        self.progress.say(f"{why}: shipping the best plan so far, measured on the {split} split")

    def _stage(self, name: str) -> None:
        self.progress.stage(name)
        self.session.journal.stage = name

    def _stages(self, evaluator: Evaluator) -> None:
        """The stages on the search split, their results in `candidates` (two of them also pulled half way back to
        uniform: few contexts overfit), and lambda at the knapsack's."""
        start = self._grid(evaluator)
        space, quantizer = start.space, format_named(start.format).keys.quantizer
        self.candidates = [Candidate("uniform", space, start.allocation)]
        floor = min(choice.tokens for choice in start.allocation) // LEAST_SHARE

        self._stage("elimination")
        begin_space, begin = self._roomy(evaluator, start, quantizer, floor)
        eliminated, passes = eliminate(evaluator, begin_space, begin, self.objective, floor, self.progress.step)
        self.record["elimination"] = [asdict(one) for one in passes]
        self.candidates.append(Candidate("elimination", begin_space, eliminated))
        eliminated_loss = self._say("elimination", evaluator.evaluate(begin_space, eliminated)).mean(self.objective)

        self._stage("knapsack")
        # what elimination leaves of a larger budget's plan serves other splits well, of a larger uniform setting less
        first_space, first = space, start.allocation
        if begin_space is not space and eliminated_loss < evaluator.evaluate(space, start.allocation).mean(
            self.objective
        ):
            first_space, first = begin_space, eliminated
        found_space, improved, rounds, around = improve(
            evaluator, first_space, first, quantizer, self.effort.rounds, self.objective, floor, self.progress.step,
            lambda space, allocation: self._keep(Candidate("knapsack", space, allocation)),
            by_head=self.session.by_head,
        )  # fmt: skip
        self.record["knapsack"] = _recorded(rounds)
        self._keep(Candidate("knapsack", found_space, improved))
        improved_losses = self._say("knapsack", evaluator.evaluate(found_space, improved))
        self.session.last = LastFound(start.format, found_space.heads, improved)

        if self.effort.additivity_plans:
            self._stage("additivity")
            self.record["additivity"] = additivity(
                evaluator, around, self.objective, self.effort.additivity_plans, self.options.seed, self.progress.step
            )

        self._stage("search")
        found = search.refine(
            evaluator, search.Family(found_space, improved, around.sensitivities, quantizer), self.effort.trials,
            self.objective, self.options.seed, self._trial,
            sampler=self.options.sampler, storage=self.options.storage, belongs_to=self.session.depends_on,
        )  # fmt: skip
        self.record["optuna"] = {"trials": self.effort.trials, "finished": len(found)}
        if found:
            best = found[0]
            self._keep(Candidate("search", found_space, best.allocation))
            gain = improved_losses.mean(self.objective) - best.loss
            self.record["optuna"].update(best=best.loss, parameters=best.parameters, gain_on_knapsack=gain)
            self.progress.say(f"search          {self.objective} {best.loss:.3f} of {len(found)} finished trials")
            if len(found) > 2:
                three = [(found_space, one.allocation) for one in found[:3]]
                self.candidates += _geometric_mean("mean of trials", three)
        even = (space, start.allocation)
        self.candidates += _geometric_mean("half elimination", [(begin_space, eliminated), even])
        self.candidates += _geometric_mean("half knapsack", [(found_space, improved), even])
        self.slope = self._slope(evaluator, found_space, improved, improved_losses)

    def _roomy(self, evaluator: Evaluator, start: Setting, quantizer: str, floor: int) -> tuple[Space, Allocation]:
        """Where elimination starts, and its space: at the larger budget's plan that the session has, or at a multiple
        of this budget, where a few rounds of the knapsack improve on the uniform setting."""
        space, last, times_budget = start.space, self.session.last, self.effort.times_budget
        if last is not None and last.format == start.format:
            last_space = replace(space, heads=last.heads)
            if last_space.bytes(last.allocation) > space.limit_bytes:
                return last_space, last.allocation
        even = roomy(space, start.format, times_budget)
        if not self.effort.roomy_rounds:
            return space, even
        found_space, found, rounds, _ = improve(
            evaluator, larger(space, times_budget), even, quantizer, self.effort.roomy_rounds, self.objective, floor,
            self.progress.step, by_head=self.session.by_head,
        )  # fmt: skip
        self.record["roomy"] = _recorded([replace(one, sensitivities=()) for one in rounds])
        return replace(found_space, requested=space.requested), found

    def _trial(self, number: int) -> None:
        """A trial begins."""
        self.progress.label(f"trial {number + 1}/{self.effort.trials}")
        self.progress.step()

    def _keep(self, candidate: Candidate) -> None:
        """A stage's latest result."""
        self.candidates = [one for one in self.candidates if one.stage != candidate.stage] + [candidate]

    def _ship(self, split: str) -> Plan:
        """The finalists on a split; the plan of the best of them there."""
        session, progress, tokens = self.session, self.progress, self.session.lengths.of_split(split)
        judged = self.shipped.at_length(tokens)
        assert self.best_uniform is not None
        is_stretched = tokens != self.space.context_tokens
        settings = session.grid(judged) if is_stretched else []  # what is best there is not known yet
        uniforms = [Candidate(one.name, one.space, one.allocation) for one in settings] or [self.best_uniform]
        evaluator = session.evaluator(split, [*self.scorings, *scorings_of(settings)], is_timed=False)
        self._stage("finalists")

        def measured(candidate: Candidate) -> tuple[Candidate, Losses]:
            progress.step()
            return candidate, evaluator.evaluate(candidate.space, candidate.allocation)

        finals = [min(map(measured, uniforms), key=lambda final: final[1].mean("ce"))]
        finals += [measured(self._stretched(candidate, judged)) for candidate in self.candidates]
        for candidate, losses in finals:
            self._say(f"  {candidate.stage}", losses)
        full, uniform = evaluator.full(), finals[0][1]
        winner, losses = _winner(finals)
        self.record["finalists"] = [{"stage": c.stage, **_means(loss)} for c, loss in finals]
        search_evaluator = session.evaluator("search", self.scorings, is_timed=False)
        self.record["search_evaluations"] = search_evaluator.spent - self.spent_before
        if not is_stretched:  # else the two do not compare
            on_search = search_evaluator.evaluate(winner.space, winner.allocation)
            self.record["optimism"] = losses.mean(self.objective) - on_search.mean(self.objective)
        # a share of the cache is worth as much at either length
        slope = None if self.slope is None else self.slope * self.space.limit_bytes / self.shipped.limit_bytes
        gain = interval(losses, "ce", minus=uniform)
        progress.say(
            f"{winner.stage} ships: cross-entropy {losses.mean('ce'):.3f} (full {full.mean('ce'):.3f}, "
            f"best uniform {uniform.mean('ce'):.3f}; difference {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}])"
        )
        calibration = Calibration(
            objective=self.objective,
            seed=self.options.seed,
            context_tokens=tokens,
            data=self.options.data.record(session.lengths.calibration),
            measured_on="search" if split == "search" else "validation",
            stopped=session.stopped,
            hashes={name: split.hash for name, split in session.splits.items()},
            samples=dict(session.samples),
            cross_entropy=compare("ce", full, losses, uniform),
            kl=compare("kl", full, losses, uniform),
            improvement_on_best_uniform=gain,
            loss_to_full=interval(losses, "ce", minus=full),
            worst_tenth=worst_tenth(full, losses, uniform),
            by_kind={"full": full.by_kind(), "plan": losses.by_kind(), "best_uniform": uniform.by_kind()},
            winner=winner.stage,
            lambda_nats_per_mib=_rounded(slope),
            beta=None if slope is None else _rounded(lagrangian.beta(slope)),
            best_uniform=finals[0][0].stage,
            versions=made_with(),
            search=_rounded(self.record),
        )
        at = self._stretched(winner, self.shipped)
        if at is winner:
            return at.space.plan(at.allocation, calibration)
        search = {
            **calibration.search,
            "measured_allocation": [[choice.tokens, choice.format] for choice in winner.allocation],
            "measured_reserve_tokens": winner.space.decode.reserve_tokens,
        }
        plan = at.space.plan(at.allocation, calibration.model_copy(update={"search": search}))
        return plan.model_copy(update={"extrapolated": True})

    def _stretched(self, candidate: Candidate, to: Space) -> Candidate:
        """The candidate at the length of `to`: each layer keeps the same share of it."""
        if candidate.space.context_tokens == to.context_tokens:
            return candidate
        space = replace(candidate.space, requested=to.requested, context_tokens=to.context_tokens)
        space = with_format(space, candidate.allocation[0].format, self.session.reserve_tokens)
        weights = [float(choice.tokens) for choice in candidate.allocation]
        allocation = space.project(weights, [choice.format for choice in candidate.allocation])
        assert allocation is not None, "what fits a short context fits the same share of a long one"
        return Candidate(candidate.stage, space, allocation)

    def _grid(self, evaluator: Evaluator) -> Setting:
        """Measure the uniform settings. The one of lowest cross-entropy is what the plan must beat; the search starts
        at that of the lowest objective that is below 16 bit, has the search's window and gives every layer as much."""
        self._stage("uniform grid")
        rows = []
        for setting in self.grid:
            rows.append((setting, evaluator.evaluate(setting.space, setting.allocation)))
            self.progress.step()
        self._say("full cache", evaluator.full())
        best, best_losses = min(rows, key=lambda row: row[1].mean("ce"))
        self.best_uniform = Candidate(best.name, best.space, best.allocation)
        self._say(f"best uniform    {best.name}", best_losses)
        self.record["grid"] = [
            {
                "setting": setting.name,
                "tokens": setting.allocation[-1].tokens,
                "bytes": setting.space.bytes(setting.allocation),
                **_means(losses),
            }
            for setting, losses in rows
        ]
        window = self.space.window
        whole = [row for row in rows if row[0].format != "16bit" and row[0].space.window == window and _is_even(row[0])]
        return min(whole, key=lambda row: row[1].mean(self.objective))[0]

    def _slope(self, evaluator: Evaluator, space: Space, allocation: Allocation, losses: Losses) -> float:
        """lambda = -dD/dR: nats that a tenth more budget saves, per MiB, all layers growing alike.

        losses: the allocation's own, on the same samples.
        """
        larger_space = larger(space, 1.1)
        weights = [float(choice.tokens) for choice in allocation]
        grown = larger_space.project(weights, [choice.format for choice in allocation])
        assert grown is not None
        loss = evaluator.evaluate(larger_space, grown).mean(self.objective)
        return lagrangian.slope(losses.mean(self.objective), space.bytes(allocation), loss, space.bytes(grown))

    def _say(self, what: str, losses: Losses) -> Losses:
        if what != "full cache":
            self.progress.best(self.objective, losses.mean(self.objective))
        self.progress.say(
            f"{what:<15} cross-entropy {losses.mean('ce'):.3f}  kl {losses.mean('kl'):.3f}"
            + (f"  exact answers {100 * losses.mean('exact'):.0f} %" if losses.counted("exact").kinds else "")
        )
        return losses


def _recorded(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    return [{**asdict(one), "accepted": one.is_accepted} for one in rounds]


def _is_even(setting: Setting) -> bool:
    """Whether it gives every layer as much: the pyramid does not."""
    return " uniform " in setting.name


def _geometric_mean(stage: str, members: Sequence[tuple[Space, Allocation]]) -> list[Candidate]:
    """The members' tokens' geometric mean, of every head where they share a layer's tokens unlike, in the first one's
    space and formats, if it fits."""
    space, first = members[0]
    formats = [choice.format for choice in first]
    if all(other.heads == space.heads for other, _ in members):
        columns = zip(*([choice.tokens for choice in allocation] for _, allocation in members), strict=True)
        allocation = space.project([_mean_of_logs(tokens) for tokens in columns], formats)
        return [] if allocation is None else [Candidate(stage, space, allocation)]
    held = [[one.tokens_of_heads(i, choice) for i, choice in enumerate(its)] for one, its in members]
    divided = space.divided(
        [[_mean_of_logs(tokens) for tokens in zip(*of_layer, strict=True)] for of_layer in zip(*held, strict=True)],
        formats,
    )
    return [] if divided is None else [Candidate(stage, *divided)]


def _mean_of_logs(tokens: Sequence[int]) -> float:
    return math.exp(sum(map(math.log, tokens)) / len(tokens))


def _winner(finals: Sequence[tuple[Candidate, Losses]]) -> tuple[Candidate, Losses]:
    """What the search came to last, unless others are better by more than a standard error of the paired difference, or
    a uniform setting, the first of `finals` among them, is better at all; then the best of those.

    Of many finalists on few contexts the very best is likely the luckiest (the one-standard-error rule of Breiman et
    al., 1984); a plan that is measured to be worse than what takes no search does not ship."""
    by_stage = {final[0].stage: final for final in finals}
    last = next((by_stage[stage] for stage in COMES_LAST if stage in by_stage), None)
    if last is None:
        return min(finals, key=lambda final: _under_both(final[1]).mean)
    uniform = {"uniform", finals[0][0].stage}
    better = [(0.0, last)]
    for stage, final in by_stage.items():
        change = _under_both(final[1], minus=last[1])
        if change.cautious(0 if stage in uniform else 1) < 0:
            better.append((change.mean, final))
    return min(better, key=lambda one: one[0])[1]


def _under_both(losses: Losses, minus: Losses | None = None) -> Change:
    """The loss, up to a constant, where the gold continuation and the full cache's own are as likely: cross-entropy is
    that under the one, KL that under the other. minus: less that of others on the same samples."""
    of_samples = (losses.ce + losses.kl) / 2
    return Change.of(of_samples if minus is None else of_samples - (minus.ce + minus.kl) / 2, losses.kinds)


def _means(losses: Losses) -> dict[str, float]:
    return {"cross_entropy": losses.mean("ce"), "kl": losses.mean("kl"), "exact": losses.mean("exact")}


def _rounded(value: Any) -> Any:
    """Floats with six decimals: what a reader can use, the same on every run."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
