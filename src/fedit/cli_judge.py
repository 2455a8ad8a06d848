"""The command that lets a language model judge what the models of runs answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from fedit.console import AsJson, console, print_json, quiet, say
from fedit.interfaces import ConfigError

if TYPE_CHECKING:
    from fedit.judge.answers import Answers, Contestant
    from fedit.judge.contest import Contest, Price
    from fedit.judge.replies import Judge, Replies, Request

judge_app = App(name="judge")

Texts = Annotated[list[str] | None, Parameter(negative="")]


@Parameter(name="*")
@dataclass(frozen=True)
class Asking:
    """How the judge is asked."""

    judge: Annotated[str, Parameter(help="The model that judges: its name at the server, or with --local its folder")]
    base_url: Annotated[str | None, Parameter(help="Of an OpenAI-compatible server, up to and with /v1")] = None
    local: Annotated[
        Literal["generation", "likelihood"] | None,
        Parameter(help="Judge on this machine, by written reviews or by the likelihood of each score"),
    ] = None
    max_tokens: Annotated[int, Parameter(help="Of a reply")] = 512
    parameter: Annotated[
        list[str] | None, Parameter(negative="", help="Of each request, such as seed=1; temperature=null leaves it out")
    ] = None
    concurrency: Annotated[int, Parameter(help="Requests at the same time")] = 8
    requests_per_minute: Annotated[float | None, Parameter(help="At most; by default as fast as it goes")] = None
    retries: Annotated[int, Parameter(help="Of a request that got no reply")] = 5
    timeout_s: Annotated[float, Parameter(help="Of each attempt")] = 120.0
    price_in: Annotated[float | None, Parameter(help="Of a million tokens of prompts, in any currency")] = None
    price_out: Annotated[float | None, Parameter(help="Of a million tokens of replies")] = None

    def open(self, protocol: str) -> Judge:
        """Return the judge, who is not asked anything yet."""
        if self.max_tokens < 1:
            raise ConfigError(f"--max-tokens {self.max_tokens}: a reply has one token at least.")
        if self.local is not None:
            from fedit.judge.local import LocalJudge

            if self.base_url is not None or self.parameter:
                raise ConfigError("--local judges on this machine: leave out --base-url and --parameter.")
            return LocalJudge(self.judge, self.local, protocol, self.max_tokens)
        from fedit.judge.client import ServerJudge

        parameters = {"temperature": 0, "max_tokens": self.max_tokens, **dict(map(_parameter, self.parameter or ()))}
        return ServerJudge(
            self.judge,
            self.base_url,
            {name: value for name, value in parameters.items() if value is not None},
            self.concurrency,
            self.requests_per_minute,
            self.retries,
            self.timeout_s,
        )


def _parameter(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or name in {"model", "messages", "stream", ""}:
        raise ConfigError(f"--parameter {text}: expected a key and a value, such as seed=1, but not model or messages.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@judge_app.default
def judge(
    *run: Path,
    questions: Annotated[Path, Parameter(help="Vicuna's, MT-Bench's, or any rows with a question")],
    asking: Asking,
    protocol: Annotated[
        Literal["pairwise", "single"] | None,
        Parameter(help="By default single for questions of two turns, else pairwise"),
    ] = None,
    model: Annotated[
        list[str] | None, Parameter(negative="", help="Which of each run's models are judged; by default federated")
    ] = None,
    against: Annotated[
        list[str] | None,
        Parameter(
            negative="", help="A model of the first run, or a file of stored answers; by default base, local, central"
        ),
    ] = None,
    prompt: Annotated[Path | None, Parameter(help="A file with the words to ask with")] = None,
    one_order: Annotated[
        bool, Parameter(negative="", help="Show the judged model's answer first, never second")
    ] = False,
    max_new_tokens: Annotated[int, Parameter(help="Of an answer")] = 256,
    out: Annotated[Path | None, Parameter(help="The folder of the result; by default the first run's")] = None,
    dry_run: Annotated[bool, Parameter(negative="", help="Show what would be asked, and ask nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Let a language model score what runs answer to open questions, beside baselines.

    RUN is the folder of a finished run, or a file of stored answers. The key of a server is read from the environment
    variable OPENAI_API_KEY. The same command goes on where it was interrupted, and asks nothing twice.
    """
    quiet()
    from fedit.judge.answers import complete_answers, find_contestants, known_answers
    from fedit.judge.contest import REPLIES, Contest, Price, judge_contest, save_result
    from fedit.judge.protocol import default_protocol, load_prompt
    from fedit.judge.questions import read_questions
    from fedit.judge.replies import Replies
    from fedit.report import write_report
    from fedit.report.verdicts import verdict_tables

    asked = read_questions(questions)
    how = protocol or default_protocol(asked)
    judging = asking.open(how)
    ours, baselines = find_contestants(run, model or ["federated"], against)
    contest = Contest(how, load_prompt(how, prompt), asked, ours, baselines, 1 if one_order else 2)
    folder = out or next((place for place in run if place.is_dir()), None)
    if folder is None:
        raise ConfigError("--out is missing: files of stored answers have no run folder that the result could go to.")
    replies = Replies(folder / REPLIES, judging.model, judging.parameters)
    price = Price(asking.price_in, asking.price_out)
    if dry_run:
        known = known_answers(contest.contestants, asked, max_new_tokens)
        example = _say_plan(contest, known, judging, replies, price, max_new_tokens)
        for message in example.messages:
            say(f"\n[{message['role']}]\n{message['content']}")
        return
    judging.check()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with console.status("") as status:
            answers = complete_answers(contest.contestants, asked, max_new_tokens, status.update)
            _say_plan(contest, answers, judging, replies, price, max_new_tokens)
            result, used = judge_contest(contest, answers, judging, replies, status.update)
    except KeyboardInterrupt:
        say("\nInterrupted. What was answered is kept: the same command goes on.")
        sys.exit(130)
    result = save_result(folder, questions, {"max_new_tokens": max_new_tokens, **result})
    for part in verdict_tables(result):
        console.print(part)
    tokens, cost = result["tokens"], price.of(used.prompt_tokens, used.reply_tokens)
    say(
        f"Asked now: {used.num_replies:,} requests, {used.prompt_tokens:,} + {used.reply_tokens:,} tokens as the judge "
        f"counts them{_money(cost)}. For the whole result: {tokens['prompt']:,} + {tokens['reply']:,}."
    )
    if (folder / "config.json").is_file():
        say(f"Report: {write_report(folder)}")
    if as_json:
        print_json(result)


