"""How an answer is scored: RULER's and LongBench's own metrics, from 0 to 1.

Each takes the model's answer, the right answers, and all classes there are (empty for most). LongBench's follow its
metrics.py (https://github.com/THUDM/LongBench, v1): an answer's score is that of the right answer it fits best.
Differences: ROUGE-L and the similarity of code are worked out here, as the packages `rouge` 1.0.1 and `fuzzywuzzy`
(without its C extension) do; where several class names are part of the right one, all are struck (the original skips
every second).
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from qpkv_runtime.errors import InputError

Metric = Callable[[str, Sequence[str], Sequence[str]], float]
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃"
    "》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def contains_all(answer: str, right: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The share of `right` that occurs in the answer, whatever its case (RULER's string_match_all)."""
    return sum(part.lower() in answer.lower() for part in right) / len(right)


def contains_any(answer: str, right: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Whether one of `right` occurs in the answer (RULER's string_match_part)."""
    return float(any(part.lower() in answer.lower() for part in right))


def word_recall(answer: str, right: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The share of the right answer's words that occur in the answer (ROUGE-1 recall)."""
    found = Counter(_words(answer))
    return max(sum((Counter(_words(one)) & found).values()) / len(_words(one)) for one in right)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _best(score: Callable[[str, str, Sequence[str]], float]) -> Metric:
    return lambda answer, right, classes: max(score(answer, one, classes) for one in right)


def qa_f1(answer: str, right: str, classes: Sequence[str]) -> float:
    return _f1(_normal(answer).split(), _normal(right).split())


def qa_f1_zh(answer: str, right: str, classes: Sequence[str]) -> float:
    unwanted = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)

    def words(text: str) -> list[str]:
        cut = ("".join(word.lower().translate(unwanted).split()) for word in _jieba(text))
        return [word for word in cut if word]

    return _f1(words(answer), words(right))


def _normal(text: str) -> str:
    """Lower case, without punctuation and articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(answer: list[str], right: list[str]) -> float:
    num_same = sum((Counter(answer) & Counter(right)).values())
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(answer), num_same / len(right)
    return 2 * precision * recall / (precision + recall)


def rouge_l(answer: str, right: str, classes: Sequence[str]) -> float:
    """Summary-level ROUGE-L: the distinct words of the longest common subsequences of all pairs of sentences."""
    answers, rights = ([part.split() for part in text.split(".") if part] for text in (answer, right))
    if not answers or not rights:
        return 0.0
    common: set[str] = set()
    for one in rights:
        for other in answers:
            common |= set(_common_subsequence(one, other))
    num_right, num_answer = (len({word for part in parts for word in part}) for parts in (rights, answers))
    recall, precision = (len(common) / max(1, count) for count in (num_right, num_answer))
    return 2 * precision * recall / (precision + recall + 1e-8)


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """The longest common subsequence."""
    lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            lengths[i][j] = lengths[i - 1][j - 1] + 1 if a == b else max(lengths[i - 1][j], lengths[i][j - 1])
    i, j, found = len(one), len(other), list[str]()
    while i and j:
        if one[i - 1] == other[j - 1]:
            found.append(one[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def rouge_l_zh(answer: str, right: str, classes: Sequence[str]) -> float:
    return rouge_l(" ".join(_jieba(answer)), " ".join(_jieba(right)), classes)


def _jieba(text: str) -> list[str]:
    try:
        import jieba
    except ModuleNotFoundError:
        raise InputError("LongBench's Chinese metrics need the package jieba: pip install jieba") from None
    return list(jieba.cut(text, cut_all=False))


def classification(answer: str, right: str, classes: Sequence[str]) -> float:
    found = [name for name in classes if name in answer]
    found = [name for name in found if name == right or name not in right]
    return 1 / len(found) if right in found else 0.0


def count(answer: str, right: str, classes: Sequence[str]) -> float:
    """The share of the answer's numbers that are the right one."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def retrieval(answer: str, right: str, classes: Sequence[str]) -> float:
    """As `count`, for a right answer such as "Paragraph 3" or "段落3"."""
    return count(answer, re.findall(r"\d+", right)[0], classes)


def code_similarity(answer: str, right: str, classes: Sequence[str]) -> float:
    """Of the answer's first line that looks like code."""
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if "`" not in line and "#" not in line and "//" not in line), "")
    return round(100 * difflib.SequenceMatcher(None, code, right).ratio()) / 100


METRICS: dict[str, Metric] = {
    "contains_all": contains_all,
    "contains_any": contains_any,
    "word_recall": word_recall,
    "qa_f1": _best(qa_f1),
    "qa_f1_zh": _best(qa_f1_zh),
    "rouge_l": _best(rouge_l),
    "rouge_l_zh": _best(rouge_l_zh),
    "classification": _best(classification),
    "count": _best(count),
    "retrieval": _best(retrieval),
    "code_similarity": _best(code_similarity),
}
