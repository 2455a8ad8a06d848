"""Identifiers replaced, copies counted and left out, near-copies among the held-out rows found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedit.config import DataConfig, load_plugins, parse_config
from fedit.config.tables import IDENTIFIERS
from fedit.data.cleaning import ALIKE, SHINGLE, clean, near_duplicates, redactor
from fedit.interfaces import ConfigError, Example, Turn
from fedit.prepare import prepare_data

load_plugins()


def example(instruction: str, response: str = "yes", client: str | None = None, context: str = "") -> Example:
    return Example((Turn(instruction, response, context),), client=client, source=instruction)


@pytest.fixture(scope="module")
def redact():
    return redactor(IDENTIFIERS, Counter())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mail jane.doe@example.org today", "Mail <EMAIL_ADDRESS> today"),
        ("Call +44 20 7946 0958 or (212) 555-0123.", "Call <PHONE_NUMBER> or <PHONE_NUMBER>."),
        ("Card 4111 1111 1111 1111 expired", "Card <CREDIT_CARD> expired"),
        ("IBAN DE89 3704 0044 0532 0130 00", "IBAN <IBAN_CODE>"),
        ("at 192.168.10.4 and 2001:db8::ff00:42:8329", "at <IP_ADDRESS> and <IP_ADDRESS>"),
        ("SSN 536-90-4399", "SSN <US_SSN>"),
        ("from dead:beef:cafe::abcd now", "from <IP_ADDRESS> now"),
        ("ring +49 171 23 4567 89 now", "ring <PHONE_NUMBER> now"),
        ("a@b.com and c@d.org", "<EMAIL_ADDRESS> and <EMAIL_ADDRESS>"),
        ("The 3 hens lay 12 eggs in 2023, 4.5 a day.", "The 3 hens lay 12 eggs in 2023, 4.5 a day."),
        ("Card 4111 1111 1111 1112 has a wrong checksum", "Card 4111 1111 1111 1112 has a wrong checksum"),
        ("Nothing here", "Nothing here"),
        ("", ""),
    ],
)
def test_identifiers_are_replaced_by_what_they_are(redact, text: str, expected: str) -> None:
    assert redact(text) == expected


def test_every_part_of_a_row_is_redacted_and_counted() -> None:
    row = Example(
        (Turn("ask a@b.com", "call (212) 555-0123", "from 10.0.0.1"), Turn("and?", "c@d.org")),
        system="you are e@f.org",
        rejected="g@h.net",
        source="x:1",
    )
    cleaned = clean([row], [example("held out i@j.com")], DataConfig(redact=IDENTIFIERS))
    (train,), (test,) = cleaned.train, cleaned.test
    assert "@" not in repr(train).replace("x:1", "")
    assert train.turns[0] == Turn("ask <EMAIL_ADDRESS>", "call <PHONE_NUMBER>", "from <IP_ADDRESS>")
    assert test.turns[0].instruction == "held out <EMAIL_ADDRESS>"
    assert cleaned.summary["redacted"] == {"EMAIL_ADDRESS": 5, "PHONE_NUMBER": 1, "IP_ADDRESS": 1}


FRESH = """
import socket, sys
from collections import Counter

def refuse(*_, **__):
    print("a connection")
    raise OSError

