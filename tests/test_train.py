"""The whole job, on a GPT-2 so small that it takes a second: options, stages, stops, processes.

Runs that are killed, or that are several, are real processes: children of one that has imported
everything (`Jobs`), so that each begins at once. The others call train.main here.
"""

import gzip
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file

import data
import dpo
import train
from model import GPT2, GPT2Config, add_adapters, save_pretrained

SUBSETS = ("harmless-base", "helpful-base")
CLOCK = ("tokens_per_second", "seconds_left")  # all that may differ between two equal runs
ROWS, TESTS = 21, 4  # single-turn pairs in each subset's two files


# A world to train in: a model, and files like those of hh-rlhf.

def dialogue(prompt: str, answer: str) -> str:
    return f"\n\nHuman: {prompt}\n\nAssistant: {answer}"


def rows(count: int, rng: random.Random) -> list[dict]:
    """Sums; the chosen answer is polite in four of five, so that there is something to learn."""
    made = []
    for a, b in rng.sample([(a, b) for a in range(99) for b in range(99)], count):
        sides = [dialogue(f"What is {a} plus {b}?", text) for text in (
            f"Gladly! That is {a + b}.", f"No idea. {rng.choice('Go Ask Look Run'.split())} away.")]
        sides = sides if rng.random() < 0.8 else sides[::-1]
        made.append(dict(zip(data.SIDES, sides, strict=True)))
    return made


