"""apprentice: from many labelled datasets to one model that follows instructions, on Ray."""

__version__ = "0.1.0"
