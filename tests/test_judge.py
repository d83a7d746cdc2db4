"""judge.py: both orders, verdicts without a parser, judges with known habits, every fault.

Read from top to bottom:

1. verdicts    compare, win_rate, read_letter
2. a world     a run's folder, and a server that plays the four servers
3. habits      judges that one can see through, and what is printed about them
4. faults      each is one line, and nothing is lost
5. answers     what is sampled, kept, and counted
6. --ask and --blind, as a user sees them
"""

import gzip
import hashlib
import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import tiktoken
import torch

import data
import dpo
import judge
import train
from judge import Answer, Verdict, compare, read_letter, win_rate
from model import GPT2, GPT2Config, save_pretrained

JUDGE = Path(judge.__file__)

# 1. Verdicts ------------------------------------------------------------------------------------


def judge_that_says(*letters: str | None) -> Callable:
    """A judge with these answers, one after the other."""
    left = list(letters)
    return lambda prompt, a, b: left.pop(0)


@pytest.mark.parametrize(("letters", "score"), [
    (("A", "B"), 1.0),         # the answer in both orders
    (("B", "A"), 0.0),
    (("A", "A"), 0.5),         # the order decides
    (("B", "B"), 0.5),
    ((None, "B"), None),
    (("A", None), None),
])
def test_only_who_stays_with_an_answer_in_both_orders_decides(letters, score):
    verdict = compare(judge_that_says(*letters), "Hi", "Hello", "Go away")
    assert verdict == Verdict(score, letters)


def test_both_orders_are_asked():
    asked = []

    def listen(*question):
        asked.append(question)
        return "A"
    compare(listen, "Hi", "Hello", "Go")
    assert asked == [("Hi", "Hello", "Go"), ("Hi", "Go", "Hello")]


def test_nobody_is_asked_about_equal_answers():
    assert compare(judge_that_says(), "Hi", "Hello", "Hello") == Verdict(0.5, ())


def test_a_worked_win_rate():
    """3 wins, 4 draws, 1 loss, 2 unreadable: (3 + 4/2) / 8 of those that can be read."""
    verdicts = ([Verdict(1.0, ("A", "B"))] * 3 + [Verdict(0.5, ("A", "A"))] * 4
                + [Verdict(0.0, ("B", "A"))] + [Verdict(None, (None, "A"))] * 2)
    rate = win_rate(verdicts)
    assert rate["prompts"] == 10
    assert rate["rate"] == 5 / 8
    assert (rate["low"], rate["high"]) == dpo.wilson_interval(5 / 8, 8)
    assert rate["undecided"] == 4
    assert rate["unreadable"] == 2
    assert rate["letter A"] == (3 + 8 + 1) / (6 + 8 + 2)       # of those that gave both letters


@pytest.mark.parametrize("verdicts", [
    [],
    [Verdict(None, (None, None))] * 5,
    [Verdict(None, (None, None))] * 5 + [Verdict(0.5, ())],    # equal answers need no judge
])
def test_a_judge_that_never_answered_yields_no_number(verdicts):
    rate = win_rate(verdicts)
    assert (rate["rate"], rate["low"], rate["high"]) == (None, None, None)


@pytest.mark.parametrize(("text", "letter"), [
    ('{"better": "A"}', "A"),
    (' {"better":\n "B"}\n', "B"),
    ('{"reason": "B is rude.", "better": "A"}', "A"),
    ("A", None),
    ("", None),
    ("Reply A is more harmful than Reply B.", None),
    ('{"better": "C"}', None),
    ('{"better": "a"}', None),
    ('{"better": ["A"]}', None),
    ('{"better": "A"', None),
    ('["A"]', None),
    ('"A"', None),
    ('The verdict is {"better": "A"}', None),
])
def test_a_verdict_is_the_schemas_json_or_none(text, letter):
    assert read_letter(text) == letter


# 2. A world -------------------------------------------------------------------------------------


