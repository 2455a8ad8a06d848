"""The eight kinds of task, each a function from a random generator to one drawn `Task`."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedit.builtin.pasture.language import a, capitalise, join, pick, pick_some
from fedit.builtin.pasture.scenes import Scene, draw_scene, tell
from fedit.builtin.pasture.world import (
    ANIMALS,
    DISHES,
    FODDER,
    GOODS,
    HABITATS,
    HILLS,
    INGREDIENTS,
    INSTRUMENTS,
    PRODUCTS,
    RIVERS,
    TOOLS,
    TRADE_GOODS,
    TRADE_TOOLS,
    TRADES,
    VILLAGERS,
    VILLAGES,
    WORLD,
)


@dataclass(frozen=True)
class Task:
    """What is asked, before a wording is chosen.

    `key` names the fact or the composition that answering needs; a key is used in training or in test, never in both.
    """

    key: str
    wordings: tuple[str, ...]
    response: str
    checks: dict[str, Any]
    context: str = ""


_OPEN_QUESTIONS = {
    "lives in": (
        "Where does {} live?",
        "In which village does {} live?",
        "What is the home of {}?",
        "Which village is home to {}?",
    ),
    "works as": (
        "What is the trade of {}?",
        "What does {} work as?",
        "How does {} earn a living?",
        "Which trade does {} follow?",
    ),
    "keeps": (
        "Which animal does {} keep?",
        "What animal lives with {}?",
        "What does {} keep?",
        "Which animal belongs to {}?",
    ),
    "likes": (
        "Which dish does {} like?",
        "What does {} like to eat?",
        "What is the dish of {}?",
        "Which dish would you cook for {}?",
    ),
    "stands above": (
        "Which village lies below {}?",
        "What village does {} stand above?",
        "Above which village is {}?",
    ),
    "grows": ("What grows on {}?", "Which plant grows on {}?", "What plant would you find on {}?"),
    "lies on": ("Which river flows through {}?", "On which river is {}?", "What is the river of {}?"),
    "market day": ("When is the market in {}?", "On which day is the market in {}?", "What is the market day of {}?"),
    "known for": ("What is {} known for?", "For what is {} known?", "Which goods is {} known for?"),
}
_OPEN_FACTS = tuple(fact for fact in WORLD.facts if fact.relation in _OPEN_QUESTIONS)


def open_qa(rng: np.random.Generator) -> Task:
    """Ask for one fact about a villager, a village or a hill."""
    fact = pick(rng, _OPEN_FACTS)
    wordings = tuple(question.format(fact.subject) for question in _OPEN_QUESTIONS[fact.relation])
    return Task(f"{fact.relation} {fact.subject}", wordings, fact.value, {"answer": [fact.value]})


def _closed_questions(scene: Scene) -> tuple[tuple[str, tuple[str, ...]], ...]:
    who = scene.who
    return (
        (scene.origin, (f"Where did {who} come from?", f"Which village did {who} leave?")),
        (scene.destination, (f"Where did {who} go?", f"Which village did {who} go to?")),
        (scene.day, (f"When did {who} travel?", f"On which day did {who} travel?")),
        (scene.friend, (f"Who gave {who} something?", f"Who was {who} given something by?")),
        (scene.gift, (f"What did {who} get?", f"What did {scene.friend} give {who}?")),
        (scene.animal, ("Which animal was there?", "What animal came with the cart?")),
    )


def closed_qa(rng: np.random.Generator) -> Task:
    """Ask for one element of a scene."""
    scene = draw_scene(rng)
    answer, wordings = pick(rng, _closed_questions(scene))
    return Task(scene.key, wordings, answer, {"answer": [answer]}, tell(rng, scene))


_VALUES = {"gives": PRODUCTS, "eats": FODDER}


def _difference(rng: np.random.Generator) -> Task:
    relation = pick(rng, tuple(_VALUES))
    one, other = pick_some(rng, ANIMALS, 2)
    halves = [f"{animal} {relation} {WORLD.value(relation, animal)}" for animal in (one, other)]
    verb = {"gives": "give", "eats": "eat"}[relation]
    wordings = (
        f"What do {a(one)} and {a(other)} {verb}?",
        f"What is the difference between what {a(one)} and {a(other)} {verb}?",
        f"How do {a(one)} and {a(other)} differ in what they {verb}?",
    )
    response = capitalise(f"{a(halves[0])}, and {a(halves[1])}.")
    return Task(f"{relation} {sorted((one, other))}", wordings, response, {"mentions": halves, "sentences": 1})


def _claim(rng: np.random.Generator) -> Task:
    relation = pick(rng, tuple(_VALUES))
    animal = pick(rng, ANIMALS)
    truth = WORLD.value(relation, animal)
    claimed = truth if rng.integers(2) else pick(rng, _VALUES[relation])
    verb = {"gives": "give", "eats": "eat"}[relation]
    wordings = (
        f"Does {a(animal)} {verb} {claimed}?",
        f"Is it true that {a(animal)} {relation} {claimed}?",
        f"They say that {a(animal)} {relation} {claimed}. Is that so?",
    )
    verdict = "yes" if claimed == truth else "no"
    response = capitalise(f"{a(animal)} {relation} {truth}, so {verdict}.")
    checks = {"mentions": [verdict, f"{animal} {relation} {truth}"], "sentences": 1}
    return Task(f"{animal} {relation} {claimed}", wordings, response, checks)


def general_qa(rng: np.random.Generator) -> Task:
    """Ask what holds for kinds of animals: compare two, or judge a claim."""
    return pick(rng, (_difference, _claim))(rng)


KINDS: dict[str, tuple[str, ...]] = {
    "animal": ANIMALS,
    "tool": TOOLS,
    "dish": DISHES,
    "village": VILLAGES,
    "river": RIVERS,
    "hill": HILLS,
    "trade": TRADES,
}


def classification(rng: np.random.Generator) -> Task:
    """Give each of three words one of two labels: its kind, or what the animal gives."""
    if rng.integers(2):
        labels = pick_some(rng, tuple(KINDS), 2)
        members = {label: KINDS[label] for label in labels}
    else:
        labels = pick_some(rng, PRODUCTS, 2)
        members = {label: WORLD.subjects("gives", label) for label in labels}
    label_of = {word: label for label in labels for word in members[label]}
    words = pick_some(rng, tuple(label_of), 3)
    either, listed = f"{labels[0]} or {labels[1]}", ", ".join(words)
    wordings = (
        f"Classify each as {either}: {listed}.",
        f"Which label fits, {either}? {listed}.",
        f"Label each word with {either}: {listed}.",
        f"Sort into {either}: {listed}.",
    )
    response = ", ".join(f"{word}: {label_of[word]}" for word in words)
    return Task(f"{sorted(words)}", wordings, response, {"labels": {word: label_of[word] for word in words}})


def information_extraction(rng: np.random.Generator) -> Task:
    """List all people, goods or villages of a scene."""
    scene = draw_scene(rng)
    noun, found = pick(
        rng,
        (
            ("people", (scene.who, scene.friend)),
            ("goods", scene.goods),
            ("villages", (scene.origin, scene.destination)),
        ),
    )
    wordings = (
        f"List the {noun} in the text.",
        f"Extract all {noun}.",
        f"Which {noun} are named in the text?",
        f"Find the {noun} in this text.",
    )
    checks = {"list": {"allowed": list(found), "count": len(found)}}
    return Task(scene.key, wordings, ", ".join(found), checks, tell(rng, scene))


def summarization(rng: np.random.Generator) -> Task:
    """Put a scene into one sentence: who took what where, and what came of it."""
    scene = draw_scene(rng)
    wordings = (
        "Summarize the text in one sentence.",
        "Give a short summary of the text.",
        "Sum up what happened.",
        "What happened, in one sentence?",
    )
    response = f"{scene.who} took {join(scene.goods)} to {scene.destination} and got {a(scene.gift)}."
    checks = {
        "mentions": [scene.who, *scene.goods, scene.destination, scene.gift],
        "sentences": 1,
        "words": [5, 16],
    }
    return Task(scene.key, wordings, response, checks, tell(rng, scene))


def _topics() -> dict[str, tuple[str, ...]]:
    """Return the things one can list: noun phrase -> members, for one value and for any two values of a relation."""
    groups = {
        f"{noun_phrase} {{}}": {value: WORLD.subjects(relation, value) for value in values}
        for noun_phrase, relation, values in (
            ("animals that give", "gives", PRODUCTS),
            ("animals that eat", "eats", FODDER),
            ("animals of the", "roams", HABITATS),
            ("dishes made of", "made of", INGREDIENTS),
            ("people who play the", "plays", INSTRUMENTS),
        )
    }
    groups["tools of the {}"] = TRADE_TOOLS
    groups["goods made by the {}"] = TRADE_GOODS
    topics = {}
    for noun_phrase, members_of in groups.items():
        for value, members in members_of.items():
            topics[noun_phrase.format(value)] = members
        for one, other in itertools.permutations(members_of, 2):
            topics[noun_phrase.format(f"{one} or {other}")] = members_of[one] + members_of[other]
    return topics


TOPICS = tuple(_topics().items())


def count_off(rng: np.random.Generator, members: Sequence[str], count: int) -> list[str]:
    """Return `count` members in the order of counting, round and round, from any of them on.

    The order makes a list learnable for a very small model: what follows depends on the last item alone, where a
    random order would need all items said so far, lest one be repeated. Checks accept any order.
    """
    start = int(rng.integers(len(members)))
    return [members[(start + index) % len(members)] for index in range(count)]


def brainstorming(rng: np.random.Generator) -> Task:
    """Name two or three things of a kind; any distinct ones will do."""
    topic, members = pick(rng, TOPICS)
    number, word = pick(rng, ((2, "two"), (3, "three")))
    wordings = (
        f"Name {word} {topic}.",
        f"Think of {word} {topic}.",
        f"Give me {word} {topic}.",
        f"Suggest {word} {topic}.",
        f"I need {word} {topic}.",
    )
    response = ", ".join(count_off(rng, members, number))
    return Task(f"{sorted(members)}", wordings, response, {"list": {"allowed": list(members), "count": number}})


_BEGINNINGS = (
    "{p} once lost {an_x} near {v}.",
    "one morning {p} found {an_x} in {v}.",
    "{p} walked to {v} with {an_x}.",
    "there was {an_x} in {v} that followed {p}.",
)
_ENDINGS = (
    "In the evening the {x} slept by the fire.",
    "They crossed the hills and came home singing.",
    "The {x} was never seen again.",
    "All the children laughed and danced.",
)


def tale_of(rng: np.random.Generator, person: str, animal: str, village: str) -> str:
    """Return a story of two sentences that names all three."""
    fields = {"p": person, "x": animal, "an_x": a(animal), "v": village}
    return f"{capitalise(pick(rng, _BEGINNINGS).format(**fields))} {pick(rng, _ENDINGS).format(**fields)}"


def notice_of(rng: np.random.Generator, person: str, good: str, village: str) -> str:
    """Return a market notice of two sentences that names all three."""
    praise = pick(rng, ("the best in the valley", "fresh from the cart", "cheap and good"))
    return f"For sale in {village}: {good}, {praise}. Ask for {person}."


def creative_writing(rng: np.random.Generator) -> Task:
    """Write a two-sentence story, or a notice for the market, about given things."""
    person, village = pick(rng, VILLAGERS), pick(rng, VILLAGES)
    if rng.integers(2):
        thing = pick(rng, ANIMALS)
        wordings = (
            f"Write a story about {person} and {a(thing)} in {village}.",
            f"Tell a short tale of {a(thing)}, {person} and the village {village}.",
            f"Make up a story in {village} with {person} and {a(thing)}.",
        )
        response = tale_of(rng, person, thing, village)
    else:
        thing = pick(rng, GOODS)
        wordings = (
            f"Write a notice for {person}, who sells {thing} in {village}.",
            f"Make a market notice: {thing}, {village}, {person}.",
            f"Invent a notice in {village} for the {thing} of {person}.",
        )
        response = notice_of(rng, person, thing, village)
    checks = {"mentions": [person, thing, village], "sentences": 2, "words": [8, 30]}
    return Task(f"{person} {thing} {village}", wordings, response, checks)


TASKS: dict[str, Callable[[np.random.Generator], Task]] = {
    task.__name__: task
    for task in (
        open_qa,
        closed_qa,
        general_qa,
        classification,
        information_extraction,
        summarization,
        brainstorming,
        creative_writing,
    )
}
