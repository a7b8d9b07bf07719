"""The stages of a run: one file, one verb each.  They never import each other; ``pipeline`` knows their order."""
