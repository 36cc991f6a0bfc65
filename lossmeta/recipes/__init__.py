"""Experiments: the quickstart, and one file per table or figure of the papers."""
