"""Routes of the board, one file a page."""
