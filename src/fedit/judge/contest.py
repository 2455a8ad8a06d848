"""The judgement of runs: who is compared with whom, what the judge is asked, and what its replies come to."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedit.files import write_json
from fedit.interfaces import ConfigError, EngineError
from fedit.judge.answers import Answers, Contestant
from fedit.judge.protocol import (
    PAIRWISE,
    SINGLE,
    Prompt,
    grade_messages,
    pair_messages,
    parse_grade,
    parse_pair,
)
from fedit.judge.questions import Question
from fedit.judge.replies import Judge, Replies, Reply, Request
from fedit.judge.scores import Scores, compare_grades, summarise_grades, summarise_pairs
from fedit.report.folder import read_json

RESULT, REPLIES = "judge.json", "judge_replies.jsonl"
MOST_NONSENSE = 20
"""Replies without scores from the first on, until the judge is taken for unable"""
LEAST_SCORED = 0.5
"""Share of the replies that must hold scores for a result to be worth a number"""
MISSING_ANSWER = "(not generated yet)"
CHARACTERS_PER_TOKEN = 4
"""Of English in common vocabularies: what estimates are made with"""

Cell = tuple[str | int, ...]
"""What a reply is for: (ours, baseline, question_id, order), or (model, question_id, turn)"""


@dataclass(frozen=True)
class Contest:
    """Models and their answers to questions, and how they are judged."""

    protocol: str
    prompt: Prompt
    questions: Sequence[Question]
    ours: Sequence[Contestant]
    baselines: Sequence[Contestant]
    num_orders: int = 2
    """Of pairwise judgements; 1: ours is always shown first, as in the published protocol"""

    def __post_init__(self) -> None:
        for question in self.questions:
            if self.protocol == PAIRWISE and len(question.turns) > 1:
                raise ConfigError(
                    f"{question.source}: {len(question.turns)} turns, and the pairwise protocol compares answers to "
                    "one. Use --protocol single."
                )

    @property
    def contestants(self) -> list[Contestant]:
        """Everybody once."""
        return list(dict.fromkeys([*self.ours, *self.baselines]))

    @property
    def pairs(self) -> list[tuple[Contestant, Contestant]]:
        """Who is compared with whom; nobody with himself."""
        return [(one, other) for one in self.ours for other in self.baselines if one != other]

    def requests(self, answers: Mapping[Contestant, Answers]) -> dict[Cell, Request]:
        """Return what the judge is asked."""
        requests: dict[Cell, Request] = {}
        if self.protocol == SINGLE:
            for each in self.contestants:
                for question in self.questions:
                    own = answers[each][question.question_id]
                    for turn in range(len(question.turns)):
                        about = {"question_id": question.question_id, "turn": turn + 1, "graded": each.name}
                        messages = grade_messages(self.prompt, question, own, turn)
                        requests[each.name, question.question_id, turn] = Request(messages, about)
            return requests
        for one, other in self.pairs:
            for question in self.questions:
                for order in range(self.num_orders):
                    first, second = (one, other) if order == 0 else (other, one)
                    about = {"question_id": question.question_id, "first": first.name, "second": second.name}
                    texts = (answers[each][question.question_id][0] for each in (first, second))
                    messages = pair_messages(self.prompt, question, *texts)
                    requests[one.name, other.name, question.question_id, order] = Request(messages, about)
        return requests

    def parse(self, reply: str) -> Scores:
        """Return the scores in a reply."""
        return parse_pair(reply) if self.protocol == PAIRWISE else parse_grade(reply)

    def summarise(self, scores: Mapping[Cell, Scores]) -> dict[str, Any]:
        """Return what the scores come to."""
        if self.protocol == SINGLE:
            by_name = {
                each.name: [
                    [scores[each.name, question.question_id, turn] for turn in range(len(question.turns))]
                    for question in self.questions
                ]
                for each in self.contestants
            }
            return {
                "models": {name: summarise_grades(grades) for name, grades in by_name.items()},
                "comparisons": [
                    {
                        "ours": one.name,
                        "baseline": other.name,
                        **compare_grades(by_name[one.name], by_name[other.name]),
                    }
                    for one, other in self.pairs
                ],
            }
        categories = [question.category for question in self.questions]
        comparisons = []
        for one, other in self.pairs:
            pairs = [
                [
                    _turned(scores[one.name, other.name, question.question_id, order], order)
                    for order in range(self.num_orders)
                ]
                for question in self.questions
            ]
            comparisons.append({"ours": one.name, "baseline": other.name, **summarise_pairs(pairs, categories)})
        return {"comparisons": comparisons}


def _turned(scores: Scores, order: int) -> Scores:
    """Return (ours, the baseline's), whichever was shown first."""
    return scores[::-1] if scores is not None and order == 1 else scores


# --------------------------------------------------------------------------------------------------- what it will cost


@dataclass(frozen=True, slots=True)
class Price:
    """Of a million tokens of prompts and of replies, in any currency; None: unknown."""

    prompt: float | None = None
    reply: float | None = None

    def of(self, prompt_tokens: int, reply_tokens: int) -> float | None:
        """Return what so many tokens cost."""
        if self.prompt is None or self.reply is None:
            return None
        return (prompt_tokens * self.prompt + reply_tokens * self.reply) / 1e6


@dataclass(frozen=True, slots=True)
class Plan:
    """What is yet to be asked."""

    num_requests: int
    num_known: int
    """Answered before"""
    num_missing: int
    """Answers that are yet to be generated"""
    prompt_tokens: int
    """About, at `CHARACTERS_PER_TOKEN`; of missing answers as many as they may have"""
    most_reply_tokens: int | None
    """None: nothing limits the replies"""
    example: Request
    """The first request"""


def plan(
    contest: Contest,
    answers: Mapping[Contestant, Answers],
    replies: Replies,
    most_tokens: int | None,
    max_new_tokens: int,
) -> Plan:
    """Return how much is yet to be asked; a reply has `most_tokens` at most, an answer `max_new_tokens`."""
    num_missing, whole = 0, {}
    for each, own in answers.items():
        whole[each] = {}
        for question in contest.questions:
            known = own[question.question_id]
            lacking = len(question.turns) - len(known)
            num_missing += lacking
            whole[each][question.question_id] = (*known, *[MISSING_ANSWER] * lacking)
    written, unwritten = list[Request](), list[Request]()
    for request in contest.requests(whole).values():
        lacks = any(MISSING_ANSWER in message["content"] for message in request.messages)
        (unwritten if lacks else written).append(request)
    requests = [*distinct(written), *unwritten]  # what is not there yet may come out alike, too: it is counted as it is
    asked = [request for request in requests if replies.get(request) is None]
    texts = [message["content"] for request in asked for message in request.messages]
    num_unwritten = sum(text.count(MISSING_ANSWER) for text in texts)
    return Plan(
        num_requests=len(asked),
        num_known=len(requests) - len(asked),
        num_missing=num_missing,
        prompt_tokens=math.ceil(sum(map(len, texts)) / CHARACTERS_PER_TOKEN) + num_unwritten * max_new_tokens,
        most_reply_tokens=None if most_tokens is None else len(asked) * most_tokens,
        example=requests[0],
    )


def distinct(requests: Iterable[Request]) -> list[Request]:
    """Return each request once: two answers may be the same."""
    return list({json.dumps(request.messages): request for request in requests}.values())


# ---------------------------------------------------------------------------------------------------------- the judging


@dataclass(frozen=True, slots=True)
class Used:
    """What was asked just now."""

    num_replies: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0


def judge_contest(
    contest: Contest,
    answers: Mapping[Contestant, Answers],
    judge: Judge,
    replies: Replies,
    notify: Callable[[str], None] = lambda progress: None,
) -> tuple[dict[str, Any], Used]:
    """Ask the judge for what `replies` lacks; return the result, and what was asked just now.

    Raises:
        EngineError: the judge does not answer (`Judge.ask`), or not with scores: no number is made of its replies.
    """
    requests = contest.requests(answers)
    asked = distinct(requests.values())
    known = [reply for request in asked if (reply := replies.get(request)) is not None]
    # Those that got no reply before come last: a server that answers others is then known to.
    waiting = sorted((each for each in asked if replies.get(each) is None), key=replies.has_failed)
    fresh = list[Reply]()
    reasons = list[str]()
    any_scores = any(contest.parse(reply.text) is not None for reply in known)

    def on_reply(request: Request, reply: Reply | str) -> None:
        nonlocal any_scores
        replies.add(request, reply)
        if isinstance(reply, str):
            reasons.append(reply)
        else:
            fresh.append(reply)
            any_scores = any_scores or contest.parse(reply.text) is not None
            if not any_scores and len(fresh) >= MOST_NONSENSE:
                raise EngineError(_nonsense(judge, len(fresh), 0, reply))
        notify(f"Judged: {len(fresh) + len(reasons):,} of {len(waiting):,}")

    notify(f"Asking {judge.model} ({judge.where}) the first of {len(waiting):,}")
    try:
        judge.ask(waiting, on_reply, len(known))
    except EngineError as error:
        if not (known or fresh) or any(replies.get(each) is None and not replies.has_failed(each) for each in waiting):
            raise
        reasons.append(str(error).rstrip("."))  # all were asked once, and those that failed may fail again
    found = {cell: replies.get(request) for cell, request in requests.items()}
    scores = {cell: None if reply is None else contest.parse(reply.text) for cell, reply in found.items()}
    answered = [reply for request in asked if (reply := replies.get(request)) is not None]
    unread = [reply for reply in answered if contest.parse(reply.text) is None]
    if not answered:
        raise EngineError(f"The judge at {judge.where} answered none of {len(asked)} requests: {reasons[0]}.")
    if len(answered) - len(unread) < LEAST_SCORED * len(answered):
        raise EngineError(_nonsense(judge, len(answered), len(answered) - len(unread), unread[0]))
    result = {
        "protocol": contest.protocol,
        "judge": judge.model,
        "where": judge.where,
        "parameters": dict(judge.parameters),
        "prompt_sha256": hashlib.sha256(f"{contest.prompt.system}\n---\n{contest.prompt.user}".encode()).hexdigest(),
        "num_orders": contest.num_orders if contest.protocol == PAIRWISE else None,
        "num_questions": len(contest.questions),
        **contest.summarise(scores),
        "replies": {
            "wanted": len(asked),
            "without_scores": len(unread),
            "missing": len(asked) - len(answered),
            "why_missing": reasons[:1],
            "cut": sum(reply.finish_reason == "length" for reply in answered),
        },
        "tokens": {
            "prompt": sum(reply.prompt_tokens for reply in answered),
            "reply": sum(reply.completion_tokens for reply in answered),
        },
    }
    tokens = [(reply.prompt_tokens, reply.completion_tokens) for reply in fresh]
    return result, Used(len(fresh), *(sum(column) for column in zip(*tokens, strict=True))) if tokens else Used()


def save_result(folder: Path, questions: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Put a result into ``judge.json``, in the place of that of the same question to the same judge about the same
    models, beside all others, and return it.
    """
    path = folder / RESULT
    named = {
        "questions": questions.name,
        "questions_sha256": hashlib.sha256(questions.read_bytes()).hexdigest(),
        **result,
    }
    told = {key: value for key, value in named.items() if key not in {"comparisons", "models", "replies", "tokens"}}
    told["compared"] = [(each["ours"], each["baseline"]) for each in result["comparisons"]]
    told["graded"] = list(result.get("models", ()))
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{questions.name}, {result['protocol']}, {result['judge']}, {digest}"
    write_json(path, {**read_json(path), name: named})
    return named


def _nonsense(judge: Judge, num_replies: int, num_scored: int, example: Reply) -> str:
    text = example.text if len(example.text) <= 200 else example.text[:200] + "..."
    cut = "; it was cut at the most tokens that a reply may have" if example.finish_reason == "length" else ""
    return (
        f"{judge.model} ({judge.where}) is no judge: {num_scored} of {num_replies} replies hold scores in the form "
        f"that was asked for, and no number is made of them. One reply: {text!r}{cut}. Use a stronger judge, other "
        "words (--prompt) or longer replies (--max-tokens)."
    )
