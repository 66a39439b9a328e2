"""Form of a model's replies: how its chat template writes function calls and thoughts, and the reading of a reply by it."""
