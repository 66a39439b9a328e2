"""Common knowledge of everyday words: which of four words is of the kind asked for."""

from __future__ import annotations

from typing import Any

from apprentice.tasks.builtin.seeded_random import SeededRandom

KINDS: dict[str, list[str]] = {
    "kind of animal": ["dog", "horse", "rabbit", "lion", "sheep", "monkey", "bear", "goat", "wolf", "camel"],
    "fruit": ["apple", "banana", "cherry", "grape", "lemon", "peach", "pear", "plum", "mango", "melon"],
    "piece of clothing": ["shirt", "coat", "sock", "glove", "dress", "scarf", "jacket", "skirt", "belt", "sweater"],
    "vehicle": ["car", "bus", "train", "truck", "tram", "bicycle", "taxi", "tractor", "ferry", "van"],
    "piece of furniture": ["table", "chair", "bed", "sofa", "desk", "shelf", "wardrobe", "stool", "bench", "cupboard"],
    "part of the body": ["arm", "knee", "nose", "ear", "finger", "shoulder", "foot", "elbow", "chin", "neck"],
    "tool": ["hammer", "saw", "drill", "screwdriver", "axe", "pliers", "spade", "chisel", "rake", "wrench"],
    "kind of weather": ["rain", "snow", "wind", "fog", "storm", "hail", "frost", "thunder", "sunshine", "drizzle"],
    "job": ["doctor", "baker", "teacher", "farmer", "pilot", "nurse", "lawyer", "painter", "plumber", "judge"],
    "colour": ["red", "blue", "green", "yellow", "purple", "brown", "black", "white", "grey", "pink"],
    "musical instrument": ["piano", "violin", "flute", "trumpet", "guitar", "drum", "harp", "cello", "banjo", "clarinet"],
    "feeling": ["joy", "anger", "fear", "pride", "shame", "envy", "sadness", "hope", "grief", "love"],
}


def one_of_a_kind(rng: SeededRandom, number: int) -> dict[str, Any]:
    """Row with `words`, four of different kinds; `kind`; and `label`, the index of the word of that kind."""
    label = number % 4
    kinds = rng.some(list(KINDS), 4)
    return {"words": [rng.one(KINDS[kind]) for kind in kinds], "kind": kinds[label], "label": label}
