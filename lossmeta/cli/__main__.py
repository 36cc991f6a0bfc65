"""``python -m lossmeta.cli``: the command ``lossmeta``."""

from lossmeta.cli import app

app(prog_name="lossmeta")
