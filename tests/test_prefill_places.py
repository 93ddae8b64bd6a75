"""Prefills on the device, in main memory or in a mapped file: the same losses and plans."""

from __future__ import annotations

import pytest
import torch
from small_search import FEW, SMALLEST

from qpkv_planner import calibration_cache, options, planner
from qpkv_planner.allocation import Space, uniform
from qpkv_planner.calibration import BUILT_IN, make_splits
from qpkv_planner.calibration_cache import choose_places, load_or_prepare
from qpkv_planner.measurement import Evaluator
from qpkv_planner.session import describe
from qpkv_runtime.compression import Scoring
from qpkv_runtime.models import load_model
from qpkv_runtime.plan import Decode, Scorer

SNAPKV = Scorer(name="snapkv")


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", dtype="float32")


def test_prefills_on_disk_give_the_plan_of_prefills_in_memory_byte_for_byte(tiny, capsys, monkeypatch):
    monkeypatch.setattr(options, "QUICK", SMALLEST)
    settings = {"quick": True, "context_tokens": 320, "name": "tiny", "data": FEW}
    expected = planner.plan(*tiny, "1/8", **settings)
    found = planner.plan(*tiny, "1/8", prefill_memory=1, **settings)
    assert found.to_yaml() == expected.to_yaml()
    assert "search: prefills of about" in (said := capsys.readouterr().err) and "go to disk" in said


def test_losses_do_not_depend_on_where_prefills_live(tiny, tmp_path):
    model, tokenizer = tiny
    split = make_splits(tokenizer, {"search": 2}, 320, 0, BUILT_IN)["search"]
    section = describe(model, tokenizer, "tiny", split.contexts[0])
    space = Space(section, "1/8", 320, SNAPKV, 4, 4, Decode(reserve_tokens=4, format="rotated-k4v4"))
    scorings = [Scoring.of(SNAPKV, 4, 4)]

    def losses(place, folder=None):
        prepared = load_or_prepare(model, section, split, scorings, 2, lambda: None, folder, place)
        return Evaluator(model, prepared).evaluate(space, uniform(space, "rotated-k4v4")).values

    expected = losses("device")
    assert losses("disk") == losses("host") == expected
    assert losses("disk", tmp_path) == losses("disk", tmp_path) == losses("device", tmp_path) == expected
    assert sorted(path.suffixes for path in tmp_path.iterdir()) == [[".kv", ".safetensors"], [".safetensors"]]


def test_prefills_go_where_they_fit(monkeypatch):
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    monkeypatch.setattr(calibration_cache, "free_bytes", lambda device: {"cuda": 200, "cpu": 400}[device.type])
    assert choose_places({"search": 60, "validation": 60}, gpu, None) == {"search": "device", "validation": "host"}
    assert choose_places({"search": 160, "validation": 60}, gpu, None) == {"search": "host", "validation": "device"}
    assert choose_places({"search": 160, "validation": 60}, cpu, None) == {"search": "device", "validation": "disk"}
    assert choose_places({"search": 160}, gpu, 10) == {"search": "disk"}
