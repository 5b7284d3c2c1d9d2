"""`resa conformance`: check a port against the conformance vectors."""

import argparse
import contextlib
import ctypes
import os
import sys

from . import main as cli


def add_conformance(commands: cli.Commands) -> None:
    """Add the command."""
    parser = cli.add_command(commands, "conformance", conformance)
    text = "a module that can be imported from here, or a .py file"
    parser.add_argument("module", metavar="MODULE", help=text)
    parser.option("--ops-only", False, "leave generations out; the port needs no decode_trace")
    parser.option("--json", False, "print one JSON object instead of a table")


def conformance(options: argparse.Namespace) -> int:
    """Check a port against the conformance vectors. MODULE offers the five operations, NumPy arrays
    in and out, and decode_trace for whole generations, as docs/porting.md says. Prints every case,
    and for each failure the law that it breaks. The exit status is 0 if all cases pass, 1 if not, 2
    if there is no such module. What the port prints goes to standard error.
    """
    from ..conformance.kit import check_port, is_passed, load_port, load_vectors, report, show

    # What the port prints goes to standard error, from C and from subprocesses as well.
    with contextlib.ExitStack() as restore:
        restore.enter_context(contextlib.redirect_stdout(sys.stderr))
        kept = os.dup(1)
        restore.callback(os.close, kept)
        restore.callback(os.dup2, kept, 1)
        if os.name == "posix":
            restore.callback(ctypes.CDLL(None).fflush, None)  # what C code has not written yet
        os.dup2(2, 1)
        port, vectors = load_port(options.module), load_vectors()
        rows = check_port(port, vectors, ops_only=options.ops_only)
    if options.json:
        cli.report(report(options.module, vectors, rows, ops_only=options.ops_only))
    else:
        show(rows)
    return 0 if is_passed(rows, ops_only=options.ops_only) else 1
