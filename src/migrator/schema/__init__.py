"""The live schema, and the expected one."""
