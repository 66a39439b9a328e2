"""Sentence pairs: natural language inference and paraphrase."""

from __future__ import annotations

from typing import Any

from apprentice.tasks.builtin.seeded_random import SeededRandom

NAMES = ["Ana", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kim", "Lars", "Maya", "Noah"]
# (thing, its kind)
KINDS = [
    ("poodle", "dog"), ("parrot", "bird"), ("rose bush", "plant"), ("violin", "musical instrument"), ("sofa", "piece of furniture"),
    ("canoe", "boat"), ("novel", "book"), ("ring", "piece of jewellery"), ("raincoat", "piece of clothing"), ("hammer", "tool"),
    ("van", "vehicle"), ("carp", "fish"),
]  # fmt: skip
PLACES = ["at the market", "in the old town", "at a fair", "near the harbour", "in a small shop", "at an auction"]
TIMES = ["on Monday", "on Friday", "last week", "in March", "in the morning", "after work", "yesterday", "in spring"]
COLOURS = ["black", "white", "brown", "grey", "red", "yellow"]

# (phrase, phrase with the same meaning, phrase with another meaning)
ACTS = [
    ("bought a bicycle", "purchased a bike", "repaired a bicycle"),
    ("began to cry", "burst into tears", "began to laugh"),
    ("called the doctor", "phoned the doctor", "hid from the doctor"),
    ("was very tired", "was exhausted", "was very hungry"),
    ("went home by train", "took the train home", "drove home by car"),
    ("quit the job", "resigned from the job", "was offered the job"),
    ("lost the keys", "could not find the keys any more", "found the keys"),
    ("came too late", "did not arrive on time", "arrived too early"),
    ("ate the last apple", "finished the last apple", "planted an apple tree"),
    ("was scared of the dog", "was afraid of the dog", "was fond of the dog"),
    ("fixed the roof", "repaired the roof", "fell from the roof"),
    ("fell asleep at once", "went to sleep immediately", "could not fall asleep"),
    ("passed the exam", "was successful in the exam", "failed the exam"),
    ("mailed the letter", "sent the letter by post", "burned the letter"),
    ("won the race", "came first in the race", "came last in the race"),
    ("shut the window", "closed the window", "broke the window"),
]
MOMENTS = [
    ("shortly before lunch", "just ahead of lunch", "long after lunch"),
    ("after the storm", "once the storm was over", "before the storm came"),
    ("at noon", "at twelve o'clock in the day", "in the middle of the night"),
    ("in the autumn", "in the fall", "in the spring"),
    ("the day before yesterday", "two days ago", "this morning"),
    ("two weeks ago", "fourteen days ago", "three years ago"),
]
PEOPLE = ["Ana", "Carla", "David", "Emma", "Hugo", "Jonas", "Maya", "Olga", "Petra", "Ruth"]
RELATIVES = ["sister", "neighbour", "cousin", "teacher", "aunt", "friend", "boss", "grandmother"]


def composed_inference(rng: SeededRandom, number: int) -> dict[str, Any]:
    """Row with `premise`, `hypothesis` and `label`: 0 entailment, 1 neutral, 2 contradiction."""
    label = number % 3
    buyer, seller, stranger = rng.some(NAMES, 3)
    (thing, kind), (other, _) = rng.some(KINDS, 2)
    colour, wrong = rng.some(COLOURS, 2)
    place, time = rng.one(PLACES), rng.one(TIMES)
    deal = rng.one(
        [
            f"{buyer} bought a {colour} {thing} from {seller}",
            f"{seller} sold a {colour} {thing} to {buyer}",
        ]
    )
    premise = f"{deal} {place} {time}."
    follows = [
        f"{buyer} bought a {kind}.",
        f"{seller} sold a {thing}.",
        f"{seller} sold something to {buyer}.",
        f"{buyer} got a {colour} {thing}.",
        f"A {thing} was sold {place}.",
    ]
    open_question = [
        f"{buyer} paid a high price for the {thing}.",
        f"{buyer} also has a {other}.",
        f"{seller} was sorry to see the {thing} go.",
        f"{buyer} and {seller} are old friends.",
        f"{stranger} would like the {thing} too.",
        f"{buyer} is going to give the {thing} to {stranger}.",
    ]
    cannot = [
        f"{buyer} did not buy anything.",
        f"The {thing} that {buyer} bought is {wrong}.",
        f"{seller} kept the {thing} and sold nothing.",
        f"{buyer} got nothing from {seller}.",
        f"Nobody sold a {kind}.",
    ]
    hypothesis = rng.one([follows, open_question, cannot][label])
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


def same_meaning(rng: SeededRandom, number: int) -> dict[str, Any]:
    """Row with `first`, `second` and `label`: 0 different meaning, 1 same meaning."""
    label = number % 2
    who = f"{rng.one(PEOPLE)}'s {rng.one(RELATIVES)}" if rng.below(2) else rng.one(PEOPLE)
    *acts, other_act = rng.one(ACTS)
    *moments, other_moment = rng.one(MOMENTS)
    (act, same_act), (moment, same_moment) = rng.shuffled(acts), rng.shuffled(moments)
    if rng.below(2):
        same_moment = moment
    changed = 0 if label else rng.between(1, 4)  # 1: the act, 2: the moment, 3 and 4: both
    act_again = same_act if changed in (0, 2) else other_act
    moment_again = same_moment if changed in (0, 1) else other_moment
    first = f"{who} {act} {moment}."
    second = rng.one(
        [
            f"{moment_again[0].upper()}{moment_again[1:]}, {who} {act_again}.",
            f"{who} {act_again}, and that was {moment_again}.",
            f"It was {moment_again} that {who} {act_again}.",
        ]
    )
    return {"first": first, "second": second, "label": label}
