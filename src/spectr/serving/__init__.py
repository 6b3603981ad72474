"""The HTTP API: which experts a client may use, what a request selects, and what an engine receives."""
