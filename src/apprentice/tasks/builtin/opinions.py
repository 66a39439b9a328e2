"""Sentiment and emotion: reviews of things, and messages from friends.

A review often names a good and a bad side, or denies one, so that single words do not give its label away.
"""

from __future__ import annotations

from typing import Any

from apprentice.tasks.builtin.seeded_random import SeededRandom

# Kind of thing → (things, their aspects, words of praise, words of blame).
REVIEWED: dict[str, tuple[list[str], list[str], list[str], list[str]]] = {
    "story": (
        ["film", "series", "play", "novel", "short story"],
        ["plot", "dialogue", "ending", "opening", "main character", "humour"],
        ["gripping", "moving", "witty", "clever", "believable", "original", "charming"],
        ["dull", "clumsy", "predictable", "confusing", "shallow", "tiresome", "lifeless"],
    ),
    "stay": (
        ["hotel", "guest house", "campsite", "hostel", "holiday flat"],
        ["breakfast", "staff", "location", "shower", "view", "bed"],
        ["excellent", "delightful", "lovely", "impressive", "wonderful", "pleasant"],
        ["awful", "disappointing", "miserable", "poor", "dreadful", "shabby"],
    ),
    "purchase": (
        ["phone", "kettle", "vacuum cleaner", "printer", "rucksack", "desk lamp"],
        ["build quality", "design", "manual", "price", "customer service", "finish"],
        ["superb", "sensible", "great", "outstanding", "thoughtful", "very good"],
        ["terrible", "careless", "bad", "ridiculous", "useless", "very weak"],
    ),
}

# Closing remarks by label: blame, praise.
VERDICTS: list[list[str]] = [
    ["Save your money.", "I regret choosing it.", "Never again.", "I would warn my friends.", "A waste of time."],
    ["Worth every penny.", "I am glad I chose it.", "I would choose it again.", "I told all my friends.", "Time well spent."],
]

MOODS = ["joy", "sadness", "anger", "fear"]

EVENTS: dict[str, list[str]] = {
    "joy": [
        "my sister has just had her baby",
        "I got the job after all",
        "we won the final",
        "my painting was picked for the exhibition",
        "the doctors say grandpa is completely well again",
        "Tom asked me to marry him",
        "we are finally off to the seaside tomorrow",
        "I passed my driving test at the first try",
        "the whole class sang for my birthday",
        "our little garden is full of flowers",
    ],
    "sadness": [
        "our old dog died last night",
        "my best friend is moving to the other side of the world",
        "today would have been mum's birthday",
        "they are closing the bookshop where we met",
        "nobody came to say goodbye",
        "the doctor could not save the foal",
        "we had to sell grandma's house",
        "my daughter left home this morning",
        "he took his things and left the key on the table",
        "I found the last letter my father wrote",
    ],
    "anger": [
        "the neighbour has blocked our gate again",
        "they charged me twice and refuse to pay it back",
        "somebody read my diary and joked about it",
        "my boss took the credit for my work",
        "he lied to all of us, and not for the first time",
        "the landlord kept the whole deposit",
        "a man pushed an old lady out of the queue",
        "they cut down the tree without asking anyone",
        "she broke my camera and simply walked off",
        "the airline cancelled our flight and then hung up on me",
    ],
    "fear": [
        "there are footsteps outside my tent",
        "the plane is shaking badly",
        "someone has been following me since the station",
        "the ice is cracking under us",
        "the lift stopped and the light went out",
        "the doctor wants to see me at once and will not say why",
        "the water is still rising and we are on the roof",
        "a huge dog is standing right in front of me",
        "something is scratching at the cellar door",
        "the brakes of the bus do not seem to work",
    ],
}

REACTIONS: dict[str, list[str]] = {
    "joy": [
        "I can't stop smiling",
        "I could hug the whole street",
        "I danced around the kitchen",
        "what a perfect day",
        "we are opening a bottle tonight",
        "I feel ten feet tall",
    ],
    "sadness": [
        "I cried all the way home",
        "everything feels so empty",
        "I miss the old days so much",
        "I just want to lie in bed",
        "my heart is heavy",
        "I don't feel like talking",
    ],
    "anger": [
        "I slammed the door so hard that it cracked",
        "I will not put up with this",
        "how dare they",
        "I am boiling",
        "I could scream at them",
        "somebody will hear from my lawyer",
    ],
    "fear": [
        "my hands won't stop trembling",
        "I hardly dare to breathe",
        "please come quickly",
        "my heart is pounding",
        "I don't know if I will get out of this",
        "I have never felt so helpless",
    ],
}


def short_reviews(rng: SeededRandom, number: int) -> dict[str, Any]:
    """Row with `review`, the `thing` it is about, and `label`: 0 blame, 1 praise."""
    label = number % 2
    things, sides, praise, blame = REVIEWED[rng.one(list(REVIEWED))]
    says, denies = (praise, blame) if label else (blame, praise)
    thing = rng.one(things)
    side, other = rng.some(sides, 2)
    word, also = rng.some(says, 2)
    against = rng.one(denies)
    review = rng.one(
        [
            f"The {side} of this {thing} is {word}, and the {other} is {also}.",
            f"I expected the {other} to be {against}, but the {thing} turned out {word}, above all the {side}.",
            f"People had told me that the {thing} was {against}. They were wrong: the {side} is {word} and the {other} {also}.",
            f"The {other} of the {thing} may be {against}. Still, the {side} is so {word} that nothing else matters.",
            f"There is nothing {against} about this {thing}: the {side} is {word} and the {other} {also}.",
            f"Not one thing about the {side} of this {thing} is {against}. It is {word}.",
            f"This {thing} is {word}, and the {side} is {also} too. Only the {other} is {against}.",
        ]
    )
    if rng.below(3) == 0:
        review = f"{review} {rng.one(VERDICTS[label])}"
    return {"review": review, "thing": thing, "label": label}


def message_moods(rng: SeededRandom, number: int) -> dict[str, Any]:
    """Row with `message` and `label`, the index of its emotion in `MOODS`."""
    label = number % len(MOODS)
    mood = MOODS[label]
    event, reaction = rng.one(EVENTS[mood]), rng.one(REACTIONS[mood])
    greeting = rng.one(["", "", "Hi Lena, ", "Hello you, ", "Listen, ", "You won't believe it: ", "News from here: "])
    message = rng.one(
        [
            f"{greeting}{event}. {_capital(reaction)}.",
            f"{greeting}{event}, and {reaction}.",
            f"{_capital(reaction)}. {_capital(event)}.",
            f"{greeting}{event}. {_capital(reaction)}. More later.",
            f"{greeting}{event}! {_capital(reaction)}!",
        ]
    )
    return {"message": _capital(message), "label": label}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
