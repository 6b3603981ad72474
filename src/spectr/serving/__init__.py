"""Everything that speaks HTTP: who may use which expert, what a request asks for, and what an engine is told."""
