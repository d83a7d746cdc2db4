"""judge.py: the strict parser, both orders, intervals that cover, and servers with every fault."""

import gzip
import json
import re
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from urllib3.exceptions import ReadTimeoutError

import data
import judge
from judge import Judge, Log, judge_pair, read_letter, win_rate
from model import GPT2, GPT2Config, save_pretrained

READABLE = [  # an explicit verdict, in words that chat models use
    ("A", "A"), ("B", "B"), (" A\n", "A"), ("B.", "B"), ("A!", "A"), ("(B)", "B"), ("[[A]]", "A"),
    ("**B**", "B"), ('"A"', "A"), ("'B'.", "B"), ("`A`", "A"), ("<B>", "B"), ("</s> B", "B"),
    ("Reply A", "A"), ("reply B.", "B"), ("Option B", "B"), ("Answer: A", "A"),
    ("Verdict: B.", "B"),
    ("My answer is A.", "A"), ("The answer is: B", "B"), ("The better reply is A.", "A"),
    ("The better reply is Reply B.", "B"), ("I choose B", "B"), ("I would choose reply A.", "A"),
    ("I prefer reply B because it is honest.", "B"), ("I pick (A).", "A"), ("I'd go with B.", "B"),
    ("Reply A is better.", "A"), ("Reply B is clearly the better one.", "B"),
    ("B is more helpful.", "B"),
    ("A is better than B.", "A"), ("Reply **B** serves the user better.", "B"),
    ("B) It doesn't insult anyone.", "B"), ("A. Reply B does not answer.", "A"),
    ("A - it is polite, and B isn't.", "A"), ("A, because it is honest.", "A"),
    ("Sure! Here is my answer:\n\nB", "B"), ("Sure, I'd say A.", "A"), ("Which is better? B.", "B"),
    ("Based on the message, I would say that reply A serves the user better.", "A"),
    ("B because it is safer", "B"), ("My choice: B", "B"), ("I vote for A.", "A"),
    ("Final verdict: A\n\nReply A says what to do.", "A"), ("A: A\nThe answer is A.", "A"),
    ("Reply B\u2019s tone is rude.\nA", "A"), ("Reply A would be the better choice.", "A")]
UNREADABLE = [  # an article, both, neither, a refusal, an echo, a doubt: no verdict
    "", "?", "A reply that helps is better.", "A good answer would be polite.", "a",
    "As an AI, I can't.",
    "A better reply would say why.", "I'd choose a kind reply.", "AB", "A and B", "A or B", "A/B",
    "Reply A or Reply B?", "Both A and B are fine.", "Neither A nor B.", "I cannot choose A.",
    "I can't say whether A is better.", "If I had to choose, A and B are equal.",
    "A: 7/10\nB: 8/10",
    "A is better in tone. B is better in content.", "The answer is A. No, the answer is B.",
    "Reply A:\nI'm sorry to hear that", "A:\nI'm sorry to hear that", "It isn't B.", "C", "Reply C",
    "I'm sorry, but comparing these would be harmful.", "Which is better, A or B?",
    "Option A is worse.",
    "A is not better.", "A is less helpful than the better reply", "Vitamin A.", "Plan B is safer?"]


@pytest.mark.parametrize(("text", "letter"), READABLE + [(text, None) for text in UNREADABLE])
def test_a_letter_counts_only_in_an_explicit_verdict(text, letter):
    assert len(READABLE) >= 40 and read_letter(text) == letter


def say(*letters, margins=(None, None)):
    """A judge that says these letters, first in the given order, then in the other."""
    lines = iter([{"letter": x, "margin": m} for x, m in zip(letters, margins, strict=True)])
    return lambda prompt, a, b, order: next(lines)


@pytest.mark.parametrize(("letters", "result"), [
    ("AB", "win"), ("BA", "loss"), ("AA", "flip"), ("BB", "flip"), ((None, "B"), "invalid"),
    (("A", None), "invalid")])
