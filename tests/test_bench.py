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
from process import output_of, run_python

from fastattn import _core, reference
from fastattn.__main__ import main
from fastattn.bench import cli, contenders, report, runner
from fastattn.bench.workloads import GRID, GROWTH, OPTIONS, QUICK, prefill

TINY = prefill("tiny", 1, 4, 32, 16, num_kv_heads=2, causal=True)


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


# --- workloads --------------------------------------------------------------------------------


@pytest.mark.any_kernel_set
def test_workloads_are_told_apart():
    names = [workload.name for workload in GRID]
    assert len(set(names)) == len(names)
    labels = [workload.label for workload in GRID]
    assert len(set(labels)) == len(labels)
    assert set(QUICK) <= set(names)
    assert {workload.option for workload in GRID} == set(OPTIONS)
    assert TINY.label == "(1,4/2,32,16) causal"


@pytest.mark.any_kernel_set
def test_baselines():
    for shorter, longer in itertools.pairwise(GROWTH):
        assert longer.baseline.label == shorter.label
        assert longer.flops == 4 * longer.baseline.flops
    for workload in GRID:
        if workload.option:
            assert workload.baseline.label == workload.shape


@pytest.mark.any_kernel_set
def test_useful_operations():
    full = prefill("", 2, 4, 512, 16)
    assert full.flops == 4 * 2 * 4 * 512 * 512 * 16
    assert full.output_bytes == contenders.CONTENDERS["fastattn"].make(full, 1).run().nbytes
    assert full._replace(causal=True).flops == full.flops / 2
    for option in ("window", "segments"):
        workload = full._replace(option=option)
        keep = contenders._takes_part(workload)
        assert workload.flops == pytest.approx(full.flops * keep.mean())


# --- contenders -------------------------------------------------------------------------------

# Long enough for the window to leave keys out.
SMALL = prefill("small", 1, 4, 320, 16)


@pytest.mark.any_kernel_set
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_numpy_is_attention(option, causal):
    workload = SMALL._replace(option=option, causal=causal, dtype="float64", num_kv_heads=2)
    call = contenders.CONTENDERS["numpy"].make(workload, 1)
    result = call.run()
    expected = reference.attention(*workload.arrays(), **workload.options())
    np.testing.assert_allclose(call.read(result), expected, rtol=1e-10, atol=1e-12)
    contenders.check(call, result, workload)


@pytest.mark.any_kernel_set
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_check_finds_a_wrong_result(option, causal):
    workload = SMALL._replace(option=option, causal=causal)
    call = contenders.CONTENDERS["fastattn"].make(workload, 1)
    result = call.run()
    contenders.check(call, result, workload)
    result[0, -1, -1, 3] += 0.01
    with pytest.raises(AssertionError):
        contenders.check(call, result, workload)


@pytest.mark.any_kernel_set
def test_blas_is_the_products():
    call = contenders.CONTENDERS["blas"].make(TINY, 1)
    result = call.run()
    contenders.check(call, result, TINY)
    result[0, 0] += 1
    with pytest.raises(AssertionError):
        contenders.check(call, result, TINY)
    with pytest.raises(contenders.Unsupported, match="no mask"):
        contenders.CONTENDERS["blas"].make(SMALL._replace(option="mask"), 1)


# In a process of its own: the libraries set the threads of the whole process.
CHECK_PEER = """
import sys
from fastattn.bench import contenders
from fastattn.bench.workloads import OPTIONS, prefill

make = contenders.CONTENDERS[sys.argv[1]].make
for option in OPTIONS:
    for causal, num_kv_heads in ((False, 4), (True, 2)):
        workload = prefill(
            "", 2, 4, 320, 16, num_kv_heads=num_kv_heads, causal=causal, option=option
        )
        try:
            call = make(workload, 1)
        except contenders.Unsupported:
            continue
        contenders.check(call, call.run(), workload)
        print(option or "plain", causal)
"""


@pytest.mark.any_kernel_set
@pytest.mark.parametrize("name", ["torch", "onnxruntime", "openvino", "jax"])
def test_peers_are_attention(name):
    if name not in contenders.installed():
        pytest.skip(f"{name} is not installed")
    checked = output_of("-c", CHECK_PEER, name, **contenders.environment(1)).splitlines()
    options = {"plain True", "plain False"}
    options |= {f"{x} False" for x in ("mask", "bias", "alibi", "window", "segments")}
    assert options <= set(checked)


