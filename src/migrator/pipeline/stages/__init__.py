"""The stages of a run: one file and one verb each. They never import each other; the pipeline knows their order."""