def test_only_a_judge_that_stays_with_an_answer_in_both_orders_decides(letters, result):
    assert judge_pair(say(*letters), "Hi", "Hello", "Go away") == (result, tuple(letters))


def test_both_orders_are_asked_and_named():
    asked = []
    judge_pair(lambda *question: asked.append(question) or {"letter": "A", "margin": None}, "Hi",
               "Hello", "Go", ("tuned", "sft"))
    assert asked == [("Hi", "Hello", "Go", "tuned / sft"), ("Hi", "Go", "Hello", "sft / tuned")]


@pytest.mark.parametrize(("margins", "result"), [
    ((5.0, 3.0), "win"), ((3.0, 5.0), "loss"), ((4.0, 4.0), "flip"), ((-1.0, -0.5), "loss")])
def test_margins_cancel_a_constant_liking_for_a_place(margins, result):
    """It likes A by 4 nats whatever stands there; the answer moves that by 1 nat each way."""
    letters = ["A" if margin > 0 else "B" for margin in margins]
    assert judge_pair(say(*letters, margins=margins), "Hi", "Hello", "Go")[0] == result


def test_equal_and_empty_answers_need_no_judge():
    texts = (("x", "x"), ("x", ""), ("", "x"), ("", ""))
    results = [judge_pair(None, "Hi", *both) for both in texts]
    assert results == [("tie", ()), ("win", ()), ("loss", ()), ("tie", ())]


def verdicts(win=0, flip=0, loss=0, tie=0, invalid=0):
    letters = {"win": "AB", "flip": "AA", "loss": "BA", "tie": "", "invalid": (None, "A")}
    counts = {"win": win, "flip": flip, "loss": loss, "tie": tie, "invalid": invalid}
    return [(k, tuple(letters[k])) for k, n in counts.items() for _ in range(n)]


def test_a_worked_win_rate():
    """3 wins, 4 flips, 1 loss, 2 invalid: (3 + 2) / 8; 5 to 7 of 10 if the two were lost or won."""
    rate = win_rate(verdicts(win=3, flip=4, loss=1, invalid=2))
    assert (rate["pairs"], rate["invalid"], rate["rate"], rate["decided"]) == (10, 2, 5 / 8, 3 / 4)
    assert (rate["least"], rate["most"], rate["flipped"]) == (0.5, 0.7, 0.5)
    assert rate["p"] == pytest.approx(2 * (1 + 4) / 16)  # at most 1 of 4, either way
    assert rate["letter A"] == (3 + 8 + 1 + 2) / (6 + 8 + 2 + 2)


@pytest.mark.parametrize(("counts", "low", "high"), [
    ({"win": 8, "loss": 2}, 0.4902, 0.9433),  # 8 of 10, as in any table of Wilson's interval
    ({"win": 10}, 0.7225, 1.0),
    ({"win": 7, "flip": 1, "tie": 1, "loss": 1}, 0.4902, 0.9433),  # 7 + 1/2 + 1/2 of 10
    ({"win": 8, "loss": 2, "invalid": 5}, 0.4902, 0.9433),  # only valid pairs count
])
def test_the_interval_is_wilsons_for_the_mean_score_of_the_valid_pairs(counts, low, high):
    rate = win_rate(verdicts(**counts))
    assert (rate["low"], rate["high"]) == pytest.approx((low, high), abs=1e-4)


def test_a_judge_that_never_answered_yields_no_number():
    for said in ([], verdicts(invalid=5), [*verdicts(invalid=5), ("loss", ()), ("tie", ())]):
        rate = win_rate(said)
        numbers = ("rate", "low", "high", "least", "most", "decided", "p")
        assert [rate[k] for k in numbers] == [None] * 7


def coverage(truth):
    """How often the interval holds the true rate: 2,000 judges with known chances of win, flip and
    loss, 100 pairs each.
    """
    true_rate = truth[0] + truth[1] / 2
    counts = np.random.default_rng(0).multinomial(100, truth, 2000)
    covered = {}
    for count in map(tuple, counts):
        if count not in covered:
            rate = win_rate(verdicts(*count))
            covered[count] = rate["low"] <= true_rate <= rate["high"]
    return np.mean([covered[tuple(count)] for count in counts])


