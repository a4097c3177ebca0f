"""`python -m foveate` is the command `foveate`."""

from .cli import app

app(prog_name="foveate")
