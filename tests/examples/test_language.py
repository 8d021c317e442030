"""The examples that read and write text, in short forms."""

import importlib.util
import re

import numpy as np
import pytest

import fastattn as fa

pytestmark = pytest.mark.any_kernel_set


@pytest.fixture
def load_torch(load):
    """The same for one that trains."""
    return lambda name: load(name, "torch", "tqdm", "matplotlib")


@pytest.fixture
def generate(load):
    return load("generate")


@pytest.fixture
def ngram(load):
    return load("ngram")


def test_generate_writes_the_same_text_three_times(generate, ngram, capsys):
    assert generate.main(["--tokens", "60", "--hidden", "1500", "--order", "6"]) == 0
    report = capsys.readouterr().out
    speeds = re.findall(
        r"^(no cache|KVCache|PagedKVCache) +[\d,]+ tokens per second$", report, re.M
    )
    assert speeds == ["no cache", "KVCache", "PagedKVCache"]
    assert report.endswith("the same text each time\n")
    [text] = re.findall(r"^a function .{60}$", report, re.M)
    words = set(ngram.corpus().split())
    known = [word in words for word in text.split()[:-1]]
    assert sum(known) > len(known) / 2  # recognisable


def test_generate_is_the_model_that_it_says(generate, ngram):
    """Back-off log-probabilities of the last characters, less votes for what came after them."""
    order, hidden = 4, 400
    text = ngram.corpus()[:20_000]
    model = ngram.make_model(text, order, hidden)
    base, units = ngram.context_units(text, order, hidden)
    units = dict(units)
    assert len(units) == hidden
    attends = [generate.no_cache(layer, 0) for layer in model.layers]
    for length in (40, 41, 300):
        written = "\n" * order + text[:length]
        tokens = np.array([ngram.ALPHABET.index(c) for c in written])
        expected = base.astype(np.float64)
        for n in range(1, order + 1):
            expected = expected + units.get(written[-n:], 0.0)
        last, m = written[-(order - 1) :], order - 1
        followers = [tokens[i + m] for i in range(len(written) - m) if written[i : i + m] == last]
        weight = 1 / (len(followers) + np.exp(-ngram.SHARPNESS / 2))
        for follower in followers:
            expected[follower] -= ngram.SUPPRESSION * weight
        np.testing.assert_allclose(model(tokens, 0, attends), expected, atol=1e-3)
    # The units' changes add up to log-probabilities.
    longest = max(units, key=len)
    log_p = base + sum(units[longest[-n:]] for n in range(1, len(longest) + 1))
    assert np.exp(log_p).sum() == pytest.approx(1.0, abs=1e-5)


def test_generate_names_what_is_wrong(generate, capsys):
    for argv, message in (
        (
            ["--prompt", "π", "--order", "2", "--hidden", "1"],
            "characters that the model does not know: ['π']",
        ),
        (["--tokens", "0"], "--tokens and --hidden must be at least 1, --order at least 2"),
        (["--order", "1"], "--tokens and --hidden must be at least 1, --order at least 2"),
        (["--temperature", "-1"], "--temperature must be finite and, like --seed, not below 0"),
        (["--weights", "missing.npz"], "No such file or directory: 'missing.npz'"),
        (
            ["--weights", "w.npz", "--order", "4"],
            "--order and --hidden are of the model that is made without --weights",
        ),
    ):
        with pytest.raises(SystemExit):
            generate.main(argv)
        assert message in capsys.readouterr().err


def test_ngram_layers_are_fastattns(ngram):
    model = ngram.make_model("a b a b", 2, 4)
    assert all(isinstance(layer, fa.MultiHeadAttention) for layer in model.layers)


def test_generate_refuses_files_of_other_things(generate, tmp_path, capsys):
    path = tmp_path / "other.npz"
    np.savez(path, x=np.zeros(3))
    array = tmp_path / "one.npy"
    np.save(array, np.zeros(3))
    for other in (path, array):
        with pytest.raises(SystemExit):
            generate.main(["--weights", str(other)])
        assert "does not hold the weights that train_gpt.py saves" in capsys.readouterr().err


SMALL_GPT = [
    "--steps", "60", "--batch-size", "4", "--context", "48", "--layers", "2", "--embed-dim", "32",
    "--heads", "2",
]  # fmt: skip


