"""Tasks: their schema, their templates, importers of other formats, and the library. Text only: no tokenizer, model or Ray."""
