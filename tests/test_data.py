"""Claims about data.py, from a line of JSON to a packed batch. Downloads have their own file.

The files here are written by the tests. The ids are GPT-2's, each with its text beside it.
"""

import gzip
import io
import json
import math
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import (
    ASSISTANT,
    HUMAN,
    SIDES,
    Pair,
    TokenPair,
    batches,
    by_length,
    pack,
    read_pairs,
    split,
    tokenize,
)
from model import GPT2, GPT2Config

END = 50256  # <|endoftext|>
PROMPT = "\n\nHuman: Name a color.\n\nAssistant:"
PROMPT_IDS = [198, 198, 20490, 25,  # "\n", "\n", "Human", ":"
              6530, 257, 3124, 13,  # " Name", " a", " color", "."
              198, 198, 48902, 25]  # "\n", "\n", "Assistant", ":"
RED = " Red."
BLUE = " Blue is a color."
RED_IDS = [2297, 13]  # " Red", "."
BLUE_IDS = [4518, 318, 257, 3124, 13]  # " Blue", " is", " a", " color", "."


@pytest.fixture(scope="module")
def encoding():
    return tiktoken.get_encoding("gpt2")


def dialogue(*turns: str) -> str:
    """"\\n\\nHuman: ...\\n\\nAssistant: ..." of the turns, which alternate."""
    speakers = [HUMAN, ASSISTANT]
    return "".join(f"{speakers[i % 2]} {turn}" for i, turn in enumerate(turns))


def joined(lists) -> list:
    """The elements of all the lists, in one list."""
    return list(chain.from_iterable(lists))


def write(path: Path, rows: list) -> Path:
    """A JSONL file, gzip if its name says so; bytes stand for a line as it is."""
    content = b""
    for row in rows:
        line = row if isinstance(row, bytes) else json.dumps(row).encode()
        content += line + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
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


def read_prompt(path: Path, prompt: str) -> str:
    """The prompt that comes of a row in which it stands beside the answers."""
    row = {"prompt": prompt, "chosen": "Red.", "rejected": " Blue is a color."}
    pairs, audit = read_pairs(write(path / "p.jsonl", [row]))
    assert audit == Counter(rows=1, kept=1)
    assert pairs == [Pair(pairs[0].prompt, RED, BLUE)]
    return pairs[0].prompt


@pytest.mark.parametrize("prompt", [
    "Name a color.",
    " Name a color.\n",
    "\n\nHuman: Name a color.\n\nAssistant:",
    "\n\nHuman: Name a color.\n\nAssistant: ",
    "\n\nHuman: Name a color.",
    "\n\nHuman: Name a color.\n",
    "Name a color.\n\nAssistant:",
])
def test_a_prompt_of_its_own_may_stand_beside_the_answers(tmp_path, prompt):
    assert read_prompt(tmp_path, prompt) == "\n\nHuman: Name a color.\n\nAssistant:"


@pytest.mark.parametrize("prompt", [
    "Human: Name a color.",
    "Human: Name a color.\n",
    "\nHuman: Name a color.",
    "Human: Name a color.\nAssistant:",
    "Human: Name a color.\n\nAssistant:",
    "\nHuman: Name a color.\n\nAssistant:\n",
])
def test_a_prompt_that_begins_with_human_without_two_newlines_is_not_marked_twice(tmp_path, prompt):
    assert read_prompt(tmp_path, prompt) == "\n\nHuman: Name a color.\n\nAssistant:"


@pytest.mark.parametrize(("prompt", "read"), [
    ("Humanity?", "\n\nHuman: Humanity?\n\nAssistant:"),
    ("Who says Human: Hi?", "\n\nHuman: Who says Human: Hi?\n\nAssistant:"),
    ("Go on after Assistant:", "\n\nHuman: Go on after Assistant:\n\nAssistant:"),
    ("\n\nHuman: Hi \n\nAssistant:", "\n\nHuman: Hi \n\nAssistant:"),  # its space stays
])
def test_words_of_a_prompt_that_look_like_marks_stay(tmp_path, prompt, read):
    assert read_prompt(tmp_path, prompt) == read


