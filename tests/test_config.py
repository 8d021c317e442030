"""Thread-count rules, control groups, show_config and the command line."""

import json
import os
import platform

import numpy as np
import pytest
from process import output_of, run_python

import fastattn as fa
from fastattn import _config, _core, _selftest
from fastattn.__main__ import main

pytestmark = pytest.mark.any_kernel_set

needs_openmp = pytest.mark.skipif(not _core.has_openmp(), reason="built without OpenMP")
needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system"
)

DEFAULT_THREADS = "from fastattn import _config; print(_config.default_num_threads())"
CPUS = _config._CPUS


# ---- threads ------------------------------------------------------------------------------------


@needs_openmp
@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, CPUS),
        ({"FASTATTN_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "3,2"}, 3),
        ({"OMP_NUM_THREADS": " 4 "}, 4),
        ({"FASTATTN_NUM_THREADS": "5", "OMP_NUM_THREADS": "3"}, 5),
        ({"FASTATTN_NUM_THREADS": "", "OMP_NUM_THREADS": ""}, CPUS),
        ({"FASTATTN_NUM_THREADS": "100000"}, 100000),
        ({"FASTATTN_NUM_THREADS": "2", "OMP_NUM_THREADS": "many"}, 2),
    ],
)
def test_default_threads_from_the_environment(environment: dict[str, str], threads: int) -> None:
    assert output_of("-c", DEFAULT_THREADS, **environment) == str(threads)


@pytest.mark.skipif(_core.has_openmp(), reason="built with OpenMP")
def test_without_openmp_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_NUM_THREADS", "5")
    assert _config.default_num_threads() == 1
    assert fa.show_config("dicts")["threads"]["set by"] == "built without OpenMP"


@needs_affinity
def test_default_threads_from_affinity() -> None:
    pin = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    assert output_of("-c", pin + DEFAULT_THREADS) == "1"


@needs_openmp
def test_environment_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert _config.default_num_threads() == 1
    monkeypatch.setenv("FASTATTN_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert _config.default_num_threads() == 1


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", " ", "2147483648", "9" * 5000, "2,2"])
def test_bad_num_threads_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_NUM_THREADS", value)
    message = f"`FASTATTN_NUM_THREADS` must be an integer from 1 to 2147483647, got {value!r}"
    with pytest.raises(ValueError) as error:
        _config.default_num_threads()
    assert str(error.value) == message
    x = np.ones((1, 2, 3), np.float32)
    with pytest.raises(ValueError) as error:
        fa.attention(x, x, x)
    assert str(error.value) == message
    assert fa.attention(x, x, x, num_threads=1).shape == x.shape


@pytest.mark.parametrize("value", ["0", "many", "2,", ",2", "2,0", "2,many", "2147483648", "2;2"])
def test_bad_openmp_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    x = np.ones((1, 2, 3), np.float32)
    with pytest.raises(ValueError) as error:
        fa.attention(x, x, x)
    assert str(error.value) == (
        "`OMP_NUM_THREADS` must be an integer from 1 to 2147483647, or several with commas between "
        f"them, got {value!r}"
    )
    assert fa.attention(x, x, x, num_threads=1).shape == x.shape


@pytest.mark.parametrize("name", ["FASTATTN_NUM_THREADS", "OMP_NUM_THREADS"])
def test_bad_num_threads_variable_does_not_stop_the_import(name: str) -> None:
    assert output_of("-c", "import fastattn", **{name: "none"}) == ""


@needs_openmp
@pytest.mark.parametrize("environment", [{}, {"FASTATTN_NUM_THREADS": "2"}])
def test_threadpoolctl_limits_the_default(environment: dict[str, str]) -> None:
    code = """
import threadpoolctl
from fastattn import _config
assert any(pool["user_api"] == "openmp" for pool in threadpoolctl.threadpool_info())
before = _config.default_num_threads()
with threadpoolctl.threadpool_limits(1):
    inside = _config.default_num_threads()
    rule = _config.show_config("dicts")["threads"]["set by"]
print([before, inside, _config.default_num_threads()], rule)
"""
    environment = {"OMP_NUM_THREADS": "2"} | environment
    expected = "[2, 1, 2] limit set on the OpenMP runtime"
    assert output_of("-c", code, **environment) == expected


# ---- control groups -----------------------------------------------------------------------------

V2 = "0::/a/b\n"
V1 = "7:memory:/m\n3:cpu,cpuacct:/a/b\n2:cpuset:/\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        pytest.param(V2, {"a/b/cpu.max": "max 100000"}, None, id="v2 without a limit"),
        pytest.param(V2, {"a/b/cpu.max": "200000 100000"}, 2, id="v2"),
        pytest.param(V2, {"a/b/cpu.max": "150000 100000"}, 2, id="v2 rounded up"),
        pytest.param(V2, {"a/b/cpu.max": "50000 100000"}, 1, id="v2 less than one"),
        pytest.param(
            V2, {"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000"}, 3, id="v2 ancestor"
        ),
        pytest.param(V2, {"cpu.max": "100000 50000"}, 2, id="v2 container root"),
        pytest.param("0::/\n", {"cpu.max": "100000 50000"}, 2, id="v2 own namespace"),
        pytest.param(
            V1, {"cpu/a/b/cpu.cfs_quota_us": "250000", "cpu/a/b/cpu.cfs_period_us": "100000"}, 3,
            id="v1",
        ),
        pytest.param(
            V1, {"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/a/b/cpu.cfs_period_us": "100000"}, None,
            id="v1 without a limit",
        ),
        pytest.param(
            V1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1,
            id="v1 container root",
        ),
        pytest.param(V1, {"cpu/a/b/cpu.cfs_quota_us": "100000"}, None, id="v1 without a period"),
        pytest.param(V2, {}, None, id="no files"),
        pytest.param(V2, {"a/b/cpu.max": "many 100000"}, None, id="unreadable quota"),
        pytest.param(V2, {"a/b/cpu.max": "100000 0"}, None, id="no period"),
        pytest.param("nonsense\n\n", {"cpu.max": "100000 100000"}, None, id="unreadable groups"),
        pytest.param(None, {"cpu.max": "100000 100000"}, None, id="no control groups"),
    ],
)  # fmt: skip
def test_cgroup_cpus(groups, files, cpus, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_config, "CGROUP_FILE", str(tmp_path / "self"))
    monkeypatch.setattr(_config, "CGROUP_ROOT", str(tmp_path / "fs"))
    if groups is not None:
        (tmp_path / "self").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert _config.cgroup_cpus() == cpus