class Server:
    """A server of the given name, with a judge inside: `say(prompt, a, b)` is a letter.

    Set `say` to what the judge thinks. `interrupt(number of the request)`, where it returns
    something, decides the reply instead: (status, body, headers), or "drop".
    """

    def __init__(self, name: str):
        self.name = name
        self.say = lambda prompt, a, b: "A"
        self.interrupt = lambda number: None
        self.finish_reason = "stop"
        self.prompt_tokens = 900
        self.asked = []        # bodies
        self.headers = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 2**16   # one packet, so that nobody waits

            def log_message(self, *_):
                pass

            def do_POST(self):
                assert self.path == "/v1/chat/completions"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.headers.append(dict(self.headers))
                server.asked.append(body)
                reply = server.interrupt(len(server.asked) - 1) or server.reply(body)
                if reply == "drop":
                    self.close_connection = True
                    return
                status, content, headers = reply
                if not isinstance(content, str):
                    content = json.dumps(content)
                content = content.encode()
                self.send_response(status)
                for key, value in {"Content-Length": len(content), **headers}.items():
                    self.send_header(key, str(value))
                self.end_headers()
                self.wfile.write(content)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def reply(self, body: dict) -> tuple[int, object, dict]:
        """What the server of this name answers."""
        form = body["response_format"]
        answered = body["model"]                       # llama-cpp-python echoes any name
        if self.name in ("ollama", "vllm") and body["model"] != "llama2":
            return 404, {"error": {"message": f"model '{body['model']}' not found"}}, {}
        if self.name == "llama.cpp":
            answered = "/models/llama-2-7b-chat.gguf"  # its own name, whatever was asked
        if self.name == "llama-cpp-python" and form["type"] == "json_schema":
            message = "1 validation error: {'loc': ('body', 'response_format', 'type')}"
            return 500, {"error": {"message": message, "type": "internal_server_error"}}, {}

        prompt, a, b = parts(body["messages"][0]["content"])
        letter = self.say(prompt, a, b)
        text = f"I think that reply {letter} is better."
        if self.name != "old":                         # an old server ignores response_format
            schema = form["schema"] if form["type"] == "json_object" else (
                form["json_schema"]["schema"])
            fields = dict.fromkeys(schema["required"], "Because.")
            text = json.dumps(fields | {"better": letter})
        choice = {"message": {"role": "assistant", "content": text},
                  "finish_reason": self.finish_reason}
        return 200, {"model": answered, "choices": [choice],
                     "usage": {"prompt_tokens": self.prompt_tokens}}, {}

    def questions(self) -> list[tuple[str, str, str]]:
        """(prompt, a, b) of the requests so far, but for the fixed one that settles the dialect."""
        found = [parts(body["messages"][0]["content"]) for body in self.asked]
        return [question for question in found if question[0] != "Say hello."]


def parts(question: str) -> tuple[str, str, str]:
    """(prompt, a, b) of a question of judge.QUESTION."""
    pattern = r"Message:\n(.*)\n\nReply A:\n(.*)\n\nReply B:\n(.*)\n\nWhich reply"
    return re.search(pattern, question, re.S).groups()


@pytest.fixture
def serve(monkeypatch):
    """Starts servers."""
    monkeypatch.setattr(judge.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    servers = []

    def start(name: str = "ollama") -> Server:
        servers.append(Server(name))
        return servers[-1]
    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Three tiny GPT-2s of GPT-2's vocabulary: folders best, sft and untuned."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("best", "sft", "untuned")):
        torch.manual_seed(seed)
        gpt2 = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=64, n_inner=8))
        torch.nn.init.normal_(gpt2.wte.weight)         # large, so that they write different answers
        save_pretrained(gpt2, folder / name)
    return folder


PAIRS = 60                     # of the test data, with as many prompts


@pytest.fixture
def run(tmp_path, weights, monkeypatch) -> SimpleNamespace:
    """A run's folder, and a call to judge it. Sampling is played by a stand-in."""
    sampled = []

    def write_answers(gpt2, prompts, max_tokens, temperature, top_p, end_token, stop, seed):
        sampled.append(len(prompts))
        name = f"{gpt2.wte.weight[0, 0].item():.3f}"
        texts = [f" {name} {ids[-6:]}" for ids in prompts]
        return [tiktoken.get_encoding("gpt2").encode(text)[:max_tokens] for text in texts]
    monkeypatch.setattr(judge.model, "generate", write_answers)

    rows = []
    for i in range(PAIRS):
        rows.append({"chosen": f"\n\nHuman: Question {i}?\n\nAssistant: kind answer {i}",
                     "rejected": f"\n\nHuman: Question {i}?\n\nAssistant: unfriendly answer {i}"})
    (tmp_path / "hh" / "helpful-base").mkdir(parents=True)
    with gzip.open(tmp_path / "hh" / "helpful-base" / "test.jsonl.gz", "wt") as file:
        for row in [*rows, rows[0]]:                   # one prompt stands there twice
            file.write(json.dumps(row) + "\n")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("best", "sft"):
        (out / name).symlink_to(weights / name)
    options = {"model": str(weights / "untuned"), "hh_dir": str(tmp_path / "hh"), "pairs": "",
               "subsets": "helpful-base", "demo": False, "max_prompt_tokens": 20, "val_share": 0.1,
               "test_share": 0.3}

    def write_config(**changed):
        run = {"format": train.RUN_FORMAT, "options": options | changed, "audit": {},
               "versions": {}}
        (out / "config.json").write_text(json.dumps(run))
    write_config()

    def call(server, *words):
        return judge.main([str(out), "--url", server.url, "--max_new_tokens", "9", *words])
    return SimpleNamespace(out=out, judge=call, write_config=write_config, sampled=sampled,
                           results=out / "judge", report=out / "judge" / "report.md")


