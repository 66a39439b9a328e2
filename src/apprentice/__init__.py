"""apprentice: instruction tuning on Ray, from many labelled datasets to one model that follows instructions."""

__version__ = "0.1.0"
