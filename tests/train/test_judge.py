"""A judge: both orders are asked, only consistent verdicts count, and what it prefers becomes pairs."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from typer.testing import CliRunner

from veneer.cli.main import app
from veneer.train.judge import Endpoint, Judge, Local, Tally, label


class Likes:
    """Prefers the answer with more of a letter; with ``bias``, whatever stands first."""

    def __init__(self, letter="x", bias=0.0):
        self.letter, self.bias, self.questions = letter, bias, []

    def choose(self, question, words):
        self.questions.append(question)
        if len(words) == 5:
            mark = min(4, question.split("Answer:")[1].count(self.letter))
            return [float(i == mark) for i in range(5)]
        a, b = question.split("Answer A:")[1].split("Answer B:")
        b = b.split("Which answer")[0]
        ahead = 0.5 + 0.1 * (a.count(self.letter) - b.count(self.letter)) + self.bias
        return [ahead, 1 - ahead]


def test_both_orders_are_asked_and_a_verdict_of_one_order_does_not_count():
    fair, biased = Judge(Likes()), Judge(Likes(bias=0.25))
    assert fair.compare("q", "xx", "x").better == 0 and fair.compare("q", "x", "xx").better == 1
    assert fair.compare("q", "xx", "x").first == pytest.approx(0.6)
    close = biased.compare("q", "x", "xx")
    assert close.better is None and close.first == pytest.approx(0.4)  # the bias cancels in the mean
    assert biased.compare("q", "x", "xxxxx").better == 1
    assert len(biased.asked.questions) == 4


def test_pairs_are_made_of_consistent_verdicts_and_the_others_are_counted():
    rows = [
        {"prompt": "1", "answers": ["x", "xxxxx"]},
        {"prompt": "2", "answers": ["x", "xx"]},
        {"prompt": "3", "answers": ["same", " same"]},
        {"prompt": "4", "answers": ["xxxxx", ""]},
    ]
    pairs, tally = label(Judge(Likes(bias=0.25)), rows)
    assert [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ("1", "xxxxx", "x"), ("4", "xxxxx", ""),
    ]  # fmt: skip
    assert (tally.wins, tally.inconsistent, tally.alike, tally.asked) == ([1, 1], 1, 1, 3)


def test_of_several_answers_the_best_one_so_far_is_compared():
    pairs, tally = label(Judge(Likes()), [{"prompt": "q", "answers": ["x", "xxx", "xx"]}])
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("xxx", "x"), ("xxx", "xx")]
    assert tally.wins == [0, 2, 0]


def test_the_interval_of_the_share_is_wilson_s():
    share, low, high = Tally([5, 15]).share()
    assert (share, round(low, 3), round(high, 3)) == (0.75, 0.531, 0.888)


def test_a_mark_is_the_expected_one():
    judge = Judge(Likes())
    assert [judge.rate("q", said) for said in ("", "xx", "xxxx")] == [0.0, 0.5, 1.0]


def test_a_local_model_is_asked_by_its_probabilities(base):
    import torch

    asked = Local(str(base))
    found = asked.choose("Say A or B.", ("A", "B"))
    session = asked.session
    text = session.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say A or B."}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([session.tokenizer(text)["input_ids"]])
    a, b = (session.tokenizer(word)["input_ids"][0] for word in "AB")
    expected = session.model(ids).logits[0, -1][[a, b]].softmax(0)
    assert found == pytest.approx(expected.tolist())


@pytest.fixture
def server():
    """Speaks chat completions; always says that the first answer with an x is better."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][0]["content"]
            said = "**A**" if "x" in question.split("Answer A:")[1].split("Answer B:")[0] else "B."
            reply = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args):
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}/v1"
    made.shutdown()


def test_a_server_is_asked_and_its_words_are_read(server):
    judge = Judge(Endpoint(server, "any"))
    assert judge.compare("q", "x", "o").better == 0
    assert judge.compare("q", "o", "x").better == 1
    assert judge.compare("q", "x", "xx").better is None
    with pytest.raises(OSError, match=r"The judge at http://127.0.0.1:9/chat/completions gave no answer"):
        Endpoint("http://127.0.0.1:9", "any", timeout=1).choose("q", ("A", "B"))


def test_the_command_joins_two_files_of_answers_and_writes_pairs(server, tmp_path):
    for name, said in (("a", ["x", "o", "x"]), ("b", ["o", "x", "xx"])):
        rows = [{"prompt": f"q{i}", "answer": one} for i, one in enumerate(said)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "pairs.jsonl"
    words = [
        "judge",
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "b.jsonl"),
        "--url",
        server,
        "-m",
        "any",
        "-o",
        str(out),
    ]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(pair["prompt"], pair["chosen"]) for pair in pairs] == [("q0", "x"), ("q1", "x")]
    assert "1 of 3 verdicts (33 %) changed with the order" in result.stdout
    assert "b.jsonl won 1 of 2" in result.stdout


def test_the_command_says_which_rows_have_no_two_answers(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "q", "answer": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"a.jsonl row 1 needs 'answers', a list of two or more texts"):
        CliRunner().invoke(app, ["judge", str(tmp_path / "a.jsonl"), "-m", "any"], catch_exceptions=False)
