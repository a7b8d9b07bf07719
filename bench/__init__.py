"""Benchmarks: paired and interleaved runs against plain Alembic; never part of the test suite."""
