"""Samples divided among processes: the same losses, errors and interruptions as in one."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

from qpkv_planner import measurement
from qpkv_planner.allocation import Space, uniform
from qpkv_planner.calibration import make_split
from qpkv_planner.knapsack import alternatives, tokens_and_bits
from qpkv_planner.linearization import sample_changes
from qpkv_planner.measurement import Evaluator
from qpkv_planner.prefill import prepare
from qpkv_planner.session import describe
from qpkv_planner.workers import Workers
from qpkv_runtime.compression import Scoring
from qpkv_runtime.errors import NumericsError, is_out_of_memory
from qpkv_runtime.models import load_model, model_shape
from qpkv_runtime.plan import Decode, Scorer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked on Linux only")


@pytest.fixture(scope="module")
def searched():
    model, tokenizer = load_model("tiny", dtype="float32")
    split = make_split(tokenizer, "search", 4, 384, seed=0)
    space = Space(
        describe(model, tokenizer, "tiny", split.contexts[0]), "1/8", 384, Scorer(name="snapkv"), 4, 16,
        Decode(reserve_tokens=4, format="rotated-k4v4"),
    )  # fmt: skip
    scoring = Scoring.of(space.scorer, space.sinks, space.window)
    return model, space, prepare(model, model_shape(model), "float16", split, [scoring], 2, lambda: None)


@pytest.fixture
def two_workers(monkeypatch, two_threads):
    monkeypatch.setattr(measurement, "LEAST_SHARE", 1)


def test_divided_samples_give_the_losses_and_gradients_of_one_process(searched, two_workers):
    model, space, prepared = searched
    evaluator, allocation = Evaluator(model, prepared), uniform(space, "rotated-k3v3")
    wished = [alternatives(space, i, one, tokens_and_bits(one, "rotated", 2.0), 8) for i, one in enumerate(allocation)]

    def measured() -> list[np.ndarray]:
        found = [evaluator.evaluate(space, allocation, parts).kl for parts in ((1,), (0, 1))]
        changes = sample_changes(evaluator, space, allocation, wished, "kl", (1,))
        return [*found, *(of_one for of_layer in changes for of_one in of_layer)]

    divided = measured()
    assert evaluator._workers is not None
    torch.set_num_threads(1)
    evaluator = Evaluator(model, prepared)
    alone = measured()
    assert evaluator._workers is None and len(divided) == len(alone)
    for one, other in zip(divided, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)  # products of fewer rows round otherwise


def test_what_a_worker_raises_is_raised(searched, two_workers):
    model, space, prepared = searched
    evaluator, allocation = Evaluator(model, prepared), uniform(space, "rotated-k3v3")
    weight = model.lm_head.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))  # the embedding too
        with pytest.raises(NumericsError, match="layer 0"):
            evaluator.evaluate(space, allocation)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_workers_end_with_their_evaluator(searched, two_workers):
    model, space, prepared = searched
    evaluator = Evaluator(model, prepared)
    evaluator.evaluate(space, uniform(space, "rotated-k3v3"))
    assert evaluator._workers is not None
    processes = evaluator._workers._processes
    assert all(process.is_alive() for process in processes)
    del evaluator
    gc.collect()
    assert not any(process.is_alive() for process in processes)


# --- any work ---


def named(name: str, worker: int) -> str:
    return f"{name} {worker}"


def echo(own: str, what: str, seconds: float = 0.0) -> str:
    time.sleep(seconds)
    return f"{own}: {what}"


def leave(own: str) -> None:
    os._exit(1)


@pytest.fixture
def workers():
    made = Workers(2, partial(named, "worker"))
    yield made
    made.close()


def test_everyone_answers_in_order(workers):
    assert workers.run(echo, "a") == ["worker 0: a", "worker 1: a"]
    assert workers.run(echo, "b") == ["worker 0: b", "worker 1: b"]


def test_after_an_interruption_the_late_answers_are_not_taken_for_the_next(workers):
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            workers.run(echo, "late", 1.0)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert workers.run(echo, "next") == ["worker 0: next", "worker 1: next"]


def test_a_worker_that_is_gone_is_taken_for_want_of_memory(workers):
    for _ in range(2):  # whoever asks again is told again
        with pytest.raises(MemoryError, match="worker") as caught:
            workers.run(leave)
        assert is_out_of_memory(caught.value)


def test_workers_do_not_outlive_a_killed_parent():
    script = """
import os, signal
from qpkv_planner.workers import Workers
workers = Workers(2, str)
print(*(process.pid for process in workers._processes), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in ran.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(_is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