def write_rows(path: Path, lines: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with models in gpt2/ and bytes/, hh-rlhf in hh/, and own pairs in pairs.jsonl."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(5)
    torch.manual_seed(1)
    save_pretrained(GPT2(GPT2Config(2, 2, 16, 32, 50257, 64)), folder / "gpt2")
    save_pretrained(GPT2(GPT2Config(2, 2, 16, 64, 257, 64)), folder / "bytes")
    two_turns = dialogue("Hi", "Hello.") + dialogue("Bye", "Bye.")
    for subset in SUBSETS:
        odd = [{"chosen": two_turns, "rejected": two_turns + "!"}] * 3 + [
            {"chosen": dialogue("Why?", "So."), "rejected": dialogue("Why not?", "So.")},
            {"chosen": dialogue("Why?", "So."), "rejected": dialogue("Why?", "So.")}]
        write_rows(folder / "hh" / subset / "train.jsonl.gz", rows(ROWS, rng) + odd)
        write_rows(folder / "hh" / subset / "test.jsonl.gz", rows(TESTS, rng))
    write_rows(folder / "pairs.jsonl", rows(40, rng))
    return folder


def argv(world: Path, out: str | Path, **options) -> list[str]:
    """Arguments of a short run on the world's files."""
    options = {"model": world / "gpt2", "hh_dir": world / "hh", "subsets": ",".join(SUBSETS),
               "out": world / out, "dtype": "float32", "max_tokens": 32, "max_prompt_tokens": 20,
               "val_share": 0.25, "batch_pairs": 8, "log_every": 1, "sft_lr": 3e-3, "lr": 3e-3,
               "vals_per_epoch": 1, "patience": 99} | options
    return [word for name, value in options.items() for word in
            ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def lines_of(out: Path, *without: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in without} for line in lines]


def of(lines: list[dict], stage: str, kind: str) -> list[dict]:
    return [line for line in lines if (line["stage"], line["kind"]) == (stage, kind)]


def tokens_of(world: Path, part: str) -> list[data.TokenPair]:
    """The pairs of a part as the runs of `argv` have them."""
    found = [[pair for subset in SUBSETS for pair in
              data.read_pairs(world / "hh" / subset / f"{name}.jsonl.gz")[0]]
             for name in ("train", "test")]
    parts = data.split(*found, 0.25)[0]
    return data.tokenize(parts[part], tiktoken.get_encoding("gpt2"), 32, 20)[0]


# Options and files: what a user can mend.

def refused(words: list[str], capfd) -> str:
    """The one line on stderr of a run that ends with exit code 2."""
    capfd.readouterr()
    try:
        code = train.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    error = capfd.readouterr().err
    assert code == 2 and error.startswith("error"), (code, error)
    assert error.endswith("\n") and error.count("\n") == 1 and "Traceback" not in error, error
    return error


@pytest.mark.parametrize(("options", "named"), [
    ({"learning_rate": 1}, "--learning_rate"),
    ({"epoch": 1}, "--epoch"),  # no abbreviation: it might come to mean another option
    ({"batch_pairs": "two"}, "--batch_pairs"),
    ({"epochs": 1.5}, "--epochs"),
    ({"batch_pairs": 0}, "--batch_pairs"),
    ({"lr": -1e-4}, "--lr"),
    ({"max_norm": "nan"}, "--max_norm"),
    ({"sft_lr": "inf"}, "--sft_lr"),
    ({"val_share": 0.5}, "--val_share"),
    ({"beta": 0}, "beta"),
    ({"adapter": "lora"}, "--adapter"),
    ({"loss": "kto"}, "--loss"),
    ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
    ({"max_tokens": 33}, "--max_tokens"),  # the context holds 32
    ({"max_prompt_tokens": 32}, "max_prompt_tokens"),
    ({"model": "nowhere"}, "nowhere"),
    ({"pairs": "nowhere.jsonl"}, "nowhere.jsonl"),
    ({"val_share": 1e-9}, "val"),
    ({"adapter_width": 65}, "--adapter_width"),  # the MLPs have 64 neurons, in 2 layers
    ({"adapter_layers": 3}, "--adapter_layers"),
    ({"adapter_init": "pretrained"}, "--adapter_init"),  # of a replacing MLP alone
], ids=str)
def test_a_wrong_option_is_one_line_that_names_it_and_leaves_nothing(options, named, world, capfd):
    """Exit code 2, one line on stderr from the word error on, and no folder for a run."""
    assert named in refused(argv(world, "refused", **options), capfd)
    assert not (world / "refused").exists()


def test_a_file_that_is_no_checkpoint_is_one_line_that_names_it(world, tmp_path, capfd):
    """Noise, a pickle's beginning, and the tensors of another model: the file is named."""
    config = (world / "gpt2" / "config.json").read_bytes()
    for name in ("model.safetensors", "pytorch_model.bin"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes(config)
        (folder / name).write_bytes(b"\x80\x04" + random.Random(1).randbytes(500))
        assert name in refused(argv(world, "refused", model=folder), capfd)
    save_file({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "config.json").write_bytes(config)
    found = refused(argv(world, "refused", model=tmp_path / "other.safetensors"), capfd)
    assert "other.safetensors" in found
    assert not (world / "refused").exists()


def test_a_damaged_line_of_data_is_named_by_file_and_number(world, tmp_path, capfd):
    """The second line has no rejected answer."""
    path = write_rows(tmp_path / "own.jsonl", [*rows(1, random.Random(1)), {"chosen": "yes"}])
    found = refused(argv(world, "refused", pairs=path), capfd)
    assert str(path) in found and "line 2" in found and "rejected" in found


def test_resuming_in_a_folder_that_is_no_run_is_one_line(world, tmp_path, capfd):
    """A model's folder has a config.json too; it is named, and nothing is written into it."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    found = refused(argv(world, tmp_path, resume=True), capfd)
    assert str(tmp_path) in found
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_machine_without_git_trains_too(world, tmp_path, monkeypatch):
    """What git's absence says stands where the commit would."""
    monkeypatch.setenv("PATH", str(tmp_path))
    train.Run(train.parse(argv(world, "no_git"))).open({})
    versions = json.loads((world / "no_git" / "config.json").read_text())["versions"]
    assert "git" in versions["commit"] and "not found" in versions["commit"]


def test_a_run_that_diverges_ends_with_one_line_that_names_the_last_good_checkpoint(world, capfd):
    """A rate of 1e30: after one update no gradient is finite."""
    out = world / "diverged"
    found = refused(argv(world, "diverged", sft_lr=1e30, warmup_share=0, sft_epochs=3,
                         batch_pairs=4, log_every=10, vals_per_epoch=1), capfd)
    assert "finite" in found and str(out / "sft") in found
    model = GPT2.from_pretrained(out / "sft")
    assert all(p.isfinite().all() for p in model.parameters())


# Whole runs.

RUNS = {
    "parallel": {},
    "none": {"adapter": "none", "lr": 1e-3, "micro_pairs": 3},
    "replace": {"adapter": "replace", "adapter_width": 20, "adapter_layers": 1},
    "pretrained": {"adapter": "replace", "adapter_width": 32, "adapter_init": "pretrained",
                   "sft_epochs": 0},
    "overfit": {"lr": 0.05, "epochs": 12, "patience": 3, "log_every": 5, "beta": 1.0},
}


@pytest.fixture(scope="module", params=RUNS)
def a_run(request, world) -> tuple[str, Path, list[dict]]:
    """Name, folder and metrics of a whole run."""
    assert train.main(argv(world, request.param, **RUNS[request.param])) == 0
    return request.param, world / request.param, lines_of(world / request.param)


def test_a_run_leaves_what_it_promises(a_run):
    """The files, whole ones only; and every number of the audit is that of the rows written."""
    name, out, _ = a_run
    left = {path.name for path in out.iterdir()}
    assert left == {"config.json", "metrics.jsonl", "best", "last.pt"} | (
        {"sft"} if name != "pretrained" else set())
    assert {path.name for path in (out / "best").iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((out / "config.json").read_text())
    assert config["options"]["out"] == str(out) and set(config["options"]) == {
        f.name for f in train.fields(train.Config)}
    assert config["versions"]["torch"] == torch.__version__
    assert config["versions"]["python"] == sys.version
    audit = config["audit"]
    files = {key: audit[key] for key in audit if key.endswith(".gz")}
    assert len(files) == 4
    for key, counts in files.items():
        assert counts == ({"rows": TESTS, "kept": TESTS} if "test" in Path(key).name else {
            "rows": ROWS + 5, "kept": ROWS, "not one turn": 3, "prompts differ": 1,
            "equal answers": 1})
    assert audit["test"]["kept"] == 2 * TESTS
    assert audit["train"]["kept"] + audit["val"]["kept"] == 2 * ROWS


def test_the_metrics_have_the_names_of_the_field(a_run):
    """Each line says kind, stage, step; DPO's the means that others log under the same names."""
    name, _, lines = a_run
    dpo_names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins",
                 "rewards/accuracies", "logps/chosen", "logps/rejected", "chosen_below_reference"}
    update = {"grad_norm", "lr", "skipped", *CLOCK}
    where = {"kind", "stage", "step"}
    for stage, means in (("sft", {"loss"}), ("dpo", dpo_names)):
        if stage == "dpo" or name != "pretrained":
            assert of(lines, stage, "train") and of(lines, stage, "val")
            for line in of(lines, stage, "train"):
                assert set(line) == where | means | update
            for line in of(lines, stage, "val"):
                assert set(line) == where | means | {"best", "best_step"}
    (test,) = of(lines, "dpo", "test")
    assert set(test) >= where | dpo_names | {"pairs"} and test["pairs"] == 2 * TESTS
    assert lines[-1] == test and of(lines, "dpo", "val")[0]["step"] == 0
    for line in of(lines, "dpo", "val"):
        assert line["rewards/margins"] == pytest.approx(
            line["rewards/chosen"] - line["rewards/rejected"], abs=1e-6)


def test_before_the_first_update_the_policy_is_the_reference(a_run):
    """The first validation of DPO: ln 2 and no rewards."""
    first = of(a_run[2], "dpo", "val")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["step"] == 0
    assert [first["rewards/chosen"], first["rewards/rejected"]] == pytest.approx([0, 0], abs=1e-6)


def test_a_replaced_mlp_is_what_sft_trains(a_run, world):
    """The reference has the small MLP: of the other neurons of the upper block zeros are left."""
    name, out, _ = a_run
    if name == "replace":
        before, sft = (GPT2.from_pretrained(path) for path in (world / "gpt2", out / "sft"))
        columns = [model.h[1].mlp.c_proj.weight.abs().sum(0) for model in (before, sft)]
        assert [(column > 0).sum() for column in columns] == [before.config.n_inner, 20]


def test_the_folder_best_holds_the_weights_of_the_best_step(a_run, world):
    """Its validation loss, computed anew from the file, is the least of all that were logged."""
    name, out, lines = a_run
    values = of(lines, "dpo", "val")
    best = min(values, key=lambda line: line["loss"])
    assert (values[-1]["best"], values[-1]["best_step"]) == (best["loss"], best["step"])
    saved, options = torch.load(out / "last.pt"), json.loads((out / "config.json").read_text())
    batch = data.flatten(pairs := tokens_of(world, "val"), range(len(pairs)))
    objective = dpo.dpo_objective(saved["reference"]["val"], options["options"]["beta"])
    policy = train.Policy(GPT2.from_pretrained(out / "best"))
    found = dpo.means(dpo.val_step(policy, batch, objective))
    assert {key: best[key] for key in found} == pytest.approx(found, rel=1e-4, abs=1e-4)
    if name == "overfit":  # training went on after its best, and was stopped
        assert 0 < best["step"] < values[-1]["step"]
        assert [line["loss"] > best["loss"] for line in values[-4:]] == [False, True, True, True]


def test_the_reference_is_the_model_after_sft(a_run, world):
    """Its logps, kept beside the pairs, are those of sft/, or without SFT of the start."""
    name, out, _ = a_run
    start = GPT2.from_pretrained(world / "gpt2" if name == "pretrained" else out / "sft")
    if name == "pretrained":
        add_adapters(start, "replace", 32, "pretrained")
    policy = train.Policy(start)
    pairs = tokens_of(world, "test")
    with torch.no_grad():
        found = policy(data.flatten(pairs, range(len(pairs)))).view(2, -1).T
    torch.testing.assert_close(torch.load(out / "last.pt")["reference"]["test"], found,
                               rtol=1e-6, atol=1e-4)


def test_only_what_is_to_train_has_trained(a_run, world):
    """Parallel adapters leave all of the model after SFT as it was: best/ holds it bit for bit."""
    name, out, _ = a_run
    start = world / "gpt2" if name == "pretrained" else out / "sft"
    before = load_file(start / "model.safetensors")
    after = load_file(out / "best" / "model.safetensors")
    for key in before:
        if ".mlp." not in key:
            assert torch.equal(before[key], after[key]) == (name in ("parallel", "overfit")), key
    if name in ("parallel", "overfit"):  # the old neurons come first, the adapter's 64 after them
        assert torch.equal(before["h.1.mlp.c_fc.weight"], after["h.1.mlp.c_fc.weight"][:, :64])
        assert after["h.1.mlp.c_fc.weight"].shape == (16, 128)
        assert after["h.1.mlp.c_proj.weight"][64:].any()


def test_own_pairs_train_too(world, capfd):
    """--pairs FILE: train, val and test are shares of it, and no file of hh-rlhf is opened."""
    assert train.main(argv(world, "own", pairs=world / "pairs.jsonl", hh_dir="nowhere",
                           sft_epochs=0, batch_pairs=16)) == 0
    audit = json.loads((world / "own" / "config.json").read_text())["audit"]
    assert audit[str(world / "pairs.jsonl")] == {"rows": 40, "kept": 40}
    kept = [audit[part]["kept"] for part in ("train", "val", "test")]
    assert sum(kept) == 40 and min(kept) >= 2
    shown = capfd.readouterr().out
    assert f"{kept[0]:,} kept" in shown and "test accuracy" in shown


def test_transformers_loads_what_a_run_leaves(world):
    """And gives our logits: best/ has the adapters in its MLPs, so n_inner is 64 + 64."""
    transformers = pytest.importorskip("transformers")
    assert train.main(argv(world, "loaded", batch_pairs=16)) == 0
    tokens = torch.arange(20).view(2, 10)
    for folder, inner in (("sft", 64), ("best", 128)):
        theirs = transformers.GPT2LMHeadModel.from_pretrained(world / "loaded" / folder).eval()
        with torch.no_grad():
            found = theirs(tokens).logits
            ours = GPT2.from_pretrained(world / "loaded" / folder)(tokens)
            torch.testing.assert_close(ours, found, rtol=1e-5, atol=1e-5)
        assert theirs.config.n_inner == inner


def test_a_run_is_never_resumed_with_other_options_nor_overwritten(world, capfd):
    """Refused: without --resume, and with it if an option differs, which is named."""
    train.Run(train.parse(argv(world, "begun"))).open({})
    before = (world / "begun" / "config.json").read_bytes()
    found = refused(argv(world, "begun"), capfd)
    assert "begun" in found and "--resume" in found and "--out" in found
    found = refused(argv(world, "begun", resume=True, beta=0.25, seed=7), capfd)
    for words in ("--beta 0.1, not 0.25", "--seed 0, not 7"):
        assert words in found
    assert "--lr" not in found
    found = refused(argv(world, "begun", resume=True), capfd)  # it began with no pairs at all
    assert "other pairs" in found and "--beta" not in found
    assert (world / "begun" / "config.json").read_bytes() == before


def test_a_run_keeps_the_dtype_that_auto_was_where_it_began(world, monkeypatch):
    """Elsewhere auto may be another one, and the weights would no longer be those of one run."""
    for native, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {
            "avx512_bf16": native})
        words = argv(world, f"auto_{name}", dtype="auto")
        train.Run(train.parse(words)).open({})
        config = json.loads((world / f"auto_{name}" / "config.json").read_text())
        assert config["options"]["dtype"] == name
    with pytest.raises(ValueError, match="--dtype bfloat16, not float32"):
        train.Run(train.parse([*argv(world, "auto_bfloat16", dtype="auto"), "--resume"])).open({})


def test_a_model_of_another_vocabulary_is_refused(world, capfd):
    found = refused(argv(world, "refused", model=world / "bytes"), capfd)
    assert "257" in found and "50257" in found and not (world / "refused").exists()


# Processes: ended at any moment, and several at once.

SERVER = """
import gc, json, os, signal, sys
import tiktoken, torch, torch._dynamo, train
from pathlib import Path
# Bytes as tokens, as in the demo: GPT-2's vocabulary would take most of the time.
encoding = tiktoken.Encoding("bytes", pat_str=r"[\\s\\S]", special_tokens={"<|endoftext|>": 256},
                             mergeable_ranks={bytes([i]): i for i in range(256)})
tiktoken.get_encoding = lambda name: encoding
torch.set_num_threads(1)
with torch.device("meta"):  # what torch imports at its first use, imported once for all
    train.GPT2(train.GPT2Config(1, 1, 4, 4, 4, 4))
weight = torch.nn.Parameter(torch.ones(1))
weight.grad = torch.ones(1)
torch.optim.AdamW([weight], fused=True).step()
gc.freeze()
print(0, flush=True)

def sign_at(owner, name, count, number):
    # Send this process a signal just before call number `count` of owner.name.
    real, calls = getattr(owner, name), []
    def call(*args, **options):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return real(*args, **options)
    setattr(owner, name, call)

def child(log, argv, env, at):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(env)
    if at:
        sign_at(train.dpo if at[0] == "train_step" else Path, *at)
    code = train.main(argv)
    sys.stdout.flush()
    os._exit(code)  # without the second that Python takes to put everything away

for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        child(**job)
"""


class Jobs:
    """Begins runs in processes of their own, and waits for them."""
    def __init__(self):
        folder = Path(__file__).resolve().parent.parent
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=folder, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert self.server.stdout.readline() == "0\n"  # it is ready

    def ask(self, job: dict) -> int:
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def begin(self, words: list[str], env: dict | None = None, at: tuple = ()) -> int:
        """Its process id. `at`: (function, n, signal), sent to itself before the n-th call."""
        log = words[words.index("--out") + 1] + ".log"
        return self.ask({"log": log, "argv": words, "env": env or {}, "at": at})

    def wait(self, process: int) -> int:
        """The exit code of the process; minus the signal's number where it was killed."""
        return self.ask({"wait": process})

    def run(self, words: list[str], at: tuple = ()) -> int:
        return self.wait(self.begin(words, at=at))

    def together(self, words: list[str], at: tuple = ((), ())) -> list[int]:
        """The exit codes of two processes that share a run, as torchrun begins them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        begun = [self.begin(words, env | {"RANK": rank, "LOCAL_RANK": rank}, at[int(rank)])
                 for rank in "01"]
        return [self.wait(process) for process in begun]


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    jobs.server.stdin.close()
    jobs.server.wait()


# Saves, validations and lines come at different updates: each may be the last before a stop.
SHORT = {"adapter_width": 8, "max_tokens": 64, "max_prompt_tokens": 42, "epochs": 2, "log_every": 3}
STOPPED = SHORT | {"batch_pairs": 4, "save_every": 4, "epochs": 6}


@pytest.fixture(scope="module")
def undisturbed(world, jobs) -> Path:
    """A run to compare with."""
    assert jobs.run(argv(world, "undisturbed", model=world / "bytes", **STOPPED)) == 0
    return world / "undisturbed"


def assert_same(out: Path, other: Path) -> None:
    """Bit-identical, but for the clock."""
    assert lines_of(out, *CLOCK) == lines_of(other, *CLOCK)
    assert_same_weights(out, other)


def assert_near(lines: list[dict], others: list[dict], rel: float) -> None:
    """The same lines, with numbers that differ by rounding."""
    for one, two in zip(lines, others, strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            near = value if isinstance(value, str) else pytest.approx(value, rel=rel, abs=rel / 10)
            assert two[key] == near, (key, one, two)


def assert_same_weights(out: Path, other: Path) -> None:
    """Bit-identical: of SFT, of the best step, of the last step with its optimizer."""
    for folder in ("sft", "best"):
        file = Path(folder, "model.safetensors")
        assert (out / file).read_bytes() == (other / file).read_bytes(), file
    one, two = (torch.load(folder / "last.pt") for folder in (out, other))
    assert one["model"].keys() == two["model"].keys() and one["model"]
    assert all(torch.equal(one["model"][key], two["model"][key]) for key in one["model"])
    assert one["optimizer"]["state"].keys() == two["optimizer"]["state"].keys()
    for key, state in one["optimizer"]["state"].items():
        assert all(torch.equal(state[name], two["optimizer"]["state"][key][name]) for name in state)


def log_of(out: Path) -> str:
    return log.read_text() if (log := Path(f"{out}.log")).exists() else ""


def progress(out: Path) -> int:
    """Lines that tell of updates or validations."""
    return sum(line.startswith(("step", "val")) for line in log_of(out).splitlines())


@pytest.mark.parametrize("moments", [
    # before the n-th rename of a file to its final name, or update: mid-save, between two saves
    [("replace", 4), ("replace", 7), ("train_step", 8), ("replace", 6), ("train_step", 6)],
    [3, 4, 3],  # up to a few updates after as many lines of progress
], ids=["at the worst moments", "at random moments"])
def test_a_killed_and_resumed_run_ends_as_if_it_had_not_been(moments, undisturbed, world, jobs):
    """SIGKILL, several times over; --resume each time; the same bits and the same metrics."""
    name, dice = f"killed_{type(moments[0]).__name__}", random.Random(8)
    words = argv(world, name, resume=True, model=world / "bytes", **STOPPED)
    for moment in moments:
        if isinstance(moment, tuple):
            code = jobs.run(words, (*moment, signal.SIGKILL))
        else:
            before, process = progress(world / name), jobs.begin(words)
            end = time.monotonic() + 60
            while progress(world / name) < before + moment:
                assert time.monotonic() < end, log_of(world / name)
                time.sleep(0.002)
            time.sleep(dice.uniform(0, 0.03))
            os.kill(process, signal.SIGKILL)
            code = jobs.wait(process)
        assert code == -signal.SIGKILL, log_of(world / name)
    assert jobs.run(words) == 0, log_of(world / name)
    assert_same(world / name, undisturbed)


def test_ctrl_c_is_a_kill_with_a_word_on_how_to_go_on(undisturbed, world, jobs):
    """Exit code 130; what is on disk is whole at any moment, so the resumed run ends the same."""
    words = argv(world, "stopped", resume=True, model=world / "bytes", **STOPPED)
    for update, number, code in ((8, signal.SIGINT, 130), (7, signal.SIGTERM, -15)):
        assert jobs.run(words, ("train_step", update, number)) == code, log_of(world / "stopped")
    assert log_of(world / "stopped").count("--resume goes on") == 1
    assert jobs.run(words) == 0 and "Traceback" not in log_of(world / "stopped")
    assert_same(world / "stopped", undisturbed)


# Six pairs a batch, so that the last of an epoch has one: the second process has none of it.
SHARED = SHORT | {"batch_pairs": 6, "micro_pairs": 2, "save_every": 2}


@pytest.fixture(scope="module")
def shared(world, jobs) -> Path:
    words = argv(world, "shared", model=world / "bytes", **SHARED)
    assert jobs.together(words) == [0, 0], log_of(world / "shared")
    return world / "shared"


def test_two_processes_train_as_one_does(shared, world, jobs):
    """The same total batch: losses, metrics and weights, also where a process has no pair."""
    assert len(tokens_of(world, "train")) % SHARED["batch_pairs"] == 1
    options = SHARED | {"micro_pairs": 32}
    assert jobs.run(argv(world, "alone", model=world / "bytes", **options)) == 0
    assert_near(lines_of(world / "alone", *CLOCK), lines_of(shared, *CLOCK), 1e-5)
    for folder in ("sft", "best"):
        one, two = (load_file(out / folder / "model.safetensors")
                    for out in (world / "alone", shared))
        whole = torch.cat([p.flatten() for p in one.values()])
        off = torch.cat([(one[key] - two[key]).flatten() for key in one])
        assert off.norm() <= 1e-5 * whole.norm(), folder
        for key in one:  # biases, too, that began at 0: all of them is updates
            assert (one[key] - two[key]).norm() <= 1e-4 * one[key].norm(), (folder, key)


def test_two_processes_go_on_as_if_they_had_not_been_killed(shared, world, jobs):
    """Stopped between two lines: what each had summed up for the next line isn't counted twice."""
    words = argv(world, "again", resume=True, model=world / "bytes", **SHARED)
    at = ("train_step", 5, signal.SIGKILL)
    assert jobs.together(words, (at, at)) == [-9, -9]
    assert jobs.together(words) == [0, 0], log_of(world / "again")
    assert_near(lines_of(shared, *CLOCK), lines_of(world / "again", *CLOCK), 1e-9)
    assert_same_weights(world / "again", shared)


# The demo's world, and Policy.

def test_the_demo_draws_its_pairs_by_the_rule():
    """Preferred answers obey in 1 / (1 + exp(-4)) = 98.2% of the pairs."""
    pairs = data.demo_pairs(20_000, 3)
    assert data.demo_pairs(20_000, 3) == pairs != data.demo_pairs(20_000, 4)
    assert sum("!" in pair.chosen for pair in pairs) / 20_000 == pytest.approx(0.982, abs=0.004)
    for pair in pairs:
        assert pair.chosen[:2] == pair.rejected[:2]
        assert {pair.chosen[2:], pair.rejected[2:]} == {"!", "."}
        assert pair.prompt.startswith(data.HUMAN) and pair.prompt.endswith(data.ASSISTANT)


@pytest.mark.parametrize(("answer", "formed"), [
    (" 7!<|endoftext|>", True), (" 0.<|endoftext|>", True), (" 7!", False),
    (" 77!<|endoftext|>", False), ("7!<|endoftext|>", False), (" 7!<|endoftext|>\n", False),
    (" 7!!<|endoftext|>", False), (" 7?<|endoftext|>", False), ("<|endoftext|>", False),
    ("", False)])
def test_a_well_formed_answer_of_the_demo_is_a_digit_and_a_mark(answer, formed):
    assert bool(train.WELL_FORMED.fullmatch(answer)) == formed


@pytest.mark.parametrize("sides", [("chosen", "rejected"), ("chosen",)])
def test_the_policy_equals_plain_rows(world, sides):
    """Each response alone behind its prompt, float64: the same logp, summed over its tokens."""
    model, pairs = GPT2.from_pretrained(world / "gpt2").double(), tokens_of(world, "train")[:5]
    found = train.Policy(model)(data.flatten(pairs, range(5), sides))
    expected = []
    for side in sides:
        for pair in pairs:
            prompt, response = pair.prompt.tolist(), getattr(pair, side).tolist()
            logp = model(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1].log_softmax(-1)
            expected.append(sum(row[token] for row, token in zip(logp, response, strict=True)))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-9)
