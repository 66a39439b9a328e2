"""Questions of an evaluation: test rows, prompts, perturbed wordings, and the models (subjects) that are asked."""