def test_a_prompt_of_more_than_one_turn_is_dropped_in_that_form_too(tmp_path):
    rows = [{"prompt": dialogue("Hi", "Ho", "And?"), "chosen": "A", "rejected": "B"},
            {"prompt": "Hi", "chosen": f"A{HUMAN} And?", "rejected": "B"},
            {"prompt": "Hi", "chosen": " ", "rejected": "B"},
            {"prompt": "Hi", "chosen": "A", "rejected": " A"}]
    assert read_pairs(write(tmp_path / "p.jsonl", rows)) == ([], Counter(
        {"rows": 4, "kept": 0, "not one turn": 2, "empty answer": 1, "equal answers": 1}))


@pytest.mark.parametrize(("row", "reason"), [
    ({"prompt": "Hi", "chosen": "A", "rejected": "B"}, "kept"),
    ({"prompt": "Human: Hi", "chosen": "A", "rejected": "B"}, "kept"),
    ({"prompt": "", "chosen": "A", "rejected": "B"}, "kept"),
    ({"prompt": "Human: Hi" + HUMAN, "chosen": "A", "rejected": "B"}, "not one turn"),
    ({"prompt": "Hi", "chosen": "A", "rejected": "B" + ASSISTANT}, "not one turn"),
    ({"prompt": "Hi", "chosen": "", "rejected": "\n"}, "empty answer"),  # and equal
    ({"prompt": "Hi", "chosen": "\nA", "rejected": "A"}, "equal answers"),
    ({"chosen": "", "rejected": ""}, "not one turn"),
    ({"chosen": HUMAN + ASSISTANT + "A", "rejected": HUMAN + ASSISTANT + "B"}, "kept"),
    ({"chosen": ASSISTANT + HUMAN + "A", "rejected": ASSISTANT + HUMAN + "B"}, "not one turn"),
    ({"chosen": HUMAN + "Hi", "rejected": HUMAN + "Hi"}, "not one turn"),
    ({"chosen": dialogue("Hi", "A"), "rejected": dialogue("Hi ", "A")}, "prompts differ"),
    ({"chosen": dialogue("Hi", "A"), "rejected": dialogue("Hi", "A ")}, "kept"),
])
def test_a_row_counts_under_one_reason_and_the_audit_adds_up(tmp_path, row, reason):
    """Two such rows beside one that is kept and one of two turns."""
    rows = [ROWS[0], row, ROWS[1], row]
    pairs, audit = read_pairs(write(tmp_path / "p.jsonl", rows))
    assert audit == Counter(rows=4, kept=1) + Counter(["not one turn", reason, reason])
    assert audit.total() - audit["rows"] == 4
    assert len(pairs) == audit["kept"]


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
    path = tmp_path / "torn.jsonl.gz"
    line = json.dumps(ROWS[0]).encode() + b"\n"
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


def test_a_prompts_split_follows_from_its_sha256_alone():
    """Digests of prompts 0 to 5 begin 85d6, 3c13, b32f, 019b, f11f, 62ce: of 2^16 0.52, 0.23, 0.70,
    0.01, 0.94, 0.39."""
    splits, dropped = split(asked(0, 1, 2, 3, 4, 5), asked(99), 0.25, 0.5)
    assert splits == {"train": asked(0, 2, 4, 5), "val": asked(1, 3), "test": asked(99)}
    assert dict(dropped) == {"prompt is in test": 0}   # told on the screen, also where it is 0


def test_a_share_of_just_a_prompts_place_leaves_it_in_train():
    place = 0x3c1308168610d846 / 2**64
    splits, _ = split(asked(1), asked(99), place, 0.2)
    assert splits == {"train": asked(1), "val": [], "test": asked(99)}
    splits, _ = split(asked(1), asked(99), place + 1e-15, 0.2)
    assert splits == {"train": [], "val": asked(1), "test": asked(99)}


