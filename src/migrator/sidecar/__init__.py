"""The sidecar: runs the pipeline, then stays and reports whether the database is at this image's heads.

It serves four pages and takes no commands. Code that needs Alembic runs in child processes
(:mod:`.children`), which are migrator itself. So the remaining process is small, and no ``env.py`` can
delay an answer.
"""
