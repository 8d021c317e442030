"""KVCache copied, saved and loaded; files that are damaged or none."""

import io
import subprocess
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from caches import DTYPES, HEAD_DIM, NUM_KV_HEADS, make_cache, make_tokens, once, snapshot

import fastattn as fa


def assert_same_tokens(cache, other):
    assert cache._parameters() == other._parameters()
    assert cache.lengths().tolist() == other.lengths().tolist()
    for b in range(cache.batch_size):
        assert cache.positions(b).tolist() == other.positions(b).tolist()
        live = np.s_[b, :, : len(cache.positions(b))]
        for array, same in zip(cache._arrays, other._arrays, strict=True):
            np.testing.assert_array_equal(array[live], same[live])


def filled(rng, dtype=np.float32, **options):
    cache = make_cache(3, 7, dtype=dtype, **options)
    for counts in ([5, 0, 7], [2, 0, 0]):
        cache.append(*make_tokens(rng, 3, new=7), counts=counts)
    if options:
        cache.append(*make_tokens(rng, 3, new=7), counts=[7, 0, 2])
    return cache


@once
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"window_tokens": 3}, {"window_tokens": 2, "sink_tokens": 2}]
)
def test_copy_and_file_are_the_same_cache(rng, tmp_path, dtype, options):
    cache = filled(rng, dtype, **options)
    path = tmp_path / "a cache"
    cache.save(path)
    with np.load(path, allow_pickle=False) as members:
        for name in ("k", "v"):  # live tokens only
            assert len(members[name]) == sum(len(cache.positions(b)) for b in range(3))
    for other in (fa.KVCache.load(path), fa.KVCache.load(str(path)), cache.copy()):
        assert_same_tokens(cache, other)
        before = snapshot(cache)
        if options:
            other.append(*make_tokens(rng, 3, new=3))
        other.truncate([0, 0, other.lengths()[2] - 1])
        other.reorder([2, 1, 0])
        assert snapshot(cache) == before


@once
def test_empty_cache_in_a_file(tmp_path):
    cache = make_cache()
    cache.save(tmp_path / "cache.npz")
    assert_same_tokens(cache, fa.KVCache.load(tmp_path / "cache.npz"))


@once
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_damaged_files(rng, tmp_path, dtype):
    cache = filled(rng, dtype, window_tokens=3)
    path = tmp_path / "cache.npz"
    cache.save(path)
    whole = path.read_bytes()

    def check(damaged):
        path.write_bytes(damaged)
        try:
            other = fa.KVCache.load(path)
        except ValueError as error:
            assert str(error).startswith("`path` must be a file that KVCache.save wrote, got ")
            return True
        assert_same_tokens(cache, other)  # a date, for example
        return False

    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        assert check(whole[:size])
    refused = 0
    for place in range(0, len(whole), 13):
        refused += check(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
    assert refused > len(whole) / 13 / 2


@once
def test_foreign_files(rng, tmp_path):
    cache = filled(rng)
    cache.save(tmp_path / "cache.npz")
    with np.load(tmp_path / "cache.npz") as archive:
        members = dict(archive)
    header = str(members["header"])

    def changed(**changes):
        return {name: x for name, x in {**members, **changes}.items() if x is not None}

    def with_header(old, new):
        assert old in header
        return changed(header=np.array(header.replace(old, new)))

    path = tmp_path / "other.npz"
    for other, message in (
        ({"x": np.zeros(3)}, "it lacks 'header'"),
        (changed(header=np.array("{")), "Expecting"),
        (changed(header=np.array("[]")), ""),
        (with_header("KVCache 2", "KVCache 1"), "its format is 'fastattn.KVCache 1', not"),
        (with_header('"float32"', '"float8_e4m3fn"'), "`dtype` must be"),
        (with_header('"batch_size": 3', '"batch_size": 0'), "`batch_size` must be at least 1"),
        (with_header('"batch_size": 3', '"batch_size": 2'), "its 'lengths' is int64 of shape (3,)"),
        (with_header('"sink_tokens": 0', '"sinks": 0'), "unexpected keyword argument"),
        (changed(lengths=np.array([7, 0, 8])), "its lengths are not those of a cache"),
        (changed(evicted=np.array([1, 0, 1])), "its lengths are not those of a cache"),
        (changed(evicted=np.array([0, 1, 0])), "its lengths are not those of a cache"),
        (changed(evicted=np.array([0, -1, 0])), "its lengths are not those of a cache"),
        (changed(lengths=np.array([7.0, 0.0, 7.0])), "its 'lengths' is float64 of shape (3,)"),
        (changed(evicted=np.array([0])), "its 'evicted' is int64 of shape (1,)"),
        (changed(k=members["k"][:-1]), "its 'k' is float32 of shape"),
        (changed(v=members["v"].astype(np.float64)), "its 'v' is float64 of shape"),
        (changed(v=members["v"].astype(object)), "its 'v' is object of shape"),
        (changed(v=None), "it lacks 'v'"),
        (changed(k_scale=members["k"]), "it holds 'k_scale', which is no part of this cache"),
        (changed(header=np.array([header])), "its 'header' is <U"),
        (changed(header=np.array(header + " " * 5000)), "its 'header' is <U"),
    ):
        np.savez(path, **other)
        with pytest.raises(ValueError, match="`path` must be a file that ") as caught:
            fa.KVCache.load(path)
        assert message in str(caught.value)
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "text").write_text("a cache")
    for name in ("x.npy", "text"):
        with pytest.raises(ValueError, match=r"`path` must be a file that KVCache\.save wrote"):
            fa.KVCache.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        fa.KVCache.load(tmp_path / "absent")


