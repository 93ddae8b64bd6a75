"""The choice of a launch, with a timer that is told what to say; no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_decode_kernel import RESERVE, fmt
from test_ledger import make_shape

from qpkv_kernels import tuning
from qpkv_kernels.block import BlockLayout
from qpkv_kernels.decode import Launch, default_launch
from qpkv_runtime.backend import block_layout


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder, and a GPU as far as choosing looks."""
    monkeypatch.setenv("QPKV_CACHE", str(tmp_path))
    monkeypatch.delenv("QPKV_AUTOTUNE", raising=False)
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "arch_of", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def layout(tokens: int = 512) -> BlockLayout:
    return block_layout(0, ((fmt("rotated4"), tokens), RESERVE), make_shape(8, 128, (None,), 4), "float16")


def launches() -> list[Launch]:
    return tuning.candidates(layout(), 4, torch.float16, 90)


class Timer:
    """Every launch takes 2 ms, and this one less."""

    def __init__(self, best: int) -> None:
        self.best, self.timed = launches()[best], list[Launch]()

    def __call__(self, launch: Launch) -> float:
        self.timed.append(launch)
        return 1.0 if launch == self.best else 2.0


def choose(timer: Timer, tokens: int = 512, batch: int = 1) -> Launch:
    return tuning.choose(layout(tokens), batch, 4, torch.float16, torch.device("cuda"), timer)


@pytest.mark.parametrize("best", [0, 3, 7])
def test_the_fastest_is_taken_once_for_all_layers_that_are_alike(best: int):
    timer = Timer(best)
    assert choose(timer) == timer.best and len(timer.timed) == len(launches())
    assert choose(timer, tokens=400) == timer.best and len(timer.timed) == len(launches())
    choose(timer, batch=2)
    assert len(timer.timed) == 2 * len(launches()), "another batch is another measurement"


def test_a_launch_that_the_kernel_does_not_have_for_a_layout_is_left_out():
    """Sixteen token groups of 8 query heads are more rows than a tile has."""
    narrow = block_layout(
        0, ((fmt("kivi2/32"), 512), (fmt("flexgen4/64"), 7)), make_shape(1, 128, (None,), 8), "float16"
    )
    found = tuning.candidates(narrow, 8, torch.float16, 90)
    assert 1 < len(found) < len(launches()) and found[0] == default_launch(narrow, 90)


def test_another_process_reads_what_was_measured(monkeypatch: pytest.MonkeyPatch):
    first = Timer(4)
    choose(first)
    monkeypatch.setattr(tuning, "_known", {})
    second = Timer(0)
    assert choose(second) == first.best and not second.timed
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    choose(second)
    assert second.timed, "another GPU is another measurement"
    assert len(json.loads(tuning.file().read_text())) == 2


def test_nothing_is_timed_while_a_graph_is_captured_or_when_it_is_turned_off(monkeypatch: pytest.MonkeyPatch):
    timer = Timer(3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(timer) == default_launch(layout(), 90)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("QPKV_AUTOTUNE", "0")
    assert choose(timer) == default_launch(layout(), 90)
    assert not timer.timed and not tuning.file().exists()


def test_a_torn_file_and_entries_of_another_version_are_measured_again(monkeypatch: pytest.MonkeyPatch):
    timer = Timer(3)
    choose(timer)
    (name,) = json.loads(tuning.file().read_text())
    for content in ('{"torn', json.dumps({name: {"num_lanes": 3}}), "[]"):
        tuning.file().write_text(content)
        monkeypatch.setattr(tuning, "_known", {})
        timer = Timer(3)
        assert choose(timer) == timer.best and timer.timed


def test_a_candidate_that_does_not_run_is_left_out():
    class Failing(Timer):
        def __call__(self, launch: Launch) -> float:
            taken = super().__call__(launch)
            if launch in launches()[1:3]:
                raise RuntimeError("not compiled by this Triton")
            return taken

    timer = Failing(2)
    assert choose(timer) == launches()[0] and len(timer.timed) == len(launches())


def test_without_room_to_time_the_default_is_taken_and_nothing_written():
    def full(launch: Launch) -> float:
        raise torch.cuda.OutOfMemoryError("the buffer that clears the L2")

    assert choose(full) == default_launch(layout(), 90)
    assert not tuning.file().exists()