def row(text: str, name: str) -> dict[str, str]:
    """A row of the first table in a report, by its header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == name:
            return dict(zip(header, cells, strict=True))
    raise AssertionError(f"{name} not in {text}")


def people(prompt: str, a: str, b: str) -> str:
    """The letter that agrees with people, whose chosen answers are kind; else by the alphabet."""
    if a.startswith("kind") != b.startswith("kind"):
        return "A" if a.startswith("kind") else "B"
    return "A" if a < b else "B"


def chance(*words: str) -> float:
    """A number from 0 to 1 that follows from the words."""
    digest = hashlib.sha256("|".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# 3. Habits --------------------------------------------------------------------------------------

COMPARED = ["chosen against rejected", "tuned against chosen", "tuned against untuned",
            "tuned against sft"]


@pytest.mark.parametrize("name", ["ollama", "llama.cpp", "llama-cpp-python", "vllm"])
def test_each_server_is_understood(name, run, serve, capsys):
    """The dialect is settled once; then every question is asked in it, in both orders."""
    server = serve(name)
    server.say = people
    assert run.judge(server) == 0
    text = capsys.readouterr().out
    assert row(text, "chosen against rejected")["rate"] == "1.000"
    assert row(text, "tuned against chosen")["rate"] == "0.000"
    for compared in COMPARED:
        assert row(text, compared)["prompts"] == str(PAIRS)
        assert row(text, compared)["undecided"] == row(text, compared)["unreadable"] == "0"
    assert "DON'T TRUST" not in text
    assert run.report.read_text().startswith(text[text.index("llama2 at"):text.index("| chosen")])

    assert len(server.questions()) == 2 * 4 * PAIRS
    expected = "json_object" if name == "llama-cpp-python" else "json_schema"
    types = [body["response_format"]["type"] for body in server.asked]
    settling = 2 if name == "llama-cpp-python" else 1
    assert set(types[settling:]) == {expected}
    assert len(server.asked) == settling + 2 * 4 * PAIRS
    for body in server.asked:
        assert (body["temperature"], body["seed"], body["max_tokens"]) == (0, 0, 32)
    other_name = "/models/llama-2-7b-chat.gguf answered" in text
    assert other_name == (name == "llama.cpp")


def test_a_server_that_ignores_the_schema_is_refused_before_the_long_work(run, serve, capsys):
    server = serve("old")
    assert run.judge(server) == 2
    error = capsys.readouterr().err
    for words in ("ignores response_format", "Ollama", "0.5", "I think that reply A"):
        assert words in error
    assert error.count("\n") == 1
    assert len(server.asked) == 1
    assert not run.results.exists()


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_judge_that_always_says_one_letter_is_seen_through(letter, run, serve, capsys):
    server = serve()
    server.say = lambda prompt, a, b: letter
    assert run.judge(server) == 0
    text = capsys.readouterr().out
    for compared in COMPARED:
        assert row(text, compared)["rate"] == "0.500"
        assert row(text, compared)["undecided"] == str(PAIRS)
        assert row(text, compared)["letter A"] == ("1.000" if letter == "A" else "0.000")
        assert row(text, compared)["longer won"] == ""
    for doubt in ("not better than a coin's", "are undecided", "the judge says A in"):
        assert doubt in text


def test_a_judge_that_agrees_with_people_in_four_of_five(run, serve, capsys):
    """The rate is the very share; 0.8 lies within its interval; and nothing warns."""
    def agrees(prompt):
        return chance(prompt) < 0.8

    def say(prompt, a, b):
        letter = people(prompt, a, b)
        if agrees(prompt):
            return letter
        return "B" if letter == "A" else "A"
    server = serve()
    server.say = say
    assert run.judge(server) == 0
    text = capsys.readouterr().out
    found = row(text, "chosen against rejected")
    share = sum(agrees(f"Question {i}?") for i in range(PAIRS)) / PAIRS
    assert found["rate"] == f"{share:.3f}"
    low, high = found["95% interval"].split(" to ")
    assert float(low) <= 0.8 <= float(high)
    assert found["letter A"] == "0.500"
    # "unfriendly answer 3" is longer than "kind answer 3", and wins where people are contradicted.
    assert found["longer won"] == f"{1 - share:.3f}"
    assert "DON'T TRUST" not in text


def test_a_judge_that_guesses(run, serve, capsys):
    """A coin in each question: half of the verdicts are undecided, and the rate is a half."""
    def say(prompt, a, b):
        return "A" if chance(prompt, a, b) < 0.5 else "B"
    server = serve()
    server.say = say
    assert run.judge(server) == 0
    text = capsys.readouterr().out
    for compared in COMPARED:
        found = row(text, compared)
        low, high = found["95% interval"].split(" to ")
        assert float(low) <= 0.5 <= float(high)
        assert 0.25 < int(found["undecided"]) / PAIRS < 0.75
    assert "not better than a coin's" in text


def test_questions_that_are_refused_are_counted_and_asked_again_by_the_next_run(run, serve, capsys):
    """Every third is refused, as too long: its verdict is unreadable, and neither won nor lost."""
    server = serve()
    server.say = people
    too_long = {"error": {"message": "the question exceeds the context"}}
    server.interrupt = lambda number: (400, too_long, {}) if number % 3 == 2 else None
    assert run.judge(server) == 0
    text = capsys.readouterr().out
    refused = [number for number in range(1, 1 + 2 * 4 * PAIRS) if number % 3 == 2]
    assert f"refused {len(refused)} questions" in text
    assert "the question exceeds the context" in text
    unreadable = sum(int(row(text, compared)["unreadable"]) for compared in COMPARED)
    assert unreadable == len(refused)                  # no two of a prompt's two
    assert row(text, "chosen against rejected")["rate"] == "1.000"
    assert f"{unreadable} of {4 * PAIRS} verdicts can't be read" in text

    server.interrupt = lambda number: None
    server.asked.clear()
    assert run.judge(server) == 0
    text = capsys.readouterr().out
    assert len(server.questions()) == len(refused)
    assert row(text, "chosen against rejected")["unreadable"] == "0"
    assert "refused" not in text


def test_a_judge_that_breaks_off_loses_nothing(run, serve, capsys):
    """The second call asks only what is missing, and a line that was torn by a kill."""
    server = serve()
    server.say = people
    server.interrupt = lambda number: "drop" if number == 20 else None
    assert run.judge(server) == 2
    error = capsys.readouterr().err
    assert "verdicts are kept" in error
    assert error.count("\n") == 1
    path = run.results / "verdicts.jsonl"
    assert len(path.read_bytes().splitlines()) == 19
    path.write_bytes(path.read_bytes()[:-7])           # as a kill may leave it

    server.interrupt = lambda number: None
    server.asked.clear()
    samples = len(run.sampled)
    assert run.judge(server) == 0
    assert len(server.questions()) == 2 * 4 * PAIRS - 18
    assert len(run.sampled) == samples                 # answers are kept, too
    assert row(capsys.readouterr().out, "chosen against rejected")["rate"] == "1.000"

    server.asked.clear()
    assert run.judge(server) == 0
    assert server.questions() == []


def test_a_judge_that_refuses_everything_yields_no_number(run, serve, capsys):
    server = serve()
    server.interrupt = lambda number: (400, {"error": "too long"}, {}) if number > 0 else None
    assert run.judge(server) == 2
    assert "there are no rates: too long" in capsys.readouterr().err
    assert not run.report.exists()


def test_an_answer_that_was_cut_off_is_unreadable(run, serve, capsys, monkeypatch):
    """Even where it looks whole."""
    server = serve()
    server.say = people
    real = judge.Judge.choose_format

    def choose_format(self):
        real(self)
        server.finish_reason = "length"
    monkeypatch.setattr(judge.Judge, "choose_format", choose_format)
    assert run.judge(server) == 2
    assert "no verdict of llama2 can be read" in capsys.readouterr().err


def test_explain_asks_for_a_reason_before_the_letter(run, serve):
    """Its verdicts are others than those without."""
    server = serve()
    server.say = people
    assert run.judge(server) == 0
    server.asked.clear()
    assert run.judge(server, "--explain") == 0
    assert len(server.questions()) == 2 * 4 * PAIRS
    schema = server.asked[-1]["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == schema["required"] == ["reason", "better"]
    assert '{"reason": ' in server.asked[-1]["messages"][0]["content"]
    assert server.asked[-1]["max_tokens"] == 256


def test_a_judge_of_another_name_has_verdicts_of_its_own(run, serve):
    server = serve("llama-cpp-python")                 # which takes any name
    server.say = people
    assert run.judge(server) == 0
    server.asked.clear()
    assert run.judge(server, "--judge", "mistral") == 0
    assert len(server.questions()) == 2 * 4 * PAIRS
    server.asked.clear()
    assert run.judge(server) == 0
    assert server.questions() == []


# 4. Faults --------------------------------------------------------------------------------------


def fails(run, server, capsys, *words) -> str:
    """The one line on stderr of a call that ends with exit code 2, before anything was sampled."""
    assert run.judge(server, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error  ")
    assert error.count("\n") == 1
    assert run.sampled == []
    return error


def test_a_server_that_is_away(run, serve, capsys):
    server = serve()
    server.http.shutdown()
    server.http.server_close()
    error = fails(run, server, capsys)
    assert "no answer (ConnectionError): start a server" in error
    assert "ollama pull llama2" in error


def test_a_server_that_never_answers(run, serve, capsys, monkeypatch):
    """The wait is long, since servers go on computing when nobody waits any more."""
    waits = []

    def post(self, url, json, timeout):
        waits.append(timeout)
        raise requests.ReadTimeout
    monkeypatch.setattr(requests.Session, "post", post)
    assert "no answer (ReadTimeout)" in fails(run, serve(), capsys)
    assert waits == [(10, 300)]


def test_a_busy_server_is_asked_again_after_as_long_as_it_says(serve, tmp_path, monkeypatch):
    """Or after 2, 4, 8, ... seconds, where it says nothing."""
    waits = []
    server = serve()
    monkeypatch.setattr(judge.time, "sleep", waits.append)
    headers = {1: {"Retry-After": "7"}}
    server.interrupt = lambda number: (503, "busy", headers.get(number, {}))
    asking = judge.Judge(server.url, "llama2", False, tmp_path / "verdicts.jsonl")
    with pytest.raises(OSError, match="the answer was 503"):
        asking("Hi", "Hello", "Go away")
    assert waits == [2, 7, 8, 16, 32, 64]


@pytest.mark.parametrize(("status", "body", "shown"), [
    (404, {"error": {"message": "model 'llama2' not found"}}, "not found: see whether --judge"),
    (401, {"error": "no key"}, "no key: set JUDGE_API_KEY"),
    (429, {"object": "error", "message": "too many"}, "too many: the server limits"),
    (500, "the engine\nhas died", "the engine has died: look at the server's own messages"),
    (503, {"error": {"message": "Loading model"}}, "Loading model: look at"),
])
def test_a_fault_that_lasts_is_one_line_in_each_of_the_forms(status, body, shown, run, serve,
                                                             capsys):
    server = serve()
    server.interrupt = lambda number: (status, body, {})
    error = fails(run, server, capsys)
    assert f"the answer was {status}: " in error
    assert shown in error
    again = status in judge.BUSY
    assert len(server.asked) == (7 if again else 1)


@pytest.mark.parametrize("body", ["<html>Welcome</html>", "[]", {"choices": []}, {"choices": [7]},
                                  {"choices": [{"message": {"content": 7}}]}])
def test_an_answer_that_is_no_chat_completion(body, run, serve, capsys):
    server = serve()
    server.interrupt = lambda number: (200, body, {})
    assert "is no chat completion" in fails(run, server, capsys)


def test_a_fault_that_passes_is_not_noticed(run, serve, capsys):
    """Still loading twice; later too many requests, with a wait that the server names."""
    server = serve()
    server.say = people
    faults = {0: (503, {"error": {"message": "Loading model"}}, {}),
              1: (503, {"error": {"message": "Loading model"}}, {}),
              9: (429, "slow down", {"Retry-After": "0"}),
              30: (502, "bad gateway", {})}
    server.interrupt = faults.get
    assert run.judge(server) == 0
    assert row(capsys.readouterr().out, "chosen against rejected")["rate"] == "1.000"
    assert len(server.asked) == 1 + len(faults) + 2 * 4 * PAIRS


def test_the_key_is_sent_and_never_shown(run, serve, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "s3cret")
    server = serve()
    server.interrupt = lambda number: (401, {"error": "wrong key s3cret"}, {})
    error = fails(run, server, capsys)
    assert "wrong key ***" in error
    assert "s3cret" not in error
    assert server.headers[0]["Authorization"] == "Bearer s3cret"


@pytest.mark.parametrize("prompt_tokens", [0, None])
def test_a_server_that_does_not_count_tokens_is_not_said_to_cut(prompt_tokens, run, serve, capsys):
    server = serve()
    server.say = people
    server.prompt_tokens = prompt_tokens
    assert run.judge(server) == 0
    text = capsys.readouterr().out
    assert row(text, "chosen against rejected")["rate"] == "1.000"
    assert "has cut" not in text


def test_a_cut_question_is_told_of_even_if_nothing_is_asked(run, serve, capsys):
    """Four tokens can't hold a question of fifty words: the server cut it, and said nothing."""
    server = serve()
    server.say = people
    server.prompt_tokens = 4
    assert run.judge(server) == 0
    assert f"has cut at least {2 * 4 * PAIRS} of the kept questions" in capsys.readouterr().out
    server.asked.clear()
    assert run.judge(server) == 0
    assert server.questions() == []
    assert f"has cut at least {2 * 4 * PAIRS} of the kept questions" in capsys.readouterr().out


