"""benchmarks/open_questions.py: its chats ask in turn four for what turn one said, every question gets a table."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import has_smollm2

from benchmarks import open_questions
from benchmarks.open_questions import DETAILS, calibration_error, chats
from qpkv_runtime.models import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def test_the_calibration_error_is_the_gap_between_confidence_and_truth():
    right = np.array([1.0] * 9 + [0.0])
    assert calibration_error(np.full(10, 0.9), right) == pytest.approx(0)
    assert calibration_error(np.full(10, 1.0), right) == pytest.approx(0.1)
    sure_and_right, unsure_and_right = [1.0] * 5, [0.25] * 5
    assert calibration_error(np.array(sure_and_right + unsure_and_right), np.ones(10)) == pytest.approx(0.375)


@pytest.mark.parametrize("name", ["tiny", pytest.param("smollm2", marks=pytest.mark.smollm2)])
def test_a_chat_asks_in_its_fourth_turn_for_a_detail_of_the_first(name):
    if name == "smollm2" and not has_smollm2():
        pytest.skip("the SmolLM2 weights are not installed (make install)")
    tokenizer = load_tokenizer(name)
    for context in chats(tokenizer, 2, 1024, seed=0).contexts:
        said = tokenizer.decode(list(context.tokens))
        first, second = said.index("Hello!"), said.index("This is the second passage")
        assert said.count("user") >= 3 and len(context.samples) == len(DETAILS)
        for sample, (_, _, question, lead) in zip(context.samples, DETAILS, strict=True):
            asked = tokenizer.decode(list(sample.prompt))
            assert "user" in asked and asked.index(question) < asked.index(lead) and asked.endswith(lead)
            assert tokenizer.decode(list(sample.continuation)).strip() in said[first:second]
            assert len(context.tokens) + len(sample.prompt) + len(sample.continuation) <= 1024


def test_every_question_gets_its_table(tmp_path, monkeypatch):
    written = tmp_path / "open.md"
    plan = ROOT / "plans" / "tiny__1-8.yaml"
    monkeypatch.setattr(
        sys, "argv", ["open_questions.py", "--plan", str(plan), "--contexts", "1", "--output", str(written)]
    )
    assert open_questions.main() == 0
    text = written.read_text()
    for row in (
        "| prose, answers |",
        "| code, answers |",
        "| chat, answers |",
        "| best uniform |",
        "| question comes after |",
    ):
        assert row in text
