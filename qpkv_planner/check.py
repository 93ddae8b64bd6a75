"""The command qpkv-check: have plans got worse than they were recorded to be? For a terminal, and for CI.

Exit status: 0 all passed, 1 one failed, 2 bad use, also when a plan could not be read or its model could not be loaded
(the others are checked) and when nothing at all was checked. The table (or one JSON object) goes to stdout; progress,
and annotations where GitHub Actions runs it, to stderr.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from qpkv_planner.files import check_writable, write_whole
from qpkv_runtime.cli import CommandParser
from qpkv_runtime.errors import InputError, QpkvError, run_command
from qpkv_runtime.models.options import add_loading_options, loading_options
from qpkv_runtime.overview import table

if TYPE_CHECKING:
    from qpkv_planner.regression import Result

DESCRIPTION = """\
Measure plans again on the validation samples they were recorded on, and fail when one got worse: when its mean
cross-entropy or KL rose by more than --max-regression, when its bytes are not the ledger's, or when the model, the
tokenizer or the samples are not the recorded ones. Plans without measurements are skipped."""

EXAMPLES = """\
  qpkv-check plans/*.yaml
  qpkv-check plan.yaml --model ./my-copy --max-regression 0.02
  qpkv-check plans/*.yaml --junit check.xml --json > check.json
  qpkv-check plan.yaml --update          (records what is measured now, hashes included)

exit status: 0 passed, 1 a plan got worse, 2 bad use, or a plan that cannot be read or whose model cannot be loaded."""

TAGS = {"failed": "failure", "error": "error", "skipped": "skipped"}  # JUnit's
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # no escape says these in XML 1.0


def parser() -> CommandParser:
    out = CommandParser("qpkv-check", DESCRIPTION, EXAMPLES)
    out.add_argument("plans", nargs="+", metavar="PLAN", help="plan files")
    out.add_argument("--model", metavar="NAME", help="name, directory, .gguf file or hub id; default: each plan's own")
    out.add_argument(
        "--max-regression",
        type=float,
        default=0.01,
        metavar="NATS",
        help="how much worse than recorded a mean may be (default 0.01: the samples are the same, this is noise)",
    )
    out.add_argument("--calibration", type=Path, metavar="FILE", help="the samples of plans made with such a file")
    out.add_argument("--update", action="store_true", help="write what is measured now into the plans")
    out.add_argument("--json", action="store_true", help="one JSON object on stdout, with a row per sample")
    out.add_argument("--junit", type=Path, metavar="FILE", help="write a JUnit report, a test case for each plan")
    out.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_loading_options(out, "each plan's")
    return out


def main(argv: list[str] | None = None) -> int:
    """Entry point of qpkv-check; returns the exit status."""
    return run_command("qpkv-check", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    args = parser().parse_args(argv)
    if not args.max_regression >= 0:
        raise InputError(f"--max-regression must be at least 0 nats, got {args.max_regression}")
    if args.junit is not None:
        check_writable("--junit", args.junit)
    if args.update and (args.json or args.junit):
        raise InputError("--update writes plans and reports nothing: leave --json and --junit to a check")
    files = list(dict.fromkeys(args.plans))

    from qpkv_planner.regression import Checker, Result

    checker = Checker(
        files,
        model=args.model,
        options=loading_options(args),
        max_regression=args.max_regression,
        calibration=args.calibration,
        say=(lambda line: None) if args.quiet else lambda line: print(f"qpkv-check: {line}", file=sys.stderr),
    )
    if args.update:
        for file in files:
            write_whole(Path(file), checker.updated(file).to_yaml())
        return 0
    results, broken = [], []
    for file in files:
        try:
            results.append(checker.result(file))
        except QpkvError as error:
            broken.append(" ".join(str(error).split()))
            results.append(Result(file, "error", (broken[-1].removeprefix(f"{file}: "),)))
    if args.json:
        print(json.dumps(report(results)))
    else:
        print(text(results))
    if args.junit is not None:
        write_whole(args.junit, junit(results))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        print("\n".join(github_annotations(results)), file=sys.stderr)
    if broken:
        raise InputError(f"{len(broken)} of {len(results)} plans could not be checked: {broken[0]}")
    if all(result.status == "skipped" for result in results):
        raise InputError(f"nothing was checked: {len(results)} of {len(results)} plans were skipped")
    return int(any(result.status == "failed" for result in results))


def text(results: Sequence[Result]) -> str:
    """A table of the plans; below it why some failed or were skipped, and notes."""
    rows = [["plan", "", "cross-entropy", "recorded", "KL", "recorded", "samples", "seconds"]]
    for result in results:
        cells = [
            f"{result.losses[name][when]:.4f}" if name in result.losses else ""
            for name in ("cross_entropy", "kl")
            for when in ("measured", "recorded")
        ]
        rows.append([result.file, result.status, *cells, str(len(result.samples) or ""), f"{result.seconds:.0f}"])
    lines = table(rows, left={0, 1})
    for result in results:
        lines += [f"{result.file}: {result.status}: {reason}" for reason in result.reasons]
        lines += [f"{result.file}: {note}" for note in result.notes]
    return "\n".join(lines)


def report(results: Sequence[Result]) -> dict[str, Any]:
    """Everything that was measured, as JSON values."""
    return {
        "plans": [
            {
                "file": result.file,
                "policy_hash": None if result.plan is None else result.plan.policy_hash,
                "status": result.status,
                "reasons": list(result.reasons),
                "notes": list(result.notes),
                "losses": result.losses,
                "seconds": round(result.seconds, 3),
                "samples": list(result.samples),
            }
            for result in results
        ]
    }


def junit(results: Sequence[Result]) -> str:
    """The results as a JUnit report."""
    counts = {status: sum(result.status == status for result in results) for status in TAGS}
    suite = ElementTree.Element(
        "testsuite",
        name="qpkv-check",
        tests=str(len(results)),
        failures=str(counts["failed"]),
        errors=str(counts["error"]),
        skipped=str(counts["skipped"]),
        time=f"{sum(result.seconds for result in results):.3f}",
    )
    for result in results:
        case = ElementTree.SubElement(
            suite, "testcase", classname="qpkv-check", name=_xml(result.file), time=f"{result.seconds:.3f}"
        )
        if result.status != "passed":
            reason = ElementTree.SubElement(case, TAGS[result.status], message=_xml(result.reasons[0]))
            reason.text = _xml("\n".join(result.reasons))
        if result.notes:
            ElementTree.SubElement(case, "system-out").text = _xml("\n".join(result.notes))
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return str(ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True), "utf-8") + "\n"


def _xml(value: str) -> str:
    return NOT_XML.sub("\ufffd", value)


def github_annotations(results: Sequence[Result]) -> list[str]:
    """GitHub's workflow commands: an error at each plan that failed, a notice at each that was skipped."""
    levels = {"failed": "error", "error": "error", "skipped": "notice"}
    return [
        f"::{levels[result.status]} file={_property(result.file)},title=qpkv-check::{_data(reason)}"
        for result in results
        if result.status in levels
        for reason in result.reasons
    ]


def _data(value: str) -> str:
    """Escaped as GitHub's workflow commands want their message."""
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    """Escaped as they want their properties."""
    return _data(value).replace(":", "%3A").replace(",", "%2C")


if __name__ == "__main__":
    sys.exit(main())
