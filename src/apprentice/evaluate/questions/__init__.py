"""What is asked: rows, prompts, perturbed wordings, and the models that answer."""
