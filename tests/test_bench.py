"""``python -m fastattn bench``: what it reports, not how fast anything is."""

import itertools
import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from process import run_python

from fastattn import _core
from fastattn.__main__ import main
from fastattn._bench import cli, contenders, report, runner
from fastattn._bench.grid import DECODE_DTYPES, DECODE_GROWTH, GROWTH, KINDS
from fastattn._bench.workloads import decode, prefill

pytestmark = pytest.mark.xdist_group("bench")  # one measurement is for all tests

TINY = prefill("tiny", 1, 4, 32, 16, num_kv_heads=2, causal=True)
BOTH = TINY._replace(name="both", kind="backward", gradients=True)


# --- probes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_fma_probe(kernel_set, double, num_threads):
    seconds, flops = _core.probe_fma(kernel_set, double, 1000, num_threads)
    assert seconds > 0
    again = _core.probe_fma(kernel_set, double, 2000, num_threads)[1]
    assert again == 2 * flops
    assert _core.probe_fma(kernel_set, double, 1, num_threads)[1] > 0


@pytest.mark.any_kernel_set
@pytest.mark.parametrize("size", [0, 1, 1000, 300_000])
def test_read_probe(size):
    assert _core.probe_read(np.zeros(size), 2) > 0


@pytest.mark.any_kernel_set
def test_read_probe_needs_contiguous_memory():
    with pytest.raises(ValueError, match="contiguous"):
        _core.probe_read(np.zeros(10)[::2], 1)


# --- turns ------------------------------------------------------------------------------------

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="processes are stopped on Linux")


@pytest.mark.any_kernel_set
@pytest.mark.parametrize("seconds", [0.0007, 0.25])
@pytest.mark.parametrize("first", [[0.2], [0.004, 0.007]])
def test_a_turn_is_timed_after_first_calls(seconds, first, monkeypatch):
    durations = itertools.chain(first, itertools.repeat(seconds))
    now = 0.0

    def run():
        nonlocal now
        now += next(durations)

    monkeypatch.setattr(runner.time, "perf_counter", lambda: now)
    assert runner.turn(run) == pytest.approx(seconds)
    assert now >= sum(first) + runner.TURN_SECONDS


@pytest.mark.any_kernel_set
def test_a_long_call_is_made_once_in_a_turn(monkeypatch):
    readings = iter([0.0, runner.LONG_SECONDS])
    monkeypatch.setattr(runner.time, "perf_counter", lambda: next(readings))
    calls = []
    assert runner.turn(lambda: calls.append(1)) == runner.LONG_SECONDS
    assert calls == [1]


def spin():
    while True:
        pass


def answer_and_spin(num_threads, pipe):
    """A contender's process with a thread that never rests."""
    runner._end_with_command()
    threading.Thread(target=spin, daemon=True).start()
    for _ in runner._requests(pipe):
        pipe.send(os.getpid())


def thread_states(pid):
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return [stat.rpartition(") ")[2][0] for stat in stats]


@pytest.fixture
def spinning():
    child = runner._Child(answer_and_spin, num_threads=1)
    yield child
    child.close()


@linux_only
@pytest.mark.any_kernel_set
def test_nobody_runs_between_turns(spinning):
    pid = spinning.ask("turn")
    for _ in range(3):
        assert thread_states(pid) == ["T", "T"]
        assert spinning.ask("turn") == pid
    spinning.process.kill()
    with pytest.raises(runner.ChildDied, match="status -9"):
        spinning.ask("turn")


@pytest.mark.any_kernel_set
def test_turns_where_processes_cannot_be_stopped(spinning, monkeypatch):
    monkeypatch.setattr(runner, "CAN_STOP", False)
    assert spinning.ask("turn") == spinning.ask("turn") == spinning.process.pid
    if sys.platform == "linux":
        assert "R" in thread_states(spinning.process.pid)


@pytest.mark.any_kernel_set
def test_ctrl_c_is_left_to_the_command(spinning):
    os.kill(spinning.process.pid, signal.SIGINT)
    assert spinning.ask("turn") == spinning.process.pid
    os.kill(spinning.process.pid, signal.SIGINT)
    assert spinning.ask("turn") == spinning.process.pid


@linux_only
@pytest.mark.any_kernel_set
def test_a_stopped_process_is_ended():
    child = runner._Child(runner._serve, "fastattn", TINY, num_threads=1)
    child.receive()
    path = Path(f"/proc/{child.process.pid}")
    assert set(thread_states(child.process.pid)) == {"T"}
    child.close()
    assert not path.exists()


