"""The command ``python -m fastattn bench``."""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastattn import _config
from fastattn._bench import plots, report, runner
from fastattn._bench.contenders import CONTENDERS, installed
from fastattn._bench.grid import (
    DECODE_DTYPES,
    DECODE_GROWTH,
    GRID,
    GROWTH,
    KINDS,
    QUICK,
    chosen,
)
from fastattn._bench.workloads import Workload

INSTALL_EXTRAS = 'pip install "fastattn[bench]"'

DEFAULT_ROUNDS, QUICK_ROUNDS = 10, 5
# The lengths of a plot with --quick.
QUICK_MAX_LENGTH = 4096


class BenchError(Exception):
    """What the user can mend; the message says how."""


def _at_least_one(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str
        The arguments after ``bench``.

    Returns
    -------
    int
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m fastattn bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few workloads, about a minute")
    parser.add_argument(
        "--filter", metavar="TEXT",
        help=f"workloads of a kind ({', '.join(KINDS)}), or whose name contains TEXT",
    )  # fmt: skip
    parser.add_argument("--threads", type=_at_least_one, metavar="N", help="threads of everyone")
    parser.add_argument(
        "--rounds", type=_at_least_one, metavar="N",
        help=f"turns of everyone on each workload (default {DEFAULT_ROUNDS}, "
        f"{QUICK_ROUNDS} with --quick)",
    )  # fmt: skip
    parser.add_argument(
        "--contenders", metavar="A,B", help=f"some of {','.join(CONTENDERS)} (default: installed)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured")
    parser.add_argument(
        "--plot", type=Path, metavar="DIR",
        help="measure what it takes too; write PNGs of speed, memory and decoding",
    )  # fmt: skip
    parser.set_defaults(run=_run)

    commands = parser.add_subparsers(metavar="compare", title="commands")
    comparison = commands.add_parser("compare", help="compare the JSON files of two runs")
    comparison.add_argument("before", type=Path, metavar="A.json")
    comparison.add_argument("after", type=Path, metavar="B.json")
    comparison.add_argument(
        "--threshold", type=_threshold, default=0.05, metavar="SHARE",
        help="slower by more than this is a regression, exit status 1 (default 0.05)",
    )  # fmt: skip
    comparison.set_defaults(run=_run_compare)

    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
        return status
    except (BenchError, runner.ChildDied) as error:
        print(f"fastattn bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastattn bench: interrupted", file=sys.stderr)
        return 130


def _chosen_workloads(args: argparse.Namespace) -> list[Workload]:
    found = [w for w in GRID if not args.quick or w.name in QUICK]
    if args.filter is not None:
        # What is asked for by name is measured, also with --quick.
        found = chosen(args.filter)
    if not found:
        raise BenchError(
            f"--filter {args.filter}: no such workload; kinds are {', '.join(KINDS)}, names "
            f"{', '.join(w.name for w in GRID)}"
        )
    if args.plot is not None:
        pictured = (*GROWTH, *DECODE_GROWTH, *DECODE_DTYPES)
        lengths = [w for w in pictured if not args.quick or w.seqlen_k <= QUICK_MAX_LENGTH]
        found += [w for w in lengths if w not in found]
    return found


def _chosen_contenders(args: argparse.Namespace) -> dict[str, str]:
    here = installed()
    if args.contenders is None:
        return here
    names: Sequence[str] = args.contenders.split(",")
    for name in names:
        if name not in CONTENDERS:
            raise BenchError(f"--contenders: no {name!r}; there are {', '.join(CONTENDERS)}")
        if name not in here:
            needed = (CONTENDERS[name].module, *CONTENDERS[name].needs)
            raise BenchError(f"--contenders: {name} needs {' and '.join(needed)} installed")
    return {name: here[name] for name in CONTENDERS if name in names}


def _run(args: argparse.Namespace) -> int:
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise BenchError(f"--plot needs matplotlib: {INSTALL_EXTRAS}")
    workloads, contenders = _chosen_workloads(args), _chosen_contenders(args)
    num_threads = args.threads or _config.default_num_threads()
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else DEFAULT_ROUNDS)
    # Found out before the minutes of measuring, not after.
    if args.json is not None:
        _write(args.json, "")

    bar = _progress(len(workloads))

    kind = ""

    def show(result: dict[str, Any]) -> None:
        nonlocal kind
        text = report.table(result)
        if result["kind"] != kind:
            kind = result["kind"]
            text = f"==== {kind}\n\n{text}"
        if bar is None:
            print(f"\n{text}", flush=True)
        else:
            bar.write(f"\n{text}")
            bar.update()

    started = time.perf_counter()
    try:
        measured = runner.run(
            workloads, contenders, num_threads, rounds,
            start=lambda head: print(report.header(head), flush=True), each=show,
        )  # fmt: skip
    finally:
        if bar is not None:
            bar.close()
    for made in (report.costs, report.speedups, report.programs, report.summary):
        if text := made(measured):
            print(f"\n{text}")
    print(f"\nworkloads: {len(workloads)}, seconds: {time.perf_counter() - started:.0f}")
    if args.json is not None:
        _write(args.json, json.dumps(measured, indent=1) + "\n")
    if args.plot is not None:
        try:
            written = plots.plot(measured, args.plot)
        except OSError as error:
            raise BenchError(f"--plot {args.plot}: {error.strerror or error}") from error
        print("\n".join(f"wrote {path}" for path in written))
    return 0


def _progress(total: int) -> Any:
    """A bar on a terminal once two seconds have passed; None without tqdm."""
    if importlib.util.find_spec("tqdm") is None:
        return None
    from tqdm import tqdm

    return tqdm(total=total, desc="workloads", delay=2, disable=None, leave=False)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"--json {path}: {error.strerror or error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        read: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise BenchError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(read, dict) or read.get("schema") != runner.SCHEMA:
        raise BenchError(f"{path}: not a report of fastattn bench, schema {runner.SCHEMA}")
    return read


def _run_compare(args: argparse.Namespace) -> int:
    text, regressed = report.compare(_read(args.before), _read(args.after), args.threshold)
    print(text)
    return 1 if regressed else 0