@pytest.mark.skipif(platform.system() != "Linux", reason="control groups are Linux's")
def test_default_is_the_lesser_of_affinity_and_quota() -> None:
    assert _config.affinity_cpus() == len(os.sched_getaffinity(0))
    assert min(_config._AFFINITY_CPUS, _config._CGROUP_CPUS or _config._AFFINITY_CPUS) == CPUS


# ---- show_config --------------------------------------------------------------------------------


def test_show_config_dicts() -> None:
    shown = fa.show_config("dicts")
    assert list(shown) == ["fastattn", "build", "kernels", "threads", "runtime"]
    assert {"compiler", "flags", "openmp", "switches"} <= set(shown["build"])
    assert shown["kernels"]["selected"] in shown["kernels"]["available"]
    assert set(shown["kernels"]["available"]) <= set(shown["kernels"]["known"])
    assert shown["kernels"]["engines"][-2:] == ["vector_f32", "vector_f64"]
    assert shown["threads"]["default"] == _config.default_num_threads()
    assert shown["runtime"]["numpy"] == np.__version__
    assert json.loads(json.dumps(shown)) == shown


def test_show_config_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert fa.show_config() is None
    printed = capsys.readouterr().out
    assert f"\nkernels:\n  selected: {_core.selected_isa()}\n" in printed
    assert f"\n  engines: {', '.join(_core.engines(_core.selected_isa()))}\n" in printed
    assert f"\n  available: {', '.join(_core.available_isas())}\n" in printed


@pytest.mark.parametrize("mode", ["dict", None, 1])
def test_show_config_bad_mode(mode: object) -> None:
    with pytest.raises(ValueError) as error:
        fa.show_config(mode)
    assert str(error.value) == f'`mode` must be "stdout" or "dicts", got {mode!r}'


# ---- command line -------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == fa.show_config("dicts")


def test_selftest_passes() -> None:
    printed = output_of("-m", "fastattn", "selftest")
    checks = len(_selftest.CASES) * len(_core.available_isas()) * len(_selftest.MAX_ERROR)
    assert printed.splitlines()[-1] == f"{checks} passed, 0 failed"


def _wrong_last_value(out, lse, num_threads):
    out[..., -1] += np.float32(1e-3)


def _wrong_lse(out, lse, num_threads):
    lse[..., 0] = -np.inf


def _wrong_with_two_threads(out, lse, num_threads):
    out[0] *= 1 + 2.0**-20 * (num_threads == 2)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_wrong_last_value, "error "),
        (_wrong_lse, "error of lse inf"),
        (_wrong_with_two_threads, "other bits with 2 threads"),
    ],
)
def test_selftest_finds(damage, problem, monkeypatch, capsys) -> None:
    def damaged(*arrays, num_threads, **options):
        out, lse = fa.attention(*arrays, num_threads=num_threads, **options)
        damage(out, lse, num_threads)
        return out, lse

    monkeypatch.setattr(_selftest, "attention", damaged)
    isa = _config.ISA
    assert main(["selftest"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert not lines[-1].endswith(" 0 failed")
    assert any(line.startswith(f"all keys, {isa} float32: {problem}") for line in lines)
    assert _config.ISA == isa


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"]])
def test_bad_command_line(arguments: list[str]) -> None:
    done = run_python("-m", "fastattn", *arguments)
    assert done.returncode == 2
    assert "usage: python -m fastattn" in done.stderr