def test_a_share_of_just_a_prompts_place_leaves_it_out_of_the_test_too(monkeypatch):
    monkeypatch.setattr(data, "fraction_of", lambda prompt: 0.5)
    assert split(asked(1), [], 0.25, 0.25)[0]["train"] == asked(1)
    assert split(asked(1), [], 0.25, 0.26)[0]["test"] == asked(1)


def test_without_a_test_set_another_share_of_prompts_becomes_it():
    """Digests of 5 and 9 begin 62ce and 7be1, 0.39 and 0.48: between 0.25, and 0.4 or 0.5."""
    splits, dropped = split(asked(*range(12)), [], 0.25, 0.15)
    assert splits == {"train": asked(0, 2, 4, 8, 9, 11), "val": asked(1, 3, 6, 7, 10),
                      "test": asked(5)}
    splits, dropped = split(asked(*range(12)), [], 0.25, 0.25)
    assert splits == {"train": asked(0, 2, 4, 8, 11), "val": asked(1, 3, 6, 7, 10),
                      "test": asked(5, 9)}
    assert dropped.total() == 0


def test_a_prompt_in_test_is_counted_and_kept_out_of_train_and_val():
    splits, dropped = split(asked(0, 1, 2, 1), asked(2, 1), 0.25, 0.2)
    assert splits == {"train": asked(0), "val": [], "test": asked(2, 1)}
    assert dropped == Counter({"prompt is in test": 3})


