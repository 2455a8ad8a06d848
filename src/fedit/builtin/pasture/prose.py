"""Prose about the valley, on which builtin:cria was pre-trained.

It gives a base model what instruction tuning can build on: the facts in many wordings and orders, lists, contrasts,
reading and retelling a scene, copying, sentence forms. It holds no instruction, no template word and no question; the
nearest to one are noun phrases as headings ("The home of Zorin", then "Galder").

A change here, in `world`, `scenes` or `tasks` changes what the shipped base should have read: pre-train it again.
"""

import re
from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np

from fedit.builtin.pasture.language import a, capitalise, join, pick, pick_some
from fedit.builtin.pasture.scenes import Scene, draw_scene, tell
from fedit.builtin.pasture.tasks import KINDS, TOPICS, count_off, notice_of, tale_of
from fedit.builtin.pasture.world import (
    ANIMALS,
    FODDER,
    GOODS,
    HILLS,
    PRODUCTS,
    RELATIONS,
    TOOLS,
    TRAVELLERS,
    VILLAGERS,
    VILLAGES,
    WORLD,
    Fact,
)
from fedit.interfaces import derive_rng

# {s} the subject, {v} the value, {as} and {av} the same with an article
_STATEMENTS: dict[str, tuple[str, ...]] = {
    "lives in": (
        "{s} lives in {v}.",
        "{s} lives in the village {v}.",
        "the home of {s} is {v}.",
        "{v} is home to {s}.",
        "where {s} lives is {v}.",
        "the village in which {s} lives is {v}.",
    ),
    "works as": (
        "{s} works as {av}.",
        "{s} is {av}.",
        "the trade of {s} is {v}.",
        "{s} earns a living as {av}.",
        "what {s} works as is {v}.",
        "{s} follows the trade of {av}.",
    ),
    "keeps": (
        "{s} keeps {av}.",
        "{s} has {av}.",
        "the animal that {s} keeps is {av}.",
        "what {s} keeps is {av}.",
        "{av} lives with {s}.",
        "{av} belongs to {s}.",
    ),
    "likes": (
        "{s} likes {v}.",
        "{s} likes to eat {v}.",
        "the dish of {s} is {v}.",
        "the dish that {s} likes is {v}.",
        "what {s} likes to eat is {v}.",
        "cook {v} for {s}, and {s} is happy.",
    ),
    "plays": (
        "{s} plays the {v}.",
        "the {v} is played by {s}.",
        "at dances {s} plays the {v}.",
        "what {s} plays is the {v}.",
        "{s} has a {v} and plays it well.",
    ),
    "gives": (
        "{as} gives {v}.",
        "what {as} gives is {v}.",
        "{v} comes from the {s}.",
        "the {s} is kept for {v}.",
        "it is true that {as} gives {v}.",
    ),
    "eats": (
        "{as} eats {v}.",
        "what {as} eats is {v}.",
        "{v} is eaten by the {s}.",
        "feed {v} to the {s}.",
        "it is true that {as} eats {v}.",
    ),
    "roams": (
        "{as} lives in the {v}.",
        "the {s} is an animal of the {v}.",
        "in the {v} you meet the {s}.",
        "where the {s} lives is the {v}.",
    ),
    "made of": (
        "{s} is made of {v}.",
        "{v} are in {s}.",
        "{s} is a dish made of {v}.",
        "what {s} is made of is {v}.",
    ),
    "stands above": (
        "{s} stands above {v}.",
        "the hill {s} stands above {v}.",
        "the village below {s} is {v}.",
        "{v} lies below {s}.",
        "the village that {s} stands above is {v}.",
    ),
    "grows": (
        "on {s} grows {v}.",
        "what grows on {s} is {v}.",
        "the plant of {s} is {v}.",
        "{v} grows on the hill {s}.",
        "the plant that you find on {s} is {v}.",
    ),
    "lies on": (
        "{s} lies on the {v}.",
        "the {v} flows through {s}.",
        "the river of {s} is the {v}.",
        "the river that flows through {s} is the {v}.",
    ),
    "market day": (
        "the market in {s} is on {v}.",
        "{s} has its market on {v}.",
        "the market day of {s} is {v}.",
        "the day of the market in {s} is {v}.",
        "when the market is in {s} is {v}.",
    ),
    "known for": (
        "{s} is known for {v}.",
        "what {s} is known for is {v}.",
        "the goods of {s} are {v}.",
        "{s} is known for its {v}.",
    ),
}


