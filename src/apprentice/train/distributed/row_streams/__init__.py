"""The streams of packed rows under Ray Train: one a lane, from the actors that make rows to the workers that train on them."""
