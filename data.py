"""hh-rlhf: from the download to flat batches, every pair accounted for.

Read in this order: track (progress); Pair, read_pairs (what a line holds, what is kept), split;
TokenPair, tokenize (text to ids); Batch, flatten, batches (ids to tensors); download and what it
fetches. Needs torch, numpy, tiktoken, requests. Letters: B pairs, N tokens of a flat batch, M
predictions, R rows of T tokens in a group of rows.
"""

import gzip
import hashlib
import json
import os
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
import tiktoken
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: no lock between two downloads of one file, only the check of the hash
    fcntl = None

SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def track(items: Iterable, label: str, total: int, unit: str,
          size: Callable = lambda item: 1, done: int = 0) -> Iterator:
    """Yield the items and show share done, rate and time left, in `unit`s of which an item is `size`.

    On a terminal one line is rewritten in place; in a log file each tenth is a new line.
    """
    start, first, shown, terminal = time.perf_counter(), done, -1, sys.stdout.isatty()
    for item in items:
        yield item
        done += size(item)
        seconds = time.perf_counter() - start
        mark = int(4 * seconds) if terminal else 10 * done // max(total, 1)
        if mark > shown or done == total:
            shown, rate = mark, (done - first) / max(seconds, 1e-9)
            left = f"{max(total - done, 0) / rate:.0f}s left" if rate else ""
            print(f"\r\033[K{label} " if terminal else f"{label} ", f"{done / max(total, 1):4.0%} | {done:,}/{total:,} "
                  f"{unit} | {rate:,.0f} {unit}/s | {left}", sep="",
                  end="" if terminal and done < total else "\n", flush=True)


class Pair(NamedTuple):
    """A comparison: a prompt, up to and with its "\\n\\nAssistant:", and two responses to it.

    A response keeps its leading space: on this data the ids of prompt and response, tokenized apart,
    are then those of both tokenized together.
    """
    prompt: str
    chosen: str
    rejected: str


def read_pairs(path: str | Path) -> tuple[list[Pair], Counter]:
    """The single-turn pairs in a JSONL file, plain or gzip, and the audit: what became of its rows.

    A line is an object with the strings chosen and rejected: whole dialogues, or what follows a third
    string, prompt. The audit counts "rows", "kept", and each reason for dropping one. A line that is
    none of this is an error: ValueError with file, line number and what was found.
    """
    pairs, audit, number = [], Counter(rows=0, kept=0), 0
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                result = _parse(line)
                audit.update(["rows", "kept" if isinstance(result, Pair) else result])
                pairs += [result] if isinstance(result, Pair) else []
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: no whole gzip file, it ends after line {number} ({error}); "
                         f"delete it and run again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: {error}; expected a JSON object with the strings "
                         f"chosen and rejected, and perhaps prompt") from None
    return pairs, audit


def _parse(line: bytes) -> Pair | str:
    """The pair in a line, or the reason why it is dropped."""
    row = json.loads(line.decode())
    wrong = {key: row.get(key) for key in ("chosen", "rejected", "prompt") if not isinstance(
        row.get(key, "" if key == "prompt" else None), str)} if isinstance(row, dict) else row
    if wrong or not isinstance(row, dict):
        raise ValueError(f"found {wrong!r:.80}")
    if "prompt" in row:
        prompt = row["prompt"] if row["prompt"].startswith(HUMAN) else f"{HUMAN} {row['prompt']}"
        prompt = prompt if prompt.endswith(ASSISTANT) else prompt + ASSISTANT
        texts = [f"{prompt} {row[side].lstrip()}" for side in ("chosen", "rejected")]
    else:
        texts = [row["chosen"], row["rejected"]]
    if any(not t.startswith(HUMAN) or (t.count(HUMAN), t.count(ASSISTANT)) != (1, 1) for t in texts):
        return "not one turn"
    (prompt, chosen), (other, rejected) = (text.split(ASSISTANT) for text in texts)
    if prompt != other:
        return "prompts differ"
    if not chosen.strip() or not rejected.strip():
        return "empty answer"
    return "equal answers" if chosen == rejected else Pair(prompt + ASSISTANT, chosen, rejected)


