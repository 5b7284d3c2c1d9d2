"""`resa conformance`: check a port against the conformance vectors."""

from ...conformance.command import add_arguments, conformance
from . import main as cli


def add_conformance(commands: cli.Commands) -> None:
    """Add the command."""
    add_arguments(cli.add_command(commands, "conformance", conformance))
