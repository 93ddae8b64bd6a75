"""qpkv-eval: samples are what their suites say, answers come from the plan's cache, runs resume and compare."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import has_smollm2, keep_all, make_space

from qpkv_planner import harness_cli
from qpkv_planner.evaluation import cli, longbench, niah, ruler, text
from qpkv_planner.evaluation.answering import Runner
from qpkv_planner.evaluation.comparison import bootstrap, compare, load_run
from qpkv_planner.evaluation.metrics import METRICS
from qpkv_planner.evaluation.report import comparison, summary
from qpkv_planner.evaluation.run import _Journal, evaluate
from qpkv_planner.evaluation.samples import Encoder, Options, documents, largest
from qpkv_planner.uniform import uniform_plan
from qpkv_runtime.errors import InputError
from qpkv_runtime.models import load_model, load_tokenizer
from qpkv_runtime.plan import Decode, Scorer

LENGTH = 1280
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Paragraph {i} says that the capital of land {i} is city {i}.",
                    "qas": [
                        {"question": f"What is the capital of land {i}?", "answers": [{"text": f"city {i}"}] * 2},
                        {"question": "And of nowhere?", "answers": [], "is_impossible": True},
                    ],
                }
                for i in range(40)
            ]
        }
    ]
}
HOTPOT = [
    {
        "question": f"Who wrote {i}?",
        "answer": f"writer {i}",
        "context": [[f"Title {i}", ["One. ", "Two."]], ["Same", ["x"]]],
    }
    for i in range(10)
]


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", dtype="float32")


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.smollm2)])
def encoder(request):
    return Encoder(load_tokenizer(request.param))


@pytest.fixture
def options(tmp_path):
    files = {}
    for name, data in (("squad", SQUAD), ("hotpotqa", HOTPOT)):
        files[name] = str(tmp_path / f"{name}.json")
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    return Options(lengths=(LENGTH,), seed=1, files=files)


def text_of(encoder, tokens) -> str:
    return encoder.tokenizer.decode(list(tokens))


# --- samples -------------------------------------------------------------------------------------------------------


def test_ruler_has_its_13_tasks_in_4_categories():
    counts = Counter(task.category for task in ruler.TASKS.values())
    assert counts == {"retrieval": 8, "tracing": 1, "aggregation": 2, "question answering": 2}


@pytest.mark.parametrize("name", ruler.TASKS)
def test_a_task_of_ruler_fills_its_length_and_holds_what_it_asks_for(name, encoder, options):
    (sample,) = ruler.make_samples(encoder, Options(**{**vars(options), "tasks": (name,)}))
    used = len(sample.context) + len(sample.question) + sample.max_new_tokens
    slack = LENGTH if name.startswith("qa") else 130  # the files of this test are short
    assert LENGTH - slack < used <= LENGTH
    document, asked = text_of(encoder, sample.context), text_of(encoder, sample.question)
    assert all(answer in document for answer in sample.answers[:1] if name != "qa_2")
    assert "{" not in document + asked
    needles = document.count("One of the special magic")
    expected = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    if name in ("niah_multikey_2", "niah_multikey_3"):
        assert needles > 10 and "the special magic" in document.split("\n")[-2]
    elif name.startswith("niah"):
        assert needles == expected.get(name, 1)
        assert len(sample.answers) == {"niah_multivalue": 4, "niah_multiquery": 4}.get(name, 1)
    if len(sample.answers) == 1 and name.startswith("niah"):
        assert "What is the special magic" in asked and "are all" not in asked
    if name == "vt":
        last = document.split("variables are assigned the value")[-1]
        assert last.count("VAR") == 2 * 5 - 1 and len(sample.answers) == 5
    if name == "cwe":
        words = document.split("\nBelow is a numbered list")[-1].split()
        assert {word for word, times in Counter(words).items() if times == 6} >= set(sample.answers)
        assert len(sample.answers) == 10
    if name == "fwe":
        most = [word for word, _ in Counter(document.split("coded words.")[-1].split()).most_common(4)]
        assert most == ["...", *sample.answers]


def test_samples_are_the_same_for_a_seed_and_others_for_another(encoder, options):
    hashes = [
        [
            s.hash
            for s in ruler.make_samples(encoder, Options(**{**vars(options), "seed": seed, "tasks": ("vt", "cwe")}))
        ]
        for seed in (1, 1, 2)
    ]
    assert hashes[0] == hashes[1] and not set(hashes[0]) & set(hashes[2])


@pytest.mark.parametrize("needle", niah.NEEDLES)
def test_a_needle_is_at_its_depth(needle, encoder):
    samples = niah.make_samples(encoder, Options(lengths=(LENGTH, 512), depths=(0, 50, 100), needle=needle))
    assert [(s.length, s.depth) for s in samples] == [(n, d) for n in (LENGTH, 512) for d in (0, 50, 100)]
    hidden = niah.CLASSIC if needle == "classic" else "One of the special magic numbers for"
    for sample in samples:
        document = text_of(encoder, sample.context)
        assert document.count(hidden) == 1
        assert abs(document.index(hidden) / len(document) - sample.depth / 100) < 0.2
        assert sample.length - 120 < len(sample.context) + len(sample.question) + sample.max_new_tokens <= sample.length
        assert sample.answers[0] in document


def test_text_goes_on_where_its_document_stops(encoder):
    (sample,) = text.make_samples(encoder, Options(lengths=(512,)))
    assert len(sample.context) + len(sample.target) == 512
    whole = text_of(encoder, sample.context + sample.target)
    assert text_of(encoder, encoder.tokens(whole)).strip() == whole.strip()


def test_texts_are_of_as_many_documents_as_there_are(encoder):
    num_documents = len(documents())
    samples = text.make_samples(encoder, Options(lengths=(64, 128), num_samples=num_documents + 2))
    assert Counter(s.document for s in samples if s.length == 64).most_common(3)[2][1] == 1
    assert len({s.hash for s in samples}) == len(samples) == 2 * (num_documents + 2)
    assert len({s.cluster for s in samples}) == num_documents
    again, other = (text.make_samples(encoder, Options((64,), num_samples=3, seed=seed)) for seed in (0, 1))
    assert [s.hash for s in again] == [s.hash for s in samples[:3]] != [s.hash for s in other]


def test_needles_in_one_haystack_are_one_cluster(encoder):
    samples = niah.make_samples(encoder, Options((512, 256), depths=(0, 50, 100), num_samples=2))
    assert Counter(s.cluster for s in samples) == dict.fromkeys({s.cluster for s in samples[:2]}, 6)
    assert len({s.cluster for s in samples}) == 2


def test_the_parts_of_a_prompt_are_the_chat_templates_whole(encoder):
    context, question = encoder.prompt("A document.", " A question?", " It is")
    whole = text_of(encoder, context + question)
    if encoder.tokenizer.chat_template is None:
        assert whole.endswith("A document. A question? It is")
        assert context[:1] == (encoder.tokenizer.bos_token_id,)
    else:
        message = {"role": "user", "content": "A document. A question?"}
        rendered = encoder.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        assert whole == rendered + "It is"


def test_largest_finds_the_edge():
    for edge in (3, 4, 7, 100, 12345):
        assert largest(lambda n, edge=edge: n <= edge, 3, "x") == edge
    with pytest.raises(InputError, match="too short"):
        largest(lambda n: False, 3, "x")


# --- longbench -----------------------------------------------------------------------------------------------------


def line(**changes) -> dict:
    base = {
        "input": "Who?",
        "context": "Ann did. " * 300,
        "answers": ["Ann"],
        "dataset": "hotpotqa",
        "all_classes": None,
    }
    return {**base, **changes}


def jsonl(path, *lines) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return str(path)


def test_longbench_prompts_put_the_context_before_the_input():
    assert len(longbench.DATA_SETS) == 21
    for data_set in longbench.DATA_SETS.values():
        before, after = data_set.prompt.split("{context}")
        assert "{" not in before and after.replace("{input}", "", 1).count("{") == 0
        assert data_set.metric in METRICS


def test_longbench_cuts_the_middle_and_leaves_room_for_the_answer(encoder, tmp_path):
    file = jsonl(tmp_path / "a.jsonl", line(), line(dataset="trec", all_classes=["Person"], answers=["Person"]))
    chat, plain = longbench.make_samples(encoder, Options(lengths=(400,), longbench=(file,)))
    assert len(chat.context) + len(chat.question) + chat.max_new_tokens == 400
    assert "Question: Who?\nAnswer:" in text_of(encoder, chat.question)
    assert text_of(encoder, chat.context).count("The following are given passages.") == 1
    if encoder.tokenizer.chat_template is not None:
        assert "<|im_start|>" in text_of(encoder, chat.context)
        assert "<|im_start|>" not in text_of(encoder, plain.context + plain.question)


def test_longbench_samples_of_two_files_of_a_data_set_are_two(encoder, tmp_path):
    trec = line(dataset="trec", all_classes=["Person"], answers=["Person"])
    files = [jsonl(tmp_path / f"{name}.jsonl", line(context=name * 99), trec) for name in "ab"]
    samples = longbench.make_samples(encoder, Options(lengths=(400,), longbench=tuple(files)))
    assert [s.id for s in samples] == [
        f"longbench/{name}/400/{i}" for name, i in [("hotpotqa", 0), ("trec", 1), ("hotpotqa", 1), ("trec", 3)]
    ]


def test_without_middle_keeps_both_ends():
    whole = tuple(range(20))
    for cut in range(1, 20):
        context, question = longbench.without_middle(whole[:cut], whole[cut:], 9)
        assert context + question == (0, 1, 2, 3, 4, 16, 17, 18, 19)
        assert len(context) == min(5, cut) + max(0, 4 - (20 - cut))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"input": "x", "context": "y", "dataset": "trec"}', "answers is missing"),
        ('{"input": 3}', "input is not a text"),
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        (json.dumps(line(dataset="nq")), "dataset must be one of narrativeqa"),
        (json.dumps(line(answers=[])), "answers must be one text or more"),
        (json.dumps(line(dataset="trec")), "trec needs all_classes"),
        (json.dumps(line(dataset="passage_retrieval_en")), "must name a number"),
    ],
)
def test_longbench_names_the_line_that_is_wrong(bad, message, encoder, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(line()) + "\n" + bad + "\n")
    with pytest.raises(InputError, match="line 2") as caught:
        longbench.make_samples(encoder, Options(lengths=(400,), longbench=(str(tmp_path / "a.jsonl"),)))
    assert message in str(caught.value)


# --- metrics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "answer", "right", "classes", "score"),
    [
        ("contains_all", "It is 12 and FOO.", ["12", "foo", "bar"], [], 2 / 3),
        ("contains_any", "In Paris, of course", ["Rome", "paris"], [], 1),
        ("word_recall", "Eat a sandwich!", ["eat a sandwich and sit"], [], 3 / 5),
        ("qa_f1", "The old Bridge.", ["bridge", "an old bridge here"], [], 0.8),
        ("qa_f1", "nothing", ["bridge"], [], 0),
        ("rouge_l", "the cat sat", ["the cat sat"], [], 1),
        ("rouge_l", "a b c d", ["a x c y"], [], 0.5),
        ("rouge_l", "b a. d c", ["a b. c d"], [], 0.5),  # one word of each pair of sentences is in order
        ("rouge_l", "...", ["a"], [], 0),
        ("classification", "a Person or a Place", ["Person"], ["Person", "Place"], 0.5),
        ("classification", "Home address", ["Home address"], ["Home", "Home address"], 1),
        ("classification", "none", ["Person"], ["Person"], 0),
        ("count", "3 of 4, so 3", ["3"], [], 2 / 3),
        ("retrieval", "Paragraph 12", ["Paragraph 12"], [], 1),
        ("code_similarity", "# note\nx = 1\ny", ["x = 1"], [], 1),
        ("code_similarity", "abcd", ["abef"], [], 0.5),
    ],
)
def test_metrics(metric, answer, right, classes, score):
    assert METRICS[metric](answer, right, classes) == pytest.approx(score, abs=1e-6)


# --- answers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def needles(tiny):
    return niah.make_samples(Encoder(tiny[1]), Options(lengths=(384,), depths=(0, 60)))


@pytest.fixture(scope="module")
def full(tiny, needles):
    return evaluate(Runner(*tiny, None), needles, ("aware", "agnostic"), name="tiny", quiet=True)


def small_plan(model, budget, **changes):
    return make_space(model, budget, context_tokens=384, decode=Decode(reserve_tokens=64, format="16bit"), **changes)


def test_the_full_cache_answers_alike_in_both_regimes_and_a_run_asks_it_once(tiny, needles, full, monkeypatch):
    by_id = {}
    for row in full["rows"]:
        by_id.setdefault(row["id"], []).append(row)
    agnostic = Runner(*tiny, None).row(needles[0], "agnostic")
    assert by_id[needles[0].id][0]["answer"] == agnostic["answer"] and agnostic["score"] == 1
    assert by_id[needles[0].id][0]["cross_entropy"] == pytest.approx(agnostic["cross_entropy"], abs=1e-4)
    for aware, other in by_id.values():
        assert {**aware, "regime": "agnostic"} == other
    asked = []
    monkeypatch.setattr(Runner, "row", lambda self, sample, regime: asked.append(regime) or agnostic)
    evaluate(Runner(*tiny, None), needles[:1], ("aware", "agnostic"), name="tiny", quiet=True)
    assert asked == ["aware"]


def test_a_plan_that_keeps_everything_answers_as_the_full_cache(tiny, needles, full):
    plan = keep_all(small_plan(tiny[0], "64MiB"))
    run = evaluate(Runner(*tiny, plan), needles, ("aware", "agnostic"), name="tiny", quiet=True)
    for row, right in zip(run["rows"], full["rows"], strict=True):
        assert row["answer"] == right["answer"]
        assert row["cross_entropy"] == pytest.approx(right["cross_entropy"], abs=5e-3)  # keys and values in 16 bit


def test_the_question_is_compressed_or_asked_afterwards_and_a_plan_without_the_needle_misses_it(
    tiny, needles, full, monkeypatch
):
    space = small_plan(tiny[0], "1/3", scorer=Scorer(name="streamingllm"))
    runner = Runner(*tiny, space.plan(space.project([1] * 8, ["16bit"] * 8)))
    caches, make = [], Runner._cache
    monkeypatch.setattr(Runner, "_cache", lambda self: caches.append(make(self)) or caches[-1])
    sample = needles[1]  # 60 % deep: out of sinks and window
    rows = [runner.row(sample, regime) for regime in ("aware", "agnostic")]
    num_compressed = [cache.layers[0].prompt_tokens for cache in caches]
    assert num_compressed == [[len(sample.context) + len(sample.question) - 1], [len(sample.context)]]
    assert [row["score"] for row in rows] == [0, 0]
    assert min(row["cross_entropy"] for row in rows) > full["rows"][2]["cross_entropy"] + 1


def test_a_plan_that_stops_gets_no_more_than_its_reserve(tiny, needles):
    space = make_space(
        tiny[0], "64MiB", context_tokens=384, decode=Decode(reserve_tokens=6, format="16bit", then="stop")
    )
    runner = Runner(*tiny, keep_all(space))
    row = runner.row(needles[0], "aware")
    assert len(row["by_position"]) <= 6
    with pytest.raises(InputError, match="the question alone has"):
        runner.row(needles[0], "agnostic")


# --- runs ----------------------------------------------------------------------------------------------------------


class InterruptedRunError(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_stopped(tiny, needles, full, tmp_path, monkeypatch):
    output, answered = tmp_path / "run.json", []
    row = Runner.row

    def counted(self, sample, regime):
        if len(answered) == 1:
            raise InterruptedRunError
        answered.append((sample.id, regime))
        return row(self, sample, regime)

    monkeypatch.setattr(Runner, "row", counted)
    arguments = (Runner(*tiny, None), needles, ("aware", "agnostic"))
    with pytest.raises(InterruptedRunError):
        evaluate(*arguments, name="tiny", output=output, quiet=True)
    assert not output.exists()
    partial = tmp_path / "run.json.partial"
    partial.write_text(partial.read_text() + '{"id": "torn')
    with pytest.raises(InputError, match="the beginnings of another run"):
        evaluate(*arguments[:1], needles[:1], ("aware",), name="tiny", output=output, quiet=True)
    monkeypatch.setattr(Runner, "row", lambda self, *args: answered.append((args[0].id, args[1])) or row(self, *args))
    run = evaluate(*arguments, name="tiny", output=output, quiet=True)
    assert len(answered) == len(set(answered)) == 2  # the full cache is asked once for both regimes
    assert run["rows"] == full["rows"] == json.loads(output.read_text())["rows"]
    assert not partial.exists()


def test_a_kill_while_the_rows_are_reopened_loses_none(tmp_path, monkeypatch):
    arguments = (tmp_path / "run.json", {"plan": None}, [(f"h{i}", "aware") for i in range(5)])
    journal = _Journal(*arguments)
    for i in range(4):
        journal.append({"id": f"s{i}", "hash": f"h{i}", "regime": "aware"})
    journal.close()
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + b'{"id": "torn')
    monkeypatch.setattr(_Journal, "append", lambda self, row: pytest.fail("rows are written anew"))
    again = _Journal(*arguments)
    again.close()
    assert len(again.rows) == 4 and again.path.read_bytes() == whole


def test_rows_of_one_id_and_another_sample_are_not_taken_up(tiny, needles, tmp_path, monkeypatch):
    """As earlier versions wrote them for two LongBench files."""
    monkeypatch.setattr(Runner, "row", lambda self, sample, regime: {"id": sample.id, "hash": sample.hash,
                                                                     "regime": regime})  # fmt: skip
    output, partial, arguments = tmp_path / "run.json", tmp_path / "run.json.partial", {"name": "tiny", "quiet": True}
    monkeypatch.setattr("qpkv_planner.evaluation.run._Journal.remove", lambda self: None)
    evaluate(Runner(*tiny, None), needles, ("aware",), output=output, **arguments)
    partial.write_text(partial.read_text().replace(needles[1].id, needles[0].id))
    rows = evaluate(Runner(*tiny, None), needles, ("aware",), output=output, **arguments)["rows"]
    assert [row["hash"] for row in rows] == [sample.hash for sample in needles]


def test_runs_are_compared_in_pairs(full, tmp_path, capsys):
    full = {**full, "rows": [{**row, "cluster": row["id"]} for row in full["rows"]]}
    worse = json.loads(json.dumps(full))
    for row in worse["rows"]:
        row["cross_entropy"] += 0.5
    differences = compare(full, worse, ("a", "b"))
    ce = [one for one in differences if one.measure == "cross_entropy" and one.group[3] == "aware"]
    assert ce and all(one.change.mean == pytest.approx(0.5) and one.change.low > 0.49 for one in ce)
    for name, run in (("a", full), ("b", worse)):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert cli.main(["--compare", *files]) == 0
    assert "+0.500 (+0.500 to +0.500)  *" in capsys.readouterr().out
    worse["rows"][0]["hash"] = "sha256:other"
    (tmp_path / "b.json").write_text(json.dumps(worse))
    assert cli.main(["--compare", *files]) == 2
    assert "only runs of the same samples can be compared, but 1 of" in capsys.readouterr().err


def test_samples_of_one_id_are_told_apart_by_their_hash_and_rows_without_clusters_stand_alone(full):
    runs = [json.loads(json.dumps(full)) for _ in range(2)]
    for run, losses in zip(runs, ((1.0, 2.0), (1.5, 2.5)), strict=True):
        for row in run["rows"]:
            row["id"] = "longbench/hotpotqa/384/0"  # as earlier versions named the first line of either file
            row["cross_entropy"] = losses[row["hash"] == full["rows"][-1]["hash"]]
    del runs[0]["rows"][0]["cluster"]
    found = [one for one in compare(*runs, ("a", "b")) if one.measure == "cross_entropy"]
    assert all((one.change.low, one.change.high) == (0.5, 0.5) for one in found)
    assert {one.num_clusters for one in found} == {1}
    for run in runs:
        for row in run["rows"]:
            row.pop("cluster", None)
    assert {one.num_clusters for one in compare(*runs, ("a", "b"))} == {2}


def test_the_bootstrap_covers_the_mean():
    interval = bootstrap([0, 1] * 50, list(map(str, range(100))))
    assert interval.low < interval.mean == 0.5 < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.05, rel=0.15)


def test_the_bootstrap_draws_clusters_which_may_differ_in_size():
    values = [0.0, 1.0] * 50
    alone = bootstrap(values, list(map(str, range(100))))
    alike = bootstrap(np.repeat(values, 5), np.repeat(list(map(str, range(100))), 5))
    assert (alike.low, alike.high) == (alone.low, alone.high)  # five times as many samples tell nothing more
    uneven = bootstrap([0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"])
    assert (uneven.low, uneven.mean, uneven.high) == (0, 0.25, 1)


def test_one_document_has_a_mean_and_no_interval(full):
    worse = json.loads(json.dumps(full))
    for row in worse["rows"]:
        row["cross_entropy"] += 0.5
    assert len({row["cluster"] for row in full["rows"]}) == 1  # two depths of one haystack
    assert " to " not in summary(full["rows"])
    shown = comparison(compare(full, worse, ("a", "b")), ("a", "b"))
    assert "+0.500" in shown and "(+0.500" not in shown and "*" not in shown


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"version": 1, "rows": []}, "the run lacks model"),
        ({"version": 1, "rows": [], "model": "tiny", "plan": None}, "has no row"),
        ({"version": 1, "rows": [{}], "model": "tiny", "plan": None}, "a row lacks category"),
        ({"version": 1, "rows": [3], "model": "tiny", "plan": None}, "a row is not a mapping"),
        ({"version": 1, "rows": [], "model": "tiny", "plan": {"file": "x"}}, "plan lacks planned_bytes"),
        ([3], "is not a run of qpkv-eval"),
    ],
)
def test_a_file_that_is_no_run_is_refused_in_one_line(run, message, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match=message):
        load_run(str(tmp_path / "run.json"))


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_writes_rows_and_draws_the_map(tmp_path, capsys):
    run, drawn = tmp_path / "run.json", tmp_path / "needle.png"
    pytest.importorskip("matplotlib")
    arguments = ["--model", "tiny", "--suites", "niah,text", "--lengths", "256", "--depths", "0,100", "--limit", "2"]
    assert cli.main([*arguments, "--json", str(run), "--heatmap", str(drawn), "--quiet", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "needle's depth, aware" in out and "cross-entropy of text, aware" in out
    rows = json.loads(run.read_text())["rows"]
    assert [row["suite"] for row in rows] == ["niah", "niah", "text", "text"]
    assert all(len(row["by_position"]) == 64 for row in rows[2:])
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --plan FILE, --model NAME"),
        (["--model", "tiny", "--suites", "needle"], "a suite is one of niah, ruler, text, longbench, got 'needle'"),
        (["--model", "tiny", "--suites", "longbench"], "longbench needs its data"),
        (["--model", "tiny", "--suites", "ruler", "--tasks", "qa_1"], "qa_1 needs the squad data set"),
        (["--model", "tiny", "--suites", "ruler", "--tasks", "nope"], "--tasks are of niah_single_1"),
        (["--model", "tiny", "--suites", "niah", "--tasks", "vt"], "vt is of the suite ruler, which is not among"),
        (["--model", "tiny", "--suites", "text", "--lengths", "3"], "raise --lengths"),
        (["--model", "tiny", "--json", "."], "--json must be a file in an existing directory, got ."),
        (["--model", "tiny", "--compare", "a", "b"], "leave --plan and --model out"),
        (["--model", "tiny", "--lengths", "64"], "the length is too short for the question alone"),
        (["--model", "tiny", "--lengths", "1k"], "--lengths must be whole numbers"),
        (["--model", "tiny", "--depths", "120"], "--depths must be whole numbers from 0 to 100"),
        (["--model", "tiny", "--needle", "hay"], "--needle must be one of number, classic"),
        (["--model", "tiny", "--samples", "0"], "--samples must be at least 1"),
        (["--model", "tiny", "--suites", "text", "--heatmap", "x.png"], "--heatmap draws the suite niah"),
        (["--model", "tiny", "--lengths", "4200", "--limit", "1"], "more than the model's context: lower --lengths"),
        (["--compare", "no.json", "no.json"], "no.json: cannot be read as a run of qpkv-eval: No such file"),
        (["--plan", "no.yaml"], "no.yaml: cannot be read as a plan"),
    ],
)
def test_bad_use_is_one_line_and_exit_2(arguments, message, capsys):
    assert cli.main([*arguments, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("qpkv-eval: error: ")


def test_a_plan_of_another_model_is_refused_and_one_of_other_weights_warned_of(tiny, tmp_path, capsys):
    few = ["--suites", "niah", "--lengths", "256", "--depths", "0", "--limit", "1", "--quiet"]
    other, trained = tmp_path / "other.yaml", tmp_path / "trained.yaml"
    other.write_text(uniform_plan("mistral-7b", "1/16", "snapkv:kivi:4bit").to_yaml())
    space = make_space(tiny[0], "64MiB", context_tokens=384, decode=Decode(reserve_tokens=64, format="16bit"))
    section = space.model.model_copy(update={"id": "tiny", "weights_hash": "sha256:" + "0" * 64})
    trained.write_text(keep_all(replace(space, model=section)).to_yaml())
    assert cli.main(["--plan", str(other), "--model", "tiny", *few]) == 2
    assert "the plan is for a model with num_layers = 32, this one has 8" in capsys.readouterr().err
    assert cli.main(["--plan", str(trained), *few]) == 0
    assert "the plan was made on other weights than those of tiny" in capsys.readouterr().err


def test_templates_can_be_replaced_and_mistakes_are_named(encoder, tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text('niah: {template: "Text: {context} Find the {kind} of {query}!"}')
    templates = ruler.load_templates(str(file))
    options = Options(lengths=(512,), tasks=("niah_single_2",), templates=templates)
    (sample,) = ruler.make_samples(encoder, options)
    assert "Find the number of " in text_of(encoder, sample.question)
    for bad, message in (
        ("niah: {template: no place}", "must have {context} once"),
        ("niah: {template: '{context} {what}'}", "may have {context}, {query}, {kind} and {count}"),
        ("hay: {template: '{context}'}", "a template is for one of niah"),
        ("niah: text", "must have the texts"),
        ("- x", "templates are a YAML mapping"),
    ):
        file.write_text(bad)
        with pytest.raises(InputError) as caught:
            ruler.load_templates(str(file))
        assert message in str(caught.value)


def test_smollm2_is_evaluated_in_its_chat_template():
    if not has_smollm2():
        pytest.skip("the SmolLM2 weights are not installed (make install)")
    assert Encoder(load_tokenizer("smollm2")).frame[0].endswith("<|im_start|>user\n")


def test_the_harness_command_says_what_is_missing(monkeypatch, capsys):
    for module in ("lm_eval", "lm_eval.api.registry", "qpkv_planner.harness"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert harness_cli.main() == 2
    assert capsys.readouterr().err.startswith("qpkv-lm-eval: error: the harness needs the extra eval")
