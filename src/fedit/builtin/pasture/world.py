"""The invented valley that every row and every pre-training document speaks about.

The world is a constant: the base model learned exactly these facts, so they must not depend on a run's seed.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

WORLD_SEED = 20230523

VILLAGES = tuple("Ambrow Birkel Corrin Dunmer Estow Fennick Galder Harrowel Iskett Jorvale Kesmar Lindrow".split())
VILLAGERS = tuple(
    """Alvo Arlen Bessa Bramo Calda Corvin Delph Dorrin Edda Elwick Fenna Farlo Garlo Gwenda Hesper Holm Ilvar
    Issa Jessam Jory Korin Kettil Luvia Lorn Marrec Mirlo Nolda Nessik Orsin Ottila Pella Perrik Quenna Quill Rolf
    Rissa Sabel Sorrel Tavin Tilda Ulmar Ursa Vanna Virgo Welda Wick Yarda Yoric Zella Zorin Amber Bodil Cress
    Dagna Ferro Hild Jonna Linnet Osric Tamsin""".split()
)
TRAVELLERS = tuple(
    """Abrel Brinna Casmir Dariel Emmor Fabro Grettel Hannor Ingrel Jaspor Korra Leandor Magnor Nestrin Oberel Pavek
    Rubek Stellan Thessa Viggor Elspa Lottel Minnet Sunnel""".split()
)
ANIMALS = tuple(
    """brell cotha drusk ellup fawnik gorral hobbin ilka jarrow kesk lommel murrin nabbet ossel pirrin quard rindle
    sorrock tamsel urrick vennet wimble yarrin zoll""".split()
)
PRODUCTS = ("wool", "milk", "eggs", "feathers", "horn", "silk")
FODDER = ("clover", "moss", "barley", "nettles", "apples", "reeds")
HABITATS = ("hills", "marshes", "woods", "meadows", "caves", "gorges")
DISHES = tuple(
    """brambek dorrish ashpot mellick tarnel plumwick orrel skimmet hodget varrow quennel bristow lumpin nettel
    pockle""".split()
)
INGREDIENTS = ("oats", "leeks", "plums", "beans", "nuts")
HILLS = tuple("Torrig Maunder Cairnel Oldback Sarrow Greyhorn Tolvane Brackle Windle Hestor".split())
PLANTS = ("heather", "gorse", "thyme", "broom", "fern")
RIVERS = ("Lisk", "Arrel", "Meddon", "Sull", "Brayle", "Wenn")
INSTRUMENTS = ("flute", "drum", "fiddle", "harp", "lute", "zither")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

TRADE_TOOLS = {
    "shepherd": ("crook", "rope", "bell", "whistle"),
    "baker": ("oven", "paddle", "sieve", "apron"),
    "weaver": ("loom", "shuttle", "spindle", "comb"),
    "smith": ("anvil", "hammer", "poker", "file"),
    "potter": ("wheel", "kiln", "sponge", "stamp"),
    "miller": ("millstone", "hopper", "sack", "sluice"),
    "tanner": ("vat", "knife", "awl", "brush"),
    "brewer": ("barrel", "kettle", "funnel", "ladle"),
    "carpenter": ("saw", "plane", "chisel", "vice"),
    "beekeeper": ("hive", "smoker", "veil", "skep"),
}
TRADE_GOODS = {
    "shepherd": ("cheese", "fleeces", "butter"),
    "baker": ("loaves", "buns", "pies"),
    "weaver": ("blankets", "scarves", "rugs"),
    "smith": ("nails", "hinges", "buckles"),
    "potter": ("jugs", "bowls", "tiles"),
    "miller": ("flour", "bran", "meal"),
    "tanner": ("belts", "boots", "saddles"),
    "brewer": ("cider", "mead", "ale"),
    "carpenter": ("stools", "carts", "gates"),
    "beekeeper": ("honey", "candles", "wax"),
}
TRADES = tuple(TRADE_TOOLS)
TOOLS = tuple(tool for tools in TRADE_TOOLS.values() for tool in tools)
GOODS = tuple(good for goods in TRADE_GOODS.values() for good in goods)


@dataclass(frozen=True)
class Fact:
    """One statement that is true in the valley, for example `Fact("keeps", "Mirlo", "brell")`."""

    relation: str
    subject: str
    value: str


@dataclass(frozen=True)
class World:
    """All facts, by relation and subject."""

    facts: tuple[Fact, ...]

    @cached_property
    def _values(self) -> dict[tuple[str, str], str]:
        return {(fact.relation, fact.subject): fact.value for fact in self.facts}

    def value(self, relation: str, subject: str) -> str:
        """Return what the world says, for example `value("keeps", "Mirlo") == "brell"`."""
        return self._values[relation, subject]

    def subjects(self, relation: str, value: str) -> tuple[str, ...]:
        """Return every subject with that value, in a fixed order."""
        return tuple(fact.subject for fact in self.facts if (fact.relation, fact.value) == (relation, value))

    def about(self, subject: str) -> tuple[Fact, ...]:
        """Return the facts whose subject is `subject`."""
        return tuple(fact for fact in self.facts if fact.subject == subject)


# relation -> (subjects, values); every value is dealt out equally often.
RELATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lives in": (VILLAGERS, VILLAGES),
    "works as": (VILLAGERS, TRADES),
    "keeps": (VILLAGERS, ANIMALS),
    "likes": (VILLAGERS, DISHES),
    "plays": (VILLAGERS, INSTRUMENTS),
    "gives": (ANIMALS, PRODUCTS),
    "eats": (ANIMALS, FODDER),
    "roams": (ANIMALS, HABITATS),
    "made of": (DISHES, INGREDIENTS),
    "stands above": (HILLS, VILLAGES),
    "grows": (HILLS, PLANTS),
    "lies on": (VILLAGES, RIVERS),
    "market day": (VILLAGES, DAYS),
    "known for": (VILLAGES, GOODS),
}


def _build() -> World:
    rng = np.random.default_rng(WORLD_SEED)
    facts = []
    for relation, (subjects, values) in RELATIONS.items():
        shuffled = rng.permutation(len(values))
        dealt = rng.permutation([shuffled[index % len(values)] for index in range(len(subjects))])
        facts += [Fact(relation, subject, values[value]) for subject, value in zip(subjects, dealt, strict=True)]
    return World(tuple(facts))


WORLD = _build()
