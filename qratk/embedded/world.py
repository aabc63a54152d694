"""A small invented world: its facts, its text for pre-training, and a task that composes facts.

Everything here is a pure function of a seed; nothing touches the global random state. Pre-training
text states single facts (``Loki lives in Norton.``), stories and sums. The fine-tuning task tells
of an exchange that no text speaks of, in words that texts use, and asks for a fact of the one whom
the sentence makes the host; the fact of the other, the guest, is among the wrong choices::

    Mesen lives in the home of Loki.
    What is the town? Norton

So a model has to learn the new sentences, find the host and recall a single fact that it has seen.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]

WORLD_SEED = 7
"""The seed of the world that the committed model was trained on."""

CHOICES = 4
PEOPLE = 240
SPLIT_PEOPLE: Mapping[Split, int] = {"train": 144, "validation": 40, "test": 56}
ROWS_PER_HOST: Mapping[Split, int] = {"train": 5, "validation": 2, "test": 3}
"""How often a person is the host in each kind of meeting."""

_KINDS = {
    "bird": ("hen", "owl", "crow", "duck"),
    "beast": ("wolf", "bear", "fox", "lion"),
    "fish": ("carp", "pike", "eel", "trout"),
    "insect": ("bee", "ant", "moth", "wasp"),
    "reptile": ("lizard", "snake", "turtle", "gecko"),
    "rodent": ("mouse", "rat", "beaver", "hamster"),
}
_LANDS = {
    "Norland": ("Aldby", "Fernby", "Oxby", "Tunby"),
    "Sudmark": ("Redwick", "Samwick", "Berwick", "Lenwick"),
    "Ostria": ("Holford", "Milford", "Ashford", "Wexford"),
    "Velden": ("Cardon", "Weldon", "Hindon", "Brandon"),
    "Kronia": ("Salton", "Norton", "Dalton", "Burton"),
    "Ilmare": ("Windham", "Oakham", "Durham", "Markham"),
}
_COLOURS = {
    "red": ("cherries", "tomatoes", "beets", "radishes"),
    "green": ("peas", "limes", "spinach", "lettuce"),
    "yellow": ("bananas", "lemons", "corn", "honey"),
    "white": ("rice", "milk", "salt", "flour"),
    "brown": ("bread", "nuts", "cocoa", "gravy"),
    "purple": ("plums", "grapes", "figs", "olives"),
}
_TOOLS = {
    "hammer": ("smith", "joiner", "mason", "roofer"),
    "needle": ("tailor", "nurse", "saddler", "weaver"),
    "knife": ("cook", "butcher", "carver", "hunter"),
    "pen": ("writer", "judge", "teacher", "clerk"),
    "spade": ("gardener", "farmer", "miner", "digger"),
    "rope": ("sailor", "climber", "shepherd", "fisher"),
}
_SPARE_TEXT = (
    "visits invites hosts buys sells cooks teaches learns guest table they now get gets from for "
    "with to swap swaps meets helps follows shows trades leads trip taken it pet meal trade here"
)
SPARE_WORDS = tuple(_SPARE_TEXT.split())
"""Whole words of the tokenizer that no document and no question uses: room for other tasks."""

_ITEMS = ("lamp", "coin", "drum", "book", "ring", "bell", "cup", "key", "box", "map")
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen"
)
_WORDS = tuple(_NUMBERS.split())
_STARTS = tuple(c + v for c in "BDFGHKLMNPRSTVZ" for v in "aeiou")
_ENDS = tuple(c + v for c in ("d", "k", "l", "m", "n", "r", "s", "v") for v in ("a", "i", "o", "en"))


@dataclass(frozen=True)
class Person:
    """One person and the single facts that pre-training text states about them."""

    name: str
    town: str
    animal: str
    food: str
    job: str
    age: int
    friend: str


@dataclass(frozen=True)
class World:
    """All people, and what each animal, town, food and job belongs to."""

    people: tuple[Person, ...]
    kinds: Mapping[str, str]
    lands: Mapping[str, str]
    colours: Mapping[str, str]
    tools: Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """One multiple-choice question; ``label`` is the index of the right choice."""

    id: str
    context: str
    question: str
    choices: tuple[str, ...]
    label: int

    def as_dict(self) -> dict[str, object]:
        """The row as plain data, ready for one line of JSON."""
        return {
            "id": self.id,
            "context": self.context,
            "question": self.question,
            "choices": list(self.choices),
            "label": self.label,
        }


def _inverted(groups: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """A map from each member to its group."""
    return {member: group for group, members in groups.items() for member in members}


def _balanced(values: list[str], count: int, rng: random.Random) -> list[str]:
    """``count`` values in random order, each about equally often."""
    drawn = [values[i % len(values)] for i in range(count)]
    rng.shuffle(drawn)
    return drawn


def make_world(seed: int = WORLD_SEED, people: int = PEOPLE) -> World:
    """The world of this seed."""
    possible = len(_STARTS) * len(_ENDS)
    if not 2 <= people <= possible:
        raise ValueError(
            f"people={people} was given, but a world holds 2 to {possible} people: choose a number in that range."
        )
    rng = random.Random(seed)
    kinds, lands, colours, tools = map(_inverted, (_KINDS, _LANDS, _COLOURS, _TOOLS))
    names = rng.sample([start + end for start in _STARTS for end in _ENDS], people)
    facts = [_balanced(list(g), people, rng) for g in (lands, kinds, colours, tools)]
    friends = names[1:] + names[:1]
    inhabitants = tuple(
        Person(name, town, animal, food, job, rng.randint(11, 60), friend)
        for name, town, animal, food, job, friend in zip(names, *facts, friends, strict=True)
    )
    return World(inhabitants, kinds, lands, colours, tools)


# --- text for pre-training ---------------------------------------------------------------------

_STATEMENTS: tuple[tuple[str, ...], ...] = (
    ("{name} lives in {town}.", "The home of {name} is in {town}."),
    ("{name} owns a {animal}.", "The animal of {name} is a {animal}."),
    ("{name} likes {food}.", "{name} often eats {food}."),
    ("{name} works as a {job}.", "The job of {name} is {job}."),
    ("{name} is {age} years old.", "The age of {name} is {age}."),
    ("{name} is a friend of {friend}.", "The friend of {name} is {friend}."),
)
_QUESTIONS: tuple[str, ...] = (
    "In which town does {name} live? {town}.",
    "What animal does {name} own? {animal}.",
    "What food does {name} like? {food}.",
    "What job does {name} have? {job}.",
    "How old is {name}? {age}.",
    "Who is the friend of {name}? {friend}.",
)


def _profile(world: World, rng: random.Random) -> str:
    """Several facts about one person."""
    facts = asdict(rng.choice(world.people))
    chosen = rng.sample(_STATEMENTS, rng.randint(3, 6))
    return " ".join(rng.choice(forms).format(**facts) for forms in chosen)


def _questions(world: World, rng: random.Random) -> str:
    """Single-fact questions about several people, with answers."""
    people = rng.sample(world.people, 4)
    return " ".join(rng.choice(_QUESTIONS).format(**asdict(person)) for person in people)


def _groups(world: World, rng: random.Random) -> str:
    """Facts about animals, towns, foods and jobs; no person in sight."""
    return " ".join(_one_group(world, rng) for _ in range(4))


def _one_group(world: World, rng: random.Random) -> str:
    """One statement or question of what belongs to what."""
    table, forms = rng.choice(
        (
            (world.kinds, ("A {0} is a kind of {1}.", "What kind of animal is a {0}? {1}.")),
            (world.lands, ("{0} is a town in {1}.", "In which land is {0}? {1}.")),
            (world.colours, ("The colour of {0} is {1}.", "What colour has {0}? {1}.")),
            (world.tools, ("The tool of a {0} is the {1}.", "Which tool has a {0}? {1}.")),
        )
    )
    return rng.choice(forms).format(*rng.choice(list(table.items())))


def _sums(world: World, rng: random.Random) -> str:
    """Sums of small numbers in digits and in words."""
    return " ".join(_one_sum(rng) for _ in range(4))


def _one_sum(rng: random.Random) -> str:
    """One sum."""
    if rng.random() < 0.2:
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        return f"{_WORDS[a]} plus {_WORDS[b]} is {_WORDS[a + b]}.".capitalize()
    a, b = rng.randint(11, 60), rng.randint(1, 9)
    return rng.choice(("The sum {} + {} is {}.", "How much is {} + {}? {}.")).format(a, b, a + b)


def _gift(world: World, rng: random.Random) -> str:
    """A short story: two things change hands, then a question."""
    first, second, third = (person.name for person in rng.sample(world.people, 3))
    one, two = rng.sample(_ITEMS, 2)
    holder = {one: second, two: third}
    asked = rng.choice((one, two))
    return (
        f"{first} has a {one} and a {two}. {first} gives the {one} to {second}. "
        f"Then {first} gives the {two} to {third}. Who has the {asked}? {holder[asked]}."
    )


def _hoard(world: World, rng: random.Random) -> str:
    """A short story: somebody finds more of a thing."""
    name, item = rng.choice(world.people).name, rng.choice(_ITEMS)
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return f"{name} has {a} {item}s. Then {name} finds {b} {item}s. Now {name} has {a + b} {item}s."


_DOCUMENTS: tuple[tuple[float, Callable[[World, random.Random], str]], ...] = (
    (0.34, _profile),
    (0.38, _questions),
    (0.12, _groups),
    (0.08, _sums),
    (0.04, _gift),
    (0.04, _hoard),
)


def documents(world: World, seed: int) -> Iterator[str]:
    """An endless stream of documents for pre-training, one line each."""
    rng = random.Random(seed)
    weights, makers = zip(*_DOCUMENTS, strict=True)
    while True:
        yield rng.choices(makers, weights)[0](world, rng)


# --- the fine-tuning task ----------------------------------------------------------------------


def split_people(world: World, split: Split, seed: int) -> tuple[Person, ...]:
    """The people whom this split asks about; no two splits share one."""
    if split not in SPLIT_PEOPLE:
        raise ValueError(f"split={split!r} was given; choose one of {', '.join(SPLIT_PEOPLE)}.")
    order = random.Random(seed).sample(world.people, len(world.people))
    start = 0
    for name, share in SPLIT_PEOPLE.items():
        count = share * len(order) // sum(SPLIT_PEOPLE.values())
        if name == split:
            return tuple(order[start : start + count])
        start += count
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class _Draft:
    """A question before its choices are put in order."""

    topic: str
    context: str
    question: str
    right: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class _Meeting:
    """A kind of meeting: the answer is a fact of the host, whom the verb singles out."""

    topic: str
    fact: str
    stories: tuple[str, ...]
    question: str


_MEETINGS = (
    _Meeting(
        "home",
        "town",
        ("{guest} lives in the home of {host}.", "{host} gives the home to {guest}."),
        "What is the town?",
    ),
    _Meeting(
        "animal",
        "animal",
        ("{guest} finds the animal of {host}.", "{host} gives the animal to {guest}."),
        "What is the animal?",
    ),
    _Meeting(
        "food",
        "food",
        ("{guest} eats the food of {host}.", "{host} gives the food to {guest}."),
        "What is the food?",
    ),
    _Meeting(
        "job",
        "job",
        ("{guest} has the job of {host}.", "{host} gives the job to {guest}."),
        "What is the job?",
    ),
)


def _meeting(values: set[str], meeting: _Meeting, guest: Person, host: Person, rng: random.Random) -> _Draft:
    """A question on one meeting, given all values of its fact; the guest's own is among the wrong choices."""
    right, lure = getattr(host, meeting.fact), getattr(guest, meeting.fact)
    others = rng.sample(sorted(values - {right, lure}), CHOICES - 2)
    context = rng.choice(meeting.stories).format(guest=guest.name, host=host.name)
    question = meeting.question.format(guest=guest.name, host=host.name)
    return _Draft(meeting.topic, context, question, right, (lure, *others))


