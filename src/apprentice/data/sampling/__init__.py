"""The order of training as a pure function of seed and position: mixture, plan, permutation, exemplars."""
