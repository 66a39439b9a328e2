"""Reading comprehension on short invented passages, and shop records to be written as sentences."""

from __future__ import annotations

from typing import Any

from apprentice.tasks.builtin.seeded_random import SeededRandom

FIRST = ["Marta", "Ivan", "Leila", "Peter", "Sanna", "Diego", "Wanda", "Amir", "Clara", "Felix", "Noor", "Edgar"]
LAST = ["Silva", "Novak", "Haddad", "Lind", "Okafor", "Brandt", "Moreau", "Castillo", "Reid", "Tanaka", "Kovacs", "Doyle"]
JOBS = ["a retired sailor", "a schoolteacher", "a blacksmith", "a young nurse", "a former dancer", "a mathematician", "a beekeeper"]
TOWNS = ["Norham", "Velda", "Port Amsel", "Grimsund", "Castellar", "Lower Birk", "Santa Rina", "Ostrava Hill", "Weldon", "Karsk"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
]  # fmt: skip
ADJECTIVES = ["wooden", "copper", "painted", "ancient", "tiny", "broken", "silver", "green"]
TREASURES = ["globe", "mask", "clock", "flute", "map", "lantern", "sword", "chess set"]
DISHES = ["fish soup", "walnut bread", "plum cake", "onion tart", "goat cheese", "lentil stew", "honey biscuits"]
ANIMALS = ["goat", "white owl", "fox", "pony", "otter", "swan", "hedgehog", "raven"]

GOODS = [
    "kettle", "lamp", "chair", "rucksack", "vase", "scarf", "bicycle", "teapot", "carpet", "umbrella", "notebook", "mirror",
    "clock",
]  # fmt: skip
COLOURS = ["red", "blue", "green", "black", "white", "yellow", "grey", "purple"]
# Value of the record's `stock` → its words in the sentence.
STOCK = {"none": "is sold out", "few": "is nearly gone", "many": "can be had at once", "ordered": "will be back soon"}


def passage_questions(rng: SeededRandom, number: int) -> dict[str, Any]:
    """Row with `passage`, `question` and `answer`, which is a span of the passage."""
    person, other = (f"{first} {last}" for first, last in zip(rng.some(FIRST, 2), rng.some(LAST, 2), strict=True))
    town, elsewhere = rng.some(TOWNS, 2)
    year, job = str(rng.between(1801, 1999)), rng.one(JOBS)
    thing = f"{rng.one(ADJECTIVES)} {rng.one(TREASURES)}"
    dish, animal, month = rng.one(DISHES), rng.one(ANIMALS), rng.one(MONTHS)
    passage, questions = rng.one(
        [
            (
                f"The museum of {town} opened in {year}. It was founded by {person}, {job} from {elsewhere}. "
                f"Its best known piece is {_a(thing)}, a gift of {other}.",
                [
                    ("Who founded the museum?", person),
                    ("In which year did the museum open?", year),
                    ("What is the best known piece?", thing),
                    ("Who gave the best known piece?", other),
                    ("Where did the founder come from?", elsewhere),
                ],
            ),
            (
                f"Every {month}, the people of {town} hold a feast. They cook {dish} and elect a judge, "
                f"most recently {person}, {job}. The custom began in {year}, when {_a(animal)} saved the village.",
                [
                    ("In which month is the feast?", month),
                    ("What do the people cook?", dish),
                    ("Who was the most recent judge?", person),
                    ("When did the custom begin?", year),
                    ("Which animal saved the village?", animal),
                ],
            ),
            (
                f"In {month} {year}, {person} lost {_a(thing)} on the road to {town}. "
                f"It was found under a bridge by {other}, {job}, who asked for nothing but some {dish}.",
                [
                    ("Who lost something?", person),
                    ("What was lost?", thing),
                    ("Who found it?", other),
                    ("What did the finder ask for?", dish),
                    ("Where did the road lead?", town),
                ],
            ),
            (
                f"{person} was born in {elsewhere} and moved to {town} in {year}. There, with {other}, "
                f"{job}, a small inn was opened that is known for its {dish} and for {_a(animal)} that sleeps by the door.",
                [
                    ("Where was the first person born?", elsewhere),
                    ("Which town was the move to?", town),
                    ("With whom was the inn opened?", other),
                    ("What food is the inn known for?", dish),
                    ("What animal sleeps by the door?", animal),
                ],
            ),
        ]
    )
    question, answer = questions[number % len(questions)]
    return {"passage": passage, "question": question, "answer": answer}


def product_sentences(rng: SeededRandom, number: int) -> dict[str, Any]:
    """Row with `record`, the keys and values of a shop item, and `sentence`, which says the same in words."""
    goods, colour, price = rng.one(GOODS), rng.one(COLOURS), rng.between(5, 99)
    stock = list(STOCK)[number % len(STOCK)]
    record = "; ".join(rng.shuffled([f"item: {goods}", f"colour: {colour}", f"price: {price}", f"stock: {stock}"]))
    return {"record": record, "sentence": f"The {colour} {goods} costs {price} euros and {STOCK[stock]}."}


def _a(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
