"""fastattn.plot: what is drawn, by what matplotlib holds of it."""

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")  # no window

import matplotlib.pyplot as plt  # noqa: E402

import fastattn as fa  # noqa: E402
from fastattn.plot import attention_map  # noqa: E402

pytestmark = pytest.mark.any_kernel_set


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def labels(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def test_weights_are_drawn_with_their_tokens():
    words = "the cat sat on the mat".split()
    x = np.random.default_rng(0).standard_normal((6, 16), dtype=np.float32)
    weights = fa.attention_weights(x, x[:4])
    ax = attention_map(weights, tokens_q=words, tokens_k=words[:4])
    [image] = ax.images
    np.testing.assert_array_equal(image.get_array(), weights)
    assert labels(ax.yaxis) == words and labels(ax.xaxis) == words[:4]
    np.testing.assert_allclose(ax.get_yticks(), np.arange(6))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert ax.yaxis_inverted()  # the first query on top
    assert [a.get_ylabel() for a in ax.figure.axes[1:]] == ["weight"]


def test_tokens_without_room_give_way_to_positions():
    many = [f"token {i}" for i in range(400)]
    ax = attention_map(np.eye(400), tokens_q=many, tokens_k=many)
    assert len(ax.get_yticks()) < 12
    assert not any("token" in label for label in labels(ax.xaxis) + labels(ax.yaxis))


def test_a_pooled_map_counts_positions():
    figure, given = plt.subplots()
    ax = attention_map(
        np.ones((3, 4)), seqlen_q=300, seqlen_k=1000, ax=given, tokens_k=list("abcd"), cmap="magma"
    )
    assert ax is given
    [image] = ax.images
    assert image.get_extent() == [-0.5, 999.5, 299.5, -0.5]
    assert image.get_cmap().name == "magma"
    np.testing.assert_allclose(ax.get_xticks(), [124.5, 374.5, 624.5, 874.5])
    assert figure.axes[1].get_ylabel() == "mean weight"


def test_no_colorbar():
    assert attention_map(np.ones((2, 2)), colorbar=False, norm="log").figure.axes[1:] == []


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "weights", {"weights": [["a"]]}),
        (ValueError, "weights", {"weights": np.ones((2, 3, 3))}),
        (ValueError, "weights", {"weights": np.ones((0, 3))}),
        (ValueError, "tokens_q", {"tokens_q": ["a"]}),
        (ValueError, "tokens_k", {"tokens_k": ["a"] * 4}),
        (ValueError, "seqlen_q", {"seqlen_q": 1}),
        (ValueError, "seqlen_k", {"seqlen_k": 2}),
    ],
)
def test_errors_name_the_argument(error, name, arguments):
    with pytest.raises(error, match=rf"^`{name}` must "):
        attention_map(**({"weights": np.ones((2, 3))} | arguments))
