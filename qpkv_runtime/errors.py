"""The errors a user can meet, and how a command ends when one is raised.

Every one of them says in one line the rule, what arrived and what to do, so a command prints that line and no
traceback. Anything else that escapes is our own mistake and keeps its traceback. This file imports no torch.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, likewise


class QpkvError(Exception):
    """Base of all errors that are the input's doing and not ours; its text is one line for the user."""


class PlanError(QpkvError):
    """A plan cannot be read, breaks its own rules, or was made for another model or another schema version."""


class LedgerError(PlanError):
    """A plan's recorded bytes are not those that the ledger works out for it."""


class BudgetError(QpkvError):
    """A budget is written in no known form, or is too small for the least that a plan must hold."""


class UnsupportedModelError(QpkvError):
    """A model whose cache layout, attention or tokenizer we do not know how to handle."""


class ModelNotFoundError(QpkvError):
    """No model goes by that name, or its weights are not on this machine and cannot be fetched."""


class InputError(QpkvError):
    """A prompt, an option or an input file that cannot be used as given."""


class NumericsError(QpkvError):
    """A score, a logit or a loss came out as NaN or infinite, so nothing after it would mean anything."""


class CacheError(QpkvError):
    """The cache cannot do what was asked: append to a full reserve under `then: stop`, or crop packed tokens."""


class BackendError(QpkvError):
    """The kernels cannot run here, or do not cover this format or shape; the reference backend does."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, CUDA (torch.OutOfMemoryError) or torch's CPU allocator ran out of memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: " in str(error)
    )


def run_command(program: str, main: Callable[[], int]) -> int:
    """Run a command's `main` and return the process's exit status.

    main's own status; 2 after a QpkvError, where memory ran out or where stdout cannot be written (one line on stderr
    that begins with `program`); 130 when interrupted; 141 when the reader of stdout went away (quietly). Any other
    exception passes through. What stdout's encoding lacks is written as an escape; a closed stdout or stderr is the
    null device.
    """
    _open_streams()
    try:
        status = main()
        sys.stdout.flush()
    except QpkvError as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = " ".join(str(error).split())[:120] or "no memory left"
        print(
            f"{program}: error: out of memory ({what}): lower the context, prompt or batch, load in 16 bit "
            "(--dtype bfloat16), or spread the model with --device-map auto",
            file=sys.stderr,
        )
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.filename is not None or error.errno not in _NOT_WRITABLE:
            raise
        _drop_stdout()
        with suppress(OSError):  # stderr may be what is full
            print(f"{program}: error: cannot write the output: {error.strerror}", file=sys.stderr)
        return EXIT_USAGE
    return status


_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF)


def _open_streams() -> None:
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_stdout() -> None:
    """Point stdout at the null device, or the interpreter would complain while closing it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
