"""Claims about data.download, against a hub in two threads that answers as the real one does.

The hub redirects (302) for large files to a store, another host, by a signed address that expires;
size and sha256 stand in that redirect alone. Small files it sends itself. Faults are played on
request. Nobody sleeps: the waits are written down instead.
"""

import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
from data import download, lock
from model import GPT2, GPT2Config, save_pretrained

K = 2**14  # bytes that download takes at a time: a break costs up to as many
BODY = random.Random(0).randbytes(10 * K)  # 163,840
DAMAGED = BODY[:-1] + bytes([BODY[-1] ^ 1])  # of the same size
NAME = "/a/model/resolve/main/weights.bin"
COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"  # of gpt2
HH_COMMIT = "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"  # of hh-rlhf


def sha256_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


class Host(BaseHTTPRequestHandler):
    """What hub and store have in common: they note what was asked, and play the next fault."""
    world: "World"

    def do_GET(self):
        note = SimpleNamespace(path=self.path.partition("?")[0], headers=self.headers,
                               range=self.headers["Range"])
        asked, faults = self.world.notes[type(self).__name__]
        asked.append(note)
        fault = faults.pop(0) if faults else None
        if callable(fault):
            fault(self)
        elif fault:
            self.send(*fault)
        else:
            self.answer(note.path)

    def send(self, code: int, headers: dict, body: bytes = b"", part: int | None = None):
        """An answer, or only the first `part` bytes of its body."""
        self.send_response(code)
        for key, value in ({"Content-Length": len(body)} | headers).items():
            if value is not None:
                self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body[:part])

    def log_message(self, *args):
        pass


class Hub(Host):
    def answer(self, path: str):
        world = self.world
        if path in world.moved:
            self.send(307, {"Location": world.moved[path], "X-Repo-Commit": COMMIT}, b"moved")
        elif path in world.small:
            body = world.small[path]
            blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            self.send(200, {"ETag": f'"{blob}"', "X-Repo-Commit": COMMIT}, body)
        elif path in world.large:
            world.signed += 1
            headers = {"Location": f"{world.store}{path}?Signature={world.signed}"}
            if world.linked:
                body = world.large[path]
                headers["X-Linked-Size"] = len(body)
                headers["X-Linked-Etag"] = f'"{sha256_of(body)}"'
                headers["X-Repo-Commit"] = COMMIT
            self.send(302, headers, b"Found. Redirecting")
        else:
            self.send(404, {"X-Error-Code": "EntryNotFound"}, b"Entry not found")


