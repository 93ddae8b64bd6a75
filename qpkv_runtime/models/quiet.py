"""transformers and huggingface_hub without their chatter, for as long as we load something.

What a warning would have said, `load` checks and raises instead. Both libraries keep this as global state, so it is
put back afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors only, and no progress bars but those of downloads, on stderr inside the block."""
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    hub = logging.getLogger("huggingface_hub")
    shows_bars, level, hub_level = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
        hub.level,
    )
    transformers_logging.disable_progress_bar()
    if shows_bars:
        enable_progress_bars()  # the line above turned off those of downloads too
    transformers_logging.set_verbosity_error()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        if shows_bars:
            transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity(level)
        hub.setLevel(hub_level)