KILLED_COMMAND = """
import os, signal
from fastattn._bench import runner

child = runner._Child(runner._serve_probes, "float32", 0, num_threads=1)
child.ask("peak")
print("stopped", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@linux_only
@pytest.mark.any_kernel_set
def test_a_stopped_process_ends_with_the_command():
    # The run is over when nobody has its output open any more.
    done = run_python("-c", KILLED_COMMAND)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "stopped\n")


# --- a whole run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    names = ("fastattn", "numpy")
    versions = {name: contenders.installed()[name] for name in names}
    plain = TINY._replace(causal=False)
    sinks = plain._replace(name="sinks", option="sinks", num_threads=1, baseline=plain)
    slower = TINY._replace(name="one-thread", kind="scaling", alone=True)
    slower = slower._replace(baseline=slower._replace(num_threads=1))
    turns = TINY._replace(name="turns", kind="program", product_of="numpy")
    workloads = [TINY, sinks, decode("read", 1, 4, 2, 40), BOTH, slower, turns]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "read_bandwidth", lambda num_threads: runner.probe_bandwidth(1, 4096))
        made = runner.run(workloads, versions, 2, 2, each=seen.append)
    assert made["results"] == seen
    return json.loads(json.dumps(made))  # and so it can be written


@pytest.mark.any_kernel_set
def test_report(measured):
    assert measured["schema"] == runner.SCHEMA
    assert measured["read_gbytes_per_second"] > 0
    assert measured["machine"]["cpus"] >= 1
    assert measured["machine"]["kernels"] in _core.known_isas()
    assert list(measured["versions"]) == ["fastattn", "numpy"]
    results = measured["results"]
    names = ["tiny", "sinks", "read", "both", "one-thread", "turns"]
    assert [r["workload"] for r in results] == names
    kinds = ["prefill", "prefill", "decode", "backward", "scaling", "program"]
    assert [r["kind"] for r in results] == kinds
    assert [r["num_threads"] for r in results] == [2, 1, 2, 2, 2, 2]
    assert [r["seqlen"] for r in results] == [32, 32, 40, 32, 32, 32]
    for result in results:
        alone = result["kind"] in ("scaling", "program")
        left_out = {"numpy": "fastattn only"} if result["kind"] == "scaling" else {}
        assert result["left_out"] == left_out
        assert result["peak_gflops"] > 0
        assert list(result["contenders"]) == ["fastattn", *([] if alone else ["numpy"])]
        for entry in result["contenders"].values():
            assert len(entry["seconds"]) == 2
            assert 0 < entry["best"] <= entry["median"] <= max(entry["seconds"])
            assert entry["gflops"] == pytest.approx(result["flops"] / entry["median"] / 1e9)
            assert entry["share_of_peak"] == pytest.approx(entry["gflops"] / result["peak_gflops"])
            assert entry["memory_bytes"] is None or entry["memory_bytes"] >= 0
        assert result["contenders"]["fastattn"]["ratio"] == 1
        assert alone or result["contenders"]["numpy"]["ratio"] > 0
    assert results[3]["flops"] == 3.5 * results[0]["flops"]
    nothing, baseline, *_, one_thread, _ = (result["baseline"] for result in results)
    assert nothing is None
    assert (baseline["label"], baseline["flops"]) == ("(1,4/2,32,16)", 4 * 4 * 32 * 32 * 16)
    assert (baseline["num_threads"], one_thread["num_threads"]) == (1, 1)
    assert len(baseline["seconds"]) == 2
    assert "share_of_peak" not in baseline
    assert baseline["gflops"] == pytest.approx(baseline["flops"] / baseline["median"] / 1e9)


@pytest.mark.any_kernel_set
def test_report_of_reading(measured):
    others = [result for result in measured["results"] if result["kind"] != "decode"]
    [result] = [result for result in measured["results"] if result["kind"] == "decode"]
    assert result["kv_bytes"] == 2 * 2 * 40 * 128 * 4
    assert result["read_gbytes_per_second"] > 0
    for entry in result["contenders"].values():
        rate = result["kv_bytes"] / entry["median"] / 1e9
        assert entry["gbytes_per_second"] == pytest.approx(rate)
        share = rate / result["read_gbytes_per_second"]
        assert entry["share_of_read"] == pytest.approx(share)
    lines = report.table(result).splitlines()
    assert lines[0].startswith("read: (1,4/2,1x40,128), 2 threads, 0 MiB read at ")
    assert "GB/s" in lines[1] and "of read" in lines[1]
    for result in others:
        assert (result["kv_bytes"], result["read_gbytes_per_second"]) == (None, None)
        assert "GB/s" not in report.table(result)
        assert "share_of_read" not in result["contenders"]["fastattn"]


@pytest.mark.any_kernel_set
def test_table(measured):
    result = measured["results"][0]
    result = {**result, "left_out": {"torch": "no sinks", "jax": "no sinks"}}
    lines = report.table(result).splitlines()
    assert lines[0].startswith("tiny: (1,4/2,32,16) causal, 2 threads, peak ")
    assert [line.split()[0] for line in lines[2:4]] == ["fastattn", "numpy"]
    assert lines[4] == "  torch, jax: no sinks"
    for load, busy in ((None, False), (1.4, False), (1.6, True)):
        machine = {**measured["machine"], "cpus": 3, "load_average": load}
        head = report.header({**measured, "machine": machine})
        assert head.startswith("busy: load average 1.6;") == busy
        assert measured["versions"]["numpy"] in head


@pytest.mark.any_kernel_set
def test_costs(measured):
    def row(result, work, times):
        ours = result["contenders"]["fastattn"]
        baseline = {"label": "plain", "flops": result["flops"] / work, "memory_bytes": None}
        baseline |= {"median": 1.0, "seconds": [t / times for t in ours["seconds"]]}
        baseline["num_threads"] = result["num_threads"]
        return {**result, "baseline": baseline}

    tiny, sinks, *_, one_thread, _ = measured["results"]
    rows = [tiny, row(sinks, 1, 1.25), row(sinks, 4, 4), row(sinks, 1 / 32, 1 / 16)]
    text = report.costs({"results": rows})
    ends = [line.split()[-2:] for line in text.splitlines()[3:]]
    assert ends == [["1x", "1.25x"], ["4x", "1.00x"], ["0.0312x", "2.00x"]]
    assert report.costs({"results": [tiny, one_thread]}) == ""
    without = {**rows[1], "contenders": {}}
    assert report.costs({"results": [without]}) == ""


@pytest.mark.any_kernel_set
def test_speedups(measured):
    tiny, sinks, *_, one_thread, _ = measured["results"]
    ours = one_thread["contenders"]["fastattn"]
    twice = {**one_thread["baseline"], "seconds": [1.5 * t for t in ours["seconds"]]}
    lines = report.speedups({"results": [tiny, sinks, {**one_thread, "baseline": twice}]})
    [line] = lines.splitlines()[2:]
    assert line.split()[0] == "one-thread"
    assert line.split()[-3:] == ["1.50x", "75.0", "%"]
    assert report.speedups({"results": [tiny, sinks]}) == ""


@pytest.mark.any_kernel_set
def test_programs(measured):
    turns = measured["results"][-1]
    entry = turns["contenders"]["fastattn"]
    assert [len(entry[key]) for key in ("alone", "after", "callers", "threads")] == [2] * 4
    figures = {"alone": [t / 1.25 for t in entry["seconds"]], "callers": [0.5, 1.5]}
    figures |= {"after": [0.001, 0.003], "threads": [2, 3]}
    known = {**turns, "contenders": {"fastattn": {**entry, **figures}}}
    [line] = report.programs({"results": [known]}).splitlines()[5:]
    assert line.split()[:2] == ["turns", "fastattn"]
    assert line.split()[4:] == ["1.25x", "2.00", "ms", "3", "1.00x"]
    elsewhere = {"fastattn": {**entry, "threads": [None, None]}}
    line = report.programs({"results": [{**turns, "contenders": elsewhere}]}).splitlines()[-1]
    assert line.split()[-2] == "-"
    assert report.programs({"results": measured["results"][:-1]}) == ""


@pytest.mark.any_kernel_set
def test_summary(measured):
    lines = report.summary(measured).splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names == [
        "prefill", "tiny", "sinks", "decode", "read", "backward", "both", "scaling", "one-thread",
        "program", "turns",
    ]  # fmt: skip
    # A kind has columns of those who could be asked for it.
    heads = [line.split()[-1] for line in lines if line[0] != " "]
    assert heads[1:] == ["numpy"] * 4 + ["share"]
    assert "GB/s" in lines[5]
    assert lines[5].endswith(f"{measured['results'][2]['contenders']['numpy']['ratio']:.2f}x")
    assert lines[-3].endswith(" -")
    assert report.summary({**measured, "results": []}) == ""


@pytest.mark.any_kernel_set
def test_plot(measured, tmp_path):
    pytest.importorskip("matplotlib")
    from fastattn._bench import plots

    tiny, _, read, *_ = measured["results"]

    def written(results, name):
        paths = plots.plot({**measured, "results": results}, tmp_path / name)
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
        return [path.name for path in paths]

    lengths = [{**tiny, "workload": w.name, "seqlen": w.seqlen_k} for w in GROWTH]
    decoded = [
        {**read, "workload": w.name, "seqlen": w.seqlen_k}
        for w in dict.fromkeys((*DECODE_GROWTH, *DECODE_DTYPES))
    ]
    assert written(lengths + decoded, "all") == ["speed.png", "memory.png", "decode.png"]
    assert written(lengths, "lengths") == ["speed.png", "memory.png"]
    assert written(decoded, "decoded") == ["decode.png"]
    assert written([], "none") == []


@pytest.mark.any_kernel_set
def test_failures_are_shown_and_the_others_measured(monkeypatch):
    # Spawned children import the package anew: the failure must come from the workload itself.
    workload = TINY._replace(option="softcap")
    result = runner.measure(workload, ["fastattn", "blas"], 1, 1)
    assert result["left_out"] == {"blas": "no softcap"}
    assert list(result["contenders"]) == ["fastattn"]
    result = runner.measure(TINY._replace(num_kv_heads=3), ["fastattn"], 1, 1)
    assert result["left_out"]["fastattn"].startswith("failed: ValueError: ")
    monkeypatch.setattr(runner, "_free_memory", lambda: 10.0)
    result = runner.measure(TINY, ["numpy"], 1, 1)
    assert result["left_out"] == {"numpy": "not enough memory"}
    monkeypatch.setattr(runner, "MAX_SCORES", TINY.num_scores - 1)
    result = runner.measure(TINY._replace(baseline=TINY), ["torch"], 1, 1)
    assert result["left_out"] == {"torch": "more than 4,095 scores, fastattn only"}
    assert result["baseline"] is None


@pytest.mark.any_kernel_set
def test_memory_that_a_contender_needs(monkeypatch):
    grouped = prefill("", 1, 4, 64, 16, num_kv_heads=1)
    monkeypatch.setattr(runner, "_free_memory", lambda: 2.0 * grouped.kv_bytes * 4)
    assert runner.too_large("torch", grouped) is None
    monkeypatch.setattr(runner, "_free_memory", lambda: 2.0 * grouped.kv_bytes * 4 - 1)
    assert runner.too_large("torch", grouped) == "not enough memory"
    assert runner.too_large("fastattn", grouped) is None
    monkeypatch.setattr(runner, "_free_memory", lambda: 2.0 * 4 * runner.SCORE_COPIES * 4 * 64**2)
    assert runner.too_large("numpy", grouped._replace(dtype="float16")) is None
    both = grouped._replace(dtype="float16", gradients=True)
    assert runner.too_large("numpy", both) == "not enough memory"


def take_half_a_second(*arguments):
    *_, pipe = arguments
    runner._end_with_command()
    pipe.send({"memory_bytes": None})
    for _ in runner._requests(pipe):
        pipe.send({"seconds": 0.5})


@pytest.mark.any_kernel_set
def test_who_takes_long_has_fewer_turns(monkeypatch):
    monkeypatch.setattr(runner, "_serve", take_half_a_second)
    monkeypatch.setattr(runner, "BUDGET_SECONDS", 2.0)
    result = runner.measure(TINY, ["fastattn"], 1, 8)
    assert result["contenders"]["fastattn"]["seconds"] == [0.5] * 4
    monkeypatch.setattr(runner, "BUDGET_SECONDS", 0.1)
    result = runner.measure(TINY, ["fastattn"], 1, 8)
    assert result["contenders"]["fastattn"]["seconds"] == [0.5] * runner.LEAST_TURNS


@pytest.mark.any_kernel_set
def test_environment_is_restored(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("NPROC", raising=False)
    with runner._environment(contenders.environment(2)):
        assert runner.os.environ["OMP_NUM_THREADS"] == "2"
        assert runner.os.environ["NPROC"] == "2"
    assert runner.os.environ["OMP_NUM_THREADS"] == "7"
    assert "NPROC" not in runner.os.environ


# --- the command ------------------------------------------------------------------------------


@pytest.mark.any_kernel_set
def test_command(measured, monkeypatch, capsys, tmp_path):
    def run(workloads, versions, num_threads, rounds, *, start, each):
        assert [w.name for w in workloads] == ["prefill-512", "prefill-512-causal"]
        assert (list(versions), num_threads, rounds) == (["fastattn", "numpy"], 3, 4)
        start(measured)
        for result in measured["results"]:
            each(result)
        return measured

    monkeypatch.setattr(runner, "run", run)
    path = tmp_path / "x.json"
    options = "--filter prefill-512 --threads 3 --rounds 4 --contenders numpy,fastattn --json"
    assert main(["bench", *options.split(), str(path)]) == 0
    assert json.loads(path.read_text()) == measured
    out = capsys.readouterr().out
    assert "tiny: (1,4/2,32,16) causal" in out
    for made in (report.costs, report.speedups, report.programs, report.summary):
        assert made(measured) in out
    assert out.count("==== prefill\n") == out.count("==== decode\n") == 1
    assert "workloads: 2, seconds: " in out


@pytest.mark.any_kernel_set
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--filter", "absent"], f"--filter absent: no such workload; kinds are {KINDS[0]}, "),
        (["--contenders", "abacus"], "--contenders: no 'abacus'; there are fastattn, numpy, "),
        (["--json", "absent/x.json"], "--json absent/x.json: No such file or directory"),
        (["compare", "absent.json", "bad.json"], "absent.json: No such file or directory"),
        (["compare", "bad.json", "bad.json"], "bad.json: not a JSON file: "),
        (["compare", "other.json", "other.json"], "other.json: not a report of fastattn bench"),
    ],
)
def test_errors_are_one_line(argv, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    assert main(["bench", *argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fastattn bench: {message}")
    assert error.count("\n") == 1


@pytest.mark.any_kernel_set
def test_missing_libraries_are_said(monkeypatch, capsys, tmp_path):
    find_spec = contenders.importlib.util.find_spec
    missing = {"matplotlib", "tqdm", "torch"}
    monkeypatch.setattr(
        contenders.importlib.util,
        "find_spec",
        lambda name: None if name in missing else find_spec(name),
    )
    assert main(["bench", "--plot", str(tmp_path)]) == 1
    assert main(["bench", "--contenders", "torch"]) == 1
    assert capsys.readouterr().err == (
        f"fastattn bench: --plot needs matplotlib: {cli.INSTALL_EXTRAS}\n"
        "fastattn bench: --contenders: torch needs torch installed\n"
    )
    assert "torch" not in contenders.installed()
    assert cli._progress(3) is None


@pytest.mark.any_kernel_set
@pytest.mark.parametrize("option", ["--threads", "--rounds"])
def test_counts_must_be_positive(option, capsys):
    with pytest.raises(SystemExit):
        main(["bench", option, "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err


# --- compare ----------------------------------------------------------------------------------


def slower(measured, factor):
    other = json.loads(json.dumps(measured))
    for result in other["results"]:
        for entry in result["contenders"].values():
            entry["median"] *= factor
    return other


@pytest.mark.any_kernel_set
@pytest.mark.parametrize(
    ("factor", "threshold", "status"), [(1, "0", 0), (1.04, "0.05", 0), (1.06, "0.05", 1)]
)
def test_compare(measured, factor, threshold, status, capsys, tmp_path):
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    before.write_text(json.dumps(measured))
    after.write_text(json.dumps(slower(measured, factor)))
    argv = ["bench", "compare", str(before), str(after), "--threshold", threshold]
    assert main(argv) == status
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    beside_numpy = ("tiny", "sinks", "read", "both")
    workloads = [name for workload in beside_numpy for name in (workload, "numpy")]
    assert names == ["workload", *workloads, "one-thread", "turns"]
    # The other contenders are no business of ours.
    ours = [name not in ("workload", "numpy") for name in names]
    assert ["REGRESSION" in line for line in lines] == [bool(status) and x for x in ours]
    assert f"{factor:.3f}" in lines[1]


@pytest.mark.any_kernel_set
def test_compare_says_what_differs(measured):
    other = {**measured, "machine": {**measured["machine"], "cpu": "Abacus"}, "results": []}
    text, regressed = report.compare(measured, other, 0.05)
    assert not regressed
    assert text.splitlines()[0].endswith("-> Abacus")
    assert text.splitlines()[-1] == "nothing in common"
    with pytest.raises(ValueError, match=f"schemas {runner.SCHEMA} and 0"):
        report.compare(measured, {**measured, "schema": 0}, 0.05)