@given(st.lists(st.integers(0, 30), max_size=40), st.lists(st.integers(20, 40), max_size=5),
       st.floats(0.01, 0.49), st.floats(0.01, 0.49), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_no_pair_is_lost_and_equal_prompts_are_in_one_split_in_any_order(
        numbers, test, val_share, test_share, rng):
    pairs = [Pair(pair.prompt, f" {i}", " no") for i, pair in enumerate(asked(*numbers))]
    test_pairs = asked(*test)
    splits, dropped = split(pairs, test_pairs, val_share, test_share)

    test_prompts = {pair.prompt for pair in test_pairs}
    lost = [pair for pair in pairs if pair.prompt in test_prompts]
    assert dropped == Counter({"prompt is in test": len(lost)})
    assert Counter(joined(splits.values())) + Counter(lost) == Counter(pairs + test_pairs)
    if test:
        assert splits["test"] == test_pairs

    prompts = []
    for pairs_of_split in splits.values():
        prompts += {pair.prompt for pair in pairs_of_split}
    assert len(set(prompts)) == len(prompts)

    shuffled = rng.sample(pairs, len(pairs))
    splits_again, dropped_again = split(shuffled, test_pairs, val_share, test_share)
    assert dropped_again == dropped
    for name in ("train", "val", "test"):
        assert sorted(splits_again[name]) == sorted(splits[name])


def test_a_prompt_that_no_file_could_hold_has_a_split_too():
    """JSON can hold half a character, UTF-8 cannot."""
    pair = Pair(f"{HUMAN} \ud800{ASSISTANT}", " a", " b")
    splits, _ = split([pair], [], 0.1, 0.2)
    assert joined(splits.values()) == [pair]


def test_about_a_share_of_prompts_goes_to_val():
    splits, _ = split(asked(*range(2000)), asked(5000), 0.1, 0.2)
    assert 160 < len(splits["val"]) < 240  # 200, and three standard deviations of 13.4


# Tokens

def ids_of(pairs, encoding, max_tokens=512, max_prompt_tokens=256):
    """What tokenize keeps, as tuples of lists, and its audit without zeros."""
    kept, audit = tokenize(pairs, encoding, max_tokens, max_prompt_tokens)
    lists = []
    for pair in kept:
        assert [ids.dtype for ids in pair] == [np.int32] * 3
        lists.append(tuple(ids.tolist() for ids in pair))
    return lists, +audit


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


texts = st.text(min_size=1, max_size=20)


@given(st.lists(st.builds(Pair, texts, texts, texts), max_size=5), st.integers(1, 20),
       st.integers(1, 20))
@settings(max_examples=100)
def test_a_prompt_keeps_its_end_and_a_response_its_begin(encoding, pairs, max_prompt_tokens, room):
    """Each pair for itself, none lost, and never more than the room there is."""
    max_tokens = max_prompt_tokens + room
    expected = []
    counts = Counter()
    for pair in pairs:
        whole = [encoding.encode_ordinary(text) for text in pair]
        prompt = whole[0][max(0, len(whole[0]) - max_prompt_tokens):]
        left = max_tokens - len(prompt)
        chosen = [*whole[1], END][:left]
        rejected = [*whole[2], END][:left]
        if chosen == rejected:
            counts["equal after cutting"] += 1
            continue
        expected.append((prompt, chosen, rejected))
        one_is_cut = len(whole[1]) + 1 > left or len(whole[2]) + 1 > left
        counts["cut"] += len(prompt) < len(whole[0]) or one_is_cut

    kept, audit = ids_of(pairs, encoding, max_tokens, max_prompt_tokens)
    assert kept == expected
    assert audit == +counts
    assert len(kept) + audit["equal after cutting"] == len(pairs)


# Packed batches

def numbered(*lengths: tuple[int, int, int]) -> list[TokenPair]:
    """Pairs of such lengths; no id stands twice, so that each tells where it came from."""
    pairs = []
    first = 1000
    for pair_lengths in lengths:
        parts = []
        for length in pair_lengths:
            parts.append(np.arange(first, first + length, dtype=np.int32))
            first += length
        pairs.append(TokenPair(*parts))
    return pairs


WORKED = [TokenPair(np.array([10, 11]), np.array([20, 21, END]), np.array([30, END])),
          TokenPair(np.array([12]), np.array([40]), np.array([41, 42])),
          TokenPair(np.array([13]), np.array([50, END]), np.array([51]))]


def test_a_worked_batch():
    """Three pairs in two rows: each prompt once, last tokens only predicted, one 0 of padding."""
    batch = pack(WORKED, [7, 3, 5])
    assert batch.tokens.tolist() == [[10, 11, 20, 21, 30], [12, 41, 13, 50, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 1, 0]]
    assert batch.attn_mask.dtype == torch.bool
    assert batch.attn_mask.int().tolist() == [
        [[1, 0, 0, 0, 0],
         [1, 1, 0, 0, 0],
         [1, 1, 1, 0, 0],
         [1, 1, 1, 1, 0],
         [1, 1, 0, 0, 1]],  # the rejected response sees the prompt, not the chosen one
        [[1, 0, 0, 0, 0],
         [1, 1, 0, 0, 0],
         [0, 0, 1, 0, 0],   # another pair
         [0, 0, 1, 1, 0],
         [0, 0, 0, 0, 1]]]  # padding
    assert batch.predicted_at.tolist() == [1, 2, 3, 5, 7, 8, 1, 4, 5, 6, 7]
    assert batch.targets.tolist() == [20, 21, END, 40, 50, END, 30, END, 41, 42, 51]
    assert batch.owner.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 4, 4, 5]
    assert batch.response_lengths.tolist() == [3, 1, 2, 2, 2, 1]
    assert batch.indices.tolist() == [7, 3, 5]


