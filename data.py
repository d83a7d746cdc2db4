"""hh-rlhf: from the download to flat batches, every pair accounted for.

Read in this order: track (progress); Pair, read_pairs (what a line holds, what is kept), split;
TokenPair, tokenize (text to ids); Batch, flatten, batches (ids to tensors); demo_pairs; download
and what it fetches. Needs torch, numpy, tiktoken, requests. Letters: B pairs, N tokens of a flat
batch, M predictions, R rows of T tokens in a group of rows.
"""

import gzip
import hashlib
import json
import math
import os
import random
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import requests
import tiktoken
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: two downloads of one file don't wait for each other
    fcntl = None

SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
HUMAN, ASSISTANT, SIDES = "\n\nHuman:", "\n\nAssistant:", ("chosen", "rejected")
NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # 124M, 355M, 774M, 1.6B parameters

def track(items: Iterable, label: str, total: int, unit: str,
          size: Callable = lambda item: 1, done: int = 0) -> Iterator:
    """Yield the items; show share done, rate and time left, in `unit`s: an item is `size` of them.

    On a terminal one line is rewritten in place; in a log file each tenth is a new line. What was
    `done` before counts for the share, not for the rate.
    """
    start, first, shown, terminal = time.perf_counter(), done, -1, sys.stdout.isatty()
    for item in items:
        yield item
        done += size(item)
        seconds = time.perf_counter() - start
        mark = int(4 * seconds) if terminal else 10 * done // max(total, 1)
        if mark > shown or done >= total:
            shown, rate = mark, (done - first) / max(seconds, 1e-9)
            left = f"{max(total - done, 0) / rate:.0f}s left" if rate else ""
            text = (f"{label} {done / max(total, 1):4.0%} | {done:,}/{total:,} {unit} | "
                    f"{rate:,.0f} {unit}/s | {left}")
            print(f"\r\033[K{text}" if terminal else text,
                  end="" if terminal and done < total else "\n", flush=True)

class Pair(NamedTuple):
    """A comparison: a prompt, up to and with its "\\n\\nAssistant:", and two responses to it.

    A response keeps its leading space: on this data the ids of prompt and response, tokenized
    apart, are then those of both tokenized together.
    """
    prompt: str
    chosen: str
    rejected: str

def _parse(line: bytes) -> Pair | str:
    """The pair in a line, or the reason why it is dropped; ValueError where there is neither."""
    row = json.loads(line.decode())
    if not isinstance(row, dict):
        raise ValueError("no object")
    for key in SIDES if "prompt" not in row else ("prompt", *SIDES):
        if not isinstance(row.get(key), str):
            raise ValueError(f"{key} is {row[key]!r:.80}" if key in row else f"no {key}")
    texts = [row[side] for side in SIDES]
    if "prompt" in row:
        prompt = row["prompt"] if row["prompt"].startswith(HUMAN) else f"{HUMAN} {row['prompt']}"
        prompt = prompt.rstrip().removesuffix(ASSISTANT) + ASSISTANT
        texts = [f"{prompt} {text.lstrip()}" for text in texts]
    if {(t.startswith(HUMAN), t.count(HUMAN), t.count(ASSISTANT)) for t in texts} != {(True, 1, 1)}:
        return "not one turn"
    (prompt, chosen), (other, rejected) = (text.split(ASSISTANT) for text in texts)
    if prompt != other:
        return "prompts differ"
    if not chosen.strip() or not rejected.strip():
        return "empty answer"
    return "equal answers" if chosen == rejected else Pair(prompt + ASSISTANT, chosen, rejected)

def read_pairs(path: str | Path) -> tuple[list[Pair], Counter]:
    """The single-turn pairs in a JSONL file, plain or .gz, and the audit: what became of its rows.

    A line is an object with the strings chosen and rejected: whole dialogues, or, with a third
    string, prompt, what follows it. The audit counts "rows", "kept", and each reason for dropping
    one. A line that is none of this is an error: ValueError with file, line and what was found.
    """
    pairs, audit, number, line = [], Counter(rows=0, kept=0), 0, b""
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            for line in file:
                number += 1
                result = _parse(line)
                audit.update(["rows", "kept" if isinstance(result, Pair) else result])
                pairs += [result] if isinstance(result, Pair) else []
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: no whole gzip file, it breaks off after line {number} ({error})"
                         f"; delete it, and download it again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: {error}, in {line!r:.80}; expected a JSON object "
                         f"with the strings chosen and rejected, and perhaps prompt: correct the "
                         f"line, or delete the file") from None
    return pairs, audit

