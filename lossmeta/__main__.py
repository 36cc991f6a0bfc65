"""``python -m lossmeta``: the command ``lossmeta``."""

from lossmeta.cli import app

app(prog_name="lossmeta")
