"""Every command of the README runs as it stands, in a copy of the project.

The run that is judged is of own pairs. Servers on this machine play the Hugging Face hub and the
judge's server. Two things differ from a reader's call: the hub's files are tiny, so their hashes
are not the known ones; and the judge's server has a free port in place of its usual one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_hub
from test_download import World
from test_judge import Server, tiny_demo
from test_readme import ROOT, commands

SET_UP = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
DEMO = SET_UP + ".venv/bin/python train.py --demo"
NOT_HERE = {
    DEMO: ".ci/run runs it",
    SET_UP.replace("ments", "ments-dev") + ".venv/bin/python -m pytest -q -n 2": ".ci/run runs it",
    "python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 "
    "--index-url https://download.pytorch.org/whl/cpu": "needs the network",
    "!git clone https://... dpo": "needs the network",
    "!pip install -q tiktoken": "needs the network",
    SET_UP + ".venv/bin/python train.py": "tests/test_hub.py runs it",
    "!python train.py": "tests/test_hub.py runs it",
    "uv run train.py": "tests/test_hub.py runs it, not set up by uv",
    'transformers.pipeline("text-generation", model="out/best")': "tests/test_hub.py runs it",

}
# The others, in an order in which each finds what it needs; and what the screen then shows.
HERE = {
    '.venv/bin/python judge.py out/demo --ask "Name a lucky digit." --seed 3': "--- tuned: after",
    "python train.py --help": "examples:",
    "python train.py --pairs mine.jsonl": "result out/best | test accuracy",
    "python tests/curves.py out": "",
    'python judge.py out --ask "How do I bake bread?"': "--- untuned: ",
    "python judge.py out --blind": "95%",
    "python judge.py out": "report.md",
    "--url http://localhost:8080 --judge NAME": "report.md",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = test_hub.tiny_hub(tmp_path_factory.mktemp("hub"))
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def judges():
    """The servers that the README names, by the address that stands there, or by none."""
    servers = {"": Server("ollama"), "http://localhost:8080": Server("llama.cpp")}
    yield servers
    for server in servers.values():
        server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the project, with a .venv/bin/python, a demo's run, and pairs of one's own."""
    folder = tmp_path_factory.mktemp("copy")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    with open(folder / "data.py", "a") as file:
        file.write("SHA256.clear()\n")

    (folder / ".venv" / "bin").mkdir(parents=True)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)

    lines = []
    for i in range(30):
        line = {"prompt": f"Question {i}?", "chosen": "Yes, gladly.", "rejected": "No."}
        lines.append(json.dumps(line))
    (folder / "mine.jsonl").write_text("\n".join(lines))
    tiny_demo(folder / "out" / "demo")
    return folder


def test_every_command_is_run_here_or_elsewhere():
    """And so are the two that are no command line alone."""
    readme = (ROOT / "README.md").read_text()
    on_one_line = " ".join(readme.split())
    for command in [*HERE, *NOT_HERE]:
        assert command in on_one_line, command
    found = {" ".join(command.split()) for command in commands()}
    missing = found - HERE.keys() - NOT_HERE.keys()
    assert missing == set()


def test_the_commands_run_as_they_stand(folder, hub, judges):
    """One test: what a command needs, an earlier one has left."""
    for command, shown in HERE.items():
        run_command(command, shown, folder, hub, judges)


def run_command(command: str, shown: str, folder: Path, hub: World, judges: dict) -> None:
    """Run it; it must end well, and its screen hold what is to be shown."""
    environment = os.environ | {"HF_ENDPOINT": hub.hub, "NO_PROXY": "*", "OMP_NUM_THREADS": "1",
                                "PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}"}
    line = command
    if line.startswith("--url"):
        line = "python judge.py out " + line
        line = line.replace("http://localhost:8080", judges["http://localhost:8080"].url)
    elif line == "python judge.py out":
        line += " --url " + judges[""].url
    done = subprocess.run(line, shell=True, cwd=folder, env=environment, input="a\nb\nq\n",
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert shown in done.stdout, done.stdout
    if "curves" in line:
        assert (folder / "out" / "curves.png").stat().st_size > 0
