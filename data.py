"""hh-rlhf: from a line of its files to a batch of tensors. What is dropped is counted.

Read from top to bottom:

1. pairs       what a comparison is, how a line becomes one, which part of the data it goes to
2. tokens      from text to ids, and what is cut
3. batches     from ids to tensors: padded, for any model; and packed, which is faster
4. the demo    made-up pairs whose truth is known
5. helpers     progress lines; a lock
6. downloads   hh-rlhf and GPT-2, from the Hugging Face hub

Needs torch, numpy, tiktoken and requests. The letters in the shapes: B pairs, R rows, T tokens of a
row, M predictions.
"""

import email.utils
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import requests
import tiktoken
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:                # Windows has no such locks: see lock
    fcntl = None

# 1. Pairs ---------------------------------------------------------------------------------------

SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
SIDES = ("chosen", "rejected")
HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"


class Pair(NamedTuple):
    r"""A comparison: two responses to one prompt, of which people preferred the chosen one.

    prompt:   "\n\nHuman: Name a color.\n\nAssistant:"
    chosen:   " Blue is a color."
    rejected: " Red."

    A response keeps its leading space, as in hh-rlhf: GPT-2's tokens begin with the space before a
    word, so "Assistant: Blue" is the tokens "Assistant", ":" and " Blue".
    """
    prompt: str
    chosen: str
    rejected: str


def read_pairs(path: str | Path) -> tuple[list[Pair], Counter]:
    """The dialogues of one question and one answer in a JSONL file, and what became of its rows.

    Dialogues of several turns are dropped: one question and one answer is what this project is
    about. About three in ten of hh-rlhf's rows are kept.

    The file may be plain or .gz. Each line is an object with the strings "chosen" and "rejected".
    These are whole dialogues, as in hh-rlhf; or, where there is a third string "prompt", only the
    answers to it. The audit counts "rows", "kept", and each reason for which a row was dropped.

    Raises ValueError, with the file and the line, for a line that is not of this form.
    """
    pairs = []
    audit = Counter(rows=0, kept=0)
    try:
        with open_jsonl(path) as file:
            for line in file:
                audit["rows"] += 1
                try:
                    pair, reason = parse_line(line)
                except (ValueError, RecursionError) as error:      # RecursionError: nested too deep
                    raise ValueError(
                        f"{path}, line {audit['rows']}: {error}, in {repr(line)[:80]}; expected a "
                        f"JSON object with the strings chosen and rejected, and perhaps prompt: "
                        f"correct the line, or delete the file") from None
                if pair is None:
                    audit[reason] += 1
                else:
                    audit["kept"] += 1
                    pairs.append(pair)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: no whole gzip file, it breaks off after line {audit['rows']} "
                         f"({error}); delete it, and download it again") from None
    return pairs, audit


def open_jsonl(path: str | Path) -> BinaryIO:
    """The file, open to be read as lines of bytes, whether it is compressed or not."""
    if str(path).endswith(".gz"):
        return gzip.open(path)
    return open(path, "rb")


def parse_line(line: bytes) -> tuple[Pair | None, str]:
    """The pair in a line, and ""; or None, and the reason why the line is dropped.

    Raises ValueError for a line that is not of the form that read_pairs tells.

    >>> parse_line(b'{"prompt": "Name a color.", "chosen": "Blue.", "rejected": "Blue."}')
    (None, 'equal answers')
    """
    row = json.loads(line.decode())
    if not isinstance(row, dict):
        raise ValueError("no object")
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ValueError(f"no {key}")
    for key in ("chosen", "rejected", "prompt"):
        if key in row and not isinstance(row[key], str):
            raise ValueError(f"{key} is {repr(row[key])[:80]}")

    chosen = row["chosen"]
    rejected = row["rejected"]
    if "prompt" in row:                            # make whole dialogues, for the same checks
        prompt = as_dialogue(row["prompt"])
        chosen = prompt + " " + chosen.lstrip()
        rejected = prompt + " " + rejected.lstrip()

    for dialogue in (chosen, rejected):
        begins_with_human = dialogue.startswith(HUMAN)
        one_question = dialogue.count(HUMAN) == 1
        one_answer = dialogue.count(ASSISTANT) == 1
        if not (begins_with_human and one_question and one_answer):
            return None, "not one turn"

    chosen_prompt, chosen_response = chosen.split(ASSISTANT)
    rejected_prompt, rejected_response = rejected.split(ASSISTANT)
    if chosen_prompt != rejected_prompt:
        return None, "prompts differ"
    if not chosen_response.strip() or not rejected_response.strip():
        return None, "empty answer"
    if chosen_response == rejected_response:
        return None, "equal answers"
    return Pair(chosen_prompt + ASSISTANT, chosen_response, rejected_response), ""


