"""Claims about data.py, from a line of JSON to a flat batch. Downloads have their own file.

The files here are written by the tests. The ids are GPT-2's, each with its text beside it.
"""

import gzip
import json
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import ASSISTANT, HUMAN, Pair, TokenPair, batches, flatten, read_pairs, split, tokenize
from model import GPT2, GPT2Config, in_rows

END = 50256  # <|endoftext|>
PROMPT = "\n\nHuman: Name a color.\n\nAssistant:"
PROMPT_IDS = [198, 198, 20490, 25,  # "\n", "\n", "Human", ":"
              6530, 257, 3124, 13,  # " Name", " a", " color", "."
              198, 198, 48902, 25]  # "\n", "\n", "Assistant", ":"
RED, BLUE = " Red.", " Blue is a color."
RED_IDS = [2297, 13]  # " Red", "."
BLUE_IDS = [4518, 318, 257, 3124, 13]  # " Blue", " is", " a", " color", "."


@pytest.fixture(scope="module")
def encoding():
    return tiktoken.get_encoding("gpt2")


def dialogue(*turns: str) -> str:
    """"\\n\\nHuman: ...\\n\\nAssistant: ..." of turns by turns."""
    return "".join(f"{(HUMAN, ASSISTANT)[i % 2]} {turn}" for i, turn in enumerate(turns))


def joined(lists) -> list:
    return list(chain.from_iterable(lists))