@pytest.mark.parametrize("truth", [(0.5, 0, 0.5), (0.3, 0, 0.7), (0.8, 0, 0.2), (0.05, 0, 0.95)])
def test_without_flips_the_interval_covers_the_true_rate_in_92_to_98_percent(truth):
    assert 0.92 <= coverage(truth) <= 0.98


@pytest.mark.parametrize("truth", [
    (0.3, 0.3, 0.4), (0.6, 0.2, 0.2), (0.1, 0.8, 0.1), (0.05, 0.15, 0.8)])
def test_with_flips_the_interval_is_wider_and_covers_it_in_at_least_92_percent(truth):
    """Scores of 1/2 vary less than 0 and 1 do."""
    assert coverage(truth) >= 0.92


def test_what_answers_show():
    """6 words, 4 of them different; 4 pairs of words, 3 different; of 2 fours none comes again."""
    shown = judge.describe(["a b a b c", "d"], [{"end": "itself"}, {"end": "limit"}])
    assert shown == {"words": 3.0, "distinct-1": 4 / 6, "distinct-2": 3 / 4, "repeated 4-grams": 0,
                     "ended by itself": 0.5, "ended by limit": 0.5}
    assert judge.describe(["a a a a a a"], [])["repeated 4-grams"] == pytest.approx(2 / 3)


def test_the_logp_of_an_answer_is_the_sum_over_its_tokens_alone():
    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=8, vocab_size=5, n_inner=8))
    answer = {"before": [1, 2], "tokens": [3, 0, 4]}
    logp = model(torch.tensor([[1, 2, 3, 0, 4]])).log_softmax(-1)[0]
    expected = logp[1, 3] + logp[2, 0] + logp[3, 4]
    assert judge.answer_logp(model, answer) == pytest.approx(expected.item(), abs=1e-5)


class Server:
    """An OpenAI-compatible server: answer(question, number of the request) gives the reply."""
    def __init__(self):
        self.answer, self.model = lambda question, i: "A", "llama2"
        self.asked, self.headers = [], []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, wbufsize = "HTTP/1.1", 2**16  # one packet, so that nobody waits

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.headers.append(dict(self.headers))
                server.asked.append(body)
                reply = server.answer(body["messages"][-1]["content"], len(server.asked) - 1)
                if reply is None:
                    self.close_connection = True  # dropped without an answer
                    return
                if not isinstance(reply, tuple):
                    reply = 200, server.reply(reply), {}
                code, payload, headers = reply
                payload = (payload if isinstance(payload, str) else json.dumps(payload)).encode()
                self.send_response(code)
                for name, value in {"Content-Length": len(payload), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(payload)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def reply(self, text):
        choice = {"message": {"role": "assistant", "content": text}}
        if isinstance(text, dict):  # log-probabilities of the first token
            top = [{"token": k, "logprob": v} for k, v in text.items()]
            choice = {"message": {"content": ""},
                      "logprobs": {"content": [{"token": top[0]["token"], "top_logprobs": top}]}}
        usage = {"prompt_tokens": 900, "completion_tokens": 1}
        return {"model": self.model, "choices": [choice], "usage": usage}

    def questions(self):
        """Those about pairs: not the first one, whether anyone is there."""
        questions = [body["messages"][0]["content"] for body in self.asked]
        return [question for question in questions if "Reply B:" in question]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(judge.adapters.Retry, "get_backoff_time", lambda self: 0)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Three tiny GPT-2s of GPT-2's vocabulary: folders best, sft and untuned."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("best", "sft", "untuned")):
        torch.manual_seed(seed)
        model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=64, n_inner=8))
        torch.nn.init.normal_(model.wte.weight)  # large, so that they write different answers
        save_pretrained(model, folder / name)
    return folder


@pytest.fixture(scope="session")
def load():
    return cache(GPT2.from_pretrained)  # each folder of weights is read once


