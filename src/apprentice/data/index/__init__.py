"""The frozen list of each task's usable rows: scanning, filters, n-grams for de-duplication and decontamination."""
