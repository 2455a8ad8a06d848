"""The judge of runs, against a real server that behaves or misbehaves."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from judging import Answer, error, serving

from fedit.interfaces import Example, Turn
from fedit.judge import client, contest
from fedit.run_models import RunModels

KEY = "sk-secret-0123456789"


@pytest.fixture
def run(fedit, recipe, tmp_path) -> Path:
    done = fedit("run", recipe, "--out", tmp_path / "run", "-o", "evaluation.max_new_tokens=0", "-o", "rounds=1")
    assert done.status == 0, done.stderr
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of the machine's own, no proxy, and short waits between attempts."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"question_id": n, "text": f"ab {n}?", "category": "even" if n % 2 == 0 else "odd"} for n in range(1, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def answers(tmp_path: Path) -> tuple[Path, Path]:
    """Stored answers of two models to the four questions."""
    paths = tmp_path / "mine.jsonl", tmp_path / "theirs.jsonl"
    for path in paths:
        rows = [{"question_id": n, "text": f"{path.stem} says {n}"} for n in range(1, 5)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def longer_is_better(number: int, asked: dict) -> Answer:
    """A judge that gives the answers of `mine` 8 and others 6, and 1 more to who is first."""
    first, second = asked["messages"][-1]["content"].split("<answer 2>")
    return Answer(f"{9 if 'mine says' in first else 7} {8 if 'mine says' in second else 6}\nSo it is.")


@pytest.fixture
def stored(fedit, questions, answers, tmp_path):
    """Judge the stored answers of `mine` against those of `theirs`."""

    def judge(server, *more):
        mine, theirs = answers
        common = ("--questions", questions, "--judge", "wise", "--base-url", server.url, "--out", tmp_path / "out")
        return fedit("judge", mine, "--against", theirs, *common, "--json", *more)

    return judge


# ------------------------------------------------------------------------------------------------- runs and answers


def test_a_run_is_judged_against_its_baselines(fedit, run: Path, questions: Path) -> None:
    with serving() as server:
        arguments = ("judge", run, "--questions", questions, "--judge", "wise", "--base-url", server.url)
        more = ("--max-new-tokens", "4", "--price-in", "30", "--price-out", "60", "--json")
        done = fedit(*arguments, *more)
        assert done.status == 0, done.stderr
        found = json.loads(done.stdout)
        names = [(each["ours"], each["baseline"]) for each in found["comparisons"]]
        local = names[1][1]
        assert local.startswith("local/")
        assert names == [("federated", "base"), ("federated", local), ("federated", "central")]
        assert len(server.requests) == 3 * 4 * 2
        # "8 7" always: 8 and 7 when first, 7 and 8 when second.
        for each in found["comparisons"]:
            assert each["relative_score"] == 1
            assert (each["wins"], each["ties"], each["losses"]) == (0, 4, 0)
            assert each["orders_agree"] == 0
            assert each["first_minus_second"] == 1
            assert sorted(each["by_category"]) == ["even", "odd"]
        assert "24 requests" in done.stderr
        assert "2,400 + 240 tokens" in done.stderr
        assert f"{(2400 * 30 + 240 * 60) / 1e6:.2f}" in done.stderr
        saved = [json.loads(line) for line in (run / "judge_answers.jsonl").read_text().splitlines()]
        assert len(saved) == 4 * 4
        models = RunModels.open(run, ["federated"])
        *_, last = models.answer({"federated": Example((Turn("ab 1?", ""),))}, 4)
        assert last["federated"] in [each["text"] for each in saved if each["model"] == "federated"]
        page = (run / "report.html").read_text()
        assert 'id="judge"' in page
        assert "against base" in page
        again = fedit(*arguments, *more)
        assert again.stdout == done.stdout
        assert len(server.requests) == 24
        assert "Asked now: 0 requests" in again.stderr


def test_of_clients_with_models_of_their_own_the_median_is_judged(fedit, recipe, questions, tmp_path) -> None:
    done = fedit("run", recipe, "--out", tmp_path / "run", "-o", "aggregation.name=fedsa-lora", "-o", "rounds=1")
    assert done.status == 0, done.stderr
    common = ("--questions", questions, "--judge", "wise", "--max-new-tokens", "2", "--json")
    with serving() as server:
        done = fedit("judge", tmp_path / "run", *common, "--base-url", server.url, "--against", "base")
    assert done.status == 0, done.stderr
    (compared,) = json.loads(done.stdout)["comparisons"]
    per_client = json.loads((tmp_path / "run" / "evaluation.json").read_text())["models"]["federated"]["per_client"]
    median = sorted(per_client, key=lambda client: per_client[client]["response_loss"]["all"])[1]
    assert compared["ours"] == f"federated/{median}"


def test_several_runs_are_judged_against_the_first_ones_models(fedit, run: Path, questions, answers, tmp_path) -> None:
    other = tmp_path / "other"
    other.symlink_to(run)
    common = ("--questions", questions, "--judge", "wise", "--max-new-tokens", "2", "--json")
    with serving() as server:
        done = fedit(
            "judge", run, other, *common, "--base-url", server.url, "--against", "federated", "--against", answers[0]
        )
    assert done.status == 0, done.stderr
    names = [(each["ours"], each["baseline"]) for each in json.loads(done.stdout)["comparisons"]]
    assert names == [
        ("run: federated", "mine"),
        ("other: federated", "run: federated"),
        ("other: federated", "mine"),
    ]


def test_both_orders_are_averaged_and_one_order_is_not(stored) -> None:
    with serving(longer_is_better) as server:
        found = json.loads(stored(server).stdout)
        (compared,) = found["comparisons"]
        assert compared["relative_score"] == pytest.approx((9 + 8) / (6 + 7))
        assert compared["wins"] == 4
        assert compared["orders_agree"] == 1
        assert compared["first_minus_second"] == 1
        assert len(server.requests) == 8
        done = stored(server, "--one-order")
        assert len(server.requests) == 8  # the first orders were asked before
    (compared,) = json.loads(done.stdout)["comparisons"]
    assert compared["relative_score"] == pytest.approx(9 / 6)
    assert "One order only" in done.stderr


def test_two_turns_are_graded_one_by_one(fedit, run: Path, tmp_path) -> None:
    """The second turn's prompt shows the model its own first answer, and the judge both."""
    path = tmp_path / "mt.jsonl"
    rows = [{"question_id": 81, "category": "math", "turns": ["ab 1?", "cde 2?"], "reference": ["ba", "edc"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def grade(number: int, asked: dict) -> Answer:
        return Answer(f"Fine. Rating: [[{8 if 'cde 2?' in asked['messages'][-1]['content'] else 6}]]")

    with serving(grade) as server:
        common = ("--questions", path, "--judge", "wise", "--base-url", server.url, "--max-new-tokens", "4", "--json")
        done = fedit("judge", run, *common, "--against", "base")
        assert done.status == 0, done.stderr
        assert len(server.requests) == 4
        texts = [asked["messages"][-1]["content"] for asked in server.requests]
    found = json.loads(done.stdout)
    assert found["protocol"] == "single"
    assert found["models"]["federated"]["grade"] == 7
    assert found["models"]["federated"]["by_turn"] == [6, 8]
    assert found["comparisons"][0]["difference"] == 0
    saved = [json.loads(line) for line in (run / "judge_answers.jsonl").read_text().splitlines()]
    assert sorted((each["model"], each["turn"]) for each in saved) == [
        (model, turn) for model in ("base", "federated") for turn in (1, 2)
    ]
    first, second = (
        next(each["text"] for each in saved if each["model"] == "federated" and each["turn"] == turn) for turn in (1, 2)
    )
    asked = Example((Turn("ab 1?", first), Turn("cde 2?", "")))
    *_, last = RunModels.open(run, ["federated"]).answer({"federated": asked}, 4)
    assert second == last["federated"]
    assert any(first in text and "cde 2?" in text and second in text for text in texts)
    assert all(("edc" in text) == ("cde 2?" in text) for text in texts)
    refused = fedit("judge", run, *common, "--protocol", "pairwise")
    assert refused.status == 1
    assert "mt.jsonl:1: 2 turns" in refused.stderr
    page = (run / "report.html").read_text()
    assert "Differences of the grades" in page


def test_questions_that_begin_alike_are_answered_each(fedit, run: Path, tmp_path) -> None:
    """Their first turn has one answer; their second turns have one each. What is asked twice is counted once."""
    path = tmp_path / "mt.jsonl"
    rows = [{"question_id": n, "turns": ["ab 1?", second]} for n, second in enumerate(("cde 2?", "ab 3?"))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(lambda number, asked: Answer("Rating: [[7]]")) as server:
        common = ("--questions", path, "--judge", "wise", "--base-url", server.url, "--max-new-tokens", "4", "--json")
        done = fedit("judge", run, *common, "--against", "base")
        assert done.status == 0, done.stderr
        assert ": 6 requests; 0 more" in done.stderr
        assert len(server.requests) == 6
    found = json.loads(done.stdout)
    assert found["replies"]["wanted"] == 6
    assert found["tokens"] == {"prompt": 600, "reply": 60}
    models = RunModels.open(run, ["federated"])
    *_, first = models.answer({"federated": Example((Turn("ab 1?", ""),))}, 4)
    texts = [asked["messages"][-1]["content"] for asked in server.requests]
    for second in ("cde 2?", "ab 3?"):
        asked = Example((Turn("ab 1?", first["federated"]), Turn(second, "")))
        *_, answered = models.answer({"federated": asked}, 4)
        assert any(second in text and answered["federated"] in text.partition(second)[2] for text in texts)
    saved = [json.loads(line) for line in (run / "judge_answers.jsonl").read_text().splitlines()]
    assert len({each["asked"] for each in saved}) == 6


def test_a_dry_run_sends_nothing_and_generates_nothing(fedit, run: Path, questions) -> None:
    with serving() as server:
        common = ("--questions", questions, "--judge", "wise", "--base-url", server.url, "--max-new-tokens", "4")
        done = fedit("judge", run, *common, "--dry-run", "--price-in", "1000", "--price-out", "1000")
        assert done.status == 0, done.stderr
        assert server.requests == []
    assert "Answers to generate: 16" in done.stderr
    assert "24 requests" in done.stderr
    assert f"at most {24 * 512:,} of replies" in done.stderr
    assert "ab 1?" in done.stderr
    assert "(not generated yet)" in done.stderr
    assert not (run / "judge_answers.jsonl").exists()
    assert not (run / "judge.json").exists()


def test_own_words_and_own_parameters(stored, tmp_path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("Be kind.\n---\n{question} A: {answer_1} B: {answer_2}")
    more = ("--prompt", words, "--parameter", "seed=1", "--parameter", "temperature=null", "--max-tokens", "9")
    with serving() as server:
        done = stored(server, *more)
        assert done.status == 0, done.stderr
        asked = server.requests[0]
    assert asked["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "ab 1? A: mine says 1 B: theirs says 1"},
    ]
    assert {key: asked[key] for key in asked.keys() - {"messages", "model"}} == {"seed": 1, "max_tokens": 9}


# --------------------------------------------------------------------------------------------- servers that misbehave


@pytest.mark.parametrize(
    "trouble",
    [
        error(500, "out of memory"),
        error(503, "overloaded"),
        error(429, "slow down"),
        error(429, "slow down", retry_after="0.05"),
        Answer(cut_to=40),
        Answer(body=b'{"choices": [{"mess'),
        Answer(body=b"<html>Bad gateway</html>"),
        Answer(body=b"{}"),
        Answer(body=b'{"choices": [{"text": "8 7"}]}'),
        Answer(body=b'{"choices": [{"message": null}]}'),
        Answer(body=b'{"choices": {"message": {"content": "8 7"}}}'),
        Answer(body=b'{"choices": [{"message": {"content": [{"type": "text", "text": "8 7"}]}}]}'),
        Answer(cut_to=0),
        Answer(after_s=0.5),
    ],
    ids=[
        "500",
        "503",
        "429",
        "retry-after",
        "cut",
        "half-json",
        "html",
        "no-choices",
        "no-message",
        "null",
        "object",
        "parts",
        "hung-up",
        "time-out",
    ],
)
def test_troubles_that_pass_are_outlived(stored, trouble: Answer) -> None:
    """Each request meets trouble first, also the very first one."""
    seen: set[str] = set()

    def answer(number: int, asked: dict) -> Answer:
        text = asked["messages"][-1]["content"]
        if text not in seen:
            seen.add(text)
            return trouble
        return Answer()

    with serving(answer) as server:
        done = stored(server, "--timeout-s", "0.2", "--retries", "2")
        assert done.status == 0, done.stderr
        assert len(server.requests) == 16
    found = json.loads(done.stdout)
    assert found["replies"] == {"wanted": 8, "without_scores": 0, "missing": 0, "why_missing": [], "cut": 0}
    assert found["comparisons"][0]["num_questions"] == 4


@pytest.mark.parametrize("usage", ["{}", "null", '{"prompt_tokens": null, "completion_tokens": "many"}'])
def test_a_server_that_does_not_count_tokens_is_a_judge(stored, usage: str) -> None:
    body = f'{{"choices": [{{"message": {{"content": "8 7"}}}}], "usage": {usage}}}'
    with serving(lambda number, asked: Answer(body=body.encode())) as server:
        for _ in range(2):  # the second time from what was kept
            done = stored(server)
            assert done.status == 0, done.stderr
            assert json.loads(done.stdout)["tokens"] == {"prompt": 0, "reply": 0}
        assert len(server.requests) == 8


def test_a_server_that_asks_for_a_pause_gets_it(stored, monkeypatch) -> None:
    """Not longer than a minute, though."""
    held = []
    monkeypatch.setattr(client.Pace, "hold", lambda self, seconds: held.append(seconds))
    waits = {1: "0.3", 2: "3600", 3: "Wed, 21 Oct 2026 07:28:00 GMT"}

    def answer(number: int, asked: dict) -> Answer:
        return error(429, "wait", retry_after=waits[number]) if number in waits else Answer()

    with serving(answer) as server:
        assert stored(server, "--concurrency", "1").status == 0
    assert held == [0.3, client.LONGEST_WAIT_S]


def test_nonsense_is_counted_and_left_out(stored) -> None:
    """A reply without scores costs its question; it is kept, and not asked again."""

    def answer(number: int, asked: dict) -> Answer:
        if "mine says 3\n</answer 1>" in asked["messages"][-1]["content"]:
            return Answer("I like both.", finish_reason="length")
        return longer_is_better(number, asked)

    with serving(answer) as server:
        done = stored(server)
        assert done.status == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["replies"] == {"wanted": 8, "without_scores": 1, "missing": 0, "why_missing": [], "cut": 1}
        assert found["comparisons"][0]["num_questions"] == 3
        assert found["comparisons"][0]["num_left_out"] == 1
        assert "1 of 8 replies held no scores" in done.stderr
        assert stored(server).stdout == done.stdout
        assert len(server.requests) == 8


@pytest.mark.parametrize("text", ["As a language model I cannot.", "", None])
def test_a_judge_that_gives_no_scores_is_no_judge(stored, tmp_path, monkeypatch, text: str | None) -> None:
    with serving(lambda number, asked: Answer(text)) as server:
        done = stored(server)
        assert done.status == 1
        assert "wise" in done.stderr
        assert "is no judge: 0 of 8 replies hold scores" in done.stderr
        assert done.stdout == ""
        assert not (tmp_path / "out" / "judge.json").exists()
        monkeypatch.setattr(contest, "MOST_NONSENSE", 3)
        (tmp_path / "out" / "judge_replies.jsonl").unlink()
        server.requests.clear()
        done = stored(server, "--concurrency", "1")
        assert done.status == 1
        assert "0 of 3 replies" in done.stderr
        assert len(server.requests) in {3, 4}


def test_what_a_server_refuses_of_one_question_is_left_out(stored) -> None:
    def answer(number: int, asked: dict) -> Answer:
        return error(400, "too long") if "theirs says 1" in asked["messages"][-1]["content"] else Answer()

    with serving(answer) as server:
        done = stored(server)
        assert done.status == 0, done.stderr
        replies = json.loads(done.stdout)["replies"]
        assert (replies["missing"], replies["why_missing"]) == (2, ["400, too long"])
        assert "2 of 8 requests got no reply (400, too long)" in done.stderr
        assert len(server.requests) == 8
        server.answer = lambda number, asked: Answer()
        assert json.loads(stored(server).stdout)["replies"]["missing"] == 0
        assert len(server.requests) == 10  # those that were missing alone


@pytest.mark.parametrize("trouble", [error(400, "too long"), error(500, "too hard")], ids=["refused", "unanswered"])
def test_what_failed_before_is_asked_last_and_ends_no_judgement(stored, tmp_path, monkeypatch, trouble: Answer) -> None:
    """Not even where more fail than a server is forgiven that answers none."""
    monkeypatch.setattr(client, "MOST_GIVEN_UP", 3)
    hard = ["mine says 2\n", "mine says 4\n"]
    patient = ("--retries", "0", "--concurrency", "1")

    def answer(number: int, asked: dict) -> Answer:
        return trouble if any(text in asked["messages"][-1]["content"] for text in hard) else Answer()

    with serving(answer) as server:
        for _ in range(2):
            done = stored(server, *patient)
            assert done.status == 0, done.stderr
            assert json.loads(done.stdout)["replies"]["missing"] == 4
        replies = tmp_path / "out" / "judge_replies.jsonl"
        lines = replies.read_text().splitlines(keepends=True)
        (answered, *_), (failed, *_) = ([line for line in lines if key in line] for key in ('"reply"', '"no_reply"'))
        replies.write_text(answered + failed)  # as where it was killed
        server.requests.clear()
        hard.pop()
        done = stored(server, *patient)
        assert done.status == 0, done.stderr
        assert json.loads(done.stdout)["replies"]["missing"] == 2
        asked = [request["messages"][-1]["content"] for request in server.requests]
        assert len(asked) == 7
        assert hard[0] in asked[-1], "what failed before comes last"
    done = stored(server, *patient)  # now the server is gone
    assert done.status == 0, done.stderr
    assert "2 of 8 requests got no reply" in done.stderr


def test_nonsense_in_what_is_left_is_weighed_with_what_is_known(stored, tmp_path, monkeypatch) -> None:
    def answer(number: int, asked: dict) -> Answer:
        return Answer("Hm.") if "mine says 4\n" in asked["messages"][-1]["content"] else Answer()

    with serving(answer) as server:
        whole = stored(server)
        replies = tmp_path / "out" / "judge_replies.jsonl"
        lines = replies.read_text().splitlines(keepends=True)
        replies.write_text("".join(line for line in lines if "Hm." not in line))
        monkeypatch.setattr(contest, "MOST_NONSENSE", 2)
        done = stored(server)
        assert done.status == 0, done.stderr
        assert json.loads(done.stdout)["comparisons"] == json.loads(whole.stdout)["comparisons"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (error(401, "no such key"), "refuses the key: 401, no such key. Set the environment variable OPENAI_API_KEY"),
        (error(403, "not yours"), "refuses the key: 403, not yours"),
        (error(404, "no such model"), "knows no model 'wise', or is no such server: 404, no such model"),
        (
            Answer(status=429, body=b'{"error": {"message": "pay", "code": "insufficient_quota"}}'),
            "is used up: 429, pay",
        ),
    ],
    ids=["401", "403", "404", "quota"],
)
def test_what_would_not_go_better_is_asked_once(stored, answer: Answer, message: str) -> None:
    with serving(lambda number, asked: answer) as server:
        done = stored(server)
        assert done.status == 1
        assert message in done.stderr
        assert len(server.requests) == 1


def test_a_server_that_refuses_everything_is_not_asked_everything(stored, questions) -> None:
    with serving(lambda number, asked: error(400, "unknown parameter temperature")) as server:
        done = stored(server)
        assert done.status == 1
        assert "refuses what it is asked: 400, unknown parameter temperature" in done.stderr
        assert len(server.requests) == client.MOST_GIVEN_UP
        questions.write_text('{"question_id": 1, "text": "ab 1?"}\n')
        done = stored(server)
        assert done.status == 1
        assert "answered none of 2 requests: 400, unknown parameter temperature" in done.stderr


def test_an_unknown_model_is_named_beside_those_that_are_there(stored) -> None:
    with serving(lambda number, asked: error(404, "no such model")) as server:
        server.models = ("wisest", "other")
        done = stored(server)
    assert "Did you mean 'wisest'?" in done.stderr


def test_a_server_that_is_not_there(stored, fedit, questions, answers) -> None:
    with serving() as server:
        pass
    done = stored(server, "--retries", "1")
    assert done.status == 1
    assert "got no reply in 2 attempts" in done.stderr
    assert "Check --base-url" in done.stderr
    common = ("judge", answers[0], "--against", answers[1], "--questions", questions, "--judge", "wise", "--out", "out")
    for wrong in ("localhost:8000", "http://", "http://here:port/v1"):
        done = fedit(*common, "--base-url", wrong)
        assert done.status == 1
        assert "expected a URL that begins with http://" in done.stderr
    done = fedit(*common)
    assert done.status == 1
    assert "OPENAI_API_KEY is not set" in done.stderr
    planned = fedit(*common, "--dry-run")
    assert planned.status == 0, planned.stderr
    assert "To ask of wise (OpenAI): 8 requests" in planned.stderr


def test_results_stand_beside_each_other_and_only_the_same_is_replaced(stored, tmp_path) -> None:
    with serving(longer_is_better) as server:
        for _ in range(2):
            assert stored(server).status == 0
            assert stored(server, "--one-order").status == 0
    kept = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert sorted(each["num_orders"] for each in kept.values()) == [1, 2]


def test_a_server_that_dies_ends_the_command_and_what_it_said_is_kept(stored, tmp_path) -> None:
    def dying(number: int, asked: dict) -> Answer:
        return Answer() if number < 3 else error(500, "dead")

    with serving(dying) as server:
        done = stored(server, "--retries", "0", "--concurrency", "1")
        assert done.status == 1
        assert "5 requests in a row" in done.stderr
        assert len((tmp_path / "out" / "judge_replies.jsonl").read_text().splitlines()) == 3
        server.answer = lambda number, asked: Answer()
        server.requests.clear()
        done = stored(server)
        assert done.status == 0, done.stderr
        assert len(server.requests) == 5


def test_so_many_at_once_and_so_many_a_minute(stored, tmp_path, monkeypatch) -> None:
    paces = []

    class Recorded(client.Pace):
        def __init__(self, per_minute: float | None) -> None:
            super().__init__(per_minute)
            paces.append(per_minute)

    monkeypatch.setattr(client, "Pace", Recorded)
    with serving(lambda number, asked: Answer(after_s=0.1)) as server:
        assert stored(server, "--concurrency", "3").status == 0
        assert server.most_at_once == 3
        (tmp_path / "out" / "judge_replies.jsonl").unlink()
        assert stored(server, "--requests-per-minute", "6000").status == 0
    assert paces == [None, 6000]


# ----------------------------------------------------------------------------------------------------------- the key


def test_the_key_is_sent_and_never_written(stored, tmp_path, monkeypatch, caplog) -> None:
    """Not even where the server repeats it, nor with all logs on."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with serving(lambda number, asked: error(500, f"cannot use {KEY}") if number % 2 == 0 else Answer()) as server:
        done = stored(server, "--retries", "9")
        assert done.status == 0, done.stderr
        assert set(server.keys) == {f"Bearer {KEY}"}
        server.answer = lambda number, asked: error(401, f"Incorrect API key provided: {KEY}")
        refused = stored(server, "--parameter", "seed=1")
    assert refused.status == 1
    assert "Incorrect API key provided: ***. Check OPENAI_API_KEY" in refused.stderr
    assert "cannot use ***" in caplog.text
    for said in (done.stdout, done.stderr, refused.stderr, caplog.text):
        assert KEY not in said
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    assert all(KEY.encode() not in file.read_bytes() for file in files)


def test_no_part_of_the_key_is_written_where_an_error_is_cut(stored, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(lambda number, asked: error(401, "x" * (300 - len(KEY) // 2) + KEY + " is no key")) as server:
        refused = stored(server)
    assert refused.status == 1
    assert KEY[: len(KEY) // 3] not in refused.stderr


def test_a_password_in_the_url_is_not_written(stored, tmp_path) -> None:
    with serving() as server:
        server.url = server.url.replace("http://", "http://me:hidden@")
        done = stored(server)
        assert done.status == 0, done.stderr
    assert "hidden" not in done.stdout + done.stderr
    assert all(b"hidden" not in file.read_bytes() for file in (tmp_path / "out").iterdir())


# -------------------------------------------------------------------------------------------------- killed and resumed


@pytest.mark.slow
def test_a_killed_judgement_asks_the_rest(questions, answers, tmp_path) -> None:
    mine, theirs = answers
    with serving(lambda number, asked: Answer(after_s=0 if number < 3 else 60)) as server:
        common = [
            "judge",
            mine,
            "--against",
            theirs,
            "--questions",
            questions,
            "--judge",
            "wise",
            "--out",
            tmp_path / "out",
        ]
        command = [sys.executable, "-m", "fedit.cli", *map(str, common), "--base-url", server.url, "--concurrency", "1"]
        process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONWARNINGS": "default"})
        replies = tmp_path / "out" / "judge_replies.jsonl"
        deadline = time.monotonic() + 120
        while len(server.requests) < 4 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(replies.read_text().splitlines()) == 3
        assert len(server.requests) == 4
        replies.write_bytes(replies.read_bytes()[:-7])  # as if the disk had been full
        server.requests.clear()
        server.answer = lambda number, asked: Answer()
        done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(server.requests) == 6


# ------------------------------------------------------------------------------------------------------ what is refused


def test_runs_and_questions_that_cannot_be_judged(fedit, run: Path, questions, answers, tmp_path, monkeypatch) -> None:
    common = ("--questions", questions, "--judge", "wise", "--base-url", "http://127.0.0.1:9/v1")

    def refused(*arguments) -> str:
        done = fedit("judge", *arguments)
        assert done.status == 1
        return done.stderr

    assert "Nothing to judge" in refused(*common)
    assert "is not a run" in refused(tmp_path, *common)
    assert "has no model 'centrall'. Did you mean 'central'?" in refused(run, *common, "--against", "centrall")
    assert "no such file, and no run is given" in refused(answers[0], *common, "--out", "out", "--against", "base")
    assert "Nothing to compare mine with" in refused(answers[0], *common, "--out", "out")
    assert "--out is missing" in refused(answers[0], *common, "--against", answers[1])
    assert "leave out --base-url" in refused(run, *common, "--local", "generation")
    assert "--parameter model=x: expected" in refused(run, *common, "--parameter", "model=x")
    assert "--concurrency is 0" in refused(run, *common, "--concurrency", "0")
    questions.write_text('{"question_id": 1, "text": "Why?"}\n{"question_id": 2, "query": "Why?"}\n')
    assert "questions.jsonl:2: the fields are question_id, query; expected text" in refused(run, *common)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    questions.write_text('{"text": "Why?"}\n')
    assert "pip install 'fedit[judge]'" in refused(run, *common)
    monkeypatch.undo()
    (run / "adapter").rename(run / "gone")
    assert f"fedit run --resume {run}" in refused(run, *common)


# ------------------------------------------------------------------------------------------------------------- locally


@pytest.mark.parametrize("method", ["generation", "likelihood"])
def test_a_local_model_judges_without_a_server(fedit, run: Path, questions, answers, tiny_model_folder, method) -> None:
    """A random model writes nonsense; the likelihoods of its scores are numbers all the same."""
    common = ("--questions", questions, "--judge", tiny_model_folder, "--local", method, "--max-tokens", "8", "--json")
    done = fedit("judge", run, "--against", answers[0], "--max-new-tokens", "2", "--prompt", _short(run), *common)
    if method == "generation":
        assert done.status == 1
        assert "is no judge" in done.stderr
        return
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)
    (compared,) = found["comparisons"]
    assert found["where"] == "this machine, by likelihood"
    assert 0.5 < compared["relative_score"] < 2
    assert compared["num_questions"] == 4
    again = fedit("judge", run, "--against", answers[0], "--max-new-tokens", "2", "--prompt", _short(run), *common)
    assert again.stdout == done.stdout


def test_a_local_judge_that_is_not_there(fedit, run: Path, questions) -> None:
    """Said before any answer is generated, and of the option that was given."""
    done = fedit("judge", run, "--questions", questions, "--judge", "./absent", "--local", "likelihood")
    assert done.status == 1
    assert "--judge './absent': no such folder" in done.stderr
    assert not (run / "judge_answers.jsonl").exists()


def _short(folder: Path) -> Path:
    """Return a prompt that fits a context of 512 bytes."""
    path = folder.parent / "short.txt"
    path.write_text("{question}\n1: {answer_1}\n2: {answer_2}\nScores:")
    return path