def as_dialogue(prompt: str) -> str:
    r"""A prompt in hh-rlhf's form, whether its turns were marked or not.

    >>> as_dialogue("Name a color.")
    '\n\nHuman: Name a color.\n\nAssistant:'
    >>> as_dialogue("\n\nHuman: Name a color.\n\nAssistant:")
    '\n\nHuman: Name a color.\n\nAssistant:'
    """
    question = prompt.strip().removesuffix("\nAssistant:").rstrip("\n")
    if not question.startswith("Human:"):
        question = "Human: " + question
    return "\n\n" + question + ASSISTANT


def split(pairs: list[Pair], test: list[Pair], val_share: float,
          test_share: float) -> tuple[dict[str, list[Pair]], Counter]:
    """The splits "train", "val" and "test", and how many pairs were dropped.

    test: the pairs of a test file, which become the split "test". Of `pairs`, those whose prompt is
    in the test file are dropped, and counted. Without a test file, about test_share of the prompts
    go to "test". In both cases about val_share of the prompts go to "val".

    The hash of a prompt decides, so equal prompts are never in two splits, in whatever order the
    pairs come and on whatever machine. If rows were drawn instead, a prompt that has several pairs
    would be trained on and tested on.
    """
    splits = {"train": [], "val": [], "test": list(test)}
    dropped = Counter({"prompt is in test": 0})    # to be shown even where it stays 0
    test_prompts = {pair.prompt for pair in test}
    share_to_test = 0.0 if test else test_share
    for pair in pairs:
        fraction = fraction_of(pair.prompt)
        if pair.prompt in test_prompts:
            dropped["prompt is in test"] += 1
        elif fraction < val_share:
            splits["val"].append(pair)
        elif fraction < val_share + share_to_test:
            splits["test"].append(pair)
        else:
            splits["train"].append(pair)
    return splits, dropped


def fraction_of(prompt: str) -> float:
    """A number in [0, 1] that follows from the prompt alone, and is spread evenly over prompts.

    Python's own hash() would not do: it is another one in each process.
    """
    # JSON may hold a lone surrogate, half a character. UTF-8 refuses it without "surrogatepass".
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# 2. Tokens --------------------------------------------------------------------------------------


class TokenPair(NamedTuple):
    """The ids of a pair. A response ends with end-of-text, or was cut."""
    prompt: np.ndarray | list[int]
    chosen: np.ndarray | list[int]
    rejected: np.ndarray | list[int]


def tokenize(pairs: list[Pair], encoding: tiktoken.Encoding, max_tokens: int,
             max_prompt_tokens: int) -> tuple[list[TokenPair], Counter]:
    """The ids of the pairs; and how many pairs were "cut", or dropped as "equal after cutting".

    A prompt longer than max_prompt_tokens loses its beginning. It is cut first, so both responses
    share it. Each response may then fill what is left of max_tokens. A response that is too long
    loses its end and has no end-of-text token, as it does not end there. A "<|endoftext|>" that
    somebody has typed stays text.

    Raises ValueError unless 0 < max_prompt_tokens < max_tokens.
    """
    if not 0 < max_prompt_tokens < max_tokens:
        raise ValueError(f"max_prompt_tokens {max_prompt_tokens}, max_tokens {max_tokens}: "
                         f"expected 0 < max_prompt_tokens < max_tokens, so that responses fit")
    kept = []
    audit = Counter()
    for pair in track(pairs, "tokenize", len(pairs), "pairs"):
        whole_prompt = encoding.encode_ordinary(pair.prompt)
        whole_chosen = [*encoding.encode_ordinary(pair.chosen), encoding.eot_token]
        whole_rejected = [*encoding.encode_ordinary(pair.rejected), encoding.eot_token]

        prompt = whole_prompt[-max_prompt_tokens:]
        room = max_tokens - len(prompt)
        chosen = whole_chosen[:room]
        rejected = whole_rejected[:room]

        if chosen == rejected:
            audit["equal after cutting"] += 1
            continue
        if (prompt, chosen, rejected) != (whole_prompt, whole_chosen, whole_rejected):
            audit["cut"] += 1
        kept.append(TokenPair(np.array(prompt, np.int32), np.array(chosen, np.int32),
                              np.array(rejected, np.int32)))
    return kept, audit