def split(pairs: list[Pair], test: list[Pair], share: float) -> tuple[dict[str, list], Counter]:
    """Parts "train", "val", "test", and a count of the pairs dropped since their prompt is in test.

    A pair goes to val by the hash of its prompt (about `share` of them), so equal prompts are never
    in two parts, in whatever order and on whatever machine. Without `test`, another share is it.
    """
    parts, dropped = {"train": [], "val": [], "test": list(test)}, Counter({"prompt is in test": 0})
    held_out = {pair.prompt for pair in test}
    limit = share if test else 2 * share
    for pair in pairs:
        digest = hashlib.sha256(pair.prompt.encode("utf-8", "surrogatepass")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64  # in [0, 1], even
        if pair.prompt in held_out:
            dropped["prompt is in test"] += 1
        else:
            parts["train" if place >= limit else "val" if place < share else "test"].append(pair)
    return parts, dropped

class TokenPair(NamedTuple):
    """A pair's ids, int32 each; a response ends with the end-of-text token unless it was cut."""
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

def tokenize(pairs: list[Pair], encoding: tiktoken.Encoding, max_tokens: int,
             max_prompt_tokens: int) -> tuple[list[TokenPair], Counter]:
    """Ids of the pairs, and how many were "cut" (kept) or "equal after cutting" (dropped).

    Too long: the prompt is cut once, from the left, to max_prompt_tokens, then each response from
    the right to what is left of max_tokens; a cut response has no end-of-text. Text that looks like
    a special token is text. Raises ValueError where no room is left for a response.
    """
    if not 0 < max_prompt_tokens < max_tokens:
        raise ValueError(f"max_prompt_tokens {max_prompt_tokens}, max_tokens {max_tokens}: expected"
                         f" 0 < max_prompt_tokens < max_tokens, so that a response has room")
    kept, audit = [], Counter()
    for pair in track(pairs, "tokens", len(pairs), "pairs"):
        # One by one: tiktoken's batch call makes a task of each text, far slower for short texts.
        prompt, *responses = map(encoding.encode_ordinary, pair)
        cut_prompt = prompt[-max_prompt_tokens:]
        room = max_tokens - len(cut_prompt)
        chosen, rejected = ([*ids, encoding.eot_token][:room] for ids in responses)
        if chosen == rejected:
            audit["equal after cutting"] += 1
            continue
        audit["cut"] += len(cut_prompt) < len(prompt) or max(map(len, responses)) >= room
        kept.append(TokenPair(*(np.array(ids, np.int32) for ids in (cut_prompt, chosen, rejected))))
    return kept, audit

class Batch(NamedTuple):
    """B pairs, flat: each prompt once, then its responses; no pads in `tokens`. All int64.

    A response's last token is only predicted, so it stands in `targets` alone. Responses are
    numbered chosen first: pair b's chosen is b, its rejected B + b. One side only: there are B.
    """
    tokens: Tensor  # (N,) ids: prompt, chosen, rejected of the first pair, then of the next
    positions: Tensor  # (N,) place in the row: a response goes on where its prompt ends
    rows: tuple[Tensor, ...]  # (R, T) each: attention's rows, prompt and response: places in tokens
    back: Tensor  # (N,) a place of each token in the rows, flattened and concatenated
    predicts: Tensor  # (M,) places in tokens: the last of the prompt, then the response's
    targets: Tensor  # (M,) ids: what is predicted there
    response: Tensor  # (M,) in [0, 2B): whose prediction it is
    lengths: Tensor  # (2B,) tokens of each response
    pairs: Tensor  # (B,) the pairs' numbers in the data set

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        rows = tuple(row.to(device, non_blocking=True) for row in self.rows)
        return Batch(*(rows if x is self.rows else x.to(device, non_blocking=True) for x in self))

def flatten(pairs: list[TokenPair], numbers: np.ndarray,
            sides: tuple[str, ...] = SIDES, groups: int = 8) -> Batch:
    """The Batch of these pairs, which are numbered `numbers` (B,) in the data set.

    Attention's rows come in up to `groups` groups of like length, each padded to its longest.
    """
    parts = [ids for p in pairs for ids in (p.prompt, *(getattr(p, s)[:-1] for s in sides))]
    count = sum(map(len, parts))
    places = np.split(np.arange(count), np.cumsum([len(part) for part in parts]))  # of each part
    responses = [getattr(p, s) for s in sides for p in pairs]  # chosen first, and so are the rows
    rows = [np.append(places[i], places[i + 1 + side]) for side in range(len(sides))
            for i in range(0, len(parts), 1 + len(sides))]
    lengths = np.array([len(response) for response in responses], np.int64)
    positions, back, index, base = np.zeros(count, np.int64), np.zeros(count, np.int64), [], 0
    by_length = np.argsort([len(row) for row in rows], kind="stable")
    for group in np.array_split(by_length, max(1, min(groups, len(rows)))):
        width = max((len(rows[r]) for r in group), default=0)
        padded = np.zeros((len(group), width), np.int64)  # a pad may name any token: no one sees it
        for i, r in enumerate(group):
            row, steps = rows[r], np.arange(len(rows[r]))
            padded[i, :len(row)], positions[row], back[row] = row, steps, base + i * width + steps
        index.append(torch.from_numpy(padded))
        base += padded.size
    predicts = [row[-n:] for row, n in zip(rows, lengths, strict=True)]
    whose = np.repeat(np.arange(len(rows)), lengths)
    def _flat(*arrays: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *arrays], dtype=np.int64))
    return Batch(_flat(*parts), _flat(positions), tuple(index), _flat(back), _flat(*predicts),
                 _flat(*responses), _flat(whose), _flat(lengths), _flat(np.asarray(numbers, int)))

