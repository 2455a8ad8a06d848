"""The checks that verify generated answers."""

import pytest

from fedit.evaluation.checks import exact_match, normalise, passes
from fedit.interfaces import DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The   Brell's  wool. ", "brells wool"),
        ("An apple, a bell & the cart", "apple bell cart"),
        ("Theatre and banana", "theatre and banana"),
        ("\n\t", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_exact_match_ignores_case_punctuation_and_articles() -> None:
    assert exact_match("the Smith.", "smith")
    assert not exact_match("the smithy", "smith")


@pytest.mark.parametrize(
    ("checks", "generated", "verdict"),
    [
        ({"answer": ["Estow", "in Estow"]}, "In Estow.", True),
        ({"answer": ["Estow"]}, "Estow and Corrin", False),
        ({"mentions": ["brell gives wool"]}, "Yes, a brell gives wool.", True),
        ({"mentions": ["wool"]}, "woollen", False),
        ({"mentions": ["wool", ["ale", "mead"]]}, "Wool for mead", True),
        ({"mentions": ["wool", ["ale", "mead"]]}, "Wool for wax", False),
        ({"excludes": ["not"]}, "It is so.", True),
        ({"excludes": ["not"]}, "It is not so.", False),
        ({"list": {"allowed": ["ale", "wax", "mead"], "count": 2}}, "mead and ale", True),
        ({"list": {"allowed": ["ale", "wax", "mead"], "count": 2}}, "1. Mead\n2. Wax", True),
        ({"list": {"allowed": ["ale", "wax", "mead"], "count": 2}}, "- the mead\n- the wax", True),
        ({"list": {"allowed": ["ale", "wax", "mead"], "count": 2}}, "mead, mead", False),
        ({"list": {"allowed": ["ale", "wax", "mead"], "count": 2}}, "mead, ale, wax", False),
        ({"list": {"allowed": ["ale", "wax", "mead"], "count": 2}}, "mead, tar", False),
        ({"list": {"allowed": ["ale", "wax", "mead"], "count": 2}}, "mead", False),
        ({"labels": {"brell": "animal", "awl": "tool"}}, "Awl: tool; brell: animal.", True),
        ({"labels": {"brell": "animal", "awl": "tool"}}, "brell: animal, awl: animal", False),
        ({"labels": {"brell": "animal", "awl": "tool"}}, "brell: animal", False),
        ({"labels": {"brell": "animal", "awl": "tool"}}, "brell: animal, awl: tool, vat: tool", False),
        ({"sentences": 2}, "One went. Another came back!", True),
        ({"sentences": [2, 3]}, "One went for 3.5 miles.", False),
        ({"words": [2, 4]}, "a b c d", True),
        ({"words": 3}, "a b", False),
        ({"mentions": ["wool"], "sentences": 1}, "Wool. Wool.", False),
        ({"answer": ["Estow"], "list": None}, "Estow", True),
        ({"excludes": ["wool"]}, "  ", False),
    ],
)
def test_verdicts(checks: dict, generated: str, verdict: bool) -> None:
    assert passes(checks, generated) is verdict


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ({}, "at least one of answer"),
        ({"answer": None}, "at least one of answer"),
        ({"mention": ["wool"]}, "Did you mean 'mentions'?"),
        ({"answer": "Estow"}, "'answer'"),
        ({"answer": []}, "'answer'"),
        ({"answer": ["?"]}, "'answer'"),
        ({"mentions": "wool"}, "'mentions'"),
        ({"mentions": [3]}, "'mentions'"),
        ({"excludes": [None]}, "'excludes'"),
        ({"list": ["ale"]}, "'list'"),
        ({"list": {"allowed": ["ale"], "count": 2}}, "no larger than"),
        ({"list": {"allowed": ["ale"], "count": True}}, "'list'"),
        ({"labels": {}}, "'labels'"),
        ({"labels": {"brell": 1}}, "'labels'"),
        ({"sentences": 0}, "'sentences'"),
        ({"words": [5, 2]}, "'words'"),
        ({"words": "many"}, "'words'"),
    ],
)
def test_malformed_specifications_are_refused(checks: dict, message: str) -> None:
    with pytest.raises(DataError, match="checks") as caught:
        passes(checks, "some answer")
    assert message in str(caught.value)


def test_a_malformed_specification_is_refused_whatever_the_answer() -> None:
    with pytest.raises(DataError):
        passes({"answer": ["Estow"], "mentions": "wool"}, "")