def write(path: Path, rows: list) -> Path:
    """A JSONL file, gzip if its name says so; bytes stand for a line as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        file.writelines(line + b"\n" for line in lines)
    return path


# Reading

ROWS = [
    {"chosen": dialogue("Hi", "Yes."), "rejected": dialogue("Hi", "No.")},
    {"chosen": dialogue("Hi", "A", "And?", "B"), "rejected": dialogue("Hi", "A", "And?", "C")},
    {"chosen": dialogue("Hi", "A"), "rejected": dialogue("Hi", "A", "And?", "C")},
    {"chosen": "Hi", "rejected": "Ho"},  # no turn at all
    {"chosen": "x" + dialogue("Hi", "A"), "rejected": "x" + dialogue("Hi", "B")},
    {"chosen": dialogue("Hi", "A"), "rejected": dialogue("Ho", "B")},
    {"chosen": dialogue("Hi", " \n"), "rejected": dialogue("Hi", "B")},
    {"chosen": dialogue("Hi", "A"), "rejected": dialogue("Hi", "")},
    {"chosen": dialogue("Hi", "A"), "rejected": dialogue("Hi", "A")},
    {"chosen": dialogue("Ho", " spaced"), "rejected": dialogue("Ho", "two\nlines")},
]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_each_row_is_kept_or_counted_under_its_reason(tmp_path, name):
    pairs, audit = read_pairs(write(tmp_path / name, ROWS))
    assert pairs == [Pair("\n\nHuman: Hi\n\nAssistant:", " Yes.", " No."),
                     Pair("\n\nHuman: Ho\n\nAssistant:", "  spaced", " two\nlines")]
    assert audit == Counter({"rows": 10, "kept": 2, "not one turn": 4, "prompts differ": 1,
                             "empty answer": 2, "equal answers": 1})


@pytest.mark.parametrize(("rejected", "cut", "reason"), [
    ("\n\nHuman: I see\n\nAssistant: No.", "", "prompts differ"),
    ("\n\nHuman: I see\n\nAssistant: No, I do not.", "do not.", "prompts differ"),
    ("\n\nHuman: I see\n\nAssistant: No.\n\nHuman: Why?\n\nAssistant: So.",
     "uman: Why?\n\nAssistant: So.", "not one turn"),
    ("\n\nHuman: I see a tree\n\nAssistant:", "", "empty answer"),
])
def test_no_rejected_text_is_cut_at_the_length_of_the_chosen_prompt(tmp_path, rejected, cut,
                                                                    reason):
    """Published code for this data does that: what is left is empty, or begins in mid-sentence."""
    chosen = "\n\nHuman: I see a tree\n\nAssistant: Yes."
    assert rejected[len("\n\nHuman: I see a tree\n\nAssistant:"):] == cut
    row = {"chosen": chosen, "rejected": rejected}
    assert read_pairs(write(tmp_path / "p.jsonl", [row])) == ([], {"rows": 1, "kept": 0, reason: 1})


@pytest.mark.parametrize("prompt", ["Name a color.", PROMPT, PROMPT + " ", PROMPT[:-12],
                                    "\n\nHuman: Name a color.\n"])
def test_a_prompt_of_its_own_may_stand_beside_the_answers(tmp_path, prompt):
    row = {"prompt": prompt, "chosen": "Red.", "rejected": " Blue is a color."}
    pairs, audit = read_pairs(write(tmp_path / "p.jsonl", [row]))
    assert pairs == [Pair(PROMPT, RED, BLUE)] and audit == Counter(rows=1, kept=1)


def test_a_prompt_of_more_than_one_turn_is_dropped_in_that_form_too(tmp_path):
    rows = [{"prompt": dialogue("Hi", "Ho", "And?"), "chosen": "A", "rejected": "B"},
            {"prompt": "Hi", "chosen": f"A{HUMAN} And?", "rejected": "B"},
            {"prompt": "Hi", "chosen": " ", "rejected": "B"},
            {"prompt": "Hi", "chosen": "A", "rejected": " A"}]
    assert read_pairs(write(tmp_path / "p.jsonl", rows)) == ([], Counter(
        {"rows": 4, "kept": 0, "not one turn": 2, "empty answer": 1, "equal answers": 1}))


@pytest.mark.parametrize(("line", "found"), [
    (b"not JSON", "Expecting value.*b'not JSON"),
    (b"", "Expecting value"),
    (b'{"chosen": "a"', "delimiter.*chosen"),
    (b'{"chosen": "\xff", "rejected": "b"}', "codec can't decode byte 0xff"),
    (b'\xef\xbb\xbf{"chosen": "a", "rejected": "b"}', "BOM"),
    (b'{"chosen": "a"}', "no rejected"),
    (b'{"rejected": "b", "prompt": "a"}', "no chosen"),
    (b'{"chosen": null, "rejected": "b"}', "chosen is None"),
    (b'{"chosen": "a", "rejected": [{"role": "user"}]}', r"rejected is \[\{'role'"),
    (b'{"chosen": "a", "rejected": "b", "prompt": 7}', "prompt is 7"),
    (b'["chosen", "rejected"]', r"no object.*\[\"chosen"),
    (b'"chosen"', "no object"),
    (b"[" * 100_000, "recursion"),
])
@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_a_bad_line_is_an_error_with_file_and_line_and_what_was_found(tmp_path, name, line, found):
    path = write(tmp_path / name, [ROWS[0], ROWS[1], line, ROWS[9]])
    with pytest.raises(ValueError, match=f"(?s){name}, line 3: .*{found}") as caught:
        read_pairs(path)
    assert "expected a JSON object with the strings chosen and rejected" in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(path))


def test_a_torn_gzip_is_an_error_that_tells_the_last_whole_line(tmp_path):
    path, line = tmp_path / "torn.jsonl.gz", json.dumps(ROWS[0]).encode() + b"\n"
    path.write_bytes(gzip.compress(2 * line) + gzip.compress(line)[:-12])
    with pytest.raises(ValueError, match=r"torn\.jsonl\.gz.*breaks off after line 2 .*delete it"):
        read_pairs(path)


@pytest.mark.parametrize("harm", [lambda b: b[:-1], lambda b: b[:20], lambda b: b[:5],
                                  lambda b: b"no gzip" + b, lambda b: b + b"tail",
                                  lambda b: b[:-8] + bytes([b[-8] ^ 1]) + b[-7:],
                                  lambda b: b[:40] + b"\xff\xff\xff" + b[43:]])
def test_any_harm_to_a_gzip_is_an_error(tmp_path, harm):
    path = write(tmp_path / "p.jsonl.gz", ROWS)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ValueError, match=r"p\.jsonl\.gz(: no whole gzip file|, line 1: )"):
        read_pairs(path)


def test_an_empty_file_has_no_rows(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"")
    assert read_pairs(tmp_path / "p.jsonl") == ([], Counter(rows=0, kept=0))


words = st.text(max_size=12).filter(lambda t: HUMAN not in t and ASSISTANT not in t)


@given(st.lists(st.tuples(words, words, words), max_size=6))
@settings(max_examples=60)
def test_any_text_is_read_back_unchanged_and_in_order(tmp_path_factory, texts):
    """Line breaks, quotes, astral characters and lone surrogates too: JSON can hold them all."""
    rows = [{"chosen": HUMAN + h + ASSISTANT + c, "rejected": HUMAN + h + ASSISTANT + r}
            for h, c, r in texts]
    pairs, audit = read_pairs(write(tmp_path_factory.mktemp("any") / "p.jsonl.gz", rows))
    assert pairs == [Pair(HUMAN + h + ASSISTANT, c, r) for h, c, r in texts
                     if c.strip() and r.strip() and c != r]
    assert audit["rows"] == len(rows) == sum(audit.values()) - audit["rows"]


# Splitting

def asked(*numbers: int) -> list[Pair]:
    return [Pair(f"\n\nHuman: question {n}\n\nAssistant:", f" {n}", " no") for n in numbers]


def test_a_prompts_part_follows_from_its_sha256_alone():
    """Digests of prompts 0 to 5 begin 85d6, 3c13, b32f, 019b, f11f, 62ce: of 2^16 0.52, 0.23, 0.70,
    0.01, 0.94, 0.39."""
    parts, dropped = split(asked(0, 1, 2, 3, 4, 5), asked(99), 0.25)
    assert parts == {"train": asked(0, 2, 4, 5), "val": asked(1, 3), "test": asked(99)}
    assert dropped == Counter()
    at_a_hair = [split(asked(1), asked(99), 0x3c1308168610d846 / 2**64 + e) for e in (0, 1e-15)]
    assert [(len(parts["train"]), len(parts["val"])) for parts, _ in at_a_hair] == [(1, 0), (0, 1)]


def test_without_a_test_set_a_second_share_of_prompts_becomes_it():
    """Digests of 5 and 9 begin 62ce and 7be1, 0.39 and 0.48: between one share and two."""
    parts, dropped = split(asked(*range(12)), [], 0.25)
    assert parts == {"train": asked(0, 2, 4, 8, 11), "val": asked(1, 3, 6, 7, 10),
                     "test": asked(5, 9)} and not dropped.total()


def test_a_prompt_in_test_is_counted_and_kept_out_of_train_and_val():
    parts, dropped = split(asked(0, 1, 2, 1), asked(2, 1), 0.25)
    assert parts == {"train": asked(0), "val": [], "test": asked(2, 1)}
    assert dropped == Counter({"prompt is in test": 3})


@given(st.lists(st.integers(0, 30), max_size=40), st.lists(st.integers(20, 40), max_size=5),
       st.floats(0.01, 0.49), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_no_pair_is_lost_and_equal_prompts_are_in_one_part_in_any_order(numbers, test, share, rng):
    pairs = [Pair(pair.prompt, f" {i}", " no") for i, pair in enumerate(asked(*numbers))]
    parts, dropped = split(pairs, asked(*test), share)
    assert Counter(joined(parts.values())) + Counter(p for p in pairs if p.prompt in {
        q.prompt for q in asked(*test)}) == Counter(pairs + asked(*test))
    assert not test or parts["test"] == asked(*test)
    prompts = [{pair.prompt for pair in part} for part in parts.values()]
    assert len(set().union(*prompts)) == sum(map(len, prompts))
    shuffled = rng.sample(pairs, len(pairs))
    other, again = split(shuffled, asked(*test), share)
    assert again == dropped
    assert all(sorted(other[name]) == sorted(parts[name]) for name in parts)


def test_a_prompt_that_no_file_could_hold_has_a_part_too():
    """JSON can hold half a character, UTF-8 cannot."""
    pair = Pair(f"{HUMAN} \ud800{ASSISTANT}", " a", " b")
    assert sum(map(len, split([pair], [], 0.1)[0].values())) == 1


def test_about_a_share_of_prompts_goes_to_val():
    parts, _ = split(asked(*range(2000)), asked(5000), 0.1)
    assert 160 < len(parts["val"]) < 240  # 200, and three standard deviations of 13.4


# Tokens

def ids_of(pairs, encoding, max_tokens=512, max_prompt_tokens=256):
    kept, audit = tokenize(pairs, encoding, max_tokens, max_prompt_tokens)
    assert all(part.dtype == np.int32 for pair in kept for part in pair)
    return [tuple(part.tolist() for part in pair) for pair in kept], +audit  # no zeros


def test_a_response_keeps_its_space_and_gets_one_end_of_text(encoding):
    kept, audit = ids_of([Pair(PROMPT, RED, BLUE)], encoding)
    assert kept == [(PROMPT_IDS, [*RED_IDS, END], [*BLUE_IDS, END])] and not audit
    assert encoding.encode_ordinary(PROMPT + RED) == PROMPT_IDS + RED_IDS


@pytest.mark.parametrize(("max_tokens", "chosen", "rejected"), [
    (18, [*RED_IDS, END], [*BLUE_IDS, END]),  # 12 of prompt, 6 of the longer response: no cut
    (17, [*RED_IDS, END], BLUE_IDS),          # the end-of-text is the first to go
    (15, [*RED_IDS, END], [4518, 318, 257]),  # the shorter still is whole
    (14, RED_IDS, [4518, 318]),
    (13, [2297], [4518]),                     # one token at least
])
def test_a_response_is_cut_from_the_right_and_then_has_no_end_of_text(encoding, max_tokens, chosen,
                                                                       rejected):
    kept, audit = ids_of([Pair(PROMPT, RED, BLUE)], encoding, max_tokens, 12)
    assert kept == [(PROMPT_IDS, chosen, rejected)]
    assert audit == Counter(cut=1 if max_tokens < 18 else 0)


@pytest.mark.parametrize(("max_prompt_tokens", "prompt"), [
    (13, PROMPT_IDS), (12, PROMPT_IDS), (11, PROMPT_IDS[1:]), (5, [13, 198, 198, 48902, 25]),
    (1, [25])])
def test_a_prompt_is_cut_once_from_the_left_and_leaves_the_rest_to_both_responses(
        encoding, max_prompt_tokens, prompt):
    kept, audit = ids_of([Pair(PROMPT, RED, BLUE)], encoding, len(prompt) + 4, max_prompt_tokens)
    assert kept == [(prompt, [*RED_IDS, END], BLUE_IDS[:4])] and audit == Counter(cut=1)


def test_a_cut_prompt_counts_as_cut_though_its_responses_are_whole(encoding):
    kept, audit = ids_of([Pair(PROMPT, RED, BLUE)], encoding, 512, 2)
    assert kept == [([48902, 25], [*RED_IDS, END], [*BLUE_IDS, END])] and audit == Counter(cut=1)


def test_a_pair_whose_sides_are_equal_after_cutting_is_dropped_and_counted(encoding):
    """ " one two three four" is [530, 734, 1115, 1440], " one two five" [530, 734, 1936]."""
    pairs = [Pair(PROMPT, RED, BLUE), Pair(PROMPT, " one two three four", " one two five"),
             Pair(PROMPT, " one two", " one two five")]
    kept, audit = ids_of(pairs, encoding, 14, 12)
    assert [chosen for _, chosen, _ in kept] == [RED_IDS]
    assert audit == Counter({"cut": 1, "equal after cutting": 2})
    kept, audit = ids_of(pairs, encoding, 15, 12)
    assert kept[1:] == [(PROMPT_IDS, [530, 734, 1115], [530, 734, 1936]),
                        (PROMPT_IDS, [530, 734, END], [530, 734, 1936])]
    assert audit == Counter(cut=3)


def test_text_that_looks_like_a_special_token_is_text(encoding):
    """ "<|endoftext|>" is "<", "|", "end", "of", "text", "|", ">" where a person wrote it."""
    kept, _ = ids_of([Pair("<|endoftext|>", " <|endoftext|>", RED)], encoding)
    assert kept == [([27, 91, 437, 1659, 5239, 91, 29],
                     [1279, 91, 437, 1659, 5239, 91, 29, END], [*RED_IDS, END])]


def test_a_lone_surrogate_becomes_the_replacement_character(encoding):
    kept, _ = ids_of([Pair("a\ud800b", RED, BLUE)], encoding)
    assert encoding.decode(kept[0][0]) == "a\ufffdb"


@pytest.mark.parametrize(("max_tokens", "max_prompt_tokens"), [(5, 5), (4, 5), (5, 0), (0, -1)])
def test_limits_that_leave_no_room_are_refused(encoding, max_tokens, max_prompt_tokens):
    with pytest.raises(ValueError, match=f"{max_prompt_tokens}, max_tokens {max_tokens}: expected"):
        tokenize([], encoding, max_tokens, max_prompt_tokens)


@given(st.lists(st.builds(Pair, *[st.text(min_size=1, max_size=20)] * 3), max_size=5),
       st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=100)
def test_a_prompt_keeps_its_end_and_a_response_its_begin(encoding, pairs, of_prompt, room):
    """Each pair for itself, none lost, and never more than the room there is."""
    one_by_one = [tokenize([pair], encoding, of_prompt + room, of_prompt) for pair in pairs]
    kept, audit = tokenize(pairs, encoding, of_prompt + room, of_prompt)
    for ids, alone in zip(kept, joined(k for k, _ in one_by_one), strict=True):
        assert [part.tolist() for part in ids] == [part.tolist() for part in alone]
    assert audit == sum((a for _, a in one_by_one), Counter()) + Counter()
    assert len(kept) + audit["equal after cutting"] == len(pairs)
    for pair, (single, _) in zip(pairs, one_by_one, strict=True):
        prompt, *responses = (encoding.encode_ordinary(text) for text in pair)
        for ids in single:
            assert ids.prompt.tolist() == prompt[max(0, len(prompt) - of_prompt):]
            for got, full in zip(ids[1:], responses, strict=True):
                left = of_prompt + room - len(ids.prompt)
                assert len(got) == min(len(full) + 1, left)
                assert got.tolist() == [*full, END][:left]


# Flat batches

def numbered(*lengths: tuple[int, int, int]) -> list[TokenPair]:
    """Pairs of such lengths; no id stands twice, so that each tells where it came from."""
    ids = iter(range(1000, 50000))
    return [TokenPair(*(np.array([next(ids) for _ in range(n)], np.int32) for n in pair))
            for pair in lengths]


WORKED = [TokenPair(np.array([10, 11]), np.array([20, 21, END]), np.array([30, END])),
          TokenPair(np.array([12]), np.array([40]), np.array([41, 42]))]


def test_a_worked_batch():
    """Two pairs: each prompt once, no padding among the tokens, last tokens only predicted."""
    batch = flatten(WORKED, np.array([7, 3]), groups=1)
    assert batch.tokens.tolist() == [10, 11, 20, 21, 30, 12, 41]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert batch.predicts.tolist() == [1, 2, 3, 5, 1, 4, 5, 6]
    assert batch.targets.tolist() == [20, 21, END, 40, 30, END, 41, 42]
    assert batch.response.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    assert batch.lengths.tolist() == [3, 1, 2, 2]
    assert batch.pairs.tolist() == [7, 3]
    rows, = batch.rows  # the shortest first, 0 for a pad
    assert rows.tolist() == [[5, 0, 0, 0], [5, 6, 0, 0], [0, 1, 4, 0], [0, 1, 2, 3]]
    assert batch.back.tolist()[2:] == [14, 15, 10, batch.back[5], 5]
    assert batch.back[5] in (0, 4) and batch.back[:2].tolist() in ([8, 9], [12, 13])


def test_a_worked_batch_of_the_chosen_side_alone():
    batch = flatten(WORKED, np.array([7, 3]), sides=("chosen",), groups=2)
    assert batch.tokens.tolist() == [10, 11, 20, 21, 12]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0]
    assert [rows.tolist() for rows in batch.rows] == [[[4]], [[0, 1, 2, 3]]]
    assert batch.back.tolist() == [1, 2, 3, 4, 0]
    assert batch.predicts.tolist() == [1, 2, 3, 4] and batch.targets.tolist() == [20, 21, END, 40]
    assert batch.response.tolist() == [0, 0, 0, 1] and batch.lengths.tolist() == [3, 1]


def check(batch: data.Batch, pairs: list[TokenPair], sides: tuple) -> None:
    """Read a batch back, as a model sees it: what each prediction's token can attend to, in order,
    must be exactly its pair's prompt and response up to there, each token at its own position."""
    pairs = [pairs[i] for i in batch.pairs]
    places, columns, context = [], [], {}
    for rows in batch.rows:
        for row in rows.tolist():
            places += row
            columns += range(len(row))
            context |= {len(context) + i: row[:i + 1] for i in range(len(row))}
    tokens, positions = batch.tokens.tolist(), batch.positions.tolist()
    for token, place in enumerate(batch.back.tolist()):
        assert places[place] == token and columns[place] == positions[token]
        assert [positions[t] for t in context[place]] == list(range(columns[place] + 1))
    responses = [getattr(pair, side).tolist() for side in sides for pair in pairs]
    prompts = [pair.prompt.tolist() for _ in sides for pair in pairs]
    assert batch.lengths.tolist() == [len(response) for response in responses]
    told = iter(zip(batch.response.tolist(), batch.predicts.tolist(), batch.targets.tolist(),
                    strict=True))
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        for i, target in enumerate(response):
            whose, place, predicted = next(told)
            seen = [tokens[t] for t in context[batch.back[place].item()]]
            assert (whose, predicted, seen) == (number, target, prompt + response[:i])
    assert next(told, None) is None
    assert len(tokens) == sum(len(p.prompt) for p in pairs) + sum(len(r) - 1 for r in responses)
    assert all(t.dtype == torch.int64 for t in (
        *batch.rows, *(value for value in batch._asdict().values() if value is not batch.rows)))


