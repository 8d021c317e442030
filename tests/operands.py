"""Small operands, and calls that must be refused."""

import numpy as np
import pytest

once = pytest.mark.any_kernel_set

# float32 results of a few products of numbers near one.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

B, H, HK, LQ, LK, D, DV = 2, 4, 2, 5, 7, 8, 6
OUT = (B, H, LQ, DV)
SCORES = (B, H, LQ, LK)
FLOATS = "float16, bfloat16, float32 or float64"


def operands(dtype=np.float32):
    """q, k, v of (B, H, LQ, D), (B, HK, LK, D), (B, HK, LK, DV)."""
    rng = np.random.default_rng(0)
    shapes = (B, H, LQ, D), (B, HK, LK, D), (B, HK, LK, DV)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def read_only(array):
    array.flags.writeable = False
    return array


def refuse(function, arguments, options, error, message):
    """Expect the message, or its beginning where that ends in dots, and arrays left alone."""
    arrays = [x for x in [*arguments, *options.values()] if type(x) is np.ndarray]
    before = [array.tobytes() for array in arrays]
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    # Python's own messages begin with the function's name.
    text = text.removeprefix(f"{function.__name__}() ")
    beginning = message.removesuffix("...")
    assert (text if beginning == message else text[: len(beginning)]) == beginning
    assert [array.tobytes() for array in arrays] == before
