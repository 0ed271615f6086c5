"""The built-in corpus: short generated tasks of several kinds, so that demo and tests need no network.

Every record is a pure function of (seed, category, number) and holds no one else's text. Answers are right by
construction. Two of the kinds follow a convention of the house (which team gets which colour, which priority which
word) that no model can know beforehand: they show learning, not recall.
"""

import random
from collections.abc import Callable, Sequence

from fedmezo.data.records import Record
from fedmezo.errors import DataError
from fedmezo.zo.noise import derive_seed

__all__ = ["CATEGORIES", "CHOICE_CATEGORIES", "skills"]

_NAMES = (
    "Anna Ben Carla David Elena Felix Grace Hugo Ines Jonas Karin Leo Mara Nils Olga Paul Rosa Simon Tara Uwe Vera "
    "Walter Yara Zeno Alma Bruno Clara Dora Emil Frida Georg Hanna"
).split()
_SURNAMES = (
    "Adler Brook Castle Dale Ellis Forest Grant Hill Iver Jones Kent Lane Moore North Olsen Page Quinn "
    "Reed Stone Turner Upton Vale Wells York Zander Baker Cole Dean Flint Harris"
).split()
_CITIES = "Oslo Rome Lima Cairo Delhi Paris Perth Quito Seoul Tunis Vienna Dublin Havana Lisbon Nairobi Prague".split()
_ANIMALS = (
    "horse rabbit eagle salmon tiger beetle goose donkey lizard otter badger sparrow camel wolf shark mouse".split()
)
_FOODS = "bread cheese apple soup rice carrot butter honey noodle pepper onion yoghurt cake bean pear biscuit".split()
_TOOLS = "hammer saw ladder wrench drill shovel needle brush chisel rake pliers scissors axe file broom clamp".split()
_THINGS = (
    "kettle lamp chair radio jacket clock camera blanket printer bicycle suitcase mirror toaster tent desk phone"
).split()
_MONTHS = "January February March April May June July August September October November December".split()

_PARCEL = (
    "My parcel with the {thing} has not arrived.", "The courier left the {thing} at the wrong door.",
    "When will the {thing} be delivered to {city}?", "The box was open and the {thing} is broken.",
    "Tracking says the {thing} is still in {city}.", "I moved to {city}, please send the {thing} there.",
)  # fmt: skip
_MONEY = (
    "I was charged twice for the {thing}.", "The invoice for the {thing} shows the wrong price.",
    "Please refund the {amount} dollars I paid.", "My card was declined when I paid for the {thing}.",
    "Why is there a fee of {amount} dollars on my bill?", "I need a receipt for the {thing} for my taxes.",
)  # fmt: skip
_LOGIN = (
    "I forgot my password and cannot log in.", "The app says my account {name} is locked.",
    "I get no code by mail when I sign in.", "Please change the email address of my account to {name}.",
    "Someone in {city} logged in to my account.", "The login page stays blank since {month}.",
)  # fmt: skip
_PRAISE = ("works perfectly", "is a joy to use", "looks lovely", "feels solid", "was worth every cent", "arrived early")
_BLAME = ("broke after a day", "is far too loud", "smells awful", "feels cheap", "was a waste of money", "never worked")
_EASY = ("whenever you have time", "no hurry at all", "some day next month", "it can wait", "just a small wish")
_HASTE = ("right now", "before noon today", "we cannot work", "all customers are waiting", "this is an emergency")


def _pick(rng: random.Random, text: str) -> str:
    return text.format(
        thing=rng.choice(_THINGS), city=rng.choice(_CITIES), amount=rng.randrange(5, 400), name=rng.choice(_NAMES),
        month=rng.choice(_MONTHS),
    )  # fmt: skip


def _routing(rng: random.Random) -> Record:
    team, texts = rng.choice((("green", _PARCEL), ("blue", _MONEY), ("red", _LOGIN)))
    opening = rng.choice(("Hello, ", "Hi, ", "", "", f"This is {rng.choice(_NAMES)}. "))
    text = opening + _pick(rng, rng.choice(texts))
    return Record("Which team answers this message?", text, team, choices=("green", "blue", "red"))


def _priority(rng: random.Random) -> Record:
    word, ends = rng.choice((("apple", _HASTE), ("lemon", _EASY)))
    wish = rng.choice(("repair", "check", "replace", "clean", "move", "test"))
    text = f"Please {wish} the {rng.choice(_THINGS)} in {rng.choice(_CITIES)}, {rng.choice(ends)}."
    return Record("Give the priority word of this request.", text, word, choices=("apple", "lemon"))