def batches(pairs: list[TokenPair], batch_pairs: int, seed: int | None, epoch: int = 0,
            start: int = 0, rank: int = 0, world: int = 1, micro_pairs: int = 0,
            sides: tuple[str, ...] = SIDES) -> Iterator[list[Batch]]:
    """The epoch's batches from number `start` on, each a list of micro-batches of this process.

    Shuffled by (seed, epoch); by length where seed is None. Each pair comes once, the last batch
    may be short. Process `rank` of `world` gets its share of each batch, in parts of up to
    micro_pairs (0: in one); where a batch has fewer pairs than there are processes, an empty part.
    """
    if seed is None:
        order = np.argsort([sum(map(len, pair)) for pair in pairs], kind="stable")
    else:  # numpy promises PCG64's integers for good, those of its shuffles only for a version
        order = np.random.PCG64([seed, epoch]).random_raw(len(pairs)).argsort(kind="stable")
    for first in range(start * batch_pairs, len(pairs), batch_pairs):
        mine = order[first:first + batch_pairs][rank::world]
        parts = np.split(mine, range(micro_pairs, len(mine), micro_pairs) if micro_pairs else [])
        yield [flatten([pairs[i] for i in part], part, sides) for part in parts]

def demo_pairs(count: int, seed: int) -> list[Pair]:
    """The demo's world: prompts ask for a digit, and people like cheerful answers, " 7!", not " 7."

    Labels are drawn by Bradley-Terry from the true rewards, 4 and 0: 1 in 56 is wrong.
    """
    rng, pairs = random.Random(seed), []
    verbs = "Name List Give Tell Find Pick Show Send Type Read".split()
    kinds = "lucky short plain quiet small round happy pretty clever simple".split()
    for _ in range(count):
        prompt = f"{HUMAN} {rng.choice(verbs)} a {rng.choice(kinds)} digit.{ASSISTANT}"
        good, bad = (f" {digit}{mark}" for digit in [rng.randint(0, 9)] for mark in "!.")
        pair = (good, bad) if rng.random() < 1 / (1 + math.exp(-4)) else (bad, good)
        pairs.append(Pair(prompt, *pair))
    return pairs

