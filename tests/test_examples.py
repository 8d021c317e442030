"""The examples, in short forms."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

import fastattn as fa

pytestmark = pytest.mark.any_kernel_set

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", EXAMPLES / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generate_writes_the_same_text_three_times(generate, capsys):
    assert generate.main(["--tokens", "60", "--hidden", "1500", "--order", "6"]) == 0
    report = capsys.readouterr().out
    speeds = re.findall(
        r"^(no cache|KVCache|PagedKVCache) +[\d,]+ tokens per second$", report, re.M
    )
    assert speeds == ["no cache", "KVCache", "PagedKVCache"]
    assert report.endswith("the same text each time\n")
    [text] = re.findall(r"^a function .{60}$", report, re.M)
    words = set(generate.corpus().split())
    known = [word in words for word in text.split()[:-1]]
    assert sum(known) > len(known) / 2  # recognisable


def test_generate_is_the_model_that_it_says(generate):
    """Back-off log-probabilities of the last characters, less votes for what came after them."""
    order, hidden = 4, 400
    text = generate.corpus()[:20_000]
    model = generate.make_model(text, order, hidden)
    base, units = generate.context_units(text, order, hidden)
    units = dict(units)
    assert len(units) == hidden
    attends = [generate.no_cache(block.attention, 0) for block in model.blocks]
    for length in (40, 41, 300):
        written = "\n" * order + text[:length]
        tokens = np.array([generate.ALPHABET.index(c) for c in written])
        expected = base.astype(np.float64)
        for n in range(1, order + 1):
            expected = expected + units.get(written[-n:], 0.0)
        last, m = written[-(order - 1) :], order - 1
        followers = [tokens[i + m] for i in range(len(written) - m) if written[i : i + m] == last]
        weight = 1 / (len(followers) + np.exp(-generate.SHARPNESS / 2))
        for follower in followers:
            expected[follower] -= generate.SUPPRESSION * weight
        np.testing.assert_allclose(model(tokens, 0, attends), expected, atol=1e-3)
    # The units' changes add up to log-probabilities.
    longest = max(units, key=len)
    log_p = base + sum(units[longest[-n:]] for n in range(1, len(longest) + 1))
    assert np.exp(log_p).sum() == pytest.approx(1.0, abs=1e-5)


def test_generate_names_what_is_wrong(generate, capsys):
    for argv, message in (
        (["--prompt", "π"], "--prompt has characters that the model does not know: ['π']"),
        (["--tokens", "0"], "--tokens and --hidden must be at least 1, --order at least 2"),
        (["--order", "1"], "--tokens and --hidden must be at least 1, --order at least 2"),
    ):
        with pytest.raises(SystemExit):
            generate.main(argv)
        assert message in capsys.readouterr().err


def test_generate_layers_are_fastattns(generate):
    model = generate.make_model("a b a b", 2, 4)
    assert all(isinstance(block.attention, fa.MultiHeadAttention) for block in model.blocks)
