"""The command `resa conformance`, and the same by itself: `python -m resa.conformance`."""

import argparse
import json
import os
import sys
import time

from .children import check_module, serve
from .grades import GRADES
from .kit import UNSUPPORTED, chosen_entries, header, is_passed, line, report, summary
from .vectors import load_vectors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    text = "a module that can be imported from here, or a .py file"
    parser.add_argument("module", metavar="MODULE", help=text)
    text = "run the cases of operations alone; the port needs no decode_trace"
    parser.add_argument("--ops-only", action="store_true", help=text)
    text = "run the cases whose name, or whose operation's, fits this pattern (* and ?)"
    parser.add_argument("--only", metavar="PATTERN", default="*", help=text)
    text = "run the cases of these number types and sizes (default: all that the port names)"
    parser.add_argument("--grade", nargs="+", choices=GRADES, default=GRADES, help=text)
    text = "seconds that a case may take (default: %(default)g)"
    parser.add_argument("--timeout", metavar="S", type=float, default=60.0, help=text)
    text = "print one JSON object instead of a table"
    parser.add_argument("--json", action="store_true", help=text)


def conformance(options: argparse.Namespace) -> int:
    """Check a port against the conformance vectors. MODULE offers five operations, NumPy arrays in
    and out, and decode_trace for whole generations, as docs/porting.md says. Optional are both
    operations of key sketches, choose_token, attention_trace, paged_trace and decode_batch. Every
    case runs in a process of its own that may crash or hang, and is printed as it ends. Each
    failure names the law that it breaks. The exit status is 0 if all cases pass, 1 if
    not, 2 if there is no such module. What the port prints goes to standard error.
    """
    vectors, rows, start = load_vectors(), [], time.monotonic()
    entries = chosen_entries(vectors, grades=options.grade, only=options.only)
    if not entries:
        raise ValueError(f"--only: got {options.only}; allowed: the name of a case or an operation")
    if not options.timeout > 0:
        raise ValueError(f"--timeout: got {options.timeout:g}; allowed: more than 0 seconds")
    for row in check_module(
        options.module, vectors, entries, ops_only=options.ops_only, timeout=options.timeout
    ):
        if not (options.json or rows):
            print(header(), flush=True)
        rows.append(row)
        if not options.json and row.status != UNSUPPORTED:  # they are counted in the end
            print(line(row), flush=True)
    if options.json:
        print(json.dumps(report(options.module, vectors, rows, ops_only=options.ops_only)))
    else:
        print(f"\n{summary(rows)}", flush=True)
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0 if is_passed(rows, ops_only=options.ops_only) else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command by itself."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--child"]:
        serve(arguments[1])
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m resa.conformance", description=conformance.__doc__
    )
    add_arguments(parser)
    try:
        return conformance(parser.parse_args(arguments))
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
