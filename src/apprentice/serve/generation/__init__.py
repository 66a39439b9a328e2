"""Text generation over an engine: served models, adapters, prompts, grammars, detokenization, replies, tasks."""
