"""Who is judged: models of runs, which answer the questions here, and files of stored answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedit.evaluation.heldout import NUM_SLOTS, continue_prompts, together
from fedit.files import append_line, keep_lines
from fedit.interfaces import ConfigError, Example, Turn
from fedit.judge.questions import Question, read_answers
from fedit.report.folder import read_lines
from fedit.run_models import BASE, LOCAL, RunModels, model_names, resolve_names

FILE = "judge_answers.jsonl"
"""In a run's folder: one line for each answer of its models"""
DEFAULT_BASELINES = (BASE, LOCAL, "central")

Answers = Mapping[str, tuple[str, ...]]
"""By ``question_id``, the answers to its turns, as far as there are any"""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A model that is judged."""

    name: str
    place: Path
    """The folder of its run, or the file of its answers"""
    model: str | None = None
    """Which of the run's models; None: stored answers"""


def find_contestants(
    places: Sequence[Path], models: Sequence[str], against: Sequence[str] | None
) -> tuple[list[Contestant], list[Contestant]]:
    """Return who is judged, and the baselines: what it is compared with.

    Judged are the `models` of every run in `places`, and every file of stored answers there. The baselines are files of
    stored answers, or models of the first run; by default its base, its median local-only model and its centralised
    one, as far as it has them.

    Raises:
        ConfigError: there is no such place, run or model, or nothing to compare with.
    """
    if not places:
        raise ConfigError("Nothing to judge: give the folder of a run, or a file of stored answers.")
    ours = []
    runs = [place for place in places if place.is_dir()]
    for place in places:
        if place.is_file():
            ours.append(Contestant(place.stem, place))
            continue
        ours += [_of_run(place, model, runs) for model in resolve_names(place, models)]
    baselines = []
    for name in against or (_default_baselines(runs[0]) if runs else ()):
        if Path(name).is_file():
            baselines.append(Contestant(Path(name).stem, Path(name)))
        elif runs:
            baselines += [_of_run(runs[0], model, runs) for model in resolve_names(runs[0], [name])]
        else:
            raise ConfigError(f"--against {name}: no such file, and no run is given whose model it could be.")
    found = list(dict.fromkeys([*ours, *baselines]))
    if len({contestant.name for contestant in found}) < len(found):
        rename = {each: Contestant(f"{each.place}: {each.model or 'stored'}", each.place, each.model) for each in found}
        ours, baselines = [rename[each] for each in ours], [rename[each] for each in baselines]
    ours = list(dict.fromkeys(ours))
    if not any(one != other for one in ours for other in baselines):
        raise ConfigError(
            f"Nothing to compare {ours[0].name} with: give --against, a file of stored answers or a model of the first "
            "run."
        )
    return ours, list(dict.fromkeys(baselines))


def _of_run(place: Path, model: str, runs: Sequence[Path]) -> Contestant:
    return Contestant(model if len(runs) == 1 else f"{place.name}: {model}", place, model)


def _default_baselines(run: Path) -> list[str]:
    known = model_names(run)
    return [name for name in DEFAULT_BASELINES if name in known or any(k.startswith(f"{name}/") for k in known)]


def known_answers(
    contestants: Sequence[Contestant], questions: Sequence[Question], max_new_tokens: int
) -> dict[Contestant, Answers]:
    """Return the answers that are stored or were saved before; some may be missing.

    Raises:
        DataError: a file of stored answers lacks one.
    """
    found: dict[Contestant, Answers] = {}
    for each in contestants:
        if each.model is None:
            found[each] = read_answers(each.place, questions)
        else:
            saved = _Saved(each.place, max_new_tokens)
            found[each] = {question.question_id: saved.answers(each.model, question) for question in questions}
    return found


def complete_answers(
    contestants: Sequence[Contestant],
    questions: Sequence[Question],
    max_new_tokens: int,
    notify: Callable[[str], None] = lambda progress: None,
) -> dict[Contestant, Answers]:
    """Return all answers; those that are missing are generated, greedily, and saved as they come.

    Raises:
        ConfigError, EngineError: a run's models cannot be opened (`RunModels.open`).
        DataError: a question is too long for them.
    """
    known = known_answers(contestants, questions, max_new_tokens)
    for folder in dict.fromkeys(each.place for each in contestants if each.model is not None):
        lacking = [
            each.model
            for each in contestants
            if each.place == folder
            and each.model is not None
            and any(len(known[each][question.question_id]) < len(question.turns) for question in questions)
        ]
        if lacking:
            notify(f"Opening {folder}")
            _generate(RunModels.open(folder, lacking), _Saved(folder, max_new_tokens), questions, notify)
    return known_answers(contestants, questions, max_new_tokens)


def _generate(models: RunModels, saved: _Saved, questions: Sequence[Question], notify: Callable[[str], None]) -> None:
    num_all = len(models.adapters) * sum(len(question.turns) for question in questions)
    num_done = sum(len(saved.answers(name, question)) for name in models.adapters for question in questions)
    for turn in range(max(len(question.turns) for question in questions)):
        for names in together(models.adapters, min(NUM_SLOTS, 2 * models.model.max_slots)):
            waiting = [
                (slot, question, before)
                for slot, name in enumerate(names)
                for question in questions
                if len(question.turns) > turn == len(before := saved.answers(name, question))
            ]
            prompts = [
                (slot, models.prompt(_conversation(question, before), saved.max_new_tokens))
                for slot, question, before in waiting
            ]
            adapters = [models.adapters[name] for name in names]
            for index, text in continue_prompts(models.model, adapters, prompts, saved.max_new_tokens):
                slot, question, before = waiting[index]
                saved.add(names[slot], question, before, text.strip())
                num_done += 1
                notify(f"Answers: {num_done:,} of {num_all:,}")


def _conversation(question: Question, answers: Sequence[str]) -> Example:
    """Return the conversation that asks for the next answer."""
    turns = [Turn(asked, answered) for asked, answered in zip(question.turns, answers, strict=False)]
    return Example((*turns, Turn(question.turns[len(answers)], "")), source=question.source)


class _Saved:
    """The answers of a run's models on the disk, found by what was asked."""

    def __init__(self, folder: Path, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens
        self._path = folder / FILE
        self._texts = {values["asked"]: values["text"] for values in read_lines(self._path)}
        self._ends_whole = False

    def answers(self, model: str, question: Question) -> tuple[str, ...]:
        """Return the answers to the first turns of a question, as far as they are there."""
        texts: list[str] = []
        while len(texts) < len(question.turns):
            text = self._texts.get(self._key(model, question, texts))
            if text is None:
                break
            texts.append(text)
        return tuple(texts)

    def add(self, model: str, question: Question, before: Sequence[str], text: str) -> None:
        """Save the answer to the turn that follows those answered by `before`."""
        key = self._key(model, question, before)
        about = {"model": model, "question_id": question.question_id, "turn": len(before) + 1}
        if not self._ends_whole:  # not before: another process may be adding to the file
            keep_lines(self._path)
            self._ends_whole = True
        append_line(self._path, {"asked": key, **about, "max_new_tokens": self.max_new_tokens, "text": text})
        self._texts[key] = text

    def _key(self, model: str, question: Question, before: Sequence[str]) -> str:
        asked = [model, self.max_new_tokens, list(question.turns[: len(before) + 1]), list(before)]
        return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()
