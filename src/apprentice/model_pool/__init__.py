"""Pool of Ray actors that each hold a model and answer prompts; shared by evaluation, prediction and on-policy training."""
