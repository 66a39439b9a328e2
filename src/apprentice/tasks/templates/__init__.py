"""Templates: the expression language and the sandbox that it runs in."""
