"""API keys and their rate limits: the keys file, token buckets, the limiter of all keys, and the account of one request."""