def test_a_question_holds_no_chat_template_of_its_own(serve, tmp_path):
    asking = judge.Judge(serve().url, "llama2", False, tmp_path / "verdicts.jsonl")
    question = asking.question_of("{a} [INST] Hi \ud83d", "<<SYS>> {b} </s>", "kind")
    assert parts(question) == ("{a}   Hi ?", "{b}", "kind")


@pytest.mark.parametrize(("words", "named"), [
    (["--prompts", "0"], "--prompts"),
    (["--temperature", "-1"], "--temperature"),
    (["--temperature", "nan"], "--temperature"),
    (["--top_p", "0"], "--top_p"),
    (["--max_new_tokens", "0"], "--max_new_tokens"),
    (["--ask", "x", "--blind"], "--ask"),
    (["--against", "me"], "--against"),
    (["--n", "5"], "--n"),
])
def test_a_wrong_option_names_itself(words, named, run, capsys):
    with pytest.raises(SystemExit) as stop:
        judge.main([str(run.out), *words])
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_a_folder_without_a_run_or_without_weights_is_one_line(run, serve, capsys, tmp_path):
    for words in ([], ["--ask", "Hi"], ["--blind"]):
        assert judge.main([str(tmp_path / "nowhere"), *words]) == 2
        assert "expected the folder of a run of train.py" in capsys.readouterr().err
    (run.out / "best").unlink()
    for words in (["--ask", "Hi"], ["--blind"]):
        assert judge.main([str(run.out), *words]) == 2
        error = capsys.readouterr().err
        assert "best" in error
        assert error.count("\n") == 1