def test_a_worked_batch_of_the_chosen_side_alone():
    """4, 1 and 2 tokens, in rows of 4."""
    batch = pack(WORKED, [7, 3, 5], sides=("chosen",))
    assert batch.tokens.tolist() == [[10, 11, 20, 21], [13, 50, 12, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch.predicted_at.tolist() == [1, 2, 3, 6, 4, 5]
    assert batch.targets.tolist() == [20, 21, END, 40, 50, END]
    assert batch.owner.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.response_lengths.tolist() == [3, 1, 2]
    assert batch.indices.tolist() == [7, 3, 5]


def test_a_worked_padded_batch():
    """The first two in rows, chosen first; the mask is on the responses, last tokens too."""
    batch = data.pad(WORKED[:2], [7, 3])
    assert batch.tokens.tolist() == [[10, 11, 20, 21, END], [12, 40, 0, 0, 0],
                                     [10, 11, 30, END, 0], [12, 41, 42, 0, 0]]
    assert batch.mask.tolist() == [[False, False, True, True, True],
                                   [False, True, False, False, False],
                                   [False, False, True, True, False],
                                   [False, True, True, False, False]]
    assert batch.indices.tolist() == [7, 3]
    assert batch.mask.dtype == torch.bool
    of_array = data.pad(WORKED[:2], np.array([7, 3], np.int32))
    assert data.pad(WORKED[:2]).indices.tolist() == [0, 1]
    assert of_array.indices.dtype == torch.int64
    moved = batch.to("meta")
    assert [tensor.device.type for tensor in moved] == ["meta"] * 3
    assert [tensor.shape for tensor in moved] == [tensor.shape for tensor in batch]


def check(batch: data.PackedBatch, pairs: list[TokenPair], sides: tuple[str, ...]) -> None:
    """Read a batch back, as a model sees it: what each prediction's token can attend to, in order,
    must be exactly its pair's prompt and response up to there, each token at its own position."""
    rows, width = batch.tokens.shape
    assert batch.positions.shape == (rows, width)
    assert batch.attn_mask.shape == (rows, width, width)

    expected = []  # (response, what it predicts, from which tokens)
    response_lengths = []
    read = 0
    own_pairs = [pairs[i] for i in batch.indices]
    for side in sides:
        for pair in own_pairs:
            response = getattr(pair, side).tolist()
            for i, target in enumerate(response):
                context = pair.prompt.tolist() + response[:i]
                expected.append((len(response_lengths), target, context))
            response_lengths.append(len(response))
            read += len(response) - 1

    found = []
    for owner, place, target in zip(batch.owner.tolist(), batch.predicted_at.tolist(),
                                    batch.targets.tolist(), strict=True):
        row, column = divmod(place, width)
        seen = batch.attn_mask[row, column].nonzero()[:, 0]
        assert seen[-1] == column  # itself, and nothing that comes later
        assert batch.positions[row, seen].tolist() == list(range(len(seen)))
        found.append((owner, target, batch.tokens[row, seen].tolist()))
    assert found == expected
    assert batch.response_lengths.tolist() == response_lengths

    # Ids begin at 1000. Each token stands once; the rest is padding. It sees itself, and of all
    # others padding alone.
    real = batch.tokens > 0
    assert real.sum() == read + sum(len(pair.prompt) for pair in own_pairs)
    assert batch.tokens[real].unique().numel() == real.sum()
    for row, column in (~real).nonzero().tolist():
        seen = batch.attn_mask[row, column]
        assert seen[column]
        assert not (seen & real[row]).any()

    assert batch.attn_mask.dtype == torch.bool
    assert batch.reference_logps.dtype == torch.float32
    for tensor in batch._replace(attn_mask=batch.indices, reference_logps=batch.indices):
        assert tensor.dtype == torch.int64


lengths = st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=9)
some_sides = st.sampled_from([("chosen", "rejected"), ("chosen",), ("rejected",)])


@given(lengths, some_sides)
@settings(max_examples=150)
def test_each_pair_can_be_read_back_from_a_batch_of_any_lengths(lengths, sides):
    pairs = numbered(*lengths)
    check(pack(pairs, np.arange(len(pairs)), sides=sides), pairs, sides)


def test_the_longest_piece_is_laid_first_each_in_the_first_row_with_room():
    """9 fills a row. 6 and 5 begin rows. 4 goes behind 5, 3 behind 6, and 2 begins a row."""
    count, starts = data.first_fit([3, 9, 4, 2, 6, 5], width=9)
    assert count == 4
    assert starts == [(1, 6), (0, 0), (2, 5), (3, 0), (1, 0), (2, 0)]


def test_rows_are_as_long_as_leaves_the_least_padding():
    """Pieces of 32, 20 and 20: three rows of 32 are 96 cells, two of 40 are 80. Of 16 and 8: one
    row of 24 would be all full, but rows are at most a quarter longer than the longest piece."""
    count, width, starts = data.arrange([32, 20, 20])
    assert (count, width) == (2, 40)
    assert starts == [(0, 0), (1, 0), (1, 20)]
    assert data.arrange([16, 8])[:2] == (2, 16)
    assert data.arrange([16, 4])[:2] == (1, 20)
    assert data.arrange([8, 2] * 4)[:2] == (5, 8)      # four rows of 10 have as many cells: shorter
    assert data.arrange([1]) == (1, 1, [(0, 0)])


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_pieces_lie_in_rows_without_overlap(lengths):
    count, width, starts = data.arrange(lengths)
    assert max(lengths) <= width <= 1.25 * max(lengths)
    taken = np.zeros((count, width), int)
    for length, (row, start) in zip(lengths, starts, strict=True):
        assert start + length <= width
        taken[row, start:start + length] += 1
    assert taken.max() == 1
    assert taken.sum(1).min() >= 1                     # no row is empty
    assert count * width <= data.first_fit(lengths, max(lengths))[0] * max(lengths)


def test_a_model_computes_the_same_on_a_packed_batch_as_on_each_row_alone():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=32, vocab_size=60, n_inner=16)
    model = GPT2(config).requires_grad_(False)
    rng = np.random.default_rng(0)
    pairs = []
    for lengths in ((3, 5, 2), (7, 1, 9), (1, 4, 4)):
        pairs.append(TokenPair(*[rng.integers(60, size=length) for length in lengths]))
    batch = pack(pairs, np.arange(3))
    assert len(batch.tokens) == 2                      # so two pairs share a row
    hidden = model.hidden(batch.tokens, batch.positions, batch.attn_mask).flatten(0, 1)
    logits = model.logits(hidden[batch.predicted_at])

    alone = []
    for side in SIDES:
        for pair in pairs:
            row = torch.from_numpy(np.append(pair.prompt, getattr(pair, side)[:-1]))
            alone.append(model(row[None])[0, len(pair.prompt) - 1:])
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-5, atol=1e-6)


