"""The connection to Ray, and the nodes of its cluster."""