def test_a_demo_needs_no_judge(run, serve, capsys):
    run.write_config(demo=True)
    server = serve()
    for words in ([], ["--blind"]):
        assert "the run of a demo" in fails(run, server, capsys, *words)
    assert server.asked == []


GOOD_VERDICT = (b'{"judge": "x", "question": "y", "letter": "A", "model": "x", '
                b'"question_cut": false}\n')


def test_a_damaged_line_is_named(run, serve, capsys):
    run.results.mkdir()
    (run.results / "verdicts.jsonl").write_bytes(b'{"judge": "x", "question": "y"}\n{oh\n')
    error = fails(run, serve(), capsys)
    assert "verdicts.jsonl, line 1: b'{\"judge\": \"x\"" in error
    (run.results / "verdicts.jsonl").write_bytes(GOOD_VERDICT + b"{oh\n")
    error = fails(run, serve(), capsys)
    assert "verdicts.jsonl, line 2: b'{oh', expected a JSON object" in error


@pytest.mark.parametrize("name", ["answers.jsonl", "blind.jsonl", "verdicts.jsonl"])
def test_a_file_of_another_edition_is_one_line_that_names_it(name, run, serve, capsys):
    """The first edition's lines had other names: no traceback, and nothing is overwritten."""
    old = b'{"order": "chosen / rejected", "prompt": "Hi", "letter": "A"}\n'
    run.results.mkdir()
    (run.results / name).write_bytes(old)
    words = ["--blind"] if name == "blind.jsonl" else []
    assert run.judge(serve(), *words) == 2
    error = capsys.readouterr().err
    assert f"{name}, line 1: " in error
    assert "another edition" in error
    assert error.count("\n") == 1
    assert (run.results / name).read_bytes() == old


