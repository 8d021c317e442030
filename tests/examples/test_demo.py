"""The demo on arrays it makes, and its encoder against a float64 one."""

import argparse
import importlib.util
import math
import re
import tempfile

import numpy as np
import pytest


@pytest.fixture
def demo(load):
    return load("demo.__main__")


@pytest.fixture
def minilm(load):
    return load("demo.encoder")


@pytest.fixture
def sentences(load):
    return load("demo.sentences")


SIZES = {"vocabulary": 60, "hidden": 64, "intermediate": 96, "num_layers": 2, "max_positions": 32}


@pytest.fixture
def arguments(demo):
    """The demo's options from a command line."""
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return lambda *argv: parser.parse_args([str(x) for x in argv])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        "A man is eating food. The girl is carrying a baby.\n\n"
        "A man is riding a horse. A cheetah is running behind its prey. Too short."
    )
    return path


# --- the whole demo ---------------------------------------------------------------------------


def test_demo_on_made_arrays(text, tmp_path, monkeypatch, capsys, demo, arguments):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    args = arguments("--made", "--text", text, "--query", "Who carries the baby?", "--long", 40)
    assert demo.run(args) == 0
    report = capsys.readouterr().out
    assert "random weights made here, as --made asks" in report
    assert "text.txt: 4 sentences, " in report
    nearest = report.split("Nearest to: Who carries the baby?\n")[1].split("\n\n")[0]
    assert len(nearest.splitlines()) == 4
    assert "The girl is carrying a baby." in nearest.splitlines()[0]
    differences = [float(x) for x in re.findall(r" (\d\.\de[-+]\d\d)", report)]
    assert len(differences) == 3
    assert max(differences) < 1e-5
    assert len(re.findall(r"^    fastattn +[\d.]+ m?s", report, re.MULTILINE)) == 2
    assert len(re.findall(r"^    plain NumPy +[\d.]+ m?s", report, re.MULTILINE)) == 2
    # The result, then the gain, then where the time went.
    places = [report.index(x) for x in ("Nearest to", "How exact", "The gain", "Where the time")]
    assert places == sorted(places)
    # Where the long document's attention is behind, the reason follows.
    for reason in re.findall(r"^    fastattn .* times the time\n(.*)", report, re.MULTILINE):
        assert "Behind" in reason
    row = r"^    plain NumPy .*  fastattn [\d.]+ times (as fast|the time)$"
    assert len(re.findall(row, report, re.MULTILINE)) == 1
    shares = re.findall(
        r"^    \S.* attention +[\d.]+ m?s +\((\d+)%\), everything", report, re.MULTILINE
    )
    with_torch = importlib.util.find_spec("torch") is not None
    assert report.count("    PyTorch ") == 2 * with_torch
    assert len(shares) == 2 + with_torch and all(0 <= int(share) <= 100 for share in shares)
    if importlib.util.find_spec("matplotlib") is None:
        assert f"No picture without matplotlib: {demo.INSTALL_MATPLOTLIB}" in report
    else:
        path = tmp_path / "fastattn-demo.png"
        assert report.endswith(f": {path}\n")
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.any_kernel_set
@pytest.mark.parametrize(
    ("ours", "plain", "reason"),
    [
        ((10.0, 1.0), (12.0, 3.0), None),
        ((13.0, 1.0), (12.0, 3.0), "although its attention was faster"),
        ((12.0, 3.0), (10.0, 1.0), "Behind, because the sequences are short"),
    ],
)
def test_demo_says_why_fastattn_is_behind(ours, plain, reason, capsys, demo, minilm):
    encoders = {}
    for name, (seconds, attention_seconds) in {"fastattn": ours, "plain NumPy": plain}.items():
        encoder = minilm.TimedEncoder(minilm.made_tensors(**SIZES))
        encoder.seconds, encoder.attention_seconds = seconds, attention_seconds
        encoders[name] = encoder
    demo._report_parts(encoders)
    report = capsys.readouterr().out
    for text in ("although its attention was faster", "Behind, because the sequences are short"):
        assert (text in report) == (text == reason)


