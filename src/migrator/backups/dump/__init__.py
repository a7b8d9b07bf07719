"""Make a dump with pg_dump."""
