"""From a model and budgets to plans.

Several budgets share the prefills and the journal, and a smaller one's search goes on from where the larger one's plan
ended (`stages.py` has the search for one). A study (a folder) makes a run crash-safe: prefills are kept there and
evaluations journalled, and the same command goes on over them. Interrupted or out of time, a search ships the best it
has and says so in the plan.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qpkv_planner.estimate import AUTO_BUDGETS, estimated_steps
from qpkv_planner.options import Options, check_lengths
from qpkv_planner.progress import Progress
from qpkv_planner.report import Report, check_report, write_report
from qpkv_planner.session import Session
from qpkv_planner.stages import TooLittleTimeError, plan_budget
from qpkv_runtime.attention import NAME
from qpkv_runtime.budget import limit_bytes
from qpkv_runtime.errors import BudgetError, InputError, UnsupportedModelError
from qpkv_runtime.ledger import full_bytes
from qpkv_runtime.models import model_shape
from qpkv_runtime.plan import Plan


def plan(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, budget: str, *, name: str | None = None,
    study: Path | None = None, calibration_cache: Path | None = None, report: Path | None = None, quiet: bool = False,
    **options: Any,
) -> Plan:  # fmt: skip
    """Search for the plan of `model` under `budget` (`1/64`, `1.6%`, `512MiB`, per sequence).

    model: loaded with attn_implementation="qpkv" (`qpkv_runtime.load_model` does). name: recorded as model.id, for
    `qpkv-run` to load it by. study: a folder for the journal and the prefills, over which a killed run goes on;
    calibration_cache: a folder for the prefills alone, which other searches reuse. report: an .html or .png file that
    the search is drawn into. options: of `Options`. The same arguments, model and machine give the same plan, byte for
    byte.

    Raises BudgetError when the budget cannot hold sinks, window and reserve; NumericsError when the model gives NaN.
    """
    with _session(model, tokenizer, Options(**options), name, study, calibration_cache, report, quiet, 1) as session:
        return plan_budget(session, budget)


def frontier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, budgets: Sequence[str], *, name: str | None = None,
    study: Path | None = None, calibration_cache: Path | None = None, report: Path | None = None, quiet: bool = False,
    **options: Any,
) -> Iterator[Plan]:  # fmt: skip
    """The plans of several budgets, as `plan`, largest budget first: one prefill, each search starting from the last
    plan. Ends early when interrupted or out of time: after the plan it was at, where there was one to ship."""
    count = len(budgets)
    with _session(
        model, tokenizer, Options(**options), name, study, calibration_cache, report, quiet, count
    ) as session:
        full = full_bytes(model_shape(model), session.lengths.context)
        ordered = sorted(budgets, key=lambda one: -limit_bytes(one, full))
        for budget in ordered:
            session.check_holds(budget)
            session.announce(budget)
        for budget in ordered:
            try:
                found = plan_budget(session, budget)
            except TooLittleTimeError:
                if not session.plans:
                    raise
                session.stopped = "timeout"
                break
            yield found
            if session.stopped:
                break
        if left := ordered[len(session.plans) :]:
            session.progress.warn(f"{session.stopped}: no plan of {', '.join(left)}")


def smallest(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_loss: float, *, name: str | None = None,
    study: Path | None = None, calibration_cache: Path | None = None, report: Path | None = None, quiet: bool = False,
    **options: Any,
) -> Plan:  # fmt: skip
    """The plan of the smallest budget found whose cross-entropy on validation exceeds the full cache's by no more than
    `max_loss` nats at the upper end of its 95 % interval: halving from 1/2, then between the last two.

    Interrupted or out of time, the smallest found so far. Raises BudgetError when even half of the cache loses more,
    TooLittleTimeError or KeyboardInterrupt when the search was stopped before that was known.
    """
    with _session(
        model, tokenizer, Options(**options), name, study, calibration_cache, report, quiet, AUTO_BUDGETS
    ) as session:
        good: Plan | None = None
        good_share, bad_share = 1.0, 0.0
        for _ in range(8):
            share = good_share / 2 if bad_share == 0.0 else math.sqrt(good_share * bad_share)
            if bad_share and good_share / bad_share < 1.2:
                break
            try:
                found = plan_budget(session, f"{share:.4g}")
            except BudgetError:
                bad_share = share
                continue
            except (KeyboardInterrupt, TooLittleTimeError) as stop:
                if good is None:
                    raise
                session.stopped = "interrupted" if isinstance(stop, KeyboardInterrupt) else "timeout"
                break
            if session.stopped == "interrupted":  # measured on what the search has seen: no proof of its loss
                good = good or found
                break
            assert found.calibration is not None and found.calibration.loss_to_full is not None
            high = found.calibration.loss_to_full.high
            session.progress.say(
                f"budget {share:.4g}: at most {high:+.3f} nats over the full cache, {max_loss} allowed"
            )
            if high <= max_loss:
                good, good_share = found, share
            else:
                bad_share = share
                if good is None:
                    break
            if session.stopped:
                break
        if good is None:
            raise BudgetError(
                f"no budget up to 1/2 stays within --max-loss {max_loss} nats of the full cache on validation (upper "
                "end of the 95 % interval): "
                + ("raise --timeout" if session.stopped else "allow more, or calibrate on more contexts")
            )
        if session.stopped:
            assert good.calibration is not None
            calibration = good.calibration.model_copy(update={"stopped": session.stopped})
            good = good.model_copy(update={"calibration": calibration})
        session.plans = [good]
        return good


@contextmanager
def _session(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Options, name: str | None,
    study: Path | None, calibration_cache: Path | None, report: Path | None, quiet: bool, num_budgets: int,
) -> Iterator[Session]:  # fmt: skip
    if report is not None:
        check_report(report)
    if model.config._attn_implementation != NAME:
        raise UnsupportedModelError(f"planning needs qpkv attention: call model.set_attn_implementation('{NAME}')")
    shape = model_shape(model)
    steps = estimated_steps(options, check_lengths(options, shape), shape, num_budgets)
    progress = Progress(steps, quiet)
    session = Session(model, tokenizer, options, name, study, calibration_cache, progress, num_budgets)
    try:
        yield session
        if report is not None:
            try:
                write_report(report, Report.of(session.plans, session.evaluators, progress.stage_seconds))
            except (Exception, KeyboardInterrupt) as error:  # the plan must not be lost with it
                is_ours = not isinstance(error, (InputError, KeyboardInterrupt))  # our own mistake
                progress.warn(
                    f"warning: no report: {traceback.format_exc() if is_ours else str(error) or 'interrupted'}"
                )
    finally:
        session.journal.close()
        progress.close()
