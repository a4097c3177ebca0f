"""`python -m foveate` is the command `foveate`."""

from foveate.commands.app import app

app(prog_name="foveate")
