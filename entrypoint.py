"""Hand over to :func:`migrator.cli.main.script`; the image's entrypoint and `python entrypoint.py` from a checkout."""

from migrator.cli.main import script

if __name__ == "__main__":
    script()
