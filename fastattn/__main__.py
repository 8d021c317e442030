"""The command line: ``python -m fastattn info | selftest | bench``."""

import argparse
import json
import sys

from fastattn._config import show_config


def _info(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps(show_config("dicts"), indent=2))
    else:
        show_config()
    return 0


def _selftest(arguments: argparse.Namespace) -> int:
    from fastattn import _selftest

    return 1 if _selftest.run(sys.stdout) else 0


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
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:  # with options of its own, in modules that no other command loads
        from fastattn._bench import cli

        return cli.main(argv[1:])

    parser = argparse.ArgumentParser(prog="python -m fastattn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    info = commands.add_parser("info", help="show how this installation was built and what it runs")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    check = commands.add_parser("selftest", help="check this installation in a few seconds")
    check.set_defaults(run=_selftest)

    commands.add_parser(
        "bench", help="time attention beside other libraries' and the machine's peak"
    )

    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