# --- turns ------------------------------------------------------------------------------------

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="processes are stopped on Linux")


@pytest.mark.any_kernel_set
@pytest.mark.parametrize("seconds", [0.0007, 0.25])
def test_a_turn_is_timed_after_a_first_call(seconds, monkeypatch):
    durations = itertools.chain([100.0], itertools.repeat(seconds))
    now = 0.0

    def run():
        nonlocal now
        now += next(durations)

    monkeypatch.setattr(runner.time, "perf_counter", lambda: now)
    assert runner.turn(run) == pytest.approx(seconds)
    assert now >= 100 + runner.TURN_SECONDS


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
from fastattn.bench import runner

child = runner._Child(runner._serve_probes, "float32", num_threads=1)
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
    workloads = [TINY, sinks]
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
    assert [r["workload"] for r in measured["results"]] == ["tiny", "sinks"]
    assert [r["num_threads"] for r in measured["results"]] == [2, 1]
    for result in measured["results"]:
        assert result["left_out"] == {}
        assert result["peak_gflops"] > 0
        assert list(result["contenders"]) == ["fastattn", "numpy"]
        for entry in result["contenders"].values():
            assert len(entry["seconds"]) == 2
            assert 0 < entry["best"] <= entry["median"] <= max(entry["seconds"])
            assert entry["gflops"] == pytest.approx(result["flops"] / entry["median"] / 1e9)
            assert entry["share_of_peak"] == pytest.approx(entry["gflops"] / result["peak_gflops"])
            assert entry["memory_bytes"] is None or entry["memory_bytes"] >= 0
        assert result["contenders"]["fastattn"]["ratio"] == 1
        assert result["contenders"]["numpy"]["ratio"] > 0
    nothing, baseline = (result["baseline"] for result in measured["results"])
    assert nothing is None
    assert (baseline["label"], baseline["flops"]) == ("(1,4/2,32,16)", 4 * 4 * 32 * 32 * 16)
    assert len(baseline["seconds"]) == 2
    assert baseline["gflops"] == pytest.approx(baseline["flops"] / baseline["median"] / 1e9)


@pytest.mark.any_kernel_set
def test_table(measured):
    result = measured["results"][0]
    result = {**result, "left_out": {"torch": "no sinks", "jax": "no sinks"}}
    lines = report.table(result).splitlines()
    assert lines[0].startswith("tiny: (1,4/2,32,16) causal, 2 threads, peak ")
    assert [line.split()[0] for line in lines[2:4]] == ["fastattn", "numpy"]
    assert lines[4] == "  torch, jax: no sinks"
    assert measured["versions"]["numpy"] in report.header(measured)


@pytest.mark.any_kernel_set
def test_costs(measured):
    def row(result, work, times):
        ours = result["contenders"]["fastattn"]
        baseline = {"label": "plain", "flops": result["flops"] / work, "memory_bytes": None}
        baseline |= {"median": 1.0, "seconds": [t / times for t in ours["seconds"]]}
        return {**result, "baseline": baseline}

    tiny, sinks = measured["results"]
    rows = [tiny, row(sinks, 1, 1.25), row(sinks, 4, 4), row(sinks, 1 / 32, 1 / 16)]
    text = report.costs({"results": rows})
    ends = [line.split()[-2:] for line in text.splitlines()[3:]]
    assert ends == [["1x", "1.25x"], ["4x", "1.00x"], ["0.0312x", "2.00x"]]
    assert report.costs({"results": [tiny]}) == ""
    without = {**rows[1], "contenders": {}}
    assert report.costs({"results": [without]}) == ""


@pytest.mark.any_kernel_set
def test_plot(measured, tmp_path):
    pytest.importorskip("matplotlib")
    from fastattn.bench import plots

    results = [
        {**measured["results"][0], "workload": workload.name, "seqlen": workload.seqlen_q}
        for workload in GROWTH
    ]
    written = plots.plot({**measured, "results": results}, tmp_path / "new")
    assert [path.name for path in written] == ["speed.png", "memory.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


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
    assert report.costs(measured) in out
    assert "workloads: 2, seconds: " in out


@pytest.mark.any_kernel_set
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--filter", "absent"], "--filter absent: no such workload; there are prefill-512, "),
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
    assert [line.split()[0] for line in lines] == ["workload", "tiny", "numpy", "sinks", "numpy"]
    # The other contenders are no business of ours.
    assert ["REGRESSION" in line for line in lines] == [False, *[bool(status), False] * 2]
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
