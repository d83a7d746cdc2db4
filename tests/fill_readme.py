"""Fill in what the README shows of programs' output: python tests/fill_readme.py

Runs the demo and asks its models, and puts what they print between the README's marks. So no
number there is typed by hand.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUESTION = ("--ask", "Name a lucky digit.", "--seed", "3")


def output_of(*words: str) -> str:
    """What the command prints. A demo that misses its goal ends with 1."""
    print("+ python", *words, flush=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fill(text: str, mark: str, lines: list[str]) -> str:
    """The text, with these lines as a code block between <!-- mark --> and <!-- end -->."""
    block = "\n".join(f"    {line}".rstrip() for line in lines)
    pattern = rf"(<!-- {mark} -->\n).*?(\n<!-- end -->)"
    filled, count = re.subn(pattern, lambda match: f"{match[1]}{block}{match[2]}", text, flags=re.S)
    assert count == 1, f"{mark}: {count} marks, expected 1"
    return filled


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "demo"))
        demo = output_of("train.py", "--demo", "--out", out).splitlines()
        asked = output_of("judge.py", out, *QUESTION).strip().splitlines()
    path = ROOT / "README.md"
    text = path.read_text()
    text = fill(text, "demo", [line for line in demo if line.startswith(("answer", "demo"))])
    text = fill(text, "ask", asked)
    path.write_text(text)


if __name__ == "__main__":
    main()
