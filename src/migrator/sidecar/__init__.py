"""The sidecar: runs the pipeline, then stays and says whether the database is at this image's heads.

It serves four pages and takes no commands.  All that needs Alembic runs in child processes (:mod:`.children`), which
are migrator itself, so that what stays is small, and no ``env.py`` can hold up an answer.
"""
