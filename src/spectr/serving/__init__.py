"""The HTTP API: who may use which expert, what a request asks for, and what an engine gets."""