lengths = st.lists(st.tuples(*[st.integers(1, 9)] * 3), max_size=9)
some_sides = st.sampled_from([("chosen", "rejected"), ("chosen",), ("rejected",)])


@given(lengths, some_sides, st.integers(1, 6))
@settings(max_examples=150)
def test_each_pair_can_be_read_back_from_a_batch_of_any_lengths(lengths, sides, groups):
    pairs = numbered(*lengths)
    batch = flatten(pairs, np.arange(len(pairs)), sides, groups)
    check(batch, pairs, sides)
    assert len(batch.rows) == max(1, min(groups, len(sides) * len(pairs)))


def test_groups_hold_rows_of_like_length():
    """Rows of 4, 4, 8 and 40 tokens: in two groups 2 x 4 and 2 x 40 places, instead of 4 x 40."""
    batch = flatten(numbered((3, 2, 38), (3, 2, 6)), np.arange(2), groups=2)
    assert [tuple(rows.shape) for rows in batch.rows] == [(2, 4), (2, 40)]


def test_a_model_computes_the_same_on_a_flat_batch_as_on_each_row_alone():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(2, 2, 8, 32, 60, 16)).requires_grad_(False)
    rng = np.random.default_rng(0)
    pairs = [TokenPair(*(rng.integers(60, size=n) for n in lengths))
             for lengths in ((3, 5, 2), (7, 1, 9), (1, 4, 4))]
    batch = flatten(pairs, np.arange(3))
    attend = partial(in_rows, rows=batch.rows, back=batch.back)
    logits = model(batch.tokens, batch.positions, attend, batch.predicts)
    alone = []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            row = torch.from_numpy(np.append(pair.prompt, getattr(pair, side)[:-1]))
            alone.append(model(row[None])[0, len(pair.prompt) - 1:])
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_a_batch_moves_with_all_its_parts():
    batch = flatten(WORKED, np.array([7, 3])).to("meta")
    assert all(rows.is_meta for rows in batch.rows)
    assert all(t.is_meta for t in batch._asdict().values() if t is not batch.rows)