@once
def test_small_files_take_little_memory(rng, tmp_path):
    """Sizes are compared before anything is read: none of these files' claims is believed."""
    cache = filled(rng)
    path = tmp_path / "cache.npz"
    cache.save(path)
    with np.load(path) as archive:
        members = dict(archive)

    def refused(message):
        tracemalloc.start()
        with pytest.raises(ValueError, match="`path` must be a file that ") as caught:
            fa.KVCache.load(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert message in str(caught.value)
        assert peak < 2**20

    np.savez_compressed(path, **{**members, "k": np.zeros((2**22, NUM_KV_HEADS, HEAD_DIM))})
    assert path.stat().st_size < 2**20
    refused("is compressed, or larger than the file")

    def written(name, content, size=None):
        """The file with one more member, or with this content of one that it has."""
        with zipfile.ZipFile(path, "w") as archive:
            for other, array in members.items():
                buffer = io.BytesIO()
                np.save(buffer, array)
                mine = content if other == name else buffer.getvalue()
                archive.writestr(f"{other}.npy", mine)
            if name not in members:
                archive.writestr(name, content)
            if size is not None:
                info = archive.getinfo(f"{name}.npy")
                info.file_size = info.compress_size = size

    def header_of(shape):
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        return buffer.getvalue()

    shape = members["k"].shape
    written("k", header_of(shape))
    refused(f"its 'k' of shape {shape} has 0 bytes")
    written("k", header_of((2**40, *shape[1:])))
    refused("its 'k' is float32 of shape (1099511627776, ")
    written("k", header_of(shape) + members["k"].tobytes(), size=2**33)
    refused("its 'k' is compressed, or larger than the file")
    written("readme", b"hello")
    refused("it holds 'readme', which is no part of this cache")
    with pytest.warns(UserWarning, match="Duplicate name"):
        written("k.npy", header_of(shape))
    refused("it holds 'k' twice")
    written("v", b"not an array")
    refused("magic string is not correct")
    header = str(members["header"])
    huge = header.replace('"batch_size": 3', f'"batch_size": {2**40}')
    np.savez(path, **{**members, "header": np.array(huge)})
    refused("its 'lengths' is int64 of shape (3,)")


@once
def test_bfloat16_is_not_needed_until_it_is(rng, tmp_path):
    filled(rng, ml_dtypes.bfloat16).save(tmp_path / "cache.npz")
    program = (
        "import sys, fastattn as fa\n"
        "try:\n    fa.KVCache.load(sys.argv[1])\n"
        "except ImportError as error:\n    print(error)\n"
        "assert 'ml_dtypes' not in sys.modules\n"
        "import ml_dtypes\n"
        "print(fa.KVCache.load(sys.argv[1]).dtype)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "cache.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "`path` holds bfloat16: import ml_dtypes before loading\nbfloat16\n"