def trained(train_gpt, capsys, *options):
    """Run train_gpt.py in a short form; its first loss, its last, bits, unigrams, bigrams."""
    assert train_gpt.main([*SMALL_GPT, *options]) == 0
    report = capsys.readouterr().out
    losses = re.search(r": loss ([\d.]+) at first, ([\d.]+) at last", report).groups()
    bits = re.search(
        r"held-out character: ([\d.]+); unigrams ([\d.]+), bigrams ([\d.]+)$", report, re.M
    ).groups()
    return [float(number) for number in (*losses, *bits)]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 0.002), ("bfloat16", 0.03)])
def test_gpt_learns_the_same_with_either_attention(load_torch, capsys, dtype, tolerance):
    train_gpt = load_torch("train_gpt")
    ours = trained(train_gpt, capsys, "--dtype", dtype)
    theirs = trained(train_gpt, capsys, "--dtype", dtype, "--attention", "torch")
    np.testing.assert_allclose(ours, theirs, atol=tolerance)
    first, last, bits, unigrams, bigrams = ours
    assert last < first - 1
    assert bits < unigrams + 0.05 and bigrams < unigrams


def test_gpt_counts_bits_as_by_hand(load_torch):
    torch, train_gpt = load_torch("torch"), load_torch("train_gpt")
    # abab..., then aba: b always follows a, a always follows b.
    text = train_gpt.Text("ab", torch.tensor([0, 1] * 500), torch.tensor([0, 1, 0]))
    unigram, bigram = train_gpt.counting_bits(text)
    assert unigram == pytest.approx(1.0, abs=1e-3)
    assert bigram == pytest.approx(0.0, abs=1e-3)


def test_gpt_writes_what_it_was_trained_to(load_torch, generate, tmp_path, capsys):
    """NumPy's model has the logits of PyTorch's, and writes the same text with every cache."""
    torch, train_gpt, gpt = load_torch("torch"), load_torch("train_gpt"), load_torch("gpt")
    path = tmp_path / "weights"  # saved under this very name
    trained(train_gpt, capsys, "--save", str(path))

    model = gpt.Gpt.load(path)
    original = train_gpt.Gpt(model.characters, 2, 32, 2, 48)
    original.load_state_dict(
        {name: torch.from_numpy(model.arrays[name]) for name in original.state_dict()}
    )
    tokens = model.encode("The import statement")
    with torch.no_grad():
        expected = original(torch.from_numpy(tokens)[None], train_gpt.ATTENTION["torch"])[0, -1]
    attends = [generate.no_cache(layer, 0) for layer in model.layers]
    np.testing.assert_allclose(model(tokens, 0, attends), expected, atol=1e-4)

    # Longer than the context: a window then, with and without caches.
    options = ["--weights", str(path), "--tokens", "80"]
    for drawn in ([], ["--temperature", "0.8", "--seed", "3"]):
        assert generate.main([*options, *drawn]) == 0
        assert capsys.readouterr().out.endswith("the same text each time\n")


def test_gpt_names_what_is_wrong(load_torch, capsys):
    train_gpt = load_torch("train_gpt")
    for argv, message in (
        (["--steps", "0"], "must be at least 1"),
        (["--embed-dim", "30"], "--embed-dim must be a multiple of 2 * heads"),
        (["--context", "1000000"], "--context must be below"),
    ):
        with pytest.raises(SystemExit):
            train_gpt.main(argv)
        assert message in capsys.readouterr().err


def test_classifier_learns_the_same_with_either_attention(load_torch, tmp_path, capsys):
    classifier = load_torch("text_classifier")
    picture = tmp_path / "classifier.png"
    assert classifier.main(["--quick", "--plot", str(picture)]) == 0
    report = capsys.readouterr().out
    rows = re.findall(r"^(fastattn|PyTorch) +([\d.]+) +([\d.]+) +([\d.]+)%$", report, re.M)
    assert [row[0] for row in rows] == ["fastattn", "PyTorch"]
    chance, frequent = map(
        float,
        re.search(r"chance is ([\d.]+)%,\nthe most frequent family ([\d.]+)%", report).groups(),
    )
    for _, first, last, accuracy in rows:
        assert float(last) < float(first)
        assert float(accuracy) >= max(30, chance + 10, frequent + 10)
    assert len(re.findall(r"ms a step \(median\), attention took \d+% of it$", report, re.M)) == 2
    difference = re.search(r", losses differ by (\S+) \(at most 0.0001\): ok\n\Z", report)[1]
    assert float(difference) <= 1e-4
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_classifier_notices_another_attention(load_torch, monkeypatch, tmp_path, capsys):
    """Padding that takes part, for example."""
    classifier = load_torch("text_classifier")
    right = classifier.ATTENTION["PyTorch"]
    monkeypatch.setitem(classifier.ATTENTION, "fastattn", lambda q, k, v, attn_mask: right(q, k, v))
    monkeypatch.setattr(classifier, "QUICK", classifier.QUICK._replace(epochs=1, target=0.0))
    assert classifier.main(["--quick", "--plot", str(tmp_path / "classifier.png")]) == 1
    assert capsys.readouterr().out.endswith(" (at most 0.0001): MISSED\n")


