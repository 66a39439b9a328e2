"""HTTP API of the endpoint: routes, schemas, API keys, rate limits, metrics, errors."""
