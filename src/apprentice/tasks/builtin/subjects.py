"""Text classification: topics of headlines, and intents of requests to an assistant."""

from __future__ import annotations

from typing import Any

from apprentice.tasks.builtin.seeded_random import SeededRandom

# Topic → (who, does what, remarks that fit any of them).
HEADLINES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "sport": (
        [
            "Rovers striker", "Veteran goalkeeper", "Teenage sprinter", "Marathon champion", "National rowing crew",
            "Tennis outsider", "Cycling team captain", "Swimming coach",
        ],
        [
            "takes gold after a photo finish", "out for six weeks with a knee injury", "breaks a ten-year-old record",
            "stuns the favourites in the semi-final", "signs for two more seasons", "given a red card in the last minute",
        ],
        ["in front of a full stadium", "on the final day of the season", "as fans cheer", "despite heavy rain"],
    ),
    "business": (
        [
            "Shoe maker", "Supermarket chain", "Regional bank", "Car parts supplier", "Online retailer", "Brewery group",
            "Furniture giant", "Budget airline",
        ],
        [
            "posts higher profit than analysts expected", "cuts four hundred jobs", "buys its largest rival",
            "raises prices as costs climb", "sells shares to pay off debt", "warns of weak sales this quarter",
        ],
        ["and investors react", "for the second year running", "as interest rates rise", "after merger talks fail"],
    ),
    "science": (
        [
            "Astronomers", "Deep-sea biologists", "Physics team", "Fossil hunters", "Young chemist", "Climate researchers",
            "Space probe", "Geneticists",
        ],
        [
            "find water ice where none was expected", "measure the age of a distant galaxy", "describe a new species of squid",
            "map the genes of an ancient horse", "test a theory about black holes", "build a sensor as small as a grain of sand",
        ],
        ["in a new study", "after years of experiments", "with a powerful telescope", "and publish the data"],
    ),
    "politics": (
        [
            "Prime minister", "Opposition leader", "Parliament", "Mayor", "Foreign secretary", "Coalition partners",
            "Senate committee", "Party congress",
        ],
        [
            "calls an early election", "rejects the new tax bill", "promises a vote on the treaty",
            "survives a vote of no confidence", "demands a reform of the voting law", "agrees on a minister for housing",
        ],
        ["after a night of debate", "as polls tighten", "by a narrow majority", "under pressure from voters"],
    ),
    "food": (
        [
            "Village baker", "Star chef", "Street kitchen", "Grandmother of six", "Pastry school", "Vegan diner",
            "Cheese maker", "Noodle bar",
        ],
        [
            "shares a recipe for plum dumplings", "swears by slow-cooked beans", "puts pickled pumpkin on the menu",
            "shows how to save a split sauce", "bakes the perfect rye crust", "serves soup with roasted garlic",
        ],
        ["with only five ingredients", "just in time for autumn", "and guests ask for more", "for under three euros a plate"],
    ),
}  # fmt: skip
TOPICS = list(HEADLINES)

INTENTS = ["alarm", "music", "weather", "shopping", "directions", "message"]

DAYS = ["tomorrow", "on Monday", "on Tuesday", "on Wednesday", "on Thursday", "on Friday", "on Saturday", "on Sunday"]
PEOPLE = ["Mum", "Dad", "Nadia", "Oskar", "my boss", "Aunt Rosa", "the plumber", "Yusuf", "my teacher"]
PLACES = [
    "the station", "the airport", "Mill Street", "the city library", "the nearest pharmacy", "the football ground",
    "Hill Farm", "the harbour",
]  # fmt: skip
GOODS = ["milk", "eggs", "bread", "tomatoes", "batteries", "cat food", "soap", "coffee", "onions", "candles", "olive oil"]
SOUNDS = [
    "some jazz", "the new album by the Paper Kites", "quiet piano pieces", "something to dance to", "a song from the eighties",
    "my running playlist", "an opera", "sea shanties",
]  # fmt: skip
TOWNS = ["Oslo", "Porto", "Leeds", "Bremen", "Nairobi", "Quebec", "Osaka", "Turin", "Lima", "Perth"]


def headline_topics(rng: SeededRandom, number: int) -> dict[str, Any]:
    """Row with `headline` and `label`, the index of its topic in `TOPICS`."""
    label = number % len(TOPICS)
    who, does, remarks = HEADLINES[TOPICS[label]]
    headline = f"{rng.one(who)} {rng.one(does)} {rng.one(remarks)}"
    return {"headline": headline, "label": label}


def assistant_requests(rng: SeededRandom, number: int) -> dict[str, Any]:
    """Row with `request`, to a voice assistant, and `label`, the index of its intent in `INTENTS`."""
    label = number % len(INTENTS)
    day, hour = rng.one(DAYS), f"{rng.between(5, 11)}:{rng.one(['00', '15', '30', '45'])}"
    first, second = rng.some(GOODS, 2)
    place, person, sound, town = rng.one(PLACES), rng.one(PEOPLE), rng.one(SOUNDS), rng.one(TOWNS)
    request = rng.one(
        {
            "alarm": [
                f"Wake me at {hour} {day}.",
                f"I have to be up by {hour} {day}, make sure I am.",
                f"Don't let me sleep past {hour} {day}.",
                f"Ring me out of bed {day} at {hour}.",
            ],
            "music": [
                f"Put on {sound} while I cook for {person}.",
                f"I would like to hear {sound} on the way to {place}.",
                f"Let's have {sound}, {person} likes that.",
                f"Could we listen to {sound} until {hour}?",
            ],
            "weather": [
                f"Will I need an umbrella in {town} {day}?",
                f"How cold does it get in {town} {day}?",
                f"Is it going to be sunny {day} in {town}?",
                f"Any snow expected around {town} {day}?",
            ],
            "shopping": [
                f"We are out of {first} and {second}.",
                f"Write down {first} and {second}, I am going to the store {day}.",
                f"Note that I have to buy {first} and {second} for {person}.",
                f"Put {first} and {second} on the list.",
            ],
            "directions": [
                f"How do I get to {place} from here before {hour}?",
                f"Which way is it to {place}, I am meeting {person} there.",
                f"Take me to {place} and avoid the motorway, {person} is waiting.",
                f"Find the quickest route to {place} for {day}.",
            ],
            "message": [
                f"Tell {person} I'll be at {place} {day}.",
                f"Let {person} know that I am running late, not before {hour}.",
                f"Text {person} that dinner is at {hour} {day}.",
                f"Ask {person} whether {day} still suits, at {place}.",
            ],
        }[INTENTS[label]]
    )
    return {"request": request, "label": label}