def split(pairs: list[Pair], test: list[Pair], share: float) -> tuple[dict[str, list[Pair]], Counter]:
    """Parts "train", "val" and "test", and how many pairs were dropped since their prompt is in test.

    A pair goes to val by the hash of its prompt (about `share` of them), so equal prompts are never
    in two parts, in whatever order and on whatever machine. Without `test`, another share becomes it.
    """
    parts, dropped = {"train": [], "val": [], "test": list(test)}, Counter()
    held_out = {pair.prompt for pair in test}
    for pair in pairs:
        digest = hashlib.sha256(pair.prompt.encode("utf-8", "surrogatepass")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        if pair.prompt in held_out:
            dropped["prompt is in test"] += 1
        else:
            limit = share if test else 2 * share
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

    Too long: the prompt is cut once, from the left, to max_prompt_tokens, then each response from the
    right to what is left of max_tokens; a cut response has no end-of-text. Text that looks like a
    special token is text. Raises ValueError where no room is left for a response.
    """
    if not 0 < max_prompt_tokens < max_tokens:
        raise ValueError(f"max_prompt_tokens {max_prompt_tokens} and max_tokens {max_tokens}: expected "
                         f"0 < max_prompt_tokens < max_tokens, so that a response has room")
    kept, audit = [], Counter()
    chunks = [pairs[i:i + 1024] for i in range(0, len(pairs), 1024)]
    for chunk in track(chunks, "tokens", len(pairs), "pairs", len):
        texts = [text for pair in chunk for text in pair]
        ids = iter(encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1))
        for prompt, *responses in zip(ids, ids, ids, strict=True):
            cut_prompt = prompt[-max_prompt_tokens:]
            room = max_tokens - len(cut_prompt)
            chosen, rejected = [(r + [encoding.eot_token])[:room] for r in responses]
            if chosen == rejected:
                audit["equal after cutting"] += 1
                continue
            audit["cut"] += len(cut_prompt) < len(prompt) or max(map(len, responses)) >= room
            kept.append(TokenPair(*(np.array(x, np.int32) for x in (cut_prompt, chosen, rejected))))
    return kept, audit


@dataclass(frozen=True)
class Batch:
    """B pairs, flat: each prompt once, then its responses; no padding. All int64.

    A response's last token is only predicted, so it stands in `targets` alone. Responses are numbered
    chosen first: pair b's chosen is b, its rejected B + b. With one side only, there are B in all.
    """
    tokens: Tensor  # (N,) ids: prompt, chosen, rejected of the first pair, then of the next
    positions: Tensor  # (N,) place in the row: a response goes on where its prompt ends
    rows: tuple[Tensor, ...]  # (R, T) each: attention's rows, prompt and response, as places in tokens
    back: Tensor  # (N,) a place of each token in the rows, flattened and concatenated
    predicts: Tensor  # (M,) places in tokens: the last of the prompt, then the response's
    targets: Tensor  # (M,) ids: what is predicted there
    response: Tensor  # (M,) in [0, 2B): whose prediction it is
    lengths: Tensor  # (2B,) tokens of each response
    pairs: Tensor  # (B,) the pairs' numbers in the data set

    def to(self, device: torch.device | str) -> "Batch":
        def move(x):
            return tuple(map(move, x)) if isinstance(x, tuple) else x.to(device, non_blocking=True)
        return Batch(*(move(getattr(self, f.name)) for f in fields(self)))


def flatten(pairs: list[TokenPair], numbers: np.ndarray,
            sides: tuple[str, ...] = ("chosen", "rejected"), groups: int = 4) -> Batch:
    """The Batch of these pairs, numbered `numbers` (B,) in the data set; attention in `groups`."""
    tokens, rows, responses, count = [], {s: [] for s in sides}, {s: [] for s in sides}, 0
    for pair in pairs:
        tokens.append(pair.prompt)
        prompt, count = np.arange(count, count + len(pair.prompt)), count + len(pair.prompt)
        for side in sides:
            response = getattr(pair, side)
            tokens.append(response[:-1])
            rows[side].append(np.append(prompt, np.arange(count, count + len(response) - 1)))
            responses[side].append(response)
            count += len(response) - 1
    rows, responses = sum(rows.values(), []), sum(responses.values(), [])  # chosen first
    lengths = np.array([len(r) for r in responses], np.int64)
    positions, back, index, base = np.zeros(count, np.int64), np.zeros(count, np.int64), [], 0
    by_length = np.argsort([len(row) for row in rows], kind="stable")
    for group in np.array_split(by_length, max(1, min(groups, len(rows)))):
        width = max((len(rows[r]) for r in group), default=0)
        places = np.zeros((len(group), width), np.int64)  # a pad may name any token: no one sees it
        for i, r in enumerate(group):
            places[i, :len(rows[r])] = rows[r]
            positions[rows[r]] = np.arange(len(rows[r]))
            back[rows[r]] = base + i * width + np.arange(len(rows[r]))
        index.append(torch.from_numpy(places))
        base += places.size
    predicts = [row[-n:] for row, n in zip(rows, lengths, strict=True)]
    whose = np.repeat(np.arange(len(rows)), lengths)

    def tensor(*parts: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate([*parts, np.zeros(0)]).astype(np.int64))
    return Batch(tensor(*tokens), tensor(positions), tuple(index), tensor(back), tensor(*predicts),
                 tensor(*responses), tensor(whose), tensor(lengths), tensor(numbers))


def batches(pairs: list[TokenPair], batch_pairs: int, seed: int | None, epoch: int = 0, start: int = 0,
            rank: int = 0, world: int = 1, micro_pairs: int = 0,
            sides: tuple[str, ...] = ("chosen", "rejected")) -> Iterator[list[Batch]]:
    """The epoch's batches from number `start` on, each a list of micro-batches of this process.

    Shuffled by (seed, epoch); by length where seed is None. Each pair comes once, the last batch may
    be short. Process `rank` of `world` gets its share of each batch, in parts of up to micro_pairs
    (0: in one); where the short one has fewer pairs than there are processes, an empty part.
    """
    order = (np.random.default_rng([seed, epoch]).permutation(len(pairs)) if seed is not None else
             np.argsort([sum(map(len, pair)) for pair in pairs], kind="stable"))
    for first in range(start * batch_pairs, len(pairs), batch_pairs):
        mine = order[first:first + batch_pairs][rank::world]
        parts = np.split(mine, range(micro_pairs, len(mine), micro_pairs) if micro_pairs else [])
        yield [flatten([pairs[i] for i in part], part, sides) for part in parts]


def download(url: str, path: str | Path, tries: int = 5) -> Path:
    """Fetch url to path, unless it is there; goes on with what an earlier try left in path.part.

    Size and sha256 are those that the Hugging Face hub tells of large files in its first answer, the
    redirect (X-Linked-Size, X-Linked-Etag); of others the size alone. HF_TOKEN goes to the hub, not on
    to where it redirects. Passing faults are tried again; OSError for lasting ones and wrong content.
    """
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "ab") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)  # another process may be at it: wait
        if path.exists():  # it was, and is done
            part.unlink(missing_ok=True)
            return path
        failures, size = 0, file.tell()
        while True:
            try:
                _receive(url, file, path.name)
                break
            except (requests.ConnectionError, requests.Timeout, requests.HTTPError,
                    requests.exceptions.ChunkedEncodingError) as error:
                failures = 1 if file.tell() > size else failures + 1  # what brought data was no failure
                if failures == tries:
                    raise OSError(f"{url}: {error}, {tries} times in a row; see whether the network is "
                                  f"there and run again: {part} is kept") from None
                after = "" if error.response is None else error.response.headers.get("Retry-After", "")
                wait, size = int(after) if after.isdigit() else 2**failures, file.tell()
                print(f"{url}: {error}; again in {wait} s", flush=True)
                time.sleep(wait)
        os.fsync(file.fileno())
        part.replace(path)  # only a whole file ever has the final name
    return path


def _receive(url: str, file, label: str) -> None:
    """One try: append what is missing to file and check it. The errors of requests may pass."""
    done = file.seek(0, os.SEEK_END)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    if url.startswith(hub()) and os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {os.environ['HF_TOKEN']}"
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as answer:
        code, told = answer.status_code, answer.headers.copy()
        for hop in answer.history:  # the hub's own answer tells of the file, the last only of the rest
            told.update(hop.headers)
        size, sha256 = int(told.get("X-Linked-Size", 0)), told.get("X-Linked-Etag", "").strip('W/"')
        if code in (408, 429) or code >= 500 or (code == 403 and answer.history):  # an address expired
            raise requests.HTTPError(f"the server answered {code} {answer.reason}", response=answer)
        if code not in (200, 206, 416):
            raise OSError(f"{url}: the server answered {code} {answer.reason}; expected the file: "
                          f"see whether the name is right, or set HF_TOKEN")
        where = re.match(r"bytes (\d+|\*)\S*/(\d+)", answer.headers.get("Content-Range", ""))
        if where:
            size = size or int(where[2])
        if code != 416:  # which says that nothing is missing
            if code == 200 or where is None or int(where[1]) != done:
                file.truncate(0)  # from the beginning, whatever was asked for
                if code == 206 and done:
                    raise requests.ConnectionError("the server sent another part than asked for")
                done = 0
            size = size or done + int(answer.headers.get("Content-Length", 0))
            for chunk in track(answer.iter_content(2**18), label, size, "bytes", len, done):
                file.write(chunk)
    file.flush()
    got = file.seek(0, os.SEEK_END)
    if got < size:
        raise requests.ConnectionError(f"got {got:,} of {size:,} bytes")
    with open(file.name, "rb") as whole:
        found = hashlib.file_digest(whole, "sha256").hexdigest()
    if (size and got != size) or (len(sha256) == 64 and found != sha256):
        file.truncate(0)
        raise OSError(f"{url}: got {got:,} bytes with sha256 {found}, expected {size:,} with {sha256}; "
                      f"run again, or see whether the file has changed")


def hub() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def fetch_model(name: str) -> Path:
    """Download gpt2, gpt2-medium, gpt2-large or gpt2-xl to models/<name>; returns that folder."""
    for file in ("config.json", "model.safetensors"):
        download(f"{hub()}/openai-community/{name}/resolve/main/{file}", Path("models", name, file))
    return Path("models", name)


def fetch_hh(folder: str | Path, subsets: Iterable[str], part: str) -> list[Path]:
    """The files <subset>/<part>.jsonl.gz of Anthropic/hh-rlhf in `folder`, downloaded if missing."""
    url = f"{hub()}/datasets/Anthropic/hh-rlhf/resolve/main"
    return [download(f"{url}/{name}", Path(folder, name))
            for name in (f"{subset}/{part}.jsonl.gz" for subset in subsets)]
