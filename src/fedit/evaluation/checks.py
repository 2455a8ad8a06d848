"""Verify a generated answer by program.

A row may carry `checks`, a mapping of the keys below; an answer passes when every one of them holds. A key whose
value is None counts as absent (tables fill missing fields with nulls). Words are compared after `normalise`.

| Key | Value | Holds when |
|---|---|---|
| `answer` | list of strings | the whole answer equals one of them |
| `mentions` | list of phrases, or of lists of alternatives | each (or one alternative of each) occurs as whole words |
| `excludes` | list of phrases | none occurs as whole words |
| `list` | `{"allowed": [...], "count": n}` | the answer is a list of exactly n distinct items, all of them allowed |
| `labels` | `{"item": "label", ...}` | the answer gives every item its label (`item: label, ...`) and names no other |
| `sentences` | n or [least, most] | the answer has that many sentences |
| `words` | n or [least, most] | the answer has that many words |

Examples:
    >>> passes({"list": {"allowed": ["brell", "cotha", "zoll"], "count": 2}}, "a zoll and a brell")
    True
    >>> passes({"mentions": ["wool"], "sentences": 1}, "A brell gives milk.")
    False
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedit.interfaces import DataError, did_you_mean

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ITEM_BREAK = re.compile(r"[,;\n]|\band\b|(?<!\S)(?:[-*•]|\d+[.)])\s")
_ENTRY_BREAK = re.compile(r"[,;\n]")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n")


def normalise(text: str) -> str:
    """Return the text in lower case without punctuation, English articles and surplus space, as SQuAD's scorer does.

    Source: Rajpurkar et al., arXiv 1606.05250, evaluation script v1.1.

    Examples:
        >>> normalise(" The  brell's wool. ")
        'brells wool'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(generated: str, reference: str) -> bool:
    """Tell whether both are the same text after `normalise`: the verdict on rows without checks."""
    return normalise(generated) == normalise(reference)


def passes(checks: Mapping[str, Any], generated: str) -> bool:
    """Tell whether a generated answer fulfils every check; an empty answer never does.

    Raises:
        DataError: the specification has an unknown key, a value of the wrong form, or no key at all.
    """
    present = {key: value for key, value in checks.items() if value is not None}
    if not present:
        raise DataError(f"checks: got {dict(checks)!r}, expected at least one of {', '.join(_CHECKS)}")
    verdicts = []
    for key, value in present.items():
        if key not in _CHECKS:
            raise DataError(f"checks: unknown key {key!r}. {did_you_mean(key, _CHECKS)}")
        verdicts.append(_CHECKS[key](value, generated))
    return bool(generated.strip()) and all(verdicts)


def _answer(accepted: Any, generated: str) -> bool:
    return any(exact_match(generated, answer) for answer in _strings("answer", accepted))


def _mentions(phrases: Any, generated: str) -> bool:
    if not isinstance(phrases, Sequence) or isinstance(phrases, str):
        raise _malformed("mentions", phrases, "a list of phrases or of lists of alternatives")
    alternatives = [_strings("mentions", [phrase] if isinstance(phrase, str) else phrase) for phrase in phrases]
    return all(any(_occurs(phrase, generated) for phrase in group) for group in alternatives)


def _excludes(phrases: Any, generated: str) -> bool:
    return not any(_occurs(phrase, generated) for phrase in _strings("excludes", phrases))


def _list(value: Any, generated: str) -> bool:
    if not isinstance(value, Mapping) or set(value) != {"allowed", "count"} or not _is_count(value["count"]):
        raise _malformed("list", value, '{"allowed": [strings], "count": integer >= 1}')
    allowed = {normalise(item) for item in _strings("list.allowed", value["allowed"])}
    if value["count"] > len(allowed):
        raise _malformed("list", value, "a count no larger than the number of distinct allowed items")
    items = [item for part in _ITEM_BREAK.split(generated) if (item := normalise(part))]
    return len(items) == value["count"] == len(set(items)) and set(items) <= allowed


def _labels(value: Any, generated: str) -> bool:
    if not isinstance(value, Mapping) or not value or not all(isinstance(item, str) for item in value):
        raise _malformed("labels", value, '{"item": "label", ...}')
    labels = {item: label for item, label in value.items() if label is not None}
    _strings("labels", list(labels.values()))
    wanted = sorted((normalise(item), normalise(label)) for item, label in labels.items())
    entries = [entry for entry in _ENTRY_BREAK.split(generated) if entry.strip()]
    pairs = [entry.partition(":") for entry in entries]
    return sorted((normalise(item), normalise(label)) for item, _, label in pairs) == wanted


def _sentences(value: Any, generated: str) -> bool:
    least, most = _bounds("sentences", value)
    return least <= sum(bool(normalise(part)) for part in _SENTENCE_END.split(generated)) <= most


def _words(value: Any, generated: str) -> bool:
    least, most = _bounds("words", value)
    return least <= len(generated.split()) <= most


_CHECKS: dict[str, Callable[[Any, str], bool]] = {
    "answer": _answer,
    "mentions": _mentions,
    "excludes": _excludes,
    "list": _list,
    "labels": _labels,
    "sentences": _sentences,
    "words": _words,
}


def _occurs(phrase: str, generated: str) -> bool:
    return f" {normalise(phrase)} " in f" {normalise(generated)} "


def _strings(key: str, value: Any) -> list[str]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not value or not all(isinstance(item, str) and normalise(item) for item in value):
        raise _malformed(key, value, "a list of strings with a letter or digit each")
    return list(value)


def _bounds(key: str, value: Any) -> tuple[int, int]:
    if _is_count(value):
        return value, value
    if isinstance(value, Sequence) and len(value) == 2 and all(_is_count(bound) for bound in value):
        least, most = value
        if least <= most:
            return least, most
    raise _malformed(key, value, "an integer >= 1 or [least, most]")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _malformed(key: str, value: Any, expected: str) -> DataError:
    return DataError(f"checks: {key!r} is {value!r}, expected {expected}")