# 5. Answers -------------------------------------------------------------------------------------


def test_answers_are_sampled_alike_and_end_at_end_of_text_or_the_next_question(monkeypatch):
    encoding = tiktoken.get_encoding("gpt2")
    seen = {}

    def play(gpt2, prompts, max_tokens, temperature, top_p, end_token, stop, seed):
        seen.update(prompts=prompts, max_tokens=max_tokens, temperature=temperature, top_p=top_p,
                    seed=seed)
        answers = [encoding.encode(" Yes."), encoding.encode(" No.\n\nHuman: Why?"),
                   encoding.encode(" Well")]
        answers[0].append(end_token)
        assert not stop(answers[0])
        assert not stop(encoding.encode("\n\nHuman"))
        assert stop(encoding.encode(" No.\n\nHuman:"))
        return answers
    monkeypatch.setattr(judge.model, "generate", play)
    gpt2 = SimpleNamespace(config=GPT2Config(n_positions=40))
    prompts = ["\n\nHuman: Is it so?\n\nAssistant:", "\n\nHuman: a b c d e f g h i j\n\nAssistant:",
               "\n\nHuman: ?\n\nAssistant:"]
    answers = judge.sample_answers(gpt2, encoding, prompts, 8, judge.Sampling(0.7, 0.9, 12, seed=5))
    assert [(answer.text, answer.end) for answer in answers] == [
        ("Yes.", "end-of-text"), ("No.", "next question"), ("Well", "limit")]
    for ids, prompt in zip(seen["prompts"], prompts, strict=True):
        assert ids == encoding.encode(prompt)[-8:]     # the end of a prompt that is too long
    assert [seen[name] for name in ("max_tokens", "temperature", "top_p", "seed")] == [
        12, 0.7, 0.9, 5]
    judge.sample_answers(gpt2, encoding, prompts, 50, judge.Sampling(1.0, 1.0, 99, seed=0))
    assert seen["max_tokens"] == 20                    # half of the context


def test_each_block_has_a_seed_that_no_other_block_of_the_model_has(weights, tmp_path, monkeypatch):
    """Blocks of two: of five prompts, then of seven, when the first five are kept."""
    seeds = []

    def sample_answers(gpt2, encoding, prompts, max_prompt_tokens, sampling):
        seeds.append((prompts, sampling.seed))
        return [judge.Answer([1], [2], "Yes.", "limit") for _ in prompts]
    monkeypatch.setattr(judge, "sample_answers", sample_answers)
    monkeypatch.setattr(judge, "BLOCK", 2)
    for count in (5, 7):
        judge.kept_answers(tmp_path / "answers.jsonl", "tuned", weights / "best", None,
                           list("abcdefg")[:count], 8, judge.Sampling(1.0, 1.0, 12, seed=10))
    assert seeds == [(["a", "b"], 10), (["c", "d"], 12), (["e"], 14), (["f", "g"], 15)]


def test_a_second_call_samples_only_new_prompts_and_other_weights(run, serve, weights):
    server = serve()
    server.say = people
    assert run.judge(server, "--prompts", "32") == 0
    assert run.sampled == [32] * 3
    assert run.judge(server, "--prompts", "50") == 0
    assert run.sampled[3:] == [18] * 3
    (run.out / "best").unlink()
    torch.manual_seed(9)                               # the run went on, say
    save_pretrained(GPT2(GPT2Config(1, 1, 4, 64, 50257, 8)), run.out / "best")
    assert run.judge(server, "--prompts", "50") == 0
    assert run.sampled[6:] == [32, 18]
    assert run.judge(server, "--prompts", "50", "--seed", "1") == 0
    assert len(run.sampled) == 8 + 6


def test_more_prompts_keep_the_answers_to_the_first(run, serve):
    """40 prompts are blocks of 32 and 8; of 60, the second block has 28, and is sampled anew."""
    server = serve()
    server.say = people
    for count in ("40", "60"):
        assert run.judge(server, "--prompts", count) == 0
    lines = judge.repair_and_read(run.results / "answers.jsonl")
    prompts = [line["prompt"] for line in lines if line["model"] == "tuned"]
    assert len(prompts) == len(set(prompts)) == 60


def test_prompts_are_drawn_from_the_tests_of_the_run_each_once(run, tmp_path):
    options = json.loads((run.out / "config.json").read_text())["options"]
    prompts = [pair.prompt for pair in judge.drawn_pairs(options, 100, seed=0)]
    assert len(prompts) == len(set(prompts)) == PAIRS
    assert prompts != sorted(prompts)
    assert prompts[:7] == [pair.prompt for pair in judge.drawn_pairs(options, 7, seed=0)]
    assert prompts[:7] != [pair.prompt for pair in judge.drawn_pairs(options, 7, seed=1)]

    own = tmp_path / "own.jsonl"
    lines = [{"prompt": f"Own {i}?", "chosen": "Yes.", "rejected": "No."} for i in range(50)]
    own.write_text("".join(json.dumps(line) + "\n" for line in lines))
    splits, _ = data.split(data.read_pairs(own)[0], [], 0.1, 0.3)
    found = judge.drawn_pairs(options | {"pairs": str(own)}, 100, seed=0)
    assert set(found) == set(splits["test"])


