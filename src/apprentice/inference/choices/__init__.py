"""Answer choices: their log-probabilities under a model, and the rules that rank them."""
