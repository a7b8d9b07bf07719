"""The revision graph: read the revision files, look them up, and plan over them."""
