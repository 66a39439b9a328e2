"""From a checked request to tokens and back to text: prompts, streams, stop strings, log-probabilities, grammars."""
