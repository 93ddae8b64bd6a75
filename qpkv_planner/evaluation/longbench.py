"""LongBench v1 (arXiv 2308.14508) on jsonl files that the user has: its prompts, answer lengths and metrics.

A file's lines have the fields that its authors publish: input, context, answers, all_classes, dataset. Prompts that
are too long lose their middle, room is left for the answer; few-shot and code data sets go without the chat template,
as in the authors' pred.py. Difference: tokens are cut, not decoded and tokenized again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpkv_planner.evaluation.samples import Encoder, Options, Sample
from qpkv_runtime.errors import InputError

FIELDS: dict[str, type] = {"input": str, "context": str, "answers": list, "dataset": str}


@dataclass(frozen=True)
class DataSet:
    """How a data set is asked and scored. prompt: with {context}, then {input}. is_first_line: only the answer's first
    line counts."""

    prompt: str
    new_tokens: int
    metric: str
    category: str
    is_chat: bool = True
    is_first_line: bool = False


_CONCISELY = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words."
)
_PASSAGES = (
    f"{_CONCISELY}\n\nThe following are given passages.\n{{context}}\n\n{_CONCISELY}\n\nQuestion: {{input}}\nAnswer:"
)
_STORY = "as concisely as you can, using a single phrase if possible. Do not provide any explanation."
_ARTICLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.'
)
DATA_SETS = {
    "narrativeqa": DataSet(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        f"{_STORY}\n\nStory: {{context}}\n\nNow, answer the question based on the story {_STORY}\n\n"
        "Question: {input}\n\nAnswer:",
        128, "qa_f1", "single-document QA",
    ),
    "qasper": DataSet(
        f"You are given a scientific article and a question. Answer the question {_ARTICLE}\n\nArticle: {{context}}"
        f"\n\n Answer the question based on the above article {_ARTICLE}\n\nQuestion: {{input}}\n\nAnswer:",
        128, "qa_f1", "single-document QA",
    ),
    "multifieldqa_en": DataSet(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        64, "qa_f1", "single-document QA",
    ),
    "multifieldqa_zh": DataSet(
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答：",
        64, "qa_f1_zh", "single-document QA",
    ),
    "hotpotqa": DataSet(_PASSAGES, 32, "qa_f1", "multi-document QA"),
    "2wikimqa": DataSet(_PASSAGES, 32, "qa_f1", "multi-document QA"),
    "musique": DataSet(_PASSAGES, 32, "qa_f1", "multi-document QA"),
    "dureader": DataSet(
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
        128, "rouge_l_zh", "multi-document QA",
    ),
    "gov_report": DataSet(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}"
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512, "rouge_l", "summarization",
    ),
    "qmsum": DataSet(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.\n\nQuery: {input}\nAnswer:",
        512, "rouge_l", "summarization",
    ),
    "multi_news": DataSet(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, "
        "write a one-page summary of all the news.\n\nSummary:",
        512, "rouge_l", "summarization",
    ),
    "vcsum": DataSet(
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
        512, "rouge_l_zh", "summarization",
    ),
    "trec": DataSet(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64, "classification", "few-shot", is_chat=False, is_first_line=True,
    ),
    "triviaqa": DataSet(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        32, "qa_f1", "few-shot", is_chat=False, is_first_line=True,
    ),
    "samsum": DataSet(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128, "rouge_l", "few-shot", is_chat=False, is_first_line=True,
    ),
    "lsht": DataSet(
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
        64, "classification", "few-shot", is_chat=False, is_first_line=True,
    ),
    "passage_count": DataSet(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of "
        "unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, "
        "3, and so on.\n\nThe final answer is: ",
        32, "count", "synthetic",
    ),
    "passage_retrieval_en": DataSet(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph "
        'that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\n'
        "The answer is: ",
        32, "retrieval", "synthetic",
    ),
    "passage_retrieval_zh": DataSet(
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。"
        '答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
        32, "retrieval", "synthetic",
    ),
    "lcc": DataSet(
        "Please complete the code given below. \n{context}Next line of code:\n",
        64, "code_similarity", "code", is_chat=False,
    ),
    "repobench-p": DataSet(
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        64, "code_similarity", "code", is_chat=False,
    ),
}  # fmt: skip


def make_samples(encoder: Encoder, options: Options) -> list[Sample]:
    """Every line of the user's files (`num_samples` does not count here), cut to each length, answer included.

    An index is the line's place in its file, after those of earlier files of its data set.
    """
    if not options.longbench:
        raise InputError("longbench needs its data: give jsonl files of LongBench v1 with --longbench FILE ...")
    samples = []
    taken: dict[str, int] = {}  # indices of each data set so far
    for file in options.longbench:
        before = dict(taken)
        for place, line in enumerate(_lines(file)):
            if options.tasks and line["dataset"] not in options.tasks:
                continue
            index = before.get(line["dataset"], 0) + place
            taken[line["dataset"]] = index + 1
            samples += [_make_sample(encoder, options, line, index, length) for length in options.lengths]
    return samples


def _make_sample(encoder: Encoder, options: Options, line: dict[str, Any], index: int, length: int) -> Sample:
    name = line["dataset"]
    data_set = DATA_SETS[name]
    before, after = data_set.prompt.split("{context}")
    context, question = encoder.prompt(
        before + line["context"], after.replace("{input}", line["input"]), is_chat=data_set.is_chat
    )
    new_tokens = options.new_tokens(data_set.new_tokens)
    context, question = without_middle(context, question, length - new_tokens)
    return Sample(
        suite="longbench",
        category=data_set.category,
        task=name,
        index=index,
        length=length,
        context=context,
        question=question,
        answers=tuple(line["answers"]),
        metric=data_set.metric,
        max_new_tokens=new_tokens,
        classes=tuple(line.get("all_classes") or ()),
    )


def without_middle(
    context: tuple[int, ...], question: tuple[int, ...], most: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """At most so many tokens: the first half and the last half of the prompt."""
    if most < 2:
        raise InputError(f"longbench leaves {most} tokens for the prompt beside the answer: raise --lengths")
    if len(context) + len(question) <= most:
        return context, question
    first, last, whole = most - most // 2, most // 2, context + question
    kept = whole[:first] + whole[-last:]
    num_context = min(first, len(context)) + max(0, last - len(question))
    return kept[:num_context], kept[num_context:]


def _lines(file: str) -> list[dict[str, Any]]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    lines = []
    for number, raw in enumerate(text.splitlines(), 1):
        if not raw.strip():
            continue
        where = f"{file} line {number}"
        try:
            line = json.loads(raw)
        except ValueError as error:
            raise InputError(f"{where}: is not JSON: {error}") from None
        if not isinstance(line, dict):
            raise InputError(f"{where}: must be a JSON object")
        for name, kind in FIELDS.items():
            if not isinstance(line.get(name), kind):
                what = "missing" if name not in line else f"not a {'list' if kind is list else 'text'}"
                raise InputError(f"{where}: a line has {', '.join(FIELDS)}; {name} is {what}")
        if line["dataset"] not in DATA_SETS:
            raise InputError(f"{where}: dataset must be one of {', '.join(DATA_SETS)}, got {line['dataset']!r}")
        if not line["answers"] or not all(isinstance(answer, str) for answer in line["answers"]):
            raise InputError(f"{where}: answers must be one text or more")
        metric = DATA_SETS[line["dataset"]].metric
        if metric == "classification" and not line.get("all_classes"):
            raise InputError(f"{where}: {line['dataset']} needs all_classes")
        if metric == "retrieval" and not all(any(c.isdigit() for c in answer) for answer in line["answers"]):
            raise InputError(f"{where}: an answer of {line['dataset']} must name a number")
        lines.append(line)
    if not lines:
        raise InputError(f"{file}: has no line")
    return lines


def counted(task: str, answer: str) -> str:
    """The part of a model's answer that counts."""
    return answer.lstrip("\n").split("\n")[0] if DATA_SETS[task].is_first_line else answer