def test_corpus_has_each_text_once(load):
    corpus = load("corpus")
    sizes = {"texts": 100, "vocabulary": 2000, "max_length": 64}
    texts = corpus.read_texts(np.random.default_rng(0), **sizes)
    every = [" ".join(text.words) for text in texts.training + texts.held_out]
    # Texts are cut after `max_length` tokens; whole ones are all different.
    whole = [t for t in every if len(t.split()) < sizes["max_length"]]
    assert len(set(whole)) == len(whole)
    assert {text.family for text in texts.held_out} == set(range(len(texts.families)))
    assert len(texts.numbers) == sizes["vocabulary"]


def test_stopwatch_counts_both_passes(load_torch, monkeypatch):
    """By a clock that only what is watched, and what is not, move on."""
    torch, stopwatch = load_torch("torch"), load_torch("stopwatch")
    clock = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: clock[0])

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            clock[0] += 1.0
            return q + 2 * k + 3 * v

        @staticmethod
        def backward(ctx, gradient):
            clock[0] += 10.0
            return gradient, 2 * gradient, 3 * gradient

    watch = stopwatch.Stopwatch(Slow.apply)
    q, k, v = (torch.ones(1, 1, 2, 4, requires_grad=True) for _ in range(3))
    out = watch(q, k, v)
    clock[0] += 100.0  # the rest of a model
    assert watch.seconds == 1.0
    (out**2).sum().backward()
    assert watch.seconds == 11.0
    for x, times in ((q, 1), (k, 2), (v, 3)):
        torch.testing.assert_close(x.grad, torch.full_like(x, times * 12.0))
    with torch.no_grad():
        watch(q, k, v)
    assert watch.seconds == 12.0


@pytest.mark.parametrize("length, padding", [(None, 0), (5, 2)])
def test_corpus_pads_texts(load, length, padding):
    corpus = load("corpus")
    chosen = [corpus.Text(["of", "a", "strange"], 5), corpus.Text(["a"], 0)]
    texts = corpus.Texts(chosen, [], ["email", "web"], {"a": 2, "of": 3})
    words, families = texts.arrays(chosen, length)
    none = corpus.PADDING
    expected = [[3, 2, corpus.UNKNOWN, *[none] * padding], [2, none, none, *[none] * padding]]
    assert words.tolist() == expected
    assert families.tolist() == [5, 0]
    assert str(texts) == ("2 docstrings of 2 families to train on, 2 tokens on average; 0 held out")


def test_attention_map_finds_what_is_repeated(load, capsys, tmp_path):
    attention_map = load("attention_map")
    words = attention_map.read_words(300) * 2
    x = attention_map.vectors_of_places(words)
    weights = fa.attention_weights(x, x, scale=60.0, causal=True, q_offset=-100)
    places = np.arange(20, 280)
    # No earlier place is written more alike; a few are written in the very same words.
    assert np.all(weights[300 + places, places] > 0.99 * weights[300 + places].max(-1))

    picture = tmp_path / "map.png"
    draws = importlib.util.find_spec("matplotlib") is not None
    options = ["--words", "1000", *(["--plot", str(picture)] if draws else [])]
    assert attention_map.main(options) == 0
    report = capsys.readouterr().out
    assert report.startswith("1,000,000 weights of 1,000 words in 256 x 256 blocks: ")
    assert report.endswith("ok    the weights sum to 900.000, of 900 places\n")
    assert picture.exists() == draws


def test_attention_map_names_what_is_wrong(load):
    with pytest.raises(SystemExit, match="--words must be 25 to"):
        load("attention_map").main(["--words", "10"])