@pytest.mark.any_kernel_set
def test_ratio_reads_either_way(demo):
    assert demo._ratio(3.0, 1.0) == "3.0 times as fast"
    assert demo._ratio(1.04, 1.0) == "1.04 times as fast"
    assert demo._ratio(1.0, 1.25) == "1.25 times the time"


@pytest.mark.any_kernel_set
def test_timed_encoder_counts(rng, minilm):
    tensors = minilm.made_tensors(**SIZES)
    timed = minilm.TimedEncoder(tensors)
    token_ids, lengths = minilm.padded([[1, 2, 3], [4, 5]])
    embeddings = timed.embed(token_ids, lengths)
    np.testing.assert_array_equal(embeddings, minilm.Encoder(tensors).embed(token_ids, lengths))
    assert 0 < timed.attention_seconds < timed.seconds


@pytest.mark.any_kernel_set
def test_missing_weights_are_said(monkeypatch, capsys, demo, minilm, arguments):
    monkeypatch.setattr(minilm, "find_model", lambda: None)
    demo._model(arguments())
    assert f"the weights are not installed: {demo.INSTALL_MODEL}" in capsys.readouterr().out


@pytest.mark.any_kernel_set
def test_missing_libraries_are_said(monkeypatch, capsys, tmp_path, demo, arguments):
    find_spec = importlib.util.find_spec
    missing = {"safetensors", "tokenizers", "matplotlib", "tqdm"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
    )
    demo._model(arguments("--model", tmp_path))
    said = capsys.readouterr().out
    assert f"safetensors and tokenizers cannot be imported: {demo.INSTALL_READERS}" in said
    assert demo.run(arguments("--plot", tmp_path / "x.png")) == 1
    assert capsys.readouterr().err == (
        f"fastattn demo: --plot needs matplotlib: {demo.INSTALL_MATPLOTLIB}\n"
    )
    assert demo._progress([1, 2], "label") == [1, 2]


