"""Connection to Ray, and questions to the nodes of its cluster."""
