"""Human-readable views of examples (terminal) and of packed rows (HTML)."""