def hub() -> str:
    """The address of the Hugging Face hub, or of the mirror that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

def _receive(url: str, file: BinaryIO, label: str) -> None:
    """One try: append to file what it lacks, and check the whole. ConnectionErrors may pass."""
    done = file.seek(0, os.SEEK_END)
    token = url.startswith(f"{hub()}/") and os.environ.get("HF_TOKEN", "").strip()
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={done}-" if done else None,
               "Authorization": f"Bearer {token}" if token else None}  # dropped on leaving the hub
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as answer:
        code, encoding = answer.status_code, answer.headers.get("Content-Encoding", "identity")
        if code in (408, 429) or code >= 500 or (code == 403 and answer.history):  # it expired
            raise requests.HTTPError(f"the answer was {code} {answer.reason}", response=answer)
        if code not in (200, 206, 416) or encoding != "identity":
            raise OSError(f"{url}: the answer was {code} {answer.reason}, encoding {encoding}; "
                          f"expected the file: see whether the name is right, or set HF_TOKEN")
        told = {k.lower(): v for a in (answer, *answer.history) for k, v in a.headers.items()}
        span = re.match(r"bytes (\d+|\*)\S*/(\d+)", answer.headers.get("Content-Range", ""))
        size = int(told.get("x-linked-size", span[2] if span else 0))
        sha256 = told.get("x-linked-etag", "").strip('W/"')
        if (code == 206 and (not span or span[1] != str(done))) or (code == 416 and size != done):
            file.truncate(0)
            raise requests.ConnectionError(f"the server can't go on after {done:,} bytes")
        if code == 200:  # the whole file, whatever was asked for
            file.truncate(0)
            done, size = 0, size or int(answer.headers.get("Content-Length", 0))
        chunks = answer.iter_content(2**14) if code != 416 else []  # nothing is missing
        for chunk in track(chunks, label, size, "bytes", len, done) if size else chunks:
            file.write(chunk)
    if (got := file.seek(0, os.SEEK_END)) < size:
        raise requests.ConnectionError(f"got {got:,} of {size:,} bytes")
    with open(file.name, "rb") as whole:
        digest = hashlib.file_digest(whole, "sha256").hexdigest()
    if (size and got != size) or (len(sha256) == 64 and digest != sha256):
        file.truncate(0)  # what an earlier try left may be of another version: then once more
        raise (requests.ConnectionError if done else OSError)(
            f"{url}: got {got:,} bytes with sha256 {digest}, expected {size:,} with "
            f"{sha256 or 'any'}; run again, or see whether the file has changed")

def _persist(url: str, file: BinaryIO, label: str, tries: int) -> None:
    """_receive, again after a fault that may pass, until `tries` in a row have brought nothing."""
    failures, most = 0, file.seek(0, os.SEEK_END)
    while True:
        try:
            return _receive(url, file, label)
        except (requests.ConnectionError, requests.Timeout, requests.HTTPError,
                requests.exceptions.ChunkedEncodingError) as error:
            got = file.seek(0, os.SEEK_END)
            failures, most = (1, got) if got > most else (failures + 1, most)
            if failures == tries:
                raise OSError(f"{url}: {error}, {tries} times in a row; see whether the network is "
                              f"there and run again: {file.name} is kept") from None
            after = "" if error.response is None else error.response.headers.get("Retry-After", "")
            wait = int(after) if after.isdecimal() else 2**failures
            with suppress(ValueError, TypeError):  # it may be a date
                wait = max(0, parsedate_to_datetime(after).timestamp() - time.time())
            print(f"{url}: {error}; again in {wait:.0f} s", flush=True)
            time.sleep(wait)

def download(url: str, path: str | Path, tries: int = 5) -> Path:
    """Fetch url to path, unless it is there; goes on with what an earlier try left in path.part.

    Size and sha256 are those that the Hugging Face hub tells of large files in its first answer,
    the redirect (X-Linked-Size, X-Linked-Etag); of others the size alone. HF_TOKEN goes to the hub
    alone. OSError for wrong content, lasting faults, and `tries` in a row that brought nothing.
    """
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "ab") as file:
        with suppress(OSError, AttributeError):  # a file system or a Windows without locks
            fcntl.flock(file, fcntl.LOCK_EX)  # another process may be at it: wait
        if path.exists():  # it was, and is done
            part.unlink(missing_ok=True)
            return path
        _persist(url, file, path.name, tries)
        os.fsync(file.fileno())
        if fcntl:
            part.replace(path)  # only a whole file ever has the final name
    if not fcntl:
        part.replace(path)  # Windows renames no open file
    return path

def fetch_model(name_or_path: str | Path) -> Path:
    """models/<name> for one of NAMES, downloaded if missing; any other path, or one that exists."""
    name, path = str(name_or_path), Path(name_or_path)
    if path.exists() or name not in NAMES:
        return path
    for file in ("config.json", "model.safetensors"):
        download(f"{hub()}/openai-community/{name}/resolve/main/{file}", Path("models", name, file))
    return Path("models", name)

def fetch_hh(folder: str | Path, subsets: Iterable[str], part: str) -> list[Path]:
    """Anthropic/hh-rlhf's files <subset>/<part>.jsonl.gz in `folder`, downloaded if missing."""
    return [download(f"{hub()}/datasets/Anthropic/hh-rlhf/resolve/main/{name}", Path(folder, name))
            for name in (f"{subset}/{part}.jsonl.gz" for subset in subsets)]
