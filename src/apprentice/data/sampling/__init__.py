"""The sampling plan, a pure function of seed and position: mixture, interleaving, row shuffling, exemplars, keyed permutations."""