TABLE = torch.tensor([[-10.0, -11.0, -12.0],   # of the chosen responses of pairs 0, 1 and 2
                      [-20.0, -21.0, -22.0]])  # of the rejected ones


def test_a_batch_has_its_own_pairs_reference_chosen_first():
    batch = pack(WORKED[:2], [2, 0], TABLE)
    assert batch.reference_logps.tolist() == [-12.0, -10.0, -22.0, -20.0]
    batch = pack(WORKED[:2], np.array([1, 2]), TABLE)
    assert batch.reference_logps.tolist() == [-11.0, -12.0, -21.0, -22.0]


def test_a_reference_is_of_both_sides():
    """Supervised fine-tuning has one side, and no reference."""
    with pytest.raises(AssertionError, match="both sides"):
        pack(WORKED[:2], [2, 0], TABLE, sides=("chosen",))


def test_a_reference_that_was_not_asked_is_nan():
    """So a loss that reads it shows at once."""
    reference = pack(WORKED[:2], [2, 0]).reference_logps
    assert reference.shape == (4,)
    assert reference.isnan().all()
    reference = pack(WORKED[:2], [2, 0], sides=("chosen",)).reference_logps
    assert reference.isnan().tolist() == [True, True]


def test_a_batch_moves_with_all_its_parts():
    """Each tensor to its own field."""
    batch = pack(WORKED, [7, 3, 5])
    moved = batch.to("meta")
    for name, tensor in moved._asdict().items():
        assert tensor.is_meta, name
        assert tensor.shape == getattr(batch, name).shape, name
        assert tensor.dtype == getattr(batch, name).dtype, name


def test_a_batch_moves_by_plain_copies_that_wait(monkeypatch):
    """From unpinned memory, non_blocking=True silently gave wrong numbers on Apple GPUs."""
    batch = pack(WORKED, [7, 3, 5])
    calls = []

    def record(tensor, *args, **kwargs):
        calls.append((args, kwargs))
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", record)
    batch.to("cpu")
    assert calls == [(("cpu",), {})] * 9