# Batches

EIGHT = numbered(*[(2, n % 3 + 1, 2) for n in range(8)])


def orders(pairs: list[TokenPair], *args, **kwargs) -> list[list[list[int]]]:
    return [[part.pairs.tolist() for part in parts] for parts in batches(pairs, *args, **kwargs)]


@pytest.mark.parametrize(("seed", "epoch", "order"), [
    (0, 0, [[[3, 2, 1]], [[6, 0, 7]], [[4, 5]]]),
    (0, 1, [[[7, 4, 5]], [[1, 6, 2]], [[0, 3]]]),
    (1, 0, [[[2, 4, 7]], [[5, 0, 6]], [[3, 1]]]),
])
def test_the_order_follows_from_seed_and_epoch_on_every_machine(seed, epoch, order):
    """The last batch is short, not dropped. Global generators neither matter nor move."""
    np.random.seed(5)
    before = np.random.get_state()[1].tolist()
    assert orders(EIGHT, 3, seed, epoch) == order
    assert np.random.get_state()[1].tolist() == before


def test_without_a_seed_pairs_come_by_length():
    pairs = numbered((2, 2, 3), (1, 1, 1), (9, 1, 1), (1, 3, 3), (1, 1, 2))
    assert orders(pairs, 2, None) == [[[1, 4]], [[0, 3]], [[2]]]  # 3, 4, 7, 7 and 11 tokens


