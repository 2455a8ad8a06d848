"""Scores of a judge, by numbers worked out by hand, and by those of stored reviews."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedit.judge.protocol import parse_pair
from fedit.judge.replies import Replies, Reply, Request
from fedit.judge.scores import compare_grades, summarise_grades, summarise_pairs

CATEGORIES = ["a", "a", "b", "b"]


def test_relative_score_wins_and_agreement() -> None:
    """Question 3 lost a reply. The others' means are 7 : 6, 5 : 5 and 4 : 8."""
    pairs = [[(8, 6), (6, 6)], [(6, 4), (4, 6)], [(9, 1), None], [(4, 8), (4, 8)]]
    found = summarise_pairs(pairs, CATEGORIES)
    assert found["relative_score"] == pytest.approx((7 + 5 + 4) / (6 + 5 + 8))
    assert found["mean_scores"] == pytest.approx([16 / 3, 19 / 3])
    assert (found["wins"], found["ties"], found["losses"]) == (1, 1, 1)
    assert found["orders_agree"] == pytest.approx(1 / 3)
    # Ours gains 2 - 0, 2 - -2 and 0 by being first, which is counted twice: once for each side.
    assert found["first_minus_second"] == pytest.approx((2 + 4 + 0) / 3 / 2)
    assert (found["num_questions"], found["num_left_out"]) == (3, 1)
    assert found["by_category"]["a"]["relative_score"] == pytest.approx(12 / 11)
    assert found["by_category"]["b"]["num_left_out"] == 1
    assert found["by_category"]["b"]["confidence"] is None  # of one question


def test_ties_in_every_order_agree() -> None:
    found = summarise_pairs([[(5, 5), (7, 7)], [(3, 3), (3, 3)]], ["a", "a"])
    assert (found["wins"], found["ties"], found["losses"]) == (0, 2, 0)
    assert found["orders_agree"] == 1
    assert found["relative_score"] == 1
    assert found["confidence"] == [1, 1]


def test_one_order_has_no_agreement() -> None:
    found = summarise_pairs([[(8, 4)], [(2, 4)]], ["a", "a"])
    assert found["relative_score"] == pytest.approx(10 / 8)
    assert found["orders_agree"] is None
    assert found["first_minus_second"] is None


def test_intervals_resample_questions_and_repeat() -> None:
    """Every resample of two questions has a ratio of 1/2, 2 or, with both in it, 1."""
    pairs = [[(2, 4), (2, 4)], [(4, 2), (4, 2)]]
    found = summarise_pairs(pairs, ["a", "a"])
    assert found["confidence"] == [0.5, 2.0]
    assert found == summarise_pairs(pairs, ["a", "a"])
    many = summarise_pairs([[(4 + k % 3, 5)] for k in range(200)], ["a"] * 200)
    low, high = many["confidence"]
    assert low < many["relative_score"] < high
    error = np.std([4 + k % 3 for k in range(200)]) / 5 / np.sqrt(200)
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.15)


def test_without_any_score_there_is_no_number() -> None:
    found = summarise_pairs([[None, (1, 2)], [None, None]], ["a", "b"])
    assert found["relative_score"] is None
    assert found["mean_scores"] is None
    assert (found["num_questions"], found["num_left_out"]) == (0, 2)
    assert summarise_pairs([[(5, 0)], [(6, 0)]], ["a", "a"])["relative_score"] is None
    json.dumps(found, allow_nan=False)


def test_grades_and_their_differences() -> None:
    """One question has two turns, one has one, one lost a reply."""
    ours = [[(8.0,), (6.0,)], [(5.0,)], [(9.0,), None]]
    other = [[(4.0,), (6.0,)], [(5.0,)], [(1.0,), (1.0,)]]
    found = summarise_grades(ours)
    assert found["grade"] == pytest.approx((7 + 5) / 2)
    assert found["by_turn"] == [6.5, 6.0]
    assert (found["num_questions"], found["num_left_out"]) == (2, 1)
    compared = compare_grades(ours, other)
    assert compared["difference"] == pytest.approx((2 + 0) / 2)
    assert (compared["wins"], compared["ties"], compared["losses"]) == (1, 1, 0)
    assert compared["confidence"] == [0, 2]
    assert compare_grades([[None]], [[(1.0,)]])["difference"] is None


def test_stored_reviews_are_read_as_they_were_scored(shared: Path) -> None:
    """Of GPT-4's 320 stored reviews those of the three mathematical questions have no scores on their first line."""
    files = sorted((shared / "data" / "vicuna80" / "reviews").glob("*.jsonl"))
    assert len(files) == 4
    for file in files:
        reviews = [json.loads(line) for line in file.read_text().splitlines()]
        parsed = [parse_pair(review["text"]) for review in reviews]
        stored = [tuple(review["score"]) for review in reviews]
        assert len(parsed) == 80
        assert [got for got in parsed if got is not None] == [
            score for got, score in zip(parsed, stored, strict=True) if got is not None
        ]
        assert [review["question_id"] for review, got in zip(reviews, parsed, strict=True) if got is None] == [
            68,
            69,
            70,
        ]
        found = summarise_pairs([[scores] for scores in parsed], ["all"] * 80)
        kept = [score for got, score in zip(parsed, stored, strict=True) if got is not None]
        assert found["relative_score"] == pytest.approx(sum(a for a, _ in kept) / sum(b for _, b in kept))
        assert (found["wins"], found["ties"], found["losses"]) == tuple(
            sum(np.sign(a - b) == sign for a, b in kept) for sign in (1, 0, -1)
        )
        assert found["num_left_out"] == 3


# --------------------------------------------------------------------------------------------------------- the replies


def test_replies_are_found_by_what_was_asked(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    request = Request([{"role": "user", "content": "Which?"}], {"question_id": "1"})
    replies = Replies(path, "wise", {"temperature": 0, "seed": 1})
    assert replies.get(request) is None
    replies.add(request, Reply("8 9", 100, 10))
    same = Replies(path, "wise", {"seed": 1, "temperature": 0})
    assert same.get(Request(request.messages, {"question_id": "other"})) == Reply("8 9", 100, 10)
    assert same.get(Request([{"role": "user", "content": "Which ?"}])) is None
    assert Replies(path, "other", {"temperature": 0, "seed": 1}).get(request) is None
    assert Replies(path, "wise", {"temperature": 1, "seed": 1}).get(request) is None


def test_a_reply_that_was_half_written_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    first, second = (Request([{"role": "user", "content": text}]) for text in "ab")
    replies = Replies(path, "wise", {})
    replies.add(first, Reply("8 9"))
    replies.add(second, Reply("7 7"))
    half = path.read_bytes()[:-20]
    path.write_bytes(half)
    again = Replies(path, "wise", {})
    assert path.read_bytes() == half, "who only reads changes nothing that another writes"
    assert again.get(first) == Reply("8 9")
    assert again.get(second) is None
    again.add(second, Reply("7 6"))
    assert Replies(path, "wise", {}).get(second) == Reply("7 6")