socket.socket.connect = socket.getaddrinfo = refuse
from fedit.data.cleaning import redactor
print(redactor(["EMAIL_ADDRESS"], Counter())("x@example.co.uk"))
"""


def test_no_list_is_fetched_from_the_internet(tmp_path: Path) -> None:
    """By a process that has none yet, in memory or on disk."""
    environment = {**os.environ, "TLDEXTRACT_CACHE": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "<EMAIL_ADDRESS>\n"


def test_held_out_rows_with_checks_are_redacted_and_compared() -> None:
    text = "please write to a@b.com about the seven hens of the farm and the eggs that they lay in the barn each week"
    row = replace(example(text), checks={"contains": ["a@b.com"], "count": 3})
    cleaned = clean([example(text + " now")], [row], DataConfig(redact=IDENTIFIERS))
    assert cleaned.test[0].checks == {"contains": ["<EMAIL_ADDRESS>"], "count": 3}
    assert cleaned.summary["near_duplicates"]["rows"] == 1


def test_a_training_row_that_differed_by_an_identifier_alone_is_left_out() -> None:
    rows = [example("mail a@b.com"), example("another")]
    cleaned = clean(rows, [example("mail c@d.com")], DataConfig(redact=IDENTIFIERS))
    assert [row.source for row in cleaned.train] == ["another"]


def test_what_many_rows_begin_with_is_no_copy_and_costs_no_comparison() -> None:
    preamble = "you are a helpful assistant that answers every question of the user in one short sentence " * 3
    test = [example(f"{preamble} question number {number}") for number in range(60)]
    assert near_duplicates([example(f"{preamble} something else entirely this time")], test) == []
    assert len(near_duplicates([example(f"{preamble} question number 7")], test)) == 1


def test_what_no_pattern_finds_and_a_missing_library_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'EMAIL_ADRESS' is nothing .* Did you mean 'EMAIL_"):
        redactor(["EMAIL_ADRESS"], Counter())
    for unsure in ("PERSON", "US_PASSPORT", "US_BANK_NUMBER"):
        with pytest.raises(ConfigError, match=f"'{unsure}' is nothing"):
            redactor([unsure], Counter())
    with pytest.raises(ConfigError, match='expected "identifiers" or a list of names'):
        parse_config({"data": {"redact": "emails"}})
    assert parse_config({"data": {"redact": "identifiers"}}).data.redact == IDENTIFIERS
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedit\[redaction\]'"):
        redactor(["EMAIL_ADDRESS"], Counter())


@pytest.mark.parametrize("deduplicate", [False, True])
def test_copies_are_counted_for_each_client_and_left_out_if_wanted(deduplicate: bool) -> None:
    """What two clients have, nobody can know of."""
    rows = [example("a", client="x"), example("a", client="x"), example("a", client="y"), example("b", client="x")]
    cleaned = clean([*rows, example("a", client="x")], [example("z")], DataConfig(deduplicate=deduplicate))
    assert cleaned.summary["duplicates"] == 2
    assert len(cleaned.train) == (3 if deduplicate else 5)
    assert cleaned.train[0] is rows[0]


def test_a_near_copy_is_found_whatever_its_case_and_punctuation() -> None:
    text = "The quick brown fox jumps over the lazy dog while seven hens look on and say nothing at all"
    train = [example("something quite different about the weather in May"), example(text.upper() + "!!")]
    ((one, held_out, alike),) = near_duplicates(train, [example("short"), example(text)])
    assert (one, held_out.source, alike) == (train[1], text, 1.0)
    cleaned = clean(train, [example(text.replace("nothing", "little"))], DataConfig())
    assert cleaned.summary["near_duplicates"]["rows"] == 0, "five of sixteen runs differ"
    assert near_duplicates([example("one word")], [example("One, word")])[0][2] == 1.0


words = st.lists(st.sampled_from("a b c d".split()), min_size=1, max_size=14).map(" ".join)


@settings(deadline=None, max_examples=50)
@given(st.lists(words, min_size=1, max_size=6), st.lists(words, min_size=1, max_size=6))
def test_likeness_is_the_jaccard_index_of_all_pairs(train: list[str], test: list[str]) -> None:
    def runs(text: str) -> set[tuple[str, ...]]:
        found = re.findall(r"\w+", f"{text} yes".lower())
        return {tuple(found[i : i + SHINGLE]) for i in range(max(1, len(found) - SHINGLE + 1))}

    expected = sorted(
        round(len(runs(a) & runs(b)) / len(runs(a) | runs(b)), 9)
        for a in train
        for b in test
        if len(runs(a) & runs(b)) / len(runs(a) | runs(b)) >= ALIKE
    )
    pairs = near_duplicates([example(text) for text in train], [example(text) for text in test])
    assert sorted(round(alike, 9) for _, _, alike in pairs) == expected


def test_a_run_says_what_it_found(tmp_path: Path) -> None:
    rows = [{"instruction": f"write to user{number}@example.org", "response": f"sent {number}"} for number in range(8)]
    rows += [rows[0]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({"instruction": "held out", "response": "fine"}) + "\n")
    data = {"path": str(tmp_path / "rows.jsonl"), "test_path": str(tmp_path / "test.jsonl"), "redact": "identifiers"}
    run = parse_config({"data": {**data, "deduplicate": True}, "partition": {"name": "iid", "num_clients": 2}})
    prepared = prepare_data(run)
    assert prepared.summary["cleaning"]["redacted"] == {"EMAIL_ADDRESS": 9}
    assert prepared.summary["cleaning"]["duplicates"] == 1
    texts = [row.example.turns[0].instruction for rows in prepared.clients.values() for row in rows]
    assert texts == ["write to <EMAIL_ADDRESS>"] * 8