def test_processes_share_a_batch_and_the_last_of_them_may_have_none():
    """Five pairs in batches of four, three processes: shares of 2, 1, 1 and 1, 0, 0."""
    order = joined(part for part, in orders(EIGHT[:5], 4, 0))
    shares = [orders(EIGHT[:5], 4, 0, rank=rank, world=3) for rank in range(3)]
    assert shares == [[[[order[0], order[3]]], [[order[4]]]], [[[order[1]]], [[]]],
                      [[[order[2]]], [[]]]]
    empty = list(batches(EIGHT[:5], 4, 0, rank=2, world=3))[1][0]
    assert len(empty.tokens) == len(empty.targets) == len(empty.lengths) == 0
    check(empty, EIGHT, ("chosen", "rejected"))
    model = GPT2(GPT2Config(1, 1, 4, 8, 9, 4))  # which an empty batch goes through
    attend = partial(in_rows, rows=empty.rows, back=empty.back)
    assert model(empty.tokens, empty.positions, attend, empty.predicts
                 ).shape == (0, 9)


def test_micro_batches_cut_a_share_in_order():
    whole = [part for part, in orders(EIGHT, 7, 0)]
    assert orders(EIGHT, 7, 0, micro_pairs=3) == [[whole[0][:3], whole[0][3:6], whole[0][6:]],
                                                  [whole[1]]]
    assert orders(EIGHT, 6, 0, micro_pairs=3)[0] == [whole[0][:3], whole[0][3:6]]  # none is empty