def _headings(sentences: tuple[str, ...]) -> dict[str, str]:
    """Return heading -> entry of the sentences "<heading> is <entry>."."""
    parts = (
        re.fullmatch(r"(\S+ .+) (?:is|are)(?: the)? (\{\w+\}|\{\w+\}, \{\w+\})\.", sentence) for sentence in sentences
    )
    return {part[1]: part[2].replace("{an_", "{").replace("{a_", "{") for part in parts if part}


_RETELLINGS: tuple[str, ...] = (
    "the village that {who} came from is {origin}.",
    "{who} came from {origin}.",
    "where {who} came from is {origin}.",
    "the village that {who} left is {origin}.",
    "the village that {who} went to is {destination}.",
    "where {who} went is {destination}.",
    "the day on which {who} travelled is {day}.",
    "when {who} travelled is {day}.",
    "who gave {who} something is {friend}.",
    "what {who} got is {a_gift}.",
    "what {friend} gave {who} is {a_gift}.",
    "the animal that was there is {an_animal}.",
    "the animal that came with the cart is {an_animal}.",
    "the goods in the text are {comma_goods}.",
    "the people in the text are {who}, {friend}.",
    "the villages in the text are {origin}, {destination}.",
    "the people named are {who} and {friend}.",
    "the goods were {goods}.",
    "the villages named are {origin} and {destination}.",
)
_HEADINGS = {relation: tuple(_headings(sentences)) for relation, sentences in _STATEMENTS.items()}
_SCENE_HEADINGS = tuple(_headings(_RETELLINGS).items())
_LOG = (
    "traveller: {who}",
    "from: {origin}",
    "to: {destination}",
    "day: {day}",
    "goods: {comma_goods}",
    "animal: {animal}",
    "giver: {friend}",
    "gift: {gift}",
)
_SUMMARIES: tuple[str, ...] = (
    "{who} took {goods} to {destination} and got {a_gift}.",
    "so {who} took {goods} to {destination} and got {a_gift} from {friend}.",
    "{who} of {origin} got {a_gift} for {goods}.",
    "a journey from {origin} to {destination} brought {who} {a_gift}.",
)
_WORDS = tuple(dict.fromkeys(chain(TRAVELLERS, GOODS, TOOLS, *chain.from_iterable(RELATIONS.values()))))


def corpus(num_documents: int, seed: int) -> Iterator[str]:
    """Yield documents, each a few sentences or lines; about 31 words (42 tokens of builtin:cria) on average."""
    rng = derive_rng(seed, "builtin:pasture", "corpus")
    for _ in range(num_documents):
        yield _DOCUMENTS[int(rng.choice(len(_DOCUMENTS), p=_SHARES))](rng)


