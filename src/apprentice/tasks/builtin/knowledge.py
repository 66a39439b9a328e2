"""What everybody knows about everyday words: which of four does not belong."""

from __future__ import annotations

from typing import Any

from apprentice.tasks.builtin.dice import Dice

GROUPS: dict[str, list[str]] = {
    "animals": ["dog", "horse", "rabbit", "lion", "sheep", "monkey", "bear", "goat", "wolf", "camel"],
    "fruit": ["apple", "banana", "cherry", "grape", "lemon", "peach", "pear", "plum", "mango", "melon"],
    "clothes": ["shirt", "coat", "sock", "glove", "dress", "scarf", "jacket", "skirt", "belt", "sweater"],
    "vehicles": ["car", "bus", "train", "truck", "tram", "bicycle", "taxi", "tractor", "ferry", "van"],
    "furniture": ["table", "chair", "bed", "sofa", "desk", "shelf", "wardrobe", "stool", "bench", "cupboard"],
    "body": ["arm", "knee", "nose", "ear", "finger", "shoulder", "foot", "elbow", "chin", "neck"],
    "tools": ["hammer", "saw", "drill", "screwdriver", "axe", "pliers", "spade", "chisel", "rake", "wrench"],
    "weather": ["rain", "snow", "wind", "fog", "storm", "hail", "frost", "thunder", "sunshine", "drizzle"],
    "jobs": ["doctor", "baker", "teacher", "farmer", "pilot", "nurse", "lawyer", "painter", "plumber", "judge"],
    "colours": ["red", "blue", "green", "yellow", "purple", "brown", "black", "white", "grey", "pink"],
    "instruments": ["piano", "violin", "flute", "trumpet", "guitar", "drum", "harp", "cello", "banjo", "clarinet"],
    "feelings": ["joy", "anger", "fear", "pride", "shame", "envy", "sadness", "hope", "grief", "love"],
}


def odd_one_out(dice: Dice, number: int) -> dict[str, Any]:
    """`words`, four of them, three of one group; and `label`: the place of the one from another."""
    label = number % 4
    group, stranger = dice.some(list(GROUPS), 2)
    words = dice.some(GROUPS[group], 3)
    words.insert(label, dice.one(GROUPS[stranger]))
    return {"words": words, "label": label}
