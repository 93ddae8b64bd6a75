"""The command qpkv-lm-eval: the harness's own `lm_eval`, which knows `--model qpkv` once our class is imported."""

from __future__ import annotations

import sys
from importlib import import_module

from qpkv_runtime.errors import run_command


def main() -> int:
    """Entry point of qpkv-lm-eval; takes what `lm_eval` takes and returns the exit status."""
    return run_command("qpkv-lm-eval", _main)


def _main() -> int:
    import_module("qpkv_planner.harness")  # registers the model, or says what is missing
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