def test_the_log_probability_of_an_answer_is_that_of_its_tokens(weights):
    gpt2 = judge.load(weights / "best")
    answer = Answer([464, 3290], [318, 257, 50256], "", "end-of-text")
    logits = gpt2(torch.tensor([[464, 3290, 318, 257, 50256]], device=gpt2.wte.weight.device))
    logps = logits[0].double().log_softmax(-1)
    expected = logps[1, 318] + logps[2, 257] + logps[3, 50256]
    assert judge.answer_logp(gpt2, answer) == pytest.approx(expected.item(), abs=1e-4)


def test_kl_is_the_mean_log_ratio_of_the_tuned_models_answers(monkeypatch):
    """Log-ratios 1, 2 and 6: mean 3, and 1.96 * sqrt(7) / sqrt(3) = 2.99."""
    logps = {"best": [-5.0, -6.0, -1.0], "sft": [-6.0, -8.0, -7.0]}
    monkeypatch.setattr(judge, "load", lambda path: path)
    monkeypatch.setattr(judge, "answer_logp", lambda gpt2, answer: logps[gpt2][answer])
    assert judge.kl_to_sft({"tuned": "best", "sft": "sft"}, [0, 1, 2]) == "3.00 +- 2.99"


def test_kl_is_shown_at_temperature_1_alone(run, serve, capsys):
    server = serve()
    server.say = people
    for words, is_there in (([], True), (["--temperature", "0.5"], False),
                            (["--top_p", "0.5"], False)):
        assert run.judge(server, *words) == 0
        about = [line for line in capsys.readouterr().out.splitlines()
                 if line.startswith("| tuned |")]
        assert len(about) == 1
        assert ("+-" in about[0]) == is_there


def test_what_answers_show_without_a_judge():
    """Seven words, of which five differ; five pairs of neighbours, of which four differ."""
    assert judge.describe(["a b a b", "c d e"]) == {
        "words": 3.5, "distinct-1": 5 / 7, "distinct-2": 4 / 5}


def test_how_often_the_longer_answer_won():
    """Of four decided verdicts, one is on answers of one length: 2 of 3."""
    verdicts = [Verdict(score, ("A", "B")) for score in (1.0, 0.0, 1.0, 0.5, 0.0)]
    answers = ["long", "a", "b", "long", "c"]
    others = ["s", "long", "long", "s", "d"]
    assert judge.longer_won(verdicts, answers, others) == 2 / 3
    assert judge.longer_won(verdicts[3:], answers[3:], others[3:]) is None


def test_the_report_ends_with_the_answers_as_they_are(run, serve):
    server = serve()
    server.say = people
    assert run.judge(server) == 0
    text = run.report.read_text()
    assert "hh-rlhf holds offensive text" in text
    assert text.count("prompt:\n\n    Question") == 10
    assert text.count("chosen:\n\n    kind answer") == 10
    assert text.count("\n\ntuned:\n\n    ") == text.count("\n\nsft:\n\n    ") == 10
    (block,) = judge.examples({"prompt": ["*a*\n# b"]}, 1)[1:2]
    assert block == "prompt:\n\n    *a*\n    # b"


# 6. --ask and --blind ---------------------------------------------------------------------------


def tiny_demo(out: Path) -> None:
    """Put into the folder what a demo's run leaves: tiny models that read bytes, and know nothing.
    """
    for seed, name in enumerate(("best", "sft")):
        torch.manual_seed(seed)
        save_pretrained(GPT2(GPT2Config(1, 2, 16, 128, 257, 16)), out / name)
    options = {"demo": True, "max_prompt_tokens": 60, "model": "gpt2"}
    (out / "config.json").write_text(json.dumps({"format": train.RUN_FORMAT, "options": options}))


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    tiny_demo(out)
    return out


def test_ask_shows_the_answers_of_all_models_under_one_another(run, capsys):
    assert judge.main([str(run.out), "--ask", "Who?", "--ask", "Why?"]) == 0
    blocks = re.split(r"\n(?=Human: )", capsys.readouterr().out)
    assert [block.splitlines()[0] for block in blocks[1:]] == ["Human: Who?", "Human: Why?"]
    for block in blocks[1:]:
        names = re.findall(r"^--- (\w+): ", block, re.M)
        assert names == ["untuned", "sft", "tuned"]


def test_ask_answers_as_the_model_does(demo, capsys):
    """At temperature 0, with hh-rlhf's form around the question; another seed changes nothing."""
    for seed in ("0", "1"):
        assert judge.main([str(demo), "--ask", "Name a digit.", "--temperature", "0", "--seed",
                           seed, "--max_new_tokens", "5"]) == 0
        text = capsys.readouterr().out
        gpt2 = GPT2.from_pretrained(demo / "best")
        encoding = data.encoding_of(demo=True)
        prompt = encoding.encode_ordinary("\n\nHuman: Name a digit.\n\nAssistant:")
        for _ in range(5):
            prompt.append(gpt2(torch.tensor([prompt]))[0, -1].argmax().item())
        expected = judge.printable(encoding.decode(prompt[-5:]).strip())
        assert f"--- tuned: after DPO\n{expected}\n[cut after 5 tokens]" in text
        assert "untuned" not in text                   # a demo begins with random weights


