"""From a model folder to an HTTP endpoint: protocol, engine, ingress, and the deployment on Ray Serve."""
