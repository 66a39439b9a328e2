"""The data pipeline: from task files and datasets to packed rows of token ids."""
