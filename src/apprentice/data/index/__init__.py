"""The frozen index of each task's usable rows: scanning, filters, n-grams for deduplication and decontamination."""