# Batches

EIGHT = numbered(*[(2, n % 3 + 1, 2) for n in range(8)])  # 5, 6, 7, 5, 6, 7, 5 and 6 tokens
EQUAL = numbered(*[(2, 2, 2)] * 8)  # so that the order by length is the order of the shuffle


def numbers_of(micro_batches: list[data.PackedBatch]) -> list[list[int]]:
    return [batch.indices.tolist() for batch in micro_batches]


def updates(count: int, *args, **kwargs) -> list[list[list[int]]]:
    """The pairs' numbers in the micro-batches of the first `count` updates."""
    return [numbers_of(micro_batches) for micro_batches in islice(batches(*args, **kwargs), count)]


@pytest.mark.parametrize(("seed", "order"), [
    (0, [[[3, 2, 1]], [[6, 0, 7]], [[4, 5]],    # the first epoch; its last update is short
         [[7, 4, 5]], [[1, 6, 2]], [[0, 3]]]),  # the second
    (1, [[[2, 4, 7]], [[5, 0, 6]], [[3, 1]]]),
])
def test_the_order_follows_from_seed_and_epoch_on_every_machine(seed, order):
    """The last update is short, not dropped. Global generators neither matter nor move."""
    np.random.seed(5)
    before = np.random.get_state()[1].tolist()
    assert updates(len(order), EQUAL, batch_pairs=3, micro_pairs=3, seed=seed) == order
    assert np.random.get_state()[1].tolist() == before


def test_a_resumed_run_goes_on_with_the_same_updates():
    whole = updates(9, EIGHT, batch_pairs=3, micro_pairs=2, seed=0)
    for start in range(9):
        rest = updates(9 - start, EIGHT, batch_pairs=3, micro_pairs=2, seed=0, start=start)
        assert rest == whole[start:]


def test_passes_without_updates_go_by_length():
    pairs = numbered((2, 2, 3), (1, 1, 1), (9, 1, 1), (1, 3, 3), (1, 1, 2))
    found = numbers_of(by_length(pairs, 2))
    assert found == [[1, 4], [0, 3], [2]]  # 3, 4, 7, 7 and 11 tokens


def test_an_updates_pairs_are_sorted_by_length_before_they_are_cut_into_micro_batches():
    """The shuffle of seed 0 is 3, 2, 1, 6, 0, 7, 4, 5. The first seven of these have 5, 7, 6, 5, 5,
    6 and 6 tokens."""
    found = updates(2, EIGHT, batch_pairs=7, micro_pairs=3, seed=0)
    assert found == [[[3, 6, 0], [1, 7, 4], [2]], [[5]]]


def test_no_micro_batch_is_empty():
    found = updates(1, EQUAL, batch_pairs=6, micro_pairs=3, seed=0)
    assert found == [[[3, 2, 1], [6, 0, 7]]]


def test_no_pairs_give_no_batches():
    assert list(by_length([], 4)) == []


def test_micro_batches_bring_their_own_pairs_reference():
    table = torch.arange(16.0).view(2, 8)  # pair n: n for its chosen response, 8 + n for the other
    passes = list(by_length(EIGHT, 3, table))
    [update] = islice(batches(EIGHT, 8, 3, seed=0, reference_table=table), 1)
    for batch in passes + update:
        numbers = batch.indices
        assert batch.reference_logps.tolist() == numbers.tolist() + (numbers + 8).tolist()


@given(lengths, st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(0, 9),
       some_sides)
