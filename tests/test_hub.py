"""`python train.py` in an empty folder, against a server that plays the Hugging Face hub.

The files are those of a tiny model and of made-up pairs, under the names of the real ones. So the
hashes that data.py knows are left out here: tests/test_download.py shows that they are checked.
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch
import transformers
from test_download import COMMIT, HH_COMMIT, World

import data
from model import GPT2, GPT2Config, save_pretrained

ROOT = Path(data.__file__).parent
TRAIN = "import sys, data; data.SHA256.clear(); import train; sys.exit(train.main())"


def tiny_hub(source: Path) -> World:
    """A hub with all that a run without options asks for; in the folder, its model."""
    hub = World()
    torch.manual_seed(0)
    save_pretrained(GPT2(GPT2Config(1, 2, 8, 512, 50257, 64)), source)
    at = f"/openai-community/gpt2/resolve/{COMMIT}"
    hub.small[f"{at}/config.json"] = (source / "config.json").read_bytes()
    hub.large[f"{at}/model.safetensors"] = (source / "model.safetensors").read_bytes()
    hub.small[f"{at}/vocab.json"] = (conftest.vocabulary() / "encoder.json").read_bytes()
    hub.small[f"{at}/merges.txt"] = (conftest.vocabulary() / "vocab.bpe").read_bytes()
    tokenizer = transformers.GPT2Tokenizer(str(conftest.vocabulary() / "encoder.json"),
                                           str(conftest.vocabulary() / "vocab.bpe"))
    tokenizer.save_pretrained(source)
    hub.small[f"{at}/tokenizer.json"] = (source / "tokenizer.json").read_bytes()

    for number, subset in enumerate(data.SUBSETS):
        for split, count in (("train", 12), ("test", 3)):
            lines = []
            for i in range(count):
                question = f"\n\nHuman: {number} {split} {i}?\n\nAssistant:"
                row = {"chosen": f"{question} Yes, gladly.", "rejected": f"{question} No."}
                lines.append(json.dumps(row))
            name = f"/datasets/Anthropic/hh-rlhf/resolve/{HH_COMMIT}/{subset}/{split}.jsonl.gz"
            hub.large[name] = gzip.compress("\n".join(lines).encode())
    return hub


@pytest.fixture
def hub(tmp_path):
    hub = tiny_hub(tmp_path / "source")
    yield hub
    hub.close()


def begin(hub, folder: Path, *words: str) -> subprocess.Popen:
    environment = os.environ | {"HF_ENDPOINT": hub.hub, "NO_PROXY": "*", "PYTHONPATH": str(ROOT),
                                "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", TRAIN, *words], cwd=folder, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_run_from_nothing_through_every_mishap(hub, tmp_path):
    """Told to wait; a transfer that breaks; a kill in DPO; and a second call that goes on."""
    folder = tmp_path / "empty"
    folder.mkdir()
    hub.hub_faults.append((429, {"RateLimit": '"resolvers";r=0;t=1'}))
    hub.drops.append(100_000)
    first = begin(hub, folder)
    screen = ""
    for line in first.stdout:
        screen += line
        if line.startswith("train  dpo"):
            first.send_signal(signal.SIGKILL)
            break
    screen += first.stdout.read()
    assert first.wait() == -signal.SIGKILL, screen
    assert "the answer was 429 Too Many Requests; again in 1 s" in screen
    assert re.search(r"IncompleteRead\(100000 bytes read.*; again in 1 s", screen)
    assert hub.ranges_asked()[1] == "bytes=98304-"     # it goes on after the last whole chunk
    asked = len(hub.hub_asked)

    second = begin(hub, folder, "--resume")
    screen, _ = second.communicate()
    assert second.returncode == 0, screen
    assert len(hub.hub_asked) == asked                 # all files were there
    assert "result out/best | test accuracy" in screen
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    steps = [(line["stage"], line["step"]) for line in map(json.loads, lines)
             if line["event"] == "train"]
    assert steps == sorted(set(steps), key=lambda step: (step[0] == "dpo", step[1]))

    best = folder / "out" / "best"
    expected = {*data.TOKENIZER_FILES, "tokenizer_config.json", "config.json", "model.safetensors"}
    assert set(os.listdir(best)) == set(os.listdir(folder / "out" / "sft")) == expected
    chat = [{"role": "user", "content": "Yes?"}]
    answer = transformers.pipeline("text-generation", model=str(best))(chat, max_new_tokens=3)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    assert answer[0]["generated_text"][-1]["content"]
