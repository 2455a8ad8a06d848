"""Fresh little events: what the contexts of closed questions, extractions and summaries tell.

A scene is about travellers, who are no part of the world's facts, so nothing in it can be recalled: it has to be
read. The base model read other scenes of the same kind; the number of possible scenes is above 10^12.
"""

from dataclasses import dataclass

import numpy as np

from fedit.builtin.pasture.language import a, capitalise, join, pick, pick_some
from fedit.builtin.pasture.world import ANIMALS, DAYS, GOODS, TOOLS, TRAVELLERS, VILLAGES


@dataclass(frozen=True)
class Scene:
    """One journey: who went from where to where, when, with what and whom, and what they came home with."""

    who: str
    friend: str
    origin: str
    destination: str
    day: str
    goods: tuple[str, ...]
    animal: str
    gift: str

    @property
    def key(self) -> str:
        """What makes the scene this scene and no other; decides whether it is a training or a test scene."""
        return f"{self.who} {self.friend} {self.origin} {self.destination} {self.day} {self.goods}"


def draw_scene(rng: np.random.Generator) -> Scene:
    """Return a scene; two or three kinds of goods, all names distinct."""
    who, friend = pick_some(rng, TRAVELLERS, 2)
    origin, destination = pick_some(rng, VILLAGES, 2)
    goods = tuple(pick_some(rng, GOODS, 2 + int(rng.integers(2))))
    return Scene(who, friend, origin, destination, pick(rng, DAYS), goods, pick(rng, ANIMALS), pick(rng, TOOLS))


_DEPARTURES = (
    "on {day}, {who} of {origin} took {goods} to {destination}.",
    "{who} left {origin} on {day} and carried {goods} to {destination}.",
    "{who} came from {origin} to {destination} on {day} with {goods}.",
    "with {goods} on the cart, {who} went from {origin} to {destination} on {day}.",
)
_BEASTS = (
    "{an_animal} pulled the cart.",
    "the cart was pulled by {an_animal}.",
    "{an_animal} walked in front of the cart.",
)
_MEETINGS = (
    "there {who} met {friend}, who gave {who} {a_gift}.",
    "at the market {friend} gave {who} {a_gift}.",
    "{friend} was waiting there and gave {who} {a_gift}.",
    "in return, {who} got {a_gift} from {friend}.",
)
_WEATHER = ("it rained all day.", "the sun was warm.", "the road was long and dry.", "a cold wind blew.", "")


def tell(rng: np.random.Generator, scene: Scene) -> str:
    """Return the scene as three or four sentences, always with every element of it."""
    fields = {
        **vars(scene),
        "goods": join(scene.goods),
        "an_animal": a(scene.animal),
        "a_gift": a(scene.gift),
    }
    middle = [pick(rng, _BEASTS), pick(rng, _WEATHER)]
    rng.shuffle(middle)
    sentences = [pick(rng, _DEPARTURES), *middle, pick(rng, _MEETINGS)]
    return " ".join(capitalise(sentence.format(**fields)) for sentence in sentences if sentence)