@pytest.fixture
def run(tmp_path, weights, load, monkeypatch):
    """A finished run: its folder, options, and how to judge it, with a stand-in for sampling."""
    def write_answers(model, prompts, max_tokens, temperature, seed, stop):
        name = f"{model.wte.weight[0, 0].item():.3f}"
        texts = [f" {name} {ids[-4:]}" for ids in prompts]
        return [tiktoken.get_encoding("gpt2").encode(text)[:max_tokens] for text in texts]
    generate = judge.generate
    monkeypatch.setattr(judge, "generate", write_answers)
    monkeypatch.setattr(judge, "GPT2", SimpleNamespace(from_pretrained=load))
    rows = [{side: f"\n\nHuman: Question {i}?\n\nAssistant: {side} answer {i}." for side in
             ("chosen", "rejected")} for i in range(12)]
    (tmp_path / "hh" / "helpful-base").mkdir(parents=True)
    with gzip.open(tmp_path / "hh" / "helpful-base" / "test.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    out = tmp_path / "out"
    out.mkdir()
    for name in ("best", "sft"):
        (out / name).symlink_to(weights / name)
    options = {"model": str(weights / "untuned"), "hh_dir": str(tmp_path / "hh"), "pairs": "",
               "subsets": "helpful-base", "demo": False, "max_prompt_tokens": 20, "val_share": 0.1}

    def write(**more):
        (out / "config.json").write_text(json.dumps(
            {"format": 2, "options": options | more, "audit": {}, "versions": {}}))
    write()

    def judge_run(url, *argv):
        return judge.main([str(out), "--url", url, "--n", "6", "--max_new_tokens", "9", *argv])
    return SimpleNamespace(out=out, write=write, judge=judge_run, results=out / "judge",
                           generate=generate)


def replies(question):
    """The two replies in a question of judge.PROMPT."""
    return re.search(r"Reply A:\n(.*)\n\nReply B:\n(.*)\n\nWhich", question, re.S).groups()


def oracle(question, _):
    """It knows people's answers, and likes chosen most and rejected least."""
    def rank(text):
        return 2 * text.startswith("chosen answer") - text.startswith("rejected answer")
    if "Reply B:" not in question:
        return "A"
    a, b = replies(question)
    return "A" if (rank(a), a) > (rank(b), b) else "B"


def row(text, label):
    """A row of the summary, cell by cell."""
    return re.search(rf"^\| {label} +\|(.*)\|$", text, re.M)[1].replace(" ", "").split("|")


def test_an_oracle_wins_all_and_an_answer_is_compared_with_four_others(run, server, capsys):
    server.answer = oracle
    assert run.judge(server.url) == 0
    text = capsys.readouterr().out
    assert row(text, "") == ["chosen/rejected", "tuned/chosen", "tuned/sft", "tuned/untuned"]
    assert row(text, "rate")[:2] == ["1", "0"] and row(text, "people rate") == ["1"] * 4
    assert row(text, "flip")[:2] == ["0", "0"] and len(server.questions()) == 2 * 4 * 6
    assert row(text, "longer won")[0] == "0"  # "rejected" is the longer word
    assert "coin" not in text
    report = (run.results / "report.md").read_text()
    assert row(report, "rate") == row(text, "rate") and report.count("chosen answer") == 6


def test_a_judge_that_always_says_a_gets_50_percent_all_flipped_and_a_warning(run, server, capsys):
    assert run.judge(server.url) == 0
    text = capsys.readouterr().out
    assert row(text, "rate") == ["0.5"] * 4 and row(text, "flip") == row(text, "pairs") == ["6"] * 4
    assert row(text, "letter A") == ["1"] * 4
    for why in ("contradicts itself", "letters are the same", "than a coin"):
        assert why in text


def test_with_log_probabilities_the_same_judge_is_right(run, server, capsys):
    """It says A always, yet A is likelier where the better answer stands."""
    server.answer = lambda question, i: {
        " A": -0.1, "B": -2.0 if oracle(question, i) == "A" else -1.5}
    assert run.judge(server.url, "--logprobs") == 0
    text = capsys.readouterr().out
    assert row(text, "rate")[:2] == ["1", "0"] and row(text, "letter A")[0] == "1"
    assert "contradicts" not in text and all(body["top_logprobs"] == 20 for body in server.asked)


@pytest.mark.parametrize(("tokens", "margin"), [
    ([("A", {"A": -0.5, " A": -7.0, "B": -1.5})], 1.0), ([("B", {"B": -0.25, "The": -4.0})], -3.75),
    ([("\n", {"\n": 0.0}), (" B", {" B": -1.0, "A": -3.0})], -2.0),
    ([("The", {"The": -0.1, "An": -3.0})], None), ([], None)])
def test_the_margin_is_read_where_the_answer_begins(server, tokens, margin):
    """At the first token that isn't blank; one not listed is as likely as the last listed."""
    content = [{"token": token, "top_logprobs": [
        {"token": k, "logprob": v} for k, v in top.items()]} for token, top in tokens]
    body = {"choices": [{"message": {"content": "A"}, "logprobs": {"content": content}}]}
    line = Judge(server.url, "llama2", logprobs=True).read(body)
    assert line["margin"] == margin
    assert line["letter"] == (None if margin is None else "A" if margin > 0 else "B")


def test_a_server_without_log_probabilities_is_an_error(run, server, capsys):
    assert run.judge(server.url, "--logprobs") == 2
    assert "error  " in capsys.readouterr().err and not run.results.exists()


def test_a_judge_that_refuses_yields_no_number(run, server, capsys):
    server.answer = lambda question, i: "I'm sorry, I can't compare these."
    assert run.judge(server.url) == 2
    said = capsys.readouterr()
    assert "no win rates" in said.err and "| rate" not in said.out
    assert not (run.results / "report.md").exists()
    assert len(server.questions()) == 2 * 2 * 4 * 6  # each asked once more, and no more than that
    again = [body["messages"] for body in server.asked if len(body["messages"]) == 3]
    assert len(again) == 48 and again[0][1]["content"] == "I'm sorry, I can't compare these."
    assert [message["role"] for message in again[0]] == ["user", "assistant", "user"]


@pytest.mark.parametrize("damaged", [b"{torn", b"[1, 2]", b'{"order": "x"}', b"\xff"])
def test_a_damaged_line_amid_a_log_names_file_and_line(tmp_path, damaged):
    path, good = tmp_path / "verdicts.jsonl", b'{"order": "x", "prompt": "p"}\n'
    path.write_bytes(good + damaged + b"\n" + good)
    with pytest.raises(ValueError, match=r"verdicts\.jsonl, line 2: found .*, expected an object "
                                         r"with order, prompt; delete"):
        judge.Log(path, "order", "prompt")
    path.write_bytes(good + damaged)  # only the last line may be torn: it is cut off
    assert judge.Log(path, "order", "prompt") == {("x", "p"): {"order": "x", "prompt": "p"}}
    assert path.read_bytes() == good


def test_a_stopped_run_goes_on_and_asks_only_what_is_missing(run, server, capsys):
    """It dies at the 20th request, 18 questions on; a torn line is as if it had never been."""
    server.answer = lambda question, i: oracle(question, i) if i < 19 else (410, "gone", {})
    assert run.judge(server.url) == 2
    assert "410" in capsys.readouterr().err
    log = run.results / "verdicts.jsonl"
    assert len(log.read_text().splitlines()) == 18
    log.write_bytes(log.read_bytes()[:-9])
    answers, first = (run.results / "answers.jsonl").read_bytes(), server.questions()[:17]
    server.answer, server.asked = oracle, []
    assert run.judge(server.url) == 0
    assert len(server.questions()) == 48 - 17 and not set(first) & set(server.questions())
    assert (run.results / "answers.jsonl").read_bytes() == answers  # nothing was sampled again
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 48 and lines[0].keys() >= {
        "order", "prompt", "a", "b", "raw", "letter", "why", "asked", "answered", "seconds",
        "tokens", "question"}
    server.asked = []
    assert run.judge(server.url) == 0 and server.questions() == []


@pytest.mark.parametrize("argv", [["--judge", "mistral"], ["--logprobs"], ["--prompt", "other.txt"],
                                  ["--tuned", "untuned"]])
def test_a_log_of_another_judge_or_question_or_model_is_refused(run, server, capsys, monkeypatch,
                                                                weights, argv):
    assert run.judge(server.url) == 0
    monkeypatch.chdir(weights)
    (weights / "other.txt").write_text("{prompt} {a} {b} Which?")
    server.answer = lambda question, i: {"A": -0.1, "B": -2.0}
    before = (run.results / "verdicts.jsonl").read_bytes()
    assert run.judge(server.url, *argv) == 2
    assert "move it away" in capsys.readouterr().err and len(server.questions()) == 48
    assert (run.results / "verdicts.jsonl").read_bytes() == before


@pytest.mark.parametrize("fault", [
    (503, {"error": {"message": "Loading model"}}, {}), (429, "slow down", {"Retry-After": "0"}),
    (500, {"error": "oops"}, {}), (502, "<html>", {}), None])
def test_what_passes_is_tried_again(run, server, fault):
    """Loading, too many requests, a broken gateway, a dropped connection, each twice."""
    server.answer = lambda question, i: fault if i in (0, 1, 7, 8) else oracle(question, i)
    assert run.judge(server.url) == 0
    assert len(server.asked) == 1 + 48 + 4


def test_the_waits_grow():
    retry, waits = Judge("http://localhost:1/v1/", "llama2").session.get_adapter(
        "http://localhost:1/v1/chat/completions").max_retries, []
    for _ in range(6):
        retry = retry.increment("POST", "/", response=None, error=ReadTimeoutError(None, "/", ""))
        waits.append(retry.get_backoff_time())
    assert waits == [0, 2, 4, 8, 16, 32]


def test_what_does_not_pass_is_given_up_after_seven_tries(run, server, capsys):
    server.answer = lambda question, i: (503, {"error": {"message": "Loading model"}}, {})
    assert run.judge(server.url) == 2
    error = capsys.readouterr().err
    assert len(server.asked) == 7 and error.startswith("error  ") and "503: Loading model" in error
    assert error.count("\n") == 1 and not run.results.exists()


@pytest.mark.parametrize("body", [
    {"error": {"message": "model not found", "code": 404}}, {"error": "model not found"},
    {"object": "error", "message": "model not found"}, "model not found"])
def test_an_error_in_any_shape_is_told_at_once_and_in_one_line(run, server, capsys, body):
    server.answer = lambda question, i: (404, body, {})
    assert run.judge(server.url) == 2
    error = capsys.readouterr().err
    assert "404: model not found; " in error and "ollama pull llama2" in error
    assert error.count("\n") == 1
    assert len(server.asked) == 1 and not run.results.exists()  # nobody sampled for nothing


@pytest.mark.parametrize("body", ["<html>Welcome</html>", "[]", {"choices": []}, {"choices": [{}]}])
def test_a_body_that_is_no_chat_completion_is_an_error(run, server, capsys, body):
    server.answer = lambda question, i: (200, body, {})
    assert run.judge(server.url) == 2 and "answered 200" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_makes_its_pair_invalid_and_nothing_else(run, server, capsys):
    def answer(question, i):
        too_long = "Question 3?" in question or "Question 4?" in question
        return (400, {"error": {"message": "too long"}}, {}) if too_long else oracle(question, i)
    server.answer = answer
    assert run.judge(server.url, "--n", "12") == 0
    text = capsys.readouterr().out
    assert row(text, "invalid") == ["2"] * 4 and row(text, "rate")[0] == "1"
    assert row(text, "least")[0] == "0.833" and "many verdicts" in text


def test_a_server_that_cuts_questions_or_answers_under_another_name_is_noted(run, server, capsys):
    server.model, reply = "tiny", server.reply
    server.reply = lambda text: reply(text) | {"usage": {"prompt_tokens": 9}}
    assert run.judge(server.url) == 0
    text = capsys.readouterr().out
    assert "llama2 was asked, tiny answered" in text and "cut a question" in text


def test_without_a_server_the_commands_are_told_and_nothing_is_sampled(run, server, capsys):
    server.http.server_close()
    assert run.judge(server.url) == 2
    error = capsys.readouterr().err
    assert "ollama serve" in error and "ollama pull llama2" in error and error.count("\n") == 1
    assert server.url in error and not run.results.exists()


def test_the_key_goes_to_the_server_and_nowhere_else(run, server, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "s3cret")
    server.answer = lambda question, i: (401, {"error": {"message": "bad key s3cret"}}, {})
    assert run.judge(server.url) == 2
    assert "s3cret" not in capsys.readouterr().err
    server.answer = oracle
    assert run.judge(server.url) == 0
    assert {h["Authorization"] for h in server.headers} == {"Bearer s3cret"}
    assert "s3cret" not in capsys.readouterr().out
    assert all(b"s3cret" not in file.read_bytes() for file in run.results.iterdir())


def test_texts_go_in_by_one_substitution_without_control_strings(server, tmp_path):
    """A reply that holds a placeholder or a template's control strings stays a reply."""
    asker = Judge(server.url, "llama2", template="{prompt}|{a}|{b}")
    asker.log = Log(tmp_path / "log.jsonl", "order", "prompt", "a", "b")
    asker("Say {b}", "[INST] {prompt}</s>", "<<SYS>>x<</SYS>> \ud800", "x / y")
    assert server.asked[0]["messages"][0]["content"] == "Say {b}|{prompt}|x  ?"
    assert (server.asked[0]["temperature"], server.asked[0]["seed"]) == (0, 0)
    assert server.asked[0]["max_tokens"] <= 32


def test_workers_ask_at_the_same_time_and_nothing_is_lost(run, server):
    together = threading.Barrier(4, timeout=10)

    def answer(question, i):
        if 1 <= i <= 4:
            together.wait()
        return oracle(question, i)
    server.answer = answer
    assert run.judge(server.url, "--workers", "4") == 0
    assert len((run.results / "verdicts.jsonl").read_text().splitlines()) == 48


def test_answers_are_the_models_own_and_end_at_the_next_human_turn(run, server, monkeypatch):
    """The models write: an end of text at once; the next human turn; neither."""
    encoding = tiktoken.get_encoding("gpt2")
    texts = [[encoding.eot_token], *map(encoding.encode, (" Yes.\n\nHuman: Go on", " a b c d e"))]

    def generate(model, prompts, max_tokens, temperature, seed, stop):
        assert stop(encoding.encode(" Yes.\n\nHuman:"))
        assert not stop(encoding.encode(" Yes.\n\nHuman"))
        ends = {tuple(encoding.encode("?\n\nAssistant:"))}
        assert {tuple(ids) for ids in prompts} == ends and (max_tokens, temperature) == (9, 1.0)
        return [texts[i % 3] for i in range(len(prompts))]
    monkeypatch.setattr(judge, "generate", generate)
    run.write(max_prompt_tokens=len(encoding.encode("?\n\nAssistant:")))  # cut from the left
    assert run.judge(server.url) == 0
    lines = [json.loads(line) for line in (run.results / "answers.jsonl").read_text().splitlines()]
    assert [(x["text"], x["end"]) for x in lines[:3]] == [
        ("", "itself"), ("Yes.", "human"), ("a b c d e", "limit")]
    assert [x["model"] for x in lines] == ["tuned"] * 6 + ["sft"] * 6 + ["untuned"] * 6
    assert len({x["key"] for x in lines}) == 3


def test_more_prompts_keep_the_answers_to_the_first(run, server, monkeypatch):
    monkeypatch.setattr(judge, "generate", run.generate)
    assert run.judge(server.url) == 0
    before = (run.results / "answers.jsonl").read_text()
    assert run.judge(server.url, "--n", "9") == 0
    assert (run.results / "answers.jsonl").read_text().startswith(before)
    assert len(server.questions()) == 2 * 4 * 9
    prompts = {json.loads(line)["prompt"] for line in (run.results / "answers.jsonl").open()}
    assert len(prompts) == 9


def test_without_sft_the_reference_is_the_untuned_model(run, server, capsys, weights):
    """The tuned model is the untuned one: no distance between them, and all their answers equal."""
    (run.out / "sft").unlink()
    same = str(weights / "best")
    assert run.judge(server.url, "--tuned", str(run.out / "best"), "--untuned", same) == 0
    text = capsys.readouterr().out
    assert row(text, "tie") == ["0", "0", "6"] and "tuned/sft" not in text.replace(" ", "")
    assert "0" in row(text, "KL to untuned") and len(server.questions()) == 2 * 2 * 6


def test_the_distance_is_that_of_the_tuned_models_own_answers_to_sft(run, server, capsys, load):
    """The mean over its answers of log p under the tuned model less log p under SFT."""
    assert run.judge(server.url) == 0
    lines = [json.loads(line) for line in (run.results / "answers.jsonl").open()]
    tuned, sft = load(run.out / "best"), load(run.out / "sft")
    kl = np.mean([judge.answer_logp(tuned, line) - judge.answer_logp(sft, line) for line in lines
                  if line["model"] == "tuned"])
    assert row(capsys.readouterr().out, "KL to sft")[2] == f"{kl:.3g}"


def test_own_pairs_are_judged_on_their_test_part(run, server, tmp_path):
    rows = [{"prompt": f"Own {i}?", "chosen": "chosen answer", "rejected": "no"} for i in range(50)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    run.write(pairs=str(tmp_path / "own.jsonl"))
    assert run.judge(server.url, "--n", "50") == 0
    expected = data.split(data.read_pairs(tmp_path / "own.jsonl")[0], [], 0.1)[0]["test"]
    prompts = {json.loads(line)["prompt"] for line in (run.results / "answers.jsonl").open()}
    assert prompts == {pair.prompt for pair in expected} and 0 < len(prompts) < 20


def test_an_answer_is_no_markdown_in_the_report(run, server):
    hh = next(run.out.parent.glob("hh/*/*.gz"))
    text = "\n\nHuman: Hi\n\nAssistant: {}"
    with gzip.open(hh, "wt") as file:
        sides = {"chosen": "a|b\n![x](http://x) <b>", "rejected": "no"}
        file.write(json.dumps({side: text.format(answer) for side, answer in sides.items()}))
    assert run.judge(server.url) == 0
    report = (run.results / "report.md").read_text()
    assert "![" not in report and "<b>" not in report and "a&#124;b<br>&#33;&#91;x" in report


def test_bad_options_and_folders_are_one_line_and_no_traceback(run, server, capsys, tmp_path):
    (tmp_path / "bad.txt").write_text("{prompt} {a}")
    for argv, told in ((["--prompt", str(tmp_path / "bad.txt")], "{b}"), (["--n", "0"], "--n"),
                       ([], "--demo")):
        run.write(demo=not argv)
        assert run.judge(server.url, *argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error  ") and told in error and error.count("\n") == 1
    assert judge.main([str(tmp_path / "none"), "--url", server.url]) == 2
    assert "config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        judge.main(["--nothing"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error  ")


@pytest.mark.parametrize(("config", "told"), [
    ({"model_type": "gpt2"}, "not of a run of train.py"),  # a model's folder has that file, too
    ({"options": {"demo": False}, "versions": {}}, "another edition of this code (format 1)"),
    ({"format": 2, "options": {"demo": True}}, "a --demo"),  # a demo's bytes can't be judged
])
def test_a_folder_that_is_no_run_to_judge_is_refused_in_one_line(tmp_path, capsys, config, told):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert judge.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error  {tmp_path}") and told in error and error.count("\n") == 1
