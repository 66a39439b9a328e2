"""Text generation over an engine: prompts, token streams, detokenization, grammars, log-probabilities, adapters."""