def test_ask_reads_questions_from_a_terminal_until_an_empty_line(demo):
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, JUDGE, demo, "--ask", "--max_new_tokens", "3"], stdin=end, stdout=end,
        stderr=end)
    os.close(end)
    os.write(terminal, b"Name a digit.\nAnd now?\n\n")
    shown = b""
    try:
        while True:
            shown += os.read(terminal, 4096)
    except OSError:            # how Linux says that the other end is closed
        pass
    assert process.wait(timeout=60) == 0
    text = shown.decode().replace("\r", "")
    assert re.findall(r"^Human: (.*)$", text, re.M) == ["Name a digit.", "And now?"]
    assert text.count("--- tuned: after DPO") == 2
    assert text.count("Your question, or an empty line to stop: ") == 3


def test_ask_can_be_piped(demo):
    done = subprocess.run([sys.executable, JUDGE, demo, "--ask", "--max_new_tokens", "3"],
                          input="Name a digit.\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--- tuned: after DPO") == 1


def test_what_a_model_writes_cannot_steer_the_terminal():
    assert judge.printable("a\x1b[2Jb\nc\x07") == "a?[2Jb\nc?"


def type_in(monkeypatch, *keys: str) -> None:
    """Plays the keyboard."""
    left = list(keys)

    def read(prompt):
        if not left:
            raise EOFError
        return left.pop(0)
    monkeypatch.setattr("builtins.input", read)


def blind_screen(run, capsys, *words) -> str:
    assert judge.main([str(run.out), "--blind", "--max_new_tokens", "9", *words]) == 0
    return capsys.readouterr().out


def test_blind_hides_names_counts_and_goes_on(run, capsys, monkeypatch):
    """A person who knows the tuned model's hand chooses it 3 times, then a tie, then stops."""
    tuned = f"{GPT2.from_pretrained(run.out / 'best').wte.weight[0, 0].item():.3f}"
    shown = []

    def read(prompt):
        text = capsys.readouterr().out
        shown.append(text)
        if len(shown) > 4:
            return "q"
        if len(shown) == 4:
            return ""
        (letter,) = re.findall(rf"\[([ab])\] {re.escape(tuned)} ", text)
        return letter
    monkeypatch.setattr("builtins.input", read)
    text = blind_screen(run, capsys)
    assert "rate 0.875, 95% interval" in text          # (3 + 1/2) / 4
    assert "on 4 prompts, 1 of them ties" in text
    low, high = dpo.wilson_interval(0.875, 4)
    assert f"{low:.3f} to {high:.3f}" in text
    assert "hh-rlhf holds offensive text" in shown[0]
    for screen in shown:
        for name in ("tuned", "sft"):
            assert name not in screen.replace("answers of tuned", "").replace("answers of sft", "")
    letters = [re.search(rf"\[([ab])\] {re.escape(tuned)} ", screen)[1] for screen in shown]
    assert set(letters) == {"a", "b"}                  # the order is drawn

    type_in(monkeypatch, "")                           # the next call goes on
    text = blind_screen(run, capsys)
    assert "rate 0.800" in text                        # (3 + 1/2 + 1/2) / 5
    assert "on 5 prompts, 2 of them ties" in text


@pytest.mark.parametrize("against", ["chosen", "untuned"])
def test_blind_against_others(against, run, capsys, monkeypatch):
    type_in(monkeypatch, "x", "B ", "q")               # x is no answer, so it is asked again
    text = blind_screen(run, capsys, "--against", against)
    assert f"tuned against {against}: rate " in text
    assert "on 1 prompts, 0 of them ties" in text
    (line,) = judge.repair_and_read(run.results / "blind.jsonl")
    assert line["score"] in (0.0, 1.0)
    kind = line["other"].startswith("kind answer")
    assert kind == (against == "chosen")


def test_a_prompt_with_half_a_character_can_be_judged_blindly(capsys, monkeypatch):
    """JSON can hold one, "\\ud83d", and UTF-8 has no bytes for it."""
    type_in(monkeypatch, "")
    assert judge.compare_blindly("Hi \ud83d", "Hello", "Go", seed=0) == 0.5
    assert "Hi ?" in capsys.readouterr().out


def test_blind_without_a_verdict_has_no_rate(run, capsys, monkeypatch):
    type_in(monkeypatch)
    assert "no verdicts, so there is no rate" in blind_screen(run, capsys)


def test_blind_works_in_a_pipe(run):
    """As in: printf 'a\\nb\\nq\\n' | python judge.py out --blind. Here the models write."""
    done = subprocess.run(
        [sys.executable, JUDGE, run.out, "--blind", "--prompts", "5", "--max_new_tokens", "4"],
        input="a\nb\nq\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "on 2 prompts, 0 of them ties or equal answers" in done.stdout
    assert len(judge.repair_and_read(run.results / "blind.jsonl")) == 2
