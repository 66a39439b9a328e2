"""Examples and packed rows for people to look at."""