def test_no_pairs_give_no_batches():
    assert orders([], 4, 0) == orders([], 4, None) == []


@given(lengths, st.integers(1, 5), st.integers(0, 3), st.integers(0, 3), st.integers(1, 4),
       st.integers(0, 3), some_sides)
@settings(max_examples=100)
def test_each_pair_comes_once_an_epoch_whoever_shares_it(lengths, size, seed, start, world, micro,
                                                         sides):
    pairs = numbered(*lengths)
    whole = [part for part, in orders(pairs, size, seed)]
    assert sorted(joined(whole)) == list(range(len(pairs)))
    assert [len(batch) for batch in whole[:-1]] == [size] * len(whole[:-1])
    shares = [list(batches(pairs, size, seed, start=start, rank=rank, world=world,
                           micro_pairs=micro, sides=sides)) for rank in range(world)]
    assert all(len(share) == len(whole[start:]) for share in shares)  # all make the same steps
    for batch, *parts in zip(whole[start:], *shares, strict=True):
        mine = [[n for part in share for n in part.pairs.tolist()] for share in parts]
        assert sorted(joined(mine)) == sorted(batch)
        assert max(map(len, mine)) - min(map(len, mine)) <= 1
        for part in joined(parts):
            assert not micro or len(part.pairs) <= micro
            check(part, pairs, sides)


