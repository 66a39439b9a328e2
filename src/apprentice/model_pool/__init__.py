"""Ray actors that hold a model and answer; shared by evaluation, prediction and on-policy training."""
