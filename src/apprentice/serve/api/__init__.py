"""The HTTP side of the endpoint: routes, schemas, keys, rate limits, errors."""
