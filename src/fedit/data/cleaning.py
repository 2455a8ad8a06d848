"""What rows should not have: personal identifiers, copies of themselves, and near-copies among the held-out rows.

Identifiers are found by the patterns and checksums of Presidio (``pip install 'fedit[redaction]'``), where the rows
are: at the client. They are replaced by what they are, ``<EMAIL_ADDRESS>``. Names of people and places are no patterns,
and stay.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedit.config import DataConfig
from fedit.interfaces import ConfigError, Example, Turn, did_you_mean

SCORE = 0.35
"""Presidio's confidence from which something is replaced"""
SHINGLE = 5
"""Words of the runs that near-copies share"""
ALIKE = 0.8
"""The share of two texts' runs of words (Jaccard) from which they are near-copies"""
FEW = 50
"""Held-out rows that may share a run of words for it to be one that tells"""
SHOWN = 5


@dataclass(frozen=True, eq=False)
class Cleaned:
    """The rows, and what became of them."""

    train: list[Example]
    test: list[Example]
    summary: dict[str, Any]
    """``redacted``: how many of each kind; ``duplicates``: training rows that the same client has already, removed if
    the configuration says so; ``near_duplicates``: held-out rows that a training row is nearly the same as, and the
    first pairs with their likeness"""


def clean(train: Sequence[Example], test: Sequence[Example], config: DataConfig) -> Cleaned:
    """Return the rows as they are to be used.

    Raises:
        ConfigError: `redact` names what cannot be found, or Presidio is not installed.
    """
    redacted: Counter[str] = Counter()
    if config.redact:
        redact = redactor(config.redact, redacted)
        train, test = ([_redacted(example, redact) for example in examples] for examples in (train, test))
        held_out = {example.turns for example in test}  # what differed by identifiers alone may be the same now
        train = [example for example in train if example.turns not in held_out]
    seen: set[Any] = set()
    first, again = list[Example](), 0
    for example in train:
        content = example.client, example.turns, example.rejected, example.system
        again += content in seen
        if content not in seen or not config.deduplicate:
            first.append(example)
        seen.add(content)
    pairs = near_duplicates(first, test)
    summary = {
        "redacted": dict(redacted),
        "duplicates": again,
        "deduplicated": config.deduplicate,
        "near_duplicates": {
            "rows": len({id(held_out) for _, held_out, _ in pairs}),
            "first": [(one.source, held_out.source, round(alike, 2)) for one, held_out, alike in pairs[:SHOWN]],
        },
    }
    return Cleaned(first, list(test), summary)


# ------------------------------------------------------------------------------------------------------- redaction


def redactor(entities: Iterable[str], found: Counter[str]) -> Callable[[str], str]:
    """Return a function that replaces `entities` in a text, and counts them in `found`.

    Raises:
        ConfigError: Presidio is not installed, or finds an entity by no pattern.
    """
    by_entity = _recognizers()
    for entity in entities:
        if entity not in by_entity:
            raise ConfigError(
                f"[data] redact: {entity!r} is nothing that is found by a pattern. {did_you_mean(entity, by_entity)}"
            )
    wanted = list(dict.fromkeys(entities))

    def redact(text: str) -> str:
        if not re.search(r"[\d@.:]", text):  # no identifier does without
            return text
        spans: list[tuple[float, int, int, str]] = []
        for entity in wanted:
            for recognizer in by_entity[entity]:
                results = recognizer.analyze(text, [entity], None) or ()
                spans += [(-r.score, r.start, r.end, entity) for r in results if r.score >= SCORE]
        whole: list[tuple[int, int, str]] = []
        for _, start, end, entity in sorted(spans, key=lambda span: (span[1] - span[2], span[0])):  # longest first
            meets = [other for other in whole if start < other[1] and other[0] < end]
            label = meets[0][2] if meets else entity
            whole = [other for other in whole if other not in meets]
            whole.append((min([start, *(o[0] for o in meets)]), max([end, *(o[1] for o in meets)]), label))
        for start, end, entity in sorted(whole, reverse=True):
            text = f"{text[:start]}<{entity}>{text[end:]}"
            found[entity] += 1
        return text

    return redact


def _recognizers() -> dict[str, list[Any]]:
    """Return Presidio's recognizers that need no language model, and are sure of what they find, by what that is."""
    try:
        import tldextract
        from presidio_analyzer import PatternRecognizer, RecognizerRegistry
    except ModuleNotFoundError as error:
        raise ConfigError(
            "[data] redact needs Presidio, which is not installed: pip install 'fedit[redaction]'"
        ) from error
    # Whether the end of an address is a domain is looked up in a list that would be fetched from the internet.
    tldextract.extract = tldextract.TLDExtract(suffix_list_urls=())
    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    registry = RecognizerRegistry()
    registry.load_predefined_recognizers(languages=["en"])
    by_entity: dict[str, list[Any]] = defaultdict(list)
    for recognizer in registry.recognizers:
        if recognizer.name == "SpacyRecognizer":
            continue
        if isinstance(recognizer, PatternRecognizer):  # of nine digits it needs the words around them to be sure
            checks = type(recognizer).validate_result is not PatternRecognizer.validate_result
            if not checks and max((pattern.score for pattern in recognizer.patterns), default=0.0) < SCORE:
                continue
        for entity in recognizer.supported_entities:
            by_entity[entity].append(recognizer)
    return dict(by_entity)


def _redacted(example: Example, redact: Callable[[str], str]) -> Example:
    turns = tuple(Turn(redact(turn.instruction), redact(turn.response), redact(turn.context)) for turn in example.turns)
    rejected = None if example.rejected is None else redact(example.rejected)
    checks = None if example.checks is None else _redacted_value(dict(example.checks), redact)
    return replace(example, turns=turns, system=redact(example.system), rejected=rejected, checks=checks)


def _redacted_value(value: Any, redact: Callable[[str], str]) -> Any:
    """Return a JSON value whose texts are redacted; names of keys stay."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: _redacted_value(item, redact) for key, item in value.items()}
    return [_redacted_value(item, redact) for item in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------------ duplicates


def near_duplicates(train: Sequence[Example], test: Sequence[Example]) -> list[tuple[Example, Example, float]]:
    """Return pairs of a training and a held-out row that share most of their runs of five words, with their Jaccard
    likeness, the most alike first. Case and punctuation do not count; shorter rows are one run. A pair has to share a
    run that few held-out rows have: what many begin with is no copy.
    """
    of_test = [_shingles(example) for example in test]
    where: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, shingles in enumerate(of_test):
        for shingle in shingles:
            where[shingle].append(index)
    pairs = []
    for example in train:
        shingles = _shingles(example)
        rare = (rows for shingle in shingles if len(rows := where.get(shingle, ())) <= FEW)
        for index in sorted({index for rows in rare for index in rows}):
            count = len(shingles & of_test[index])
            alike = count / (len(shingles) + len(of_test[index]) - count)
            if alike >= ALIKE:
                pairs.append((example, test[index], alike))
    return sorted(pairs, key=lambda pair: -pair[2])


def _shingles(example: Example) -> set[tuple[str, ...]]:
    text = " ".join(f"{turn.instruction} {turn.context} {turn.response}" for turn in example.turns)
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))}