@pytest.mark.any_kernel_set
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--text", "absent.txt"], "--text absent.txt: No such file or directory"),
        (["--text", "empty.txt"], "--text empty.txt: no sentence of 4 words or more"),
        (["--made", "--layer", "7"], "--layer must be at most 6 and --head at most 12, got 7 and"),
        (["--model", "absent"], "--model absent: "),
    ],
)
def test_errors_are_one_line(argv, message, tmp_path, monkeypatch, capsys, demo, arguments):
    if "--model" in argv:
        pytest.importorskip("safetensors")
        pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("No.")
    assert demo.run(arguments(*argv)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fastattn demo: {message}")
    assert error.count("\n") == 1


@pytest.mark.any_kernel_set
@pytest.mark.parametrize("option", ["--top", "--long", "--threads", "--layer", "--head"])
def test_counts_must_be_positive(option, capsys, arguments):
    with pytest.raises(SystemExit):
        arguments(option, "0")
    assert "must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.any_kernel_set
def test_plot(tmp_path, demo, minilm):
    pytest.importorskip("matplotlib")
    encoder = minilm.Encoder(minilm.made_tensors(**SIZES))
    path = tmp_path / "weights.png"
    demo._plot(path, encoder, demo.Tokens([1, 2, 3], ["a", "b"], [0, 1, 1]), 2, 1)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(demo.DemoError, match="--plot"):
        demo._plot(tmp_path / "absent" / "x.png", encoder, demo.Tokens([1], ["a"], [0]), 1, 1)


# --- text -------------------------------------------------------------------------------------


@pytest.mark.any_kernel_set
def test_markdown_becomes_sentences(sentences):
    markdown = (
        "# A title of some words.\n\nIt reads `q`, *e.g.* from [the docs](x.md), as\nit is. "
        "Then it computes the result.\n\n```python\nnot a sentence of prose at all.\n```\n"
        "| a | table | of | words |\n- An item of the list.\n- Another item of the list.\n"
    )
    assert list(sentences.split_sentences(sentences.markdown_prose(markdown))) == [
        "It reads q, *e.g.* from the docs, as it is.",
        "Then it computes the result.",
        "An item of the list.",
        "Another item of the list.",
    ]


@pytest.mark.any_kernel_set
def test_docstring_becomes_sentences(sentences):
    docstring = (
        "Compute `this` from that thing.\n\nParameters\n----------\nq : ndarray, (m, n)\n"
        "    The queries of the call.\n\nExamples\n--------\n>>> q = 1\n>>> print(q, 'of it.')\n1\n"
    )
    assert list(sentences.split_sentences(sentences.docstring_prose(docstring))) == [
        "Compute this from that thing.",
        "The queries of the call.",
    ]


@pytest.mark.any_kernel_set
def test_project_text_holds_the_docstrings(sentences):
    source, found = sentences.read_sentences(None)
    assert source == "fastattn's docs and docstrings"
    assert "Keys and values of a batch of sequences, appended in place." in found  # a class
    assert "Forget the last tokens of several sequences." in found  # a method
    assert "Attention by its definition; see fastattn.attention for the arguments." in found
    assert len(found) == len(set(found)) > 50


@pytest.mark.any_kernel_set
def test_made_tokens(demo):
    tokens = demo._made_tokenizer("The cat, the CAT")
    assert tokens.words == ["The", "cat", ",", "the", "CAT"]
    assert tokens.ids[0] == tokens.ids[3] and tokens.ids[1] == tokens.ids[4]
    assert tokens.word_of == [0, 1, 2, 3, 4]


# --- encoder ----------------------------------------------------------------------------------


def embed_float64(tensors, token_ids, length):
    """One sentence through BERT by the book, in float64, with the exact erf."""
    t = {name: array.astype(np.float64) for name, array in tensors.items()}

    def dense(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-12)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    x = t["embeddings.word_embeddings.weight"][token_ids[:length]]
    x = x + t["embeddings.position_embeddings.weight"][:length]
    x = norm(x + t["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(SIZES["num_layers"]):
        prefix = f"encoder.layer.{i}"
        q, k, v = (dense(x, f"{prefix}.attention.self.{n}") for n in ("query", "key", "value"))
        heads = []
        for start in range(0, x.shape[1], 32):
            columns = slice(start, start + 32)
            weights = np.exp(q[:, columns] @ k[:, columns].T / math.sqrt(32))
            weights /= weights.sum(axis=1, keepdims=True)
            heads.append(weights @ v[:, columns])
        attended = dense(np.concatenate(heads, axis=1), f"{prefix}.attention.output.dense")
        x = norm(attended + x, f"{prefix}.attention.output.LayerNorm")
        hidden = dense(x, f"{prefix}.intermediate.dense")
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
        x = norm(dense(hidden, f"{prefix}.output.dense") + x, f"{prefix}.output.LayerNorm")
    mean = x.mean(axis=0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize(
    "attention_class", ["MultiHeadAttention", "PlainAttention", "ReferenceAttention"]
)
def test_encoder_against_float64(attention_class, rng, minilm):
    tensors = minilm.made_tensors(**SIZES)
    token_ids = rng.integers(0, SIZES["vocabulary"], (4, 21))
    lengths = np.array([21, 1, 8, 17])
    actual = minilm.Encoder(tensors, getattr(minilm, attention_class)).embed(token_ids, lengths)
    assert actual.dtype == np.float32
    for row, ids, length in zip(actual, token_ids, lengths, strict=True):
        np.testing.assert_allclose(row, embed_float64(tensors, ids, length), rtol=0, atol=2e-6)


def test_torch_encoder_against_float64(rng, load, minilm):
    encoder = load("demo.torch_encoder", "torch").TorchEncoder(minilm.made_tensors(**SIZES))
    for lengths in (np.array([21, 1, 8, 17]), np.full(4, 21)):
        token_ids = rng.integers(0, SIZES["vocabulary"], (4, 21))
        actual = encoder.embed(token_ids, lengths)
        for row, ids, length in zip(actual, token_ids, lengths, strict=True):
            wanted = embed_float64(minilm.made_tensors(**SIZES), ids, length)
            np.testing.assert_allclose(row, wanted, rtol=0, atol=2e-6)
    assert 0 < encoder.attention_seconds < encoder.seconds


def test_head_weights_are_those_of_the_softmax(demo, minilm):
    encoder = minilm.Encoder(minilm.made_tensors(**SIZES))
    ids = [3, 1, 4, 1]
    weights = demo._head_weights(encoder, demo.Tokens(ids, list("abcd"), [0, 1, 2, 3]), 2, 2)
    x = encoder.states(np.array([ids]), np.array([4]), num_layers=1)[0].astype(np.float64)
    layer = encoder.layers[1].attention
    q, k = (x @ layer.w_q + layer.w_q_bias)[:, 32:], (x @ layer.w_k + layer.w_k_bias)[:, 32:]
    expected = np.exp(q @ k.T / math.sqrt(32))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, expected, atol=2e-6)

    # The last two tokens are pieces of one word.
    by_word = demo._head_weights(encoder, demo.Tokens(ids, list("abc"), [0, 1, 2, 2]), 2, 2)
    merged = np.column_stack([expected[:, :2], expected[:, 2:].sum(axis=1)])
    merged = np.vstack([merged[:2], merged[2:].mean(axis=0)])
    np.testing.assert_allclose(by_word, merged, atol=2e-6)


@pytest.mark.any_kernel_set
def test_gelu(minilm):
    x = np.linspace(-9, 9, 20001)
    expected = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    # The formula's error in erf, 1.5e-7, times |x| / 2.
    assert np.all(np.abs(minilm.gelu(x.copy()) - expected) <= 0.75e-7 * np.abs(x) + 1e-15)
    x32 = x.astype(np.float32)
    assert np.all(np.abs(minilm.gelu(x32) - expected) <= 3e-7 * np.abs(x) + 1e-12)
    # In blocks, and in place.
    many = np.tile(x.astype(np.float32), (3, 5))
    assert minilm.gelu(many) is many
    np.testing.assert_array_equal(many, np.tile(x32, (3, 5)))


@pytest.mark.any_kernel_set
def test_positions_start_again_past_the_last(minilm):
    encoder = minilm.Encoder(minilm.made_tensors(**SIZES))
    vectors = encoder.token_vectors(np.full(70, 5))
    np.testing.assert_array_equal(vectors[:32], vectors[32:64])


def test_real_weights_know_what_sentences_mean(demo, minilm, arguments):
    if minilm.find_model() is None:
        pytest.skip(f"needs the weights: {demo.INSTALL_MODEL}")
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    tokenize, tensors, name = demo._model(arguments())
    assert name == "all-MiniLM-L6-v2"
    sentences = (
        "A man is eating food.",
        "A man is eating a piece of bread.",
        "The girl is carrying a baby.",
    )
    [(a, b, c)] = demo._embed([minilm.Encoder(tensors)], [tokenize(s) for s in sentences])
    # As sentence-transformers gives them for this model.
    assert float(a @ b) == pytest.approx(0.7553, abs=1e-3)
    assert float(a @ c) == pytest.approx(-0.1050, abs=1e-3)
    tokens = tokenize("Unbelievable tokens!")
    assert tokens.words == ["[CLS]", "Unbelievable", "tokens", "!", "[SEP]"]
    assert len(tokens.word_of) == len(tokens.ids) > 5
