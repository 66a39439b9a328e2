"""Everything that can be known before hardware is reserved."""