@settings(max_examples=100)
def test_each_pair_comes_once_an_epoch(lengths, batch_pairs, micro_pairs, seed, start, sides):
    pairs = numbered(*lengths)
    per_epoch = math.ceil(len(pairs) / batch_pairs)
    shapes = {"batch_pairs": batch_pairs, "micro_pairs": micro_pairs, "seed": seed}
    whole = list(islice(batches(pairs, sides=sides, **shapes), 2 * per_epoch))

    pair_tokens = [sum(map(len, pair)) for pair in pairs]
    held = []  # the pairs of each update
    for micro_batches in whole:
        for batch in micro_batches:
            check(batch, pairs, sides)
        sizes = [len(batch.indices) for batch in micro_batches]
        assert sizes[:-1] == [micro_pairs] * (len(sizes) - 1)
        assert 1 <= sizes[-1] <= micro_pairs
        numbers = joined(numbers_of(micro_batches))
        assert numbers == sorted(numbers, key=lambda number: pair_tokens[number])
        held.append(numbers)

    for epoch in (held[:per_epoch], held[per_epoch:]):
        assert sorted(joined(epoch)) == list(range(len(pairs)))
        assert [len(numbers) for numbers in epoch[:-1]] == [batch_pairs] * (per_epoch - 1)

    start = min(start, len(whole) - 1)
    resumed = updates(1, pairs, start=start, **shapes)
    assert resumed == [numbers_of(whole[start])]


# Progress

@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock is a second after the last."""
    seconds = iter(range(1000))
    monkeypatch.setattr(data, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))


def test_a_line_comes_every_five_seconds_and_at_the_end(capsys, clock):
    assert list(data.track(range(20), "tokenize", 20, "pairs")) == list(range(20))
    assert capsys.readouterr().out.splitlines() == [
        "tokenize  25% | 5/20 pairs | 1 pairs/s | 15 s left",
        "tokenize  50% | 10/20 pairs | 1 pairs/s | 10 s left",
        "tokenize  75% | 15/20 pairs | 1 pairs/s | 5 s left",
        "tokenize 100% | 20/20 pairs | 1 pairs/s | 0 s left"]


def test_a_line_comes_at_the_end_of_short_work(capsys, clock):
    assert list(data.track("abc", "tokenize", 3, "pairs")) == ["a", "b", "c"]
    assert list(data.track("", "tokenize", 0, "pairs")) == []
    assert capsys.readouterr().out == "tokenize 100% | 3/3 pairs | 1 pairs/s | 0 s left\n"


def test_what_was_done_before_counts_for_the_share_and_not_for_the_rate(capsys, clock):
    """400 of 1,000 bytes were there; 50 a second came."""
    answer = SimpleNamespace(iter_content=lambda size: [bytes(50)] * 12)
    file = io.BytesIO()
    data.append(answer, file, "file", done=400, size=1000)
    assert file.getvalue() == bytes(600)
    assert capsys.readouterr().out.splitlines() == [
        "file  65% | 650/1,000 bytes | 50 bytes/s | 7 s left",
        "file  90% | 900/1,000 bytes | 50 bytes/s | 2 s left",
        "file 100% | 1,000/1,000 bytes | 50 bytes/s | 0 s left"]


def test_the_vocabularies_are_gpt2s_and_the_bytes():
    encoding = data.encoding_of(demo=False)
    assert (encoding.name, encoding.n_vocab) == ("gpt2", 50257)
    assert encoding.encode_ordinary(" Blue.") == [4518, 13]
    demo = data.encoding_of(demo=True)
    assert (demo.name, demo.n_vocab) == ("bytes", 257)


def test_tokenize_shows_its_progress(capsys):
    data.tokenize([Pair("\n\nHuman: a\n\nAssistant:", " b", " c")] * 2,
                  data.encoding_of(demo=True), 99, 60)
    assert "tokenize 100% | 2/2 pairs | " in capsys.readouterr().out


def test_progress_tells_the_rate_and_the_time_left(monkeypatch, capsys):
    """A clock that begins at 100 s. Each of 4 items takes 4 s: a line after 2, and at the end."""
    clock = iter([100.0, 104.0, 108.0, 112.0, 116.0])
    monkeypatch.setattr(data, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert list(data.track("abcd", "spell", 4, "letters")) == list("abcd")
    assert capsys.readouterr().out.splitlines() == [
        "spell  50% | 2/4 letters | 0 letters/s | 8 s left",
        "spell 100% | 4/4 letters | 0 letters/s | 0 s left"]