class Store(Host):
    def answer(self, path: str):
        world = self.world
        body = world.stored.get(path, world.large[path])
        start = 0
        if not self.path.endswith(f"?Signature={world.signed}"):
            self.send(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
            return
        if self.headers["Range"] and world.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start > 0 and start >= len(body):
            headers = {} if world.ranges == "S3" else {"Content-Range": f"bytes */{len(body)}"}
            self.send(416, headers, b"<Error><Code>InvalidRange</Code></Error>")
            return
        part = world.drops.pop(0) if world.drops else None
        headers = {"ETag": '"00ff"'}
        if start > 0:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send(206 if start > 0 else 200, headers, body[start:], part)


class World:
    """A hub and its store; the attributes say how they behave."""
    def __init__(self):
        self.large = {NAME: BODY}    # what the hub has, by path
        self.small = {}              # what the hub sends itself
        self.moved = {}              # where the hub sends one on
        self.stored = {}             # what the store has instead
        self.linked = True           # does the redirect tell size and hash?
        self.ranges = True           # does the store know ranges? "S3": without a size in its 416
        self.drops = []              # after how many bytes the store's next answers break off
        self.signed = 0              # the last signature that the hub gave out
        self.waits = []              # the seconds that download wanted to sleep
        self.watch = lambda: None    # called at each of these waits
        self.now = 1_800_000_000.0   # 15 January 2027, 08:00:00

        self.notes = {"Hub": ([], []), "Store": ([], [])}
        self.hub_asked, self.hub_faults = self.notes["Hub"]
        self.store_asked, self.store_faults = self.notes["Store"]
        self.servers = []
        self.hub = self.serve(Hub)
        self.store = self.serve(Store)
        self.url = self.hub + NAME

    def serve(self, kind: type[Host]) -> str:
        """The address where such a host now answers."""
        kind = type(kind.__name__, (kind,), {"world": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
        self.servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.watch()

    def ranges_asked(self) -> list:
        return [note.range for note in self.store_asked]


@pytest.fixture
def world(monkeypatch, tmp_path):
    world = World()
    monkeypatch.setattr(data, "time", SimpleNamespace(
        sleep=world.wait, perf_counter=time.perf_counter, time=lambda: world.now))
    monkeypatch.setenv("HF_ENDPOINT", world.hub)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    yield world
    world.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "weights.bin"


def leave(path, part: bytes):
    """What an earlier try left."""
    path.parent.mkdir()
    path.with_name("weights.bin.part").write_bytes(part)


def only(path, body: bytes = BODY) -> bool:
    """The file is whole, and nothing else is in its folder."""
    return path.read_bytes() == body and os.listdir(path.parent) == [path.name]


def test_a_file_is_fetched_once(world, path, capsys):
    assert download(world.url, str(path)) == path
    assert only(path) and world.ranges_asked() == [None] and not world.waits
    assert [n.headers["Accept-Encoding"] for n in world.hub_asked] == ["identity"]
    assert "weights.bin 100% | 163,840/163,840 bytes | " in capsys.readouterr().out
    assert download(world.url, path) == path and len(world.hub_asked) == 1


def test_a_small_file_comes_without_redirect_or_hash(world, path):
    world.small[NAME] = b"{}"
    assert only(download(world.url, path), b"{}") and not world.store_asked


def test_an_empty_file_is_a_file(world, path):
    world.small[NAME] = b""
    assert only(download(world.url, path), b"")


def test_what_an_earlier_try_left_is_not_fetched_again(world, path, capsys):
    leave(path, BODY[:4 * K])
    assert only(download(world.url, path)) and world.ranges_asked() == [f"bytes={4 * K}-"]
    assert [n.range for n in world.hub_asked] == [f"bytes={4 * K}-"]
    assert "100% | 163,840/163,840 bytes" in capsys.readouterr().out


def test_a_dropped_connection_is_taken_up_where_it_broke(world, path):
    seen = []
    world.drops = [3 * K, 2 * K]
    world.watch = lambda: seen.append(os.listdir(path.parent))
    assert only(download(world.url, path))
    assert world.ranges_asked() == [None, f"bytes={3 * K}-", f"bytes={5 * K}-"]
    assert seen == [["weights.bin.part"]] * 2  # nothing under the final name until it is whole
    assert world.waits == [1, 1]  # what brought data begins a new count


def test_a_line_that_always_breaks_gets_there_in_the_end(world, path):
    world.drops = [K] * 9
    assert only(download(world.url, path, tries=2)) and len(world.store_asked) == 10


@pytest.mark.parametrize("left", [BODY[:4 * K], b"x" * 4 * K, BODY, BODY + b"more"])
def test_a_server_that_ignores_ranges_is_not_appended(world, path, left):
    leave(path, left)
    world.ranges = False
    assert only(download(world.url, path)) and world.ranges_asked() == [f"bytes={len(left)}-"]


def test_a_break_at_a_server_that_ignores_ranges_starts_over_and_ends(world, path):
    world.ranges = False
    world.drops = [6 * K, 3 * K, 7 * K]
    assert only(download(world.url, path)) and world.waits == [1, 2, 1]
    path.unlink()
    world.drops = [6 * K] * 9
    with pytest.raises(OSError, match="3 times in a row"):  # the same bytes are no progress
        download(world.url, path, tries=3)


@pytest.mark.parametrize("ranges", [True, "S3"])
def test_a_part_that_already_is_whole_is_checked_and_renamed(world, path, ranges):
    """416 says so. Some stores tell the size with it, some do not; the redirect has it too."""
    leave(path, BODY)
    world.ranges = ranges
    assert only(download(world.url, path)) and world.ranges_asked() == [f"bytes={10 * K}-"]


@pytest.mark.parametrize("ranges", [True, "S3"])
@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("left", [b"x" * 4 * K, b"x" * 10 * K, BODY + b"more", b"x" * 30 * K])
def test_a_part_of_another_file_is_thrown_away(world, path, left, linked, ranges):
    """By hash where the redirect tells it; a mirror that does not is caught by size alone."""
    leave(path, left)
    world.linked = linked
    world.ranges = ranges
    if not linked and len(left) <= len(BODY):
        left = BODY[:len(left)]
        path.with_name("weights.bin.part").write_bytes(left)
    assert only(download(world.url, path))
    assert world.ranges_asked()[0] == f"bytes={len(left)}-"


@pytest.mark.parametrize("span", ["bytes 0-163839/163840", "bytes 3-163839/163840",
                                  None, "nonsense"])
def test_a_range_that_was_not_asked_for_is_not_appended(world, path, span):
    leave(path, BODY[:4 * K])
    world.store_faults.append((206, {"Content-Range": span}, BODY[4 * K:]))
    assert only(download(world.url, path)) and world.ranges_asked() == [f"bytes={4 * K}-", None]


def test_a_server_of_wrong_ranges_and_breaks_is_given_up(world, path):
    def wrong(host):
        host.send(206, {"Content-Range": "bytes 1-163839/163840"}, BODY[1:])
    world.store_faults += [None, wrong] * 10
    world.drops = [5 * K] * 10
    with pytest.raises(OSError, match="4 times in a row"):
        download(world.url, path, tries=4)
    assert len(world.store_asked) == 5 and not path.exists()     # the first brought data


def test_an_expired_address_is_asked_for_anew(world, path):
    def expire(host):
        world.signed += 1
        host.answer(NAME)
    world.store_faults.append(expire)
    assert only(download(world.url, path))
    assert len(world.hub_asked) == len(world.store_asked) == 2


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_a_lasting_refusal_is_an_error_at_once(world, path, code):
    world.hub_faults.append((code, {}, b"no"))
    with pytest.raises(OSError, match=f"{NAME}.* {code} .*expected the file.*name.*HF_TOKEN"):
        download(world.url, path)
    assert not path.exists() and not world.waits and len(world.hub_asked) == 1


def test_a_file_that_is_not_there_is_an_error(world, path):
    with pytest.raises(OSError, match="404 Not Found"):
        download(world.hub + "/nowhere", path)


@pytest.mark.parametrize(("after", "wait"), [
    ("7", 7), ("0", 0), (None, 2), ("soon", 2), ("\xb2", 2),
    ("Fri, 15 Jan 2027 08:00:30 GMT", 30),  # it is 08:00:00
    ("Fri, 15 Jan 2027 07:00:00 GMT", 0)])
@pytest.mark.parametrize("host", ["Hub", "Store"])
@pytest.mark.parametrize("code", [429, 503])
def test_a_busy_server_says_when_to_come_back(world, path, host, code, after, wait):
    world.notes[host][1].append((code, {"Retry-After": after}, b"busy"))
    assert only(download(world.url, path)) and world.waits == [wait]


@pytest.mark.parametrize(("after", "limit", "wait"), [
    (None, '"resolvers";r=0;t=7', 7),  # as the hub says it
    (None, '"resolvers"; r=0; t=7', 7),
    (None, '"resolvers";r=0', 2),
    ("3", '"resolvers";r=0;t=7', 3),
    ("0", '"resolvers";r=0;t=7', 0),
    ("Fri, 15 Jan 2027 08:00:30 GMT", '"resolvers";r=0;t=7', 30),
    ("soon", '"resolvers";r=0;t=7', 7)])
@pytest.mark.parametrize("host", ["Hub", "Store"])
def test_the_hub_says_in_ratelimit_when_to_come_back_but_retry_after_wins(
        world, path, host, after, limit, wait):
    world.notes[host][1].append((429, {"RateLimit": limit, "Retry-After": after}, b"busy"))
    assert only(download(world.url, path)) and world.waits == [wait]


def test_waits_grow_until_the_tries_are_used_up(world, path):
    leave(path, BODY[:4 * K])
    world.store_faults += [(code, {}) for code in (500, 502, 503, 504, 408)]
    with pytest.raises(OSError, match=r"408 .*5 times in a row.*part is kept"):
        download(world.url, path)
    assert world.waits == [2, 4, 8, 16]
    assert path.with_name("weights.bin.part").read_bytes() == BODY[:4 * K] and not path.exists()
    assert only(download(world.url, path)) and world.ranges_asked()[-1] == f"bytes={4 * K}-"


def test_nobody_there_is_an_error_that_says_so(world, path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.server_close()  # now nothing listens there
    with pytest.raises(OSError, match="2 times in a row; see whether the network is there"):
        download(f"http://127.0.0.1:{server.server_port}/file", path, tries=2)
    assert world.waits == [2]


def test_wrong_content_is_an_error_and_never_gets_the_name(world, path):
    world.stored[NAME] = DAMAGED
    told = (f"got 163,840 bytes with sha256 {sha256_of(DAMAGED)}, expected 163,840 with "
            f"{sha256_of(BODY)}")
    with pytest.raises(OSError, match=told):
        download(world.url, path)
    assert not path.exists() and not world.waits
    assert path.with_name("weights.bin.part").read_bytes() == b""
    world.stored.clear()
    assert only(download(world.url, path))


@pytest.mark.parametrize("linked", [True, False])
def test_the_hash_in_the_call_decides_whatever_the_hub_tells(world, path, linked):
    """The hub tells the hash of BODY, or none. The call wants DAMAGED, of the same size."""
    world.linked = linked
    world.stored[NAME] = DAMAGED
    assert only(download(world.url, path, sha256_of(DAMAGED)), DAMAGED)


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("left", [b"", BODY[:4 * K], BODY])
def test_content_without_the_hash_in_the_call_is_an_error(world, path, linked, left):
    """Although it is what the hub has; and wherever the first try began."""
    leave(path, left)
    world.linked = linked
    wanted = sha256_of(DAMAGED)
    told = f"with sha256 {sha256_of(BODY)}, expected 163,840 with {wanted}"
    with pytest.raises(OSError, match=told):
        download(world.url, path, sha256=wanted)
    assert not path.exists()
    assert path.with_name("weights.bin.part").read_bytes() == b""


def test_a_small_file_is_checked_by_the_hash_in_the_call(world, path):
    world.small[NAME] = b"{}"
    with pytest.raises(OSError, match=f"expected 2 with {sha256_of(b'[]')}"):
        download(world.url, path, sha256_of(b"[]"))
    assert not path.exists() and not world.waits
    assert only(download(world.url, path, sha256_of(b"{}")), b"{}")


def test_a_hash_that_stands_on_a_later_hop_is_checked(world, path):
    """A mirror may first answer with a redirect to itself that tells nothing of the file."""
    old = "/model/resolve/main/weights.bin"
    world.moved[old] = NAME  # a relative address
    world.stored[NAME] = DAMAGED
    with pytest.raises(OSError, match=f"expected 163,840 with {sha256_of(BODY)}"):
        download(world.hub + old, path)
    assert [n.path for n in world.hub_asked] == [old, NAME]
    assert not path.exists() and not world.waits
    world.stored[NAME] = BODY + b"more"
    with pytest.raises(OSError, match=r"got 163,844 bytes .*expected 163,840 with"):
        download(world.hub + old, path)
    world.stored.clear()
    assert only(download(world.hub + old, path))


def test_content_of_another_size_is_an_error(world, path):
    world.stored[NAME] = BODY + b"more"
    with pytest.raises(OSError, match=r"got 163,844 bytes.*expected 163,840 with"):
        download(world.url, path)
    world.stored[NAME] = BODY[:-1]  # as if the end were still to come
    with pytest.raises(OSError, match=r"3 times in a row"):
        download(world.url, path, tries=3)
    world.hub_faults.append((200, {"X-Linked-Size": 5}, b"longer"))
    with pytest.raises(OSError, match=r"got 6 bytes .* expected 5 with any"):
        download(world.url, path)
    assert not path.exists()


def test_a_mirror_that_tells_nothing_is_checked_by_size(world, path):
    world.linked = False
    world.drops = [3 * K, 2 * K]
    assert only(download(world.url, path))
    assert world.ranges_asked() == [None, f"bytes={3 * K}-", f"bytes={5 * K}-"]


def test_a_file_of_unknown_size_is_taken_as_it_comes(world, path, capsys):
    world.hub_faults.append((200, {"Content-Length": None}, BODY))
    assert only(download(world.url, path)) and capsys.readouterr().out == ""


def test_an_encoded_answer_is_refused_though_it_was_not_asked_for(world, path):
    world.store_faults.append((200, {"Content-Encoding": "gzip"}, gzip.compress(BODY)))
    with pytest.raises(OSError, match="encoding gzip"):
        download(world.url, path)
    assert not path.exists()


def test_the_token_goes_to_the_hub_and_not_to_the_store(world, path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", " secret\n")
    old = "/model/resolve/main/weights.bin"
    world.moved[old] = NAME  # a relative address: still the hub
    assert only(download(world.hub + old, path))
    assert [n.path for n in world.hub_asked] == [old, NAME]
    assert [n.headers["Authorization"] for n in world.hub_asked] == ["Bearer secret"] * 2
    assert [n.headers["Authorization"] for n in world.store_asked] == [None]


@pytest.mark.parametrize("token", [None, "", " "])
def test_without_a_token_none_is_sent(world, path, monkeypatch, token):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    download(world.url, path)
    assert [n.headers["Authorization"] for n in world.hub_asked] == [None]


def test_no_other_host_is_taken_for_the_hub(world, path, monkeypatch):
    """http://127.0.0.1:54321 begins with http://127.0.0.1:5432, and is not that host."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_ENDPOINT", world.hub[:-1])
    assert only(download(world.url, path))
    monkeypatch.setenv("HF_ENDPOINT", world.hub)
    world.signed = 1
    assert only(download(f"{world.store}{NAME}?Signature=1", path.with_name("2").joinpath("w")))
    asked = world.hub_asked + world.store_asked
    assert len(asked) == 3 and not any(n.headers["Authorization"] for n in asked)


@pytest.mark.parametrize(("endpoint", "hub"), [
    (None, "https://huggingface.co"), ("", "https://huggingface.co"),
    ("https://hf-mirror.com", "https://hf-mirror.com"), ("http://here/hf/", "http://here/hf")])
def test_the_hub_is_where_the_environment_says(monkeypatch, endpoint, hub):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    if endpoint is not None:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert data.hub() == hub


@pytest.mark.skipif(data.fcntl is None, reason="needs a system with locks on files")
def test_of_several_at_once_one_fetches_and_the_others_wait(world, path):
    """Threads here; a lock belongs to an open file, so processes are kept apart in the same way."""
    others_wait = threading.Event()
    locked = []
    flock = data.fcntl.flock

    def slow(host):
        assert others_wait.wait(20)
        host.answer(NAME)

    def count(file, how):
        locked.append(file)
        if len(locked) == 4:
            others_wait.set()
        flock(file, how)

    world.store_faults.append(slow)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "fcntl", SimpleNamespace(flock=count, LOCK_EX=data.fcntl.LOCK_EX))
        threads = [threading.Thread(target=lambda: results.append(download(world.url, path)))
                   for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert results == [path] * 4 and only(path) and len(world.store_asked) == 1


@pytest.mark.skipif(data.fcntl is None, reason="needs a system with locks on files")
def test_after_one_that_gave_up_the_next_goes_on(world, path):
    results = []
    locks = []
    flock = data.fcntl.flock

    def give_up_while_another_waits(host):
        thread = threading.Thread(target=lambda: results.append(download(world.url, path)))
        thread.start()
        while len(locks) < 2:
            time.sleep(0.001)
        host.send(404, {})

    def count(file, how):
        locks.append(file)
        flock(file, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "fcntl", SimpleNamespace(flock=count, LOCK_EX=data.fcntl.LOCK_EX))
        world.drops = [3 * K]
        world.hub_faults += [None, give_up_while_another_waits]
        with pytest.raises(OSError, match="404"):
            download(world.url, path)
        for _ in range(3000):
            if results:
                break
            time.sleep(0.01)
    assert only(path) and world.ranges_asked() == [None, f"bytes={3 * K}-"]


def no_locks(file, how):
    raise OSError(95, "Operation not supported")


# Windows, and a file system that knows no locks
WITHOUT_LOCKS = [None, SimpleNamespace(flock=no_locks, LOCK_EX=2, LOCK_NB=4)]


@pytest.mark.parametrize("locks", WITHOUT_LOCKS)
def test_a_system_without_locks_downloads_too(world, path, monkeypatch, locks):
    monkeypatch.setattr(data, "fcntl", locks)
    world.drops = [3 * K]
    assert only(download(world.url, path))


@pytest.mark.skipif(data.fcntl is None, reason="needs a system with locks on files")
def test_a_lock_keeps_others_out_until_its_file_is_closed(tmp_path):
    with open(tmp_path / "lock", "ab") as first, open(tmp_path / "lock", "ab") as second:
        assert lock(first, wait=False) is True
        assert lock(second, wait=False) is False
        first.close()
        assert lock(second, wait=False) is True


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(data.fcntl is None, reason="needs a system with locks on files")
def test_a_lock_of_another_process_ends_with_it(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with open(tmp_path / "lock", "ab") as file:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout.readline() == b"locked\n"
            assert lock(file, wait=False) is False
            other.kill()
        assert lock(file) is True


@pytest.mark.parametrize("locks", WITHOUT_LOCKS)
@pytest.mark.parametrize("wait", [True, False])
def test_where_there_are_no_locks_each_gets_one(tmp_path, monkeypatch, locks, wait):
    monkeypatch.setattr(data, "fcntl", locks)
    with open(tmp_path / "lock", "ab") as first, open(tmp_path / "lock", "ab") as second:
        assert lock(first, wait) is True
        assert lock(second, wait) is True


# The pinned files

def test_a_model_is_fetched_and_loaded_by_its_name(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHA256", {})  # this is another model
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=50, n_inner=12)
    model = GPT2(config).requires_grad_(False)
    save_pretrained(model, tmp_path / "saved")
    at = f"/openai-community/gpt2/resolve/{COMMIT}"
    world.small[f"{at}/config.json"] = (tmp_path / "saved/config.json").read_bytes()
    world.large[f"{at}/model.safetensors"] = (tmp_path / "saved/model.safetensors").read_bytes()
    for name in data.TOKENIZER_FILES:
        world.small[f"{at}/{name}"] = name.encode()
    folder = data.fetch_model("gpt2")
    assert sorted(os.listdir(folder)) == sorted(
        ["config.json", "model.safetensors", *data.TOKENIZER_FILES])
    assert (folder / "vocab.json").read_bytes() == b"vocab.json"
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.equal(GPT2.from_pretrained("gpt2")(tokens), model(tokens))


def test_pairs_are_fetched_and_read(world, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHA256", {})  # these are other pairs
    subsets = ["harmless-base", "helpful-base"]
    for number, subset in enumerate(subsets):
        row = {"chosen": f"\n\nHuman: {number}\n\nAssistant: Yes.",
               "rejected": f"\n\nHuman: {number}\n\nAssistant: No."}
        name = f"/datasets/Anthropic/hh-rlhf/resolve/{HH_COMMIT}/{subset}/test.jsonl.gz"
        world.large[name] = gzip.compress(json.dumps(row).encode() + b"\n")
    files = data.fetch_hh(tmp_path / "hh", subsets, "test")
    assert files == [tmp_path / "hh" / subset / "test.jsonl.gz" for subset in subsets]
    prompts = [data.read_pairs(file)[0][0].prompt for file in files]
    assert prompts == ["\n\nHuman: 0\n\nAssistant:", "\n\nHuman: 1\n\nAssistant:"]
    assert set(subsets) < set(data.SUBSETS)


@pytest.fixture
def asked(monkeypatch):
    """What download is called with, instead of downloads: (url, path, sha256)."""
    calls = []

    def record(url, path, sha256=""):
        calls.append((url, path, sha256))
        return path

    monkeypatch.setattr(data, "download", record)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub")
    return calls


def test_gpt2_is_asked_for_by_its_commit_and_hash(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at = "http://hub/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e"
    folder = data.fetch_model("gpt2")
    assert folder == Path("models/gpt2")
    assert asked == [
        (f"{at}/config.json", folder / "config.json", ""),
        (f"{at}/model.safetensors", folder / "model.safetensors",
         "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
        (f"{at}/tokenizer.json", folder / "tokenizer.json", ""),
        (f"{at}/vocab.json", folder / "vocab.json", ""),
        (f"{at}/merges.txt", folder / "merges.txt", "")]


def test_pairs_are_asked_for_by_their_commit_and_hash(asked):
    at = "http://hub/datasets/Anthropic/hh-rlhf/resolve/09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
    files = data.fetch_hh("hh", ["helpful-base", "harmless-base"], "train")
    assert files == [Path("hh/helpful-base/train.jsonl.gz"),
                     Path("hh/harmless-base/train.jsonl.gz")]
    assert asked == [
        (f"{at}/helpful-base/train.jsonl.gz", files[0],
         "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4"),
        (f"{at}/harmless-base/train.jsonl.gz", files[1],
         data.SHA256.get("harmless-base/train.jsonl.gz", ""))]


def test_each_hash_that_we_know_is_asked_for(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in data.MODELS:
        data.fetch_model(name)
        revision = data.MODEL_REVISIONS.get(name, "main")      # main: the newest
        assert f"/{name}/resolve/{revision}/config.json" in asked[-5][0]
    for split_name in ("train", "test"):
        data.fetch_hh("hh", data.SUBSETS, split_name)
    hashes = {sha256 for url, path, sha256 in asked} - {""}
    assert hashes == set(data.SHA256.values())
    assert len(hashes) == len(data.SHA256)
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in hashes)


def test_a_file_without_the_pinned_hash_is_refused(world, tmp_path, monkeypatch):
    """Although the hub itself tells the hash of what it sends."""
    monkeypatch.chdir(tmp_path)
    at = f"/openai-community/gpt2/resolve/{COMMIT}"
    world.small[f"{at}/config.json"] = b"{}"
    world.large[f"{at}/model.safetensors"] = BODY
    with pytest.raises(OSError, match=r"expected 163,840 with 248dfc3911869ec493c7"):
        data.fetch_model("gpt2")
    assert not Path("models/gpt2/model.safetensors").exists()


def test_what_is_no_name_of_a_model_or_exists_is_not_asked_for(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gpt2-large").mkdir()
    for name in ("gpt2-large", "runs/mine", "gpt3"):
        assert data.fetch_model(name) == Path(name)
    assert asked == []


def test_waits_double_where_no_server_answers():
    assert [data.seconds_to_wait(None, failures) for failures in (0, 1, 2, 3)] == [1, 2, 4, 8]


def test_a_mirrors_address_may_end_with_a_slash(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror/X/")
    assert data.hub() == "https://mirror/X"
