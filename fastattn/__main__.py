"""The command line: ``python -m fastattn info | selftest | demo | bench``."""

import argparse
import json
import sys

from fastattn import demo, selftest
from fastattn._config import show_config
from fastattn.bench import cli as bench


def _info(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps(show_config("dicts"), indent=2))
    else:
        show_config()
    return 0


def _selftest(arguments: argparse.Namespace) -> int:
    return 1 if selftest.run(sys.stdout) else 0


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : list of str, optional
        The arguments after the program's name; default ``sys.argv[1:]``.

    Returns
    -------
    int
        The exit status: 0 for success, 1 for a failed check.

    Examples
    --------
    >>> from fastattn.__main__ import main
    >>> main(["info", "--json"])  # doctest: +ELLIPSIS
    {
      "fastattn": {
    ...
    0
    """
    parser = argparse.ArgumentParser(prog="python -m fastattn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    info = commands.add_parser("info", help="show how this installation was built and what it runs")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    check = commands.add_parser("selftest", help="check this installation in a few seconds")
    check.set_defaults(run=_selftest)

    show = commands.add_parser("demo", help="find sentences with a real encoder, and measure it")
    demo.add_arguments(show)
    show.set_defaults(run=demo.run)

    measure = commands.add_parser(
        "bench", help="time attention beside other libraries' and the machine's peak"
    )
    bench.add_arguments(measure)

    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
