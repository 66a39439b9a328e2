"""`apprentice init`: a folder with a task file and a recipe, made from a table or a dataset on the hub."""
