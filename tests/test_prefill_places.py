"""Prefills on the device, in main memory or in a mapped file: the same losses and plans."""

from __future__ import annotations

import fcntl
import threading

import pytest
import torch
from small_search import FEW, SMALLEST

from qpkv_planner import calibration_cache, options, planner, prefill, session
from qpkv_planner.allocation import Space, uniform
from qpkv_planner.calibration import BUILT_IN, make_splits
from qpkv_planner.calibration_cache import choose_places, load_or_prepare
from qpkv_planner.measurement import Evaluator
from qpkv_planner.session import describe
from qpkv_runtime.compression import Scoring
from qpkv_runtime.models import load_model, model_shape
from qpkv_runtime.models.aliases import KNOWN_MODELS
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


def test_a_limit_is_for_all_splits_together(tiny, capsys, monkeypatch):
    monkeypatch.setattr(options, "QUICK", SMALLEST)
    monkeypatch.setattr(session, "prefills_bytes", lambda *args: 100)
    planner.plan(*tiny, "1/8", quick=True, context_tokens=320, name="tiny", data=FEW, prefill_memory=150)
    said = capsys.readouterr().err
    assert "search: prefills of about 0.0977 KiB go to device" in said
    assert "validation: prefills of about 0.0977 KiB go to disk" in said


def test_what_a_killed_process_was_writing_goes_at_the_next_prefill(tiny, tmp_path):
    left, others = tmp_path / "qpkv-left", tmp_path / "qpkv-others"
    for folder in (left, others):
        folder.mkdir()
        (folder / calibration_cache._LOCK).touch()
    with (others / calibration_cache._LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        settings = {"quick": True, "context_tokens": 320, "name": "tiny", "quiet": True, "data": FEW}
        planner.plan(*tiny, "1/8", **settings, calibration_cache=tmp_path)
    assert not left.exists() and others.exists() and len(list(tmp_path.glob("*.safetensors"))) == 2


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


def test_contexts_side_by_side_give_what_they_give_one_by_one(tiny, monkeypatch, two_threads):
    model, tokenizer = tiny
    split = make_splits(tokenizer, {"search": 3}, 320, 0, BUILT_IN)["search"]
    scorings = [Scoring.of(SNAPKV, 4, 4)]
    see, threads = prefill._see, []

    def watched(*arguments):
        threads.append(threading.current_thread())
        return see(*arguments)

    def prepared(free):
        monkeypatch.setattr(prefill, "free_bytes", lambda device: free)
        threads.clear()
        done = prefill.prepare(model, model_shape(model), "float16", split, scorings, 2, lambda: None)
        return done, set(threads)

    monkeypatch.setattr(prefill, "_see", watched)
    together, workers = prepared(2**40)
    alone, main = prepared(0)
    assert main == {threading.main_thread()} and threading.main_thread() not in workers
    for name in ("prompt_tokens", "inputs", "targets", "kinds", "contexts", "part_starts", "num_unanswerable"):
        assert getattr(together, name) == getattr(alone, name)
    assert torch.equal(together.token_rows, alone.token_rows)
    torch.testing.assert_close(together.full_logprobs, alone.full_logprobs, atol=1e-4, rtol=1e-4)
    for one, other in zip(together.layers, alone.layers, strict=True):
        torch.testing.assert_close(one.keys[: one.keys.shape[0] // 2], other.keys[: other.keys.shape[0] // 2])


def test_a_model_of_few_heads_gets_fewer_search_contexts():
    effort = {name: options.Options().effort(KNOWN_MODELS[name].shape) for name in ("tiny", "smollm2", "llama-3-8b")}
    assert [one.search_contexts for one in effort.values()] == [12, 24, 24]
    assert {one.validation_contexts for one in effort.values()} == {24}
    quick = options.Options(quick=True).effort(KNOWN_MODELS["smollm2"].shape)
    assert quick.search_contexts == options.QUICK.search_contexts


def test_prefills_go_where_they_fit(monkeypatch):
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    monkeypatch.setattr(calibration_cache, "free_bytes", lambda device: {"cuda": 200, "cpu": 400}[device.type])
    assert choose_places({"search": 60, "validation": 60}, gpu, None) == {"search": "device", "validation": "host"}
    assert choose_places({"search": 160, "validation": 60}, gpu, None) == {"search": "host", "validation": "device"}
    assert choose_places({"search": 160, "validation": 60}, cpu, None) == {"search": "device", "validation": "disk"}
    assert choose_places({"search": 160}, gpu, 10) == {"search": "disk"}