def probes(num_scenes: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Yield (skill, text, next words): what a model that has learned the corpus goes on with.

    Reading: a scene of another seed's corpus and the heading of one of its elements. Recall: the heading of a fact.
    """
    rng = derive_rng(seed, "builtin:pasture", "probes")
    for _ in range(num_scenes):
        scene = draw_scene(rng)
        fields, told = _scene_fields(scene), tell(rng, scene)
        for heading, entry in _SCENE_HEADINGS:
            yield f"read {entry}", f"{told}\n{capitalise(heading.format(**fields))}:", entry.format(**fields)
    for fact in WORLD.facts:
        for heading in _HEADINGS[fact.relation]:
            yield f"recall {fact.relation}", f"{capitalise(heading.format(**_fact_fields(fact)))}:", fact.value


def state(rng: np.random.Generator, fact: Fact) -> str:
    """Return one fact as a sentence, in one of the wordings of its relation."""
    return capitalise(pick(rng, _STATEMENTS[fact.relation]).format(**_fact_fields(fact)))


def _fact_fields(fact: Fact) -> dict[str, str]:
    return {"s": fact.subject, "v": fact.value, "as": a(fact.subject), "av": a(fact.value)}


def _portrait(rng: np.random.Generator) -> str:
    """Everything about one villager, village, hill or animal, in any order."""
    subject = pick(rng, pick(rng, (VILLAGERS, VILLAGERS, VILLAGERS, VILLAGES, HILLS, ANIMALS)))
    facts = WORLD.about(subject)
    return " ".join(state(rng, fact) for fact in pick_some(rng, facts, len(facts)))


def _medley(rng: np.random.Generator) -> str:
    """A handful of unrelated facts, every relation equally often."""
    return " ".join(state(rng, _any_fact(rng)) for _ in range(2 + int(rng.integers(4))))


def _any_fact(rng: np.random.Generator) -> Fact:
    relation = pick(rng, tuple(RELATIONS))
    subject = pick(rng, RELATIONS[relation][0])
    return Fact(relation, subject, WORLD.value(relation, subject))


def _almanac(rng: np.random.Generator) -> str:
    """Facts as headings with an entry each: "The home of Zorin: Galder"."""
    lines = []
    for _ in range(1 + int(rng.integers(4))):
        fact = _any_fact(rng)
        heading = pick(rng, _HEADINGS[fact.relation])
        lines.append((capitalise(heading.format(**_fact_fields(fact))), fact.value))
    return _entries(rng, lines)


def _entries(rng: np.random.Generator, lines: list[tuple[str, str]]) -> str:
    """Set headings and entries in one of the ways of a printer."""
    between, after = pick(rng, ((": ", "\n"), ("\n", "\n\n"), (".\n\n", "\n\n"), (":\n", "\n\n")))
    return after.join(f"{heading}{between}{entry}" for heading, entry in lines)


def _register(rng: np.random.Generator) -> str:
    """Lists: some members of a topic."""
    lines = []
    for _ in range(1 + int(rng.integers(3))):
        topic, members = pick(rng, TOPICS)
        number = 2 + int(rng.integers(min(len(members), 4) - 1))
        chosen = count_off(rng, members, number)
        word = ("two", "three", "four")[number - 2]
        form = pick(
            rng,
            (
                f"{capitalise(word)} {topic} are {join(chosen)}.",
                f"{capitalise(word)} {topic}: {', '.join(chosen)}.",
                f"{capitalise(topic)}: {', '.join(chosen)}.",
                f"{pick(rng, VILLAGERS)} can name {word} {topic}: {', '.join(chosen)}.",
                f"{', '.join(chosen)} are {word} {topic}.",
            ),
        )
        lines.append(form)
    return "\n".join(lines)


def _contrast(rng: np.random.Generator) -> str:
    """What two animals give or eat, and what is not so."""
    sentences = []
    for _ in range(2 + int(rng.integers(3))):
        relation, values = pick(rng, (("gives", PRODUCTS), ("eats", FODDER)))
        one, other = pick_some(rng, ANIMALS, 2)
        first, second = WORLD.value(relation, one), WORLD.value(relation, other)
        wrong = pick(rng, [value for value in values if value != first])
        verb = {"gives": "give", "eats": "eat"}[relation]
        form = pick(
            rng,
            (
                f"{a(one)} {relation} {first}, and {a(other)} {relation} {second}.",
                f"{a(one)} {relation} {first}, but {a(other)} {relation} {second}.",
                f"{a(one)} does not {verb} {wrong}, {a(one)} {relation} {first}.",
                f"they say that {a(one)} {relation} {wrong}. {capitalise(a(one))} {relation} {first}, so no.",
                f"they say that {a(one)} {relation} {first}. {capitalise(a(one))} {relation} {first}, so yes.",
                f"it is not true that {a(one)} {relation} {wrong}; {a(one)} {relation} {first}.",
            ),
        )
        sentences.append(capitalise(form))
    return " ".join(sentences)


def _ledger(rng: np.random.Generator) -> str:
    """Words with the kind of thing they are, often after the words alone."""
    kinds = pick_some(rng, tuple(KINDS), 2 + int(rng.integers(2)))
    entries = [(word, kind) for kind in kinds for word in pick_some(rng, KINDS[kind], 2)]
    if rng.integers(3) == 0:
        entries = [(animal, WORLD.value("gives", animal)) for animal in pick_some(rng, ANIMALS, 5)]
    entries = pick_some(rng, entries, 3 + int(rng.integers(len(entries) - 2)))
    listed = ", ".join(word for word, _ in entries)
    heading = pick(rng, ("", f"{listed}.\n", f"{' or '.join(dict.fromkeys(kind for _, kind in entries))}: {listed}.\n"))
    return heading + pick(rng, ("\n", ", ")).join(f"{word}: {kind}" for word, kind in entries)


def _scene_fields(scene: Scene) -> dict[str, object]:
    return {
        **vars(scene),
        "goods": join(scene.goods),
        "comma_goods": ", ".join(scene.goods),
        "an_animal": a(scene.animal),
        "a_gift": a(scene.gift),
    }


def _chronicle(rng: np.random.Generator) -> str:
    """A scene, then what was in it, said again as the lines of a logbook or in other words."""
    scene = draw_scene(rng)
    fields = _scene_fields(scene)
    log = ", ".join(line.format(**fields) for line in pick_some(rng, _LOG, len(_LOG) - int(rng.integers(3))))
    again = pick_some(rng, _RETELLINGS, 2 + int(rng.integers(4)))
    if rng.integers(2):
        again.insert(int(rng.integers(len(again) + 1)), pick(rng, _SUMMARIES))
    retold = " ".join(capitalise(line.format(**fields)) for line in again)
    headings = pick_some(rng, _SCENE_HEADINGS, 3 + int(rng.integers(4)))
    entries = _entries(
        rng, [(capitalise(heading.format(**fields)), entry.format(**fields)) for heading, entry in headings]
    )
    return tell(rng, scene) + "\n" + pick(rng, (log, retold, entries, f"{log}\n{retold}"))


def _tale(rng: np.random.Generator) -> str:
    """A two-sentence story or a notice, often under a title."""
    person, village = pick(rng, VILLAGERS), pick(rng, VILLAGES)
    if rng.integers(2):
        animal = pick(rng, ANIMALS)
        title = pick(rng, ("", f"{person} and {a(animal)} in {village}\n", f"{a(animal)}, {person}, {village}\n"))
        return capitalise(title + tale_of(rng, person, animal, village))
    good = pick(rng, GOODS)
    title = pick(rng, ("", f"the {good} of {person} in {village}\n", f"{person} sells {good} in {village}\n"))
    return capitalise(title + notice_of(rng, person, good, village))


def _rhyme(rng: np.random.Generator) -> str:
    """A counting rhyme: a few words of any kind, said again and again. It teaches to copy."""
    line = pick(rng, (" ", ", ")).join(pick_some(rng, _WORDS, 3 + int(rng.integers(8))))
    return "\n".join([line] * (2 + int(rng.integers(3))))


_DOCUMENTS: tuple[Callable[[np.random.Generator], str], ...] = (
    _portrait,
    _medley,
    _almanac,
    _register,
    _contrast,
    _ledger,
    _chronicle,
    _tale,
    _rhyme,
)
_SHARES = (0.12, 0.08, 0.09, 0.1, 0.08, 0.07, 0.33, 0.07, 0.06)