def _say_plan(
    contest: Contest,
    answers: Mapping[Contestant, Answers],
    judging: Judge,
    replies: Replies,
    price: Price,
    max_new_tokens: int,
) -> Request:
    """Print what is to be asked; return the first request."""
    from fedit.judge.contest import CHARACTERS_PER_TOKEN, plan

    planned = plan(contest, answers, replies, judging.most_tokens, max_new_tokens)
    if planned.num_missing:
        say(f"Answers to generate: {planned.num_missing:,}, counted as {max_new_tokens:,} tokens each.")
    compared = ", ".join(f"{one.name} against {other.name}" for one, other in contest.pairs)
    say(f"{len(contest.questions):,} questions, {contest.protocol}: {compared}.")
    cost = None if planned.most_reply_tokens is None else price.of(planned.prompt_tokens, planned.most_reply_tokens)
    most = "any number" if planned.most_reply_tokens is None else f"at most {planned.most_reply_tokens:,}"
    say(
        f"To ask of {judging.model} ({judging.where}): {planned.num_requests:,} requests; {planned.num_known:,} more "
        f"are answered already. About {planned.prompt_tokens:,} tokens of prompts ({CHARACTERS_PER_TOKEN} characters "
        f"each), {most} of replies{_money(cost, 'at most ')}."
    )
    return planned.example


def _money(cost: float | None, how: str = "") -> str:
    return "" if cost is None else f", {how}{cost:,.2f} in the currency of the prices"