# 3. Batches -------------------------------------------------------------------------------------
#
# A batch has two forms, with the same meaning. A padded one has a row for each response: any model
# can read it, and dpo.sequence_logps takes it. A packed one has several pairs in a row, each with
# its prompt once, and hardly any padding: it needs a model that can be told which tokens each token
# sees, as ours can. dpo.packed_logps takes it. train.py trains with packed batches, since they are
# faster.
#
# In both forms the responses are numbered chosen first: of B pairs, pair b's chosen response is
# number b, its rejected response is number B + b.


class PaddedBatch(NamedTuple):
    """B pairs in 2B rows, each a prompt, then a response, then padding."""
    tokens: Tensor                 # (2B, T) int64
    mask: Tensor                   # (2B, T) bool: True on the response
    indices: Tensor                # (B,) int64: the pairs' numbers in the data set

    def to(self, device: torch.device | str) -> "PaddedBatch":
        """The same batch on a device."""
        return PaddedBatch(self.tokens.to(device), self.mask.to(device), self.indices.to(device))


def pad(pairs: list[TokenPair], indices: Sequence[int] | None = None) -> PaddedBatch:
    """The padded batch of these pairs. Any id would do for the padding, here it is 0.

    indices (B,): the pairs' numbers in the data set; if left out, 0 to B - 1.

    >>> batch = pad([TokenPair([10, 11], [20, 21, 99], [30, 99])])
    >>> batch.tokens
    tensor([[10, 11, 20, 21, 99],
            [10, 11, 30, 99,  0]])
    >>> batch.mask.int()
    tensor([[0, 0, 1, 1, 1],
            [0, 0, 1, 1, 0]], dtype=torch.int32)
    """
    if indices is None:
        indices = range(len(pairs))
    prompts = [pair.prompt for pair in pairs]
    prompts = prompts + prompts                        # of the chosen ones, then of the rejected
    responses = [pair.chosen for pair in pairs]
    responses += [pair.rejected for pair in pairs]
    longest = 0
    for prompt, response in zip(prompts, responses, strict=True):
        longest = max(longest, len(prompt) + len(response))

    tokens = torch.zeros(len(responses), longest, dtype=torch.int64)
    mask = torch.zeros(len(responses), longest, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start = len(prompt)
        end = len(prompt) + len(response)
        tokens[row, :start] = torch.as_tensor(prompt)
        tokens[row, start:end] = torch.as_tensor(response)
        mask[row, start:end] = True
    return PaddedBatch(tokens, mask, torch.as_tensor(indices, dtype=torch.int64))


class PackedBatch(NamedTuple):
    """B pairs, packed: rows of several pairs, each with its prompt, its chosen response and its
    rejected response, one after the other. attn_mask keeps them apart.

    A response stands there without its last token, from which nothing is predicted. The docstring
    of dpo.packed_logps shows a batch with its numbers. A place is a cell of the R x T tokens,
    numbered row by row: token t of row r is place r * T + t. A batch for supervised fine-tuning has
    only the chosen responses: B instead of 2B. int64 where nothing else is said.
    """
    tokens: Tensor                 # (R, T) the ids that the model reads
    positions: Tensor              # (R, T) of each token, counted from the start of its prompt
    attn_mask: Tensor              # (R, T, T) bool: at [r, t, s] whether t sees s, in row r
    targets: Tensor                # (M,) the ids of all responses' tokens, response by response
    predicted_at: Tensor           # (M,) the place where each of them is predicted
    owner: Tensor                  # (M,) the response, 0 to 2B - 1, to which the target belongs
    response_lengths: Tensor       # (2B,) how many tokens each response has
    indices: Tensor                # (B,) the pairs' numbers in the data set
    reference_logps: Tensor        # (2B,) float32, in nats; nan before the reference was asked

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on a device."""
        return PackedBatch(*[tensor.to(device) for tensor in self])


class PairInRow(NamedTuple):
    """A pair as it stands in a packed row, before it has a place there: L tokens."""
    tokens: list[int]              # (L,) the prompt, then each response without its last token
    positions: list[int]           # (L,) of each token, counted from the start of the prompt
    parts: list[int]               # (L,) 0 for the prompt, 1 for chosen, 2 for rejected
    predicted_at: list[list[int]]  # of each response: where in this list its tokens are predicted


def lay_out(pair: TokenPair, sides: tuple[str, ...] = SIDES) -> PairInRow:
    """The pair in a line: the prompt, then the responses of these sides.

    A token is predicted at the one before it, the first of a response at the last of the prompt.
    Nothing is predicted from the last token of a response, so it is left out.

    >>> laid_out = lay_out(TokenPair([10, 11], [20, 21, 99], [30, 99]))
    >>> laid_out.tokens
    [10, 11, 20, 21, 30]
    >>> laid_out.positions
    [0, 1, 2, 3, 2]
    >>> laid_out.parts
    [0, 0, 1, 1, 2]
    >>> laid_out.predicted_at  # 20 21 99 where 11 20 21 stand; 30 99 where 11 30 stand
    [[1, 2, 3], [1, 4]]
    """
    prompt_length = len(pair.prompt)
    tokens = list(pair.prompt)
    positions = list(range(prompt_length))
    parts = [0] * prompt_length
    predicted_at = []
    for part, side in enumerate(sides, start=1):
        response = getattr(pair, side)[:-1]
        start = len(tokens)                            # the response comes behind what is there
        stop = start + len(response)
        predicted_at.append([prompt_length - 1, *range(start, stop)])
        tokens.extend(response)
        positions.extend(range(prompt_length, prompt_length + len(response)))
        parts.extend([part] * len(response))
    return PairInRow(tokens, positions, parts, predicted_at)


def pack(pairs: list[TokenPair], indices: Sequence[int], reference_table: Tensor | None = None,
         sides: tuple[str, ...] = SIDES) -> PackedBatch:
    """The PackedBatch of these pairs, whose numbers in the data set are `indices` (B,).

    sides: ("chosen", "rejected") for DPO, or ("chosen",) for supervised fine-tuning.
    reference_table (2, pairs of the data set) float32: what dpo.reference_logps returned, for DPO;
    or None.
    """
    laid_out = [lay_out(pair, sides) for pair in pairs]
    row_count, width, starts = arrange([len(in_row.tokens) for in_row in laid_out])

    # Each pair to its place.
    tokens = np.zeros((row_count, width), np.int64)
    positions = np.zeros((row_count, width), np.int64)
    parts = np.zeros((row_count, width), np.int64)
    pair_numbers = np.full((row_count, width), -1)                 # of the padding: -1
    for number, in_row in enumerate(laid_out):
        row, start = starts[number]
        stop = start + len(in_row.tokens)
        tokens[row, start:stop] = in_row.tokens
        positions[row, start:stop] = in_row.positions
        parts[row, start:stop] = in_row.parts
        pair_numbers[row, start:stop] = number

    # t sees s, in row r, if both are of one pair, s is of the prompt or of the same response as t,
    # and s does not come after t. (The padding sees padding. Nobody reads what comes of it, but it
    # must see something: a softmax over nothing may be nan.)
    same_pair = pair_numbers[:, :, None] == pair_numbers[:, None, :]  # (R, T, T)
    same_part = parts[:, :, None] == parts[:, None, :]             # (R, T, T)
    in_prompt = parts[:, None, :] == 0                             # (R, 1, T): is s in a prompt?
    not_after = np.tri(width, dtype=bool)                          # (T, T): True where s <= t
    attn_mask = same_pair & (in_prompt | same_part) & not_after

    # Response by response, chosen first: its tokens, and the places where they are predicted.
    responses = []
    predicted_at = []
    for side_number, side in enumerate(sides):
        for number, pair in enumerate(pairs):
            row, start = starts[number]
            columns = start + np.array(laid_out[number].predicted_at[side_number])
            responses.append(getattr(pair, side))
            predicted_at.append(row * width + columns)             # a place is row * T + column
    response_lengths = torch.tensor([len(response) for response in responses])

    indices = torch.as_tensor(indices, dtype=torch.int64)
    if reference_table is None:
        reference_logps = torch.full((len(responses),), math.nan)
    else:
        assert sides == SIDES, f"the reference is of both sides, the batch of {sides}"
        chosen = reference_table[0, indices]                       # (B,)
        rejected = reference_table[1, indices]                     # (B,)
        reference_logps = torch.cat([chosen, rejected])            # (2B,)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        attn_mask=torch.from_numpy(attn_mask),
        targets=torch.from_numpy(np.concatenate(responses).astype(np.int64)),
        predicted_at=torch.from_numpy(np.concatenate(predicted_at)),
        owner=torch.arange(len(responses)).repeat_interleave(response_lengths),
        response_lengths=response_lengths,
        indices=indices,
        reference_logps=reference_logps,
    )


def arrange(lengths: list[int]) -> tuple[int, int, list[tuple[int, int]]]:
    """How to lay pieces of these lengths in rows with little padding: how many rows, how long they
    are, and for each piece its row and first column.

    Rows that are a little longer than the longest piece may leave less padding, so some lengths are
    tried, from that of the longest piece up to a quarter more. Much longer rows would cost time in
    attention, whose work grows with the square of their length.
    """
    longest = max(lengths)
    best = None
    fewest_places = math.inf
    widths = [longest * n // 32 for n in range(32, 41)]
    for width in widths:
        row_count, starts = first_fit(lengths, width)
        if row_count * width < fewest_places:
            fewest_places = row_count * width
            best = row_count, width, starts
    return best


def first_fit(lengths: list[int], width: int) -> tuple[int, list[tuple[int, int]]]:
    """The longest piece first, each into the first row that has room for it. Returns how many rows
    there are, and of each piece the row and the first column.

    >>> first_fit([2, 5, 2], width=5)  # 5 fills row 0; both 2 go to row 1, to the columns 0 and 2
    (2, [(1, 0), (0, 0), (1, 2)])
    """
    used = []                                          # how many columns of each row are taken
    starts = [(0, 0)] * len(lengths)
    longest_first = sorted(range(len(lengths)), key=lambda piece: -lengths[piece])
    for piece in longest_first:
        row = 0
        while row < len(used) and used[row] + lengths[piece] > width:
            row += 1
        if row == len(used):
            used.append(0)                             # a new row
        starts[piece] = (row, used[row])
        used[row] += lengths[piece]
    return len(used), starts


def batches(pairs: list[TokenPair], batch_pairs: int, micro_pairs: int, seed: int, start: int = 0,
            reference_table: Tensor | None = None,
            sides: tuple[str, ...] = SIDES) -> Iterator[list[PackedBatch]]:
    """For each update, from number `start` on and without end, the list of its micro-batches.

    An epoch holds each pair once; its last update may have fewer pairs. The order is shuffled anew
    for each epoch, and follows from the seed, the epoch and the number of pairs: so a resumed run
    sees the same batches.
    An update's pairs are sorted by length, then cut into micro-batches of up to micro_pairs pairs.
    So the micro-batches of short pairs have short rows, in which attention has less work.
    reference_table, sides: see pack.
    """
    updates_per_epoch = math.ceil(len(pairs) / batch_pairs)
    for update in itertools.count(start):
        # With 3 updates an epoch, update number 5 is number 2 of epoch 1.
        epoch = update // updates_per_epoch
        number_in_epoch = update % updates_per_epoch
        order = shuffled(len(pairs), seed, epoch)      # anew for each update: it takes little time
        first = number_in_epoch * batch_pairs
        indices = order[first:first + batch_pairs]
        yield list(micro_batches(pairs, indices, micro_pairs, reference_table, sides))


def by_length(pairs: list[TokenPair], micro_pairs: int, reference_table: Tensor | None = None,
              sides: tuple[str, ...] = SIDES) -> Iterator[PackedBatch]:
    """For passes without updates: all pairs once, by length, in batches of up to micro_pairs.

    reference_table, sides: see pack.
    """
    return micro_batches(pairs, np.arange(len(pairs)), micro_pairs, reference_table, sides)


def micro_batches(pairs: list[TokenPair], indices: np.ndarray, micro_pairs: int,
                  reference_table: Tensor | None,
                  sides: tuple[str, ...]) -> Iterator[PackedBatch]:
    """The pairs with these numbers, sorted by length, in batches of up to micro_pairs.

    A pair's length is that of its prompt and both responses, in SFT, too.
    """
    lengths = []
    for index in indices:
        pair = pairs[index]
        lengths.append(len(pair.prompt) + len(pair.chosen) + len(pair.rejected))
    shortest_first = indices[np.argsort(lengths, kind="stable")]
    for first in range(0, len(shortest_first), micro_pairs):
        part = shortest_first[first:first + micro_pairs]
        yield pack([pairs[index] for index in part], part, reference_table, sides)


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers from 0 to count - 1 in an order that follows from the arguments alone.

    The order that sorts random numbers is a random order. numpy promises that the numbers of PCG64
    stay the same in later versions (NEP 19). It promises no such thing for its shuffle.
    """
    bits = np.random.PCG64([seed, epoch]).random_raw(count)
    return bits.argsort(kind="stable")


# 4. The demo ------------------------------------------------------------------------------------

DEMO_REWARD = 4.0                  # the true reward of an answer with "!"; one with "." has 0


def demo_pairs(count: int, seed: int) -> list[Pair]:
    """Pairs of a world whose truth is known: people ask for a digit, and like cheerful answers.

    " 7!" is cheerful, " 7." is flat. Who is chosen is drawn as Bradley and Terry say, with the
    probability sigmoid(4 - 0) = 98.2%, so 1 label in 56 is wrong.
    """
    rng = random.Random(seed)
    verbs = "Name List Give Tell Find Pick Show Send Type Read".split()
    adjectives = "lucky short plain quiet small round happy pretty clever simple".split()
    cheerful_wins = 1 / (1 + math.exp(-DEMO_REWARD))
    pairs = []
    for _ in range(count):
        prompt = f"{HUMAN} {rng.choice(verbs)} a {rng.choice(adjectives)} digit.{ASSISTANT}"
        digit = rng.randint(0, 9)
        cheerful = f" {digit}!"
        flat = f" {digit}."
        if rng.random() < cheerful_wins:
            pairs.append(Pair(prompt, chosen=cheerful, rejected=flat))
        else:
            pairs.append(Pair(prompt, chosen=flat, rejected=cheerful))
    return pairs


def encoding_of(demo: bool) -> tiktoken.Encoding:
    """GPT-2's encoding; for the demo, which downloads nothing, bytes: ids 0 to 255, and 256."""
    if not demo:
        return tiktoken.get_encoding("gpt2")
    return tiktoken.Encoding(                      # each byte is a token, and nothing is merged
        "bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256})


# 5. Helpers -------------------------------------------------------------------------------------


def track(items: Iterable, label: str, total: int, unit: str) -> Iterator:
    """Yield the items, and print a line every five seconds and at the end."""
    start = time.perf_counter()
    printed = start
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - printed >= 5 or done == total:
            print_progress(label, done, total, unit, done / max(now - start, 1e-9))
            printed = now


def print_progress(label: str, done: int, total: int, unit: str, per_second: float) -> None:
    """The share that is done, how fast it goes, and the time that is left."""
    seconds_left = (total - done) / max(per_second, 1e-9)
    print(f"{label} {done / total:4.0%} | {done:,}/{total:,} {unit} | {per_second:,.0f} {unit}/s | "
          f"{seconds_left:.0f} s left", flush=True)


def lock(file: BinaryIO, wait: bool = True) -> bool:
    """Keep other processes from locking this file, until it is closed or this process ends.

    A lock that is held by an open file is gone when its process is killed, unlike a lock file.
    False if wait is False and another process holds the lock. Where the system or the file system
    has no such locks, nothing is locked, and the answer is True.
    """
    if fcntl is None:
        return True
    try:
        if wait:
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


# 6. Downloads -----------------------------------------------------------------------------------
#
# How the Hugging Face hub answers. For a large file it redirects (302) to a store on another host,
# by a signed address that expires after a while. The redirect itself tells the file's size and its
# sha256 (X-Linked-Size, X-Linked-Etag); the store doesn't tell the sha256. It sends the rest of a
# file where it is asked for a Range (206), says that nothing is missing (416), or ignores the Range
# and sends the whole file (200). Who asks too often is told to wait (429).
#
# Nothing here is about DPO. `fetch_model` and `fetch_hh` are what one calls. (judge.py also waits
# by `seconds_to_wait`.)
#
# The revisions of gpt2 and of hh-rlhf are pinned, so that results do not change under a reader. So
# are the hashes of some files. Of the others, the hash that the hub tells is checked, if it tells
# one, as it does for large files.

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # 124M, 355M, 774M, 1.6B parameters
MODEL_REVISIONS = {"gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e"}  # others: main
HH_REVISION = "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
SHA256 = {
    "gpt2/model.safetensors":
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "helpful-base/train.jsonl.gz":
        "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
    "helpful-base/test.jsonl.gz":
        "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
    "helpful-online/train.jsonl.gz":
        "0994d18b82083f5c084ce04071b683958a724df8c7215ab1d851986642d36a2a",
    "helpful-rejection-sampled/train.jsonl.gz":
        "0cea2d2ab2187624ec1314e8cc6fb579f0fa987b3a33e8102b7556ed4d255f64",
}


def fetch_model(name_or_path: str | Path) -> Path:
    """The folder of a model: models/<name> for one of MODELS, downloaded where it is missing.

    Any other path, and one that exists, is returned as it is. The tokenizer's files are small. This
    project does not read them: they are for others, see train.save_tokenizer.
    """
    name = str(name_or_path)
    if Path(name).exists() or name not in MODELS:
        return Path(name)
    folder = Path("models", name)
    revision = MODEL_REVISIONS.get(name, "main")
    for file in ("config.json", "model.safetensors", *TOKENIZER_FILES):
        url = f"{hub()}/openai-community/{name}/resolve/{revision}/{file}"
        download(url, folder / file, SHA256.get(f"{name}/{file}", ""))
    return folder


def fetch_hh(folder: str | Path, subsets: Iterable[str], split_name: str) -> list[Path]:
    """hh-rlhf's files <folder>/<subset>/<split_name>.jsonl.gz, downloaded where they are missing.

    split_name: "train" or "test".
    """
    paths = []
    for subset in subsets:
        file = f"{subset}/{split_name}.jsonl.gz"
        url = f"{hub()}/datasets/Anthropic/hh-rlhf/resolve/{HH_REVISION}/{file}"
        paths.append(download(url, Path(folder, file), SHA256.get(file, "")))
    return paths


def hub() -> str:
    """The address of the Hugging Face hub, or of the mirror that HF_ENDPOINT names."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return endpoint.rstrip("/")


def download(url: str, path: str | Path, sha256: str = "", tries: int = 5) -> Path:
    """Fetch url to path, unless it is there.

    A try that breaks off is made again, from the byte where it broke, until `tries` in a row have
    brought nothing new. Then OSError is raised; <path>.part stays, and the next call goes on from
    it. OSError is raised at once for faults that no further try can mend: a wrong address, or a
    file of a wrong size or hash that came in one try. (What came in several is deleted, and tried
    again as a whole.)
    sha256: the hash that the file must have, in hexadecimal digits; if left out, the one that the
    hub tells. The file has its name only when it is whole and has been checked.
    """
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "ab") as file:
        lock(file)                                 # another process may be at it: wait
        if path.exists():                          # it was, and is done
            part.unlink(missing_ok=True)
            return path
        try_until_whole(url, file, path.name, sha256, tries)
        os.fsync(file.fileno())
        if fcntl is not None:
            part.replace(path)                     # while the lock is held
    if fcntl is None:
        part.replace(path)                         # Windows renames no open file
    return path


# Faults that a further try may mend.
MAY_PASS = (requests.ConnectionError, requests.Timeout, requests.HTTPError,
            requests.exceptions.ChunkedEncodingError)


def try_until_whole(url: str, file: BinaryIO, label: str, sha256: str, tries: int) -> None:
    """Call `receive` until the file is whole, or `tries` calls in a row have brought nothing."""
    failures = 0                                   # in a row
    most = file.seek(0, os.SEEK_END)               # the most bytes that have been there so far
    while True:
        try:
            receive(url, file, label, sha256)
            return
        except MAY_PASS as error:
            size = file.seek(0, os.SEEK_END)
            if size > most:                        # this try has brought something
                most = size
                failures = 0
            else:
                failures += 1
            if failures == tries:
                raise OSError(f"{url}: {error}, {tries} times in a row; see whether the network is "
                              f"there and run again: {file.name} is kept") from None
            wait = seconds_to_wait(error.response, failures)
            print(f"{url}: {error}; again in {wait:.0f} s", flush=True)
            time.sleep(wait)


def seconds_to_wait(response: requests.Response | None, failures: int) -> float:
    """The seconds that the server asks for, in Retry-After or, as the hub does, in RateLimit (t=);
    else 2**failures.
    """
    if response is None:
        return 2**failures
    retry_after = response.headers.get("Retry-After", "")
    if retry_after.isdecimal():
        return int(retry_after)
    try:                                           # or it is a date
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError):
        pass
    rate_limit = re.search(r";\s*t=(\d+)", response.headers.get("RateLimit", ""))
    return int(rate_limit[1]) if rate_limit else 2**failures


def receive(url: str, file: BinaryIO, label: str, sha256: str) -> None:
    """One try: append to the file what it lacks, then check the whole.

    Raises one of MAY_PASS where a further try may help, and OSError where it can't.
    """
    kept = file.seek(0, os.SEEK_END)               # bytes that earlier tries have brought
    headers = {"Accept-Encoding": "identity"}      # of compressed content no range can be had
    if kept > 0:
        headers["Range"] = f"bytes={kept}-"
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and url.startswith(hub() + "/"):
        headers["Authorization"] = f"Bearer {token}"   # requests drops it where it leaves the hub

    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as answer:
        check_status(url, answer)
        size, hub_sha256 = promised(answer)
        code = answer.status_code
        if code == 200:                            # the whole file, whatever was asked for
            file.truncate(0)
            kept = 0
            append(answer, file, label, kept, size)
        elif code == 206 and first_byte_of(answer) == kept:
            append(answer, file, label, kept, size)
        elif code == 416 and kept == size:
            pass                                   # nothing is missing
        else:
            file.truncate(0)
            raise requests.ConnectionError(f"the server can't go on after {kept:,} bytes")

    try:
        check_content(file, size, sha256 or hub_sha256)
    except ValueError as error:
        file.truncate(0)
        if kept > 0:           # they may be of another file: so try again, from the first byte
            raise requests.ConnectionError(str(error)) from None
        raise OSError(f"{url}: {error}; run again, or see whether the file has changed") from None


def check_content(file: BinaryIO, size: int, sha256: str) -> None:
    """ConnectionError if bytes are missing, ValueError if the file is of another size or hash.

    size 0 and sha256 "": nobody has told.
    """
    got = file.seek(0, os.SEEK_END)
    if got < size:
        raise requests.ConnectionError(f"got {got:,} of {size:,} bytes")
    file.flush()
    with open(file.name, "rb") as whole:
        digest = hashlib.file_digest(whole, "sha256").hexdigest()
    wrong_size = size > 0 and got != size
    wrong_hash = sha256 != "" and digest != sha256
    if wrong_size or wrong_hash:
        raise ValueError(f"got {got:,} bytes with sha256 {digest}, expected {size:,} with "
                         f"{sha256 or 'any'}")


def check_status(url: str, answer: requests.Response) -> None:
    """Raises HTTPError for a fault that may pass, OSError for one that doesn't."""
    code = answer.status_code
    expired = code == 403 and len(answer.history) > 0  # the signed address that the hub gave out
    if code in (408, 429) or code >= 500 or expired:
        raise requests.HTTPError(f"the answer was {code} {answer.reason}", response=answer)
    encoding = answer.headers.get("Content-Encoding", "identity")
    if code not in (200, 206, 416) or encoding != "identity":
        raise OSError(f"{url}: the answer was {code} {answer.reason}, encoding {encoding}; "
                      f"expected the file: see whether the name is right, or set HF_TOKEN")


def promised(answer: requests.Response) -> tuple[int, str]:
    """Size and sha256 of the whole file, as far as they were told: else 0 and "".

    The size may stand in Content-Range or Content-Length. For large files the hub's redirect tells
    both, and is believed rather than they.
    """
    size = 0
    sha256 = ""
    content_range = re.match(r"bytes \S+/(\d+)", answer.headers.get("Content-Range", ""))
    if content_range:
        size = int(content_range[1])
    elif answer.status_code == 200:
        size = int(answer.headers.get("Content-Length", 0))
    for hop in [*answer.history, answer]:
        size = int(hop.headers.get("X-Linked-Size", size))
        etag = hop.headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"')
        if len(etag) == 64:                        # small files have a git hash there, of 40 digits
            sha256 = etag
    return size, sha256


def first_byte_of(answer: requests.Response) -> int:
    """The number of the first byte that an answer of 206 brings; -1 if it doesn't say so."""
    content_range = re.match(r"bytes (\d+)-\d+/\d+", answer.headers.get("Content-Range", ""))
    if content_range is None:
        return -1
    return int(content_range[1])


def append(answer: requests.Response, file: BinaryIO, label: str, done: int, size: int) -> None:
    """Write the answer's body to the file, and print how far it is."""
    start = time.perf_counter()
    printed = start
    received = 0
    for chunk in answer.iter_content(2**14):
        file.write(chunk)
        received += len(chunk)
        now = time.perf_counter()
        if size > 0 and (now - printed >= 5 or done + received == size):
            per_second = received / max(now - start, 1e-9)
            print_progress(label, done + received, size, "bytes", per_second)
            printed = now