# Progress

@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock is a second after the last."""
    seconds = iter(range(1000))
    monkeypatch.setattr(data, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))


def test_a_log_gets_a_line_each_tenth(capsys, clock):
    assert list(data.track(range(40), "tokens", 40, "pairs")) == list(range(40))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines] == [
        f"{n}/40 pairs" for n in (1, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40)]
    assert lines[5] == "tokens  50% | 20/40 pairs | 1 pairs/s | 20s left"
    assert lines[-1] == "tokens 100% | 40/40 pairs | 1 pairs/s | 0s left"


def test_what_was_done_before_counts_for_the_share_and_not_for_the_rate(capsys, clock):
    """600 of 1,000 bytes were there; 100 a second came."""
    parts = [bytes(100)] * 4
    assert list(data.track(parts, "file", 1000, "bytes", len, 600)) == parts
    assert capsys.readouterr().out.splitlines() == [
        "file  70% | 700/1,000 bytes | 100 bytes/s | 3s left",
        "file  80% | 800/1,000 bytes | 100 bytes/s | 2s left",
        "file  90% | 900/1,000 bytes | 100 bytes/s | 1s left",
        "file 100% | 1,000/1,000 bytes | 100 bytes/s | 0s left"]


def test_a_terminal_gets_one_line_rewritten_in_place(capsys, clock, monkeypatch):
    monkeypatch.setattr(data.sys.stdout, "isatty", lambda: True)
    list(data.track(range(3), "tokens", 3, "pairs"))
    out = capsys.readouterr().out
    assert out.count("\r\033[K") == 3 and out.count("\n") == 1 and out.endswith("0s left\n")