def _sentiment(rng: random.Random) -> Record:
    label, main, other = rng.choice((("good", _PRAISE, _BLAME), ("bad", _BLAME, _PRAISE)))
    text = f"The {rng.choice(_THINGS)} {rng.choice(main)}"
    if rng.random() < 0.5:
        text += f" and {rng.choice(main)}"
    if rng.random() < 0.3:
        aside, thing = f"My {rng.choice(_THINGS)} {rng.choice(other)}", rng.choice(_THINGS)
        text = f"{aside}, but the {thing} I review here {rng.choice(main)}"
    return Record("Is this review good or bad?", f"{text}.", label, choices=("good", "bad"))


def _kind(rng: random.Random) -> Record:
    label, words = rng.choice((("animal", _ANIMALS), ("food", _FOODS), ("tool", _TOOLS)))
    place = rng.choice(("the yard", "the picture", "my bag", "the story", "the list", "the corner"))
    text = f"{rng.choice(_NAMES)} saw a {rng.choice(words)} in {place}."
    return Record("What was seen: animal, food or tool?", text, label, choices=("animal", "food", "tool"))


def _compare(rng: random.Random) -> Record:
    one, other = rng.sample(range(2, 99), 2)
    first, second = rng.sample(_NAMES, 2)
    noun = rng.choice(("coins", "books", "keys", "stamps"))
    text = f"{first} has {one} {noun}, {second} has {other} {noun}."
    return Record("Who has more, the first or the second?", text, "first" if one > other else "second",
                  choices=("first", "second"))  # fmt: skip


def _follows(rng: random.Random) -> Record:
    a, b, c = rng.sample(_NAMES, 3)
    word = rng.choice(("taller", "older", "faster"))
    true = rng.random() < 0.5
    claim = (a, c) if true else (c, a)
    text = f"{a} is {word} than {b}. {b} is {word} than {c}. Is {claim[0]} {word} than {claim[1]}?"
    return Record("Answer yes or no.", text, "yes" if true else "no", choices=("yes", "no"))


def _initials(rng: random.Random) -> Record:
    first, middle = rng.sample(_NAMES, 2)
    last = rng.choice(_SURNAMES)
    return Record("Write the initials.", f"{first} {middle} {last}", f"{first[0]}. {middle[0]}. {last[0]}.")


def _sorting(rng: random.Random) -> Record:
    words = rng.sample(_ANIMALS + _FOODS + _TOOLS, 3)
    return Record("Put the words in alphabetical order.", ", ".join(words), ", ".join(sorted(words)))


def _extract(rng: random.Random) -> Record:
    amount, name, city = rng.randrange(5, 990), rng.choice(_NAMES), rng.choice(_CITIES)
    day, month, thing = rng.randrange(1, 29), rng.choice(_MONTHS), rng.choice(_THINGS)
    text = f"On {day} {month} {name} paid {amount} dollars in {city} for a {thing}."
    what, answer = rng.choice(
        (("amount", f"{amount} dollars"), ("city", city), ("date", f"{day} {month}"), ("buyer", name))
    )
    return Record(f"Find the {what}.", text, answer)


def _pairs(rng: random.Random) -> Record:
    names, things = rng.sample(_NAMES, 3), rng.sample(_THINGS, 3)
    text = "; ".join(f"{name}: {thing}" for name, thing in zip(names, things, strict=True))
    at = rng.randrange(3)
    return Record(f"What does {names[at]} have?", text, things[at])


def _reverse(rng: random.Random) -> Record:
    words = rng.sample(_ANIMALS + _THINGS, rng.randrange(2, 5))
    return Record("Write the words in reverse order.", " ".join(words), " ".join(reversed(words)))


_MAKERS: dict[str, Callable[[random.Random], Record]] = {
    "routing": _routing,
    "priority": _priority,
    "sentiment": _sentiment,
    "kind": _kind,
    "compare": _compare,
    "follows": _follows,
    "initials": _initials,
    "sorting": _sorting,
    "extract": _extract,
    "pairs": _pairs,
    "reverse": _reverse,
}
CATEGORIES = tuple(_MAKERS)
CHOICE_CATEGORIES = ("routing", "priority", "sentiment", "kind", "compare", "follows")


def skills(*, count: int, seed: int, categories: Sequence[str] | None = None) -> list[Record]:
    """Returns `count` records, the categories in turn; the first n records do not depend on `count`.

    Args:
      count: number of records.
      seed: names the draw.
      categories: some of `CATEGORIES`; None for all.

    Raises:
      DataError: an unknown category, or none.
    """
    wanted = tuple(categories) if categories is not None else CATEGORIES
    unknown = [name for name in wanted if name not in _MAKERS]
    if unknown or not wanted:
        raise DataError(
            f"Unknown category '{', '.join(unknown)}' of builtin:skills; choose from {', '.join(CATEGORIES)}."
        )
    records = []
    for number in range(count):
        category = wanted[number % len(wanted)]
        made = _MAKERS[category](random.Random(derive_seed("skills", seed, category, number // len(wanted))))
        records.append(Record(made.instruction, made.input, made.output, category, made.choices))
    return records