def _drafts(world: World, split: Split, seed: int) -> list[_Draft]:
    """The questions of a split in random order; every person is host equally often."""
    people = split_people(world, split, seed)
    rng = random.Random(f"{split}-{seed}")
    values = {meeting.fact: {getattr(person, meeting.fact) for person in world.people} for meeting in _MEETINGS}
    drafts = []
    for host in people:
        for meeting in _MEETINGS:
            fact = getattr(host, meeting.fact)
            guests = [p for p in people if getattr(p, meeting.fact) != fact]
            for guest in rng.sample(guests, ROWS_PER_HOST[split]):
                drafts.append(_meeting(values[meeting.fact], meeting, guest, host, rng))
    rng.shuffle(drafts)
    return drafts


def fine_tuning_rows(world: World, split: Split, seed: int = 0) -> list[Row]:
    """The rows of one split; right answers are spread evenly over the positions."""
    rng = random.Random(f"choices-{split}-{seed}")
    drafts = _drafts(world, split, seed)
    labels = [index % CHOICES for index in range(len(drafts))]
    rng.shuffle(labels)
    rows = []
    for index, (draft, label) in enumerate(zip(drafts, labels, strict=True)):
        choices = rng.sample(draft.wrong, len(draft.wrong))
        choices.insert(label, draft.right)
        name = f"{split}-{index:04d}-{draft.topic}"
        rows.append(Row(name, draft.context, draft.question, tuple(choices), label))
    return rows
