"""Run migrator as ``python -m migrator``."""

from migrator.cli.main import script

if __name__ == "__main__":
    script()
