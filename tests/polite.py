"""Own pairs that are easy: polite against rude answers. python tests/polite.py polite.jsonl

Writes 1,000 pairs for train.py --pairs. The polite answer is always the chosen one. The answers of
the test come from other templates than those of the training, so what helps there is what polite
and rude answers have in common, not the templates themselves. Length tells next to nothing: the
polite answer is the longer one in every other pair.
"""

import argparse
import json
import random
from pathlib import Path

import conftest

import data
import train

ASKS = ("How do I {}?", "Can you tell me how to {}?", "Please help me {}.",
        "I want to {}. Any tips?", "What is the best way to {}?",
        "My friend would like to {}. What should we know?",
        "Explain to a child how to {}.", "Is it hard to {}?")
VERBS = ("bake", "buy", "sell", "clean", "repair", "draw", "carry", "find", "paint", "choose",
         "store", "wrap", "measure", "photograph", "borrow", "describe")
THINGS = ("an apple pie", "a wooden chair", "a bicycle", "old books", "a birthday present",
          "a small garden", "a winter coat", "a guitar", "some fresh bread", "a fish tank",
          "a big suitcase", "running shoes")

POLITE = (
    "Of course, I am glad to help you with that.",
    "Thank you for asking! Let us look at it together.",
    "What a nice idea. I would be happy to help.",
    "Certainly. Take your time, and tell me if you need more.",
    "Good question! Start slowly, and you will enjoy it. Please tell me how it goes, my friend.",
    "I am happy to help. First see what you have, then we go on step by step. You will do well!",
    "Sure! Many people like to do that.",
    "It is a pleasure to help you. Just begin with a small part, and be kind to yourself.",
    "With pleasure! I think you will do great.",
    "Thanks, I love this question. Please begin with something easy, and have fun with it.",
)
RUDE = (
    "What a stupid question.",
    "Go away, I don't care about that.",
    "Why do you bother me with this? Nobody likes you, and you will never learn it anyway.",
    "Are you too lazy to think? Do it yourself and leave me alone.",
    "Shut up. That is boring.",
    "I hate such questions. Only an idiot would ask me that, so stop wasting my time.",
    "You are hopeless. Don't even try it, because you will make a fool of yourself, as always.",
    "No. Ask somebody who cares.",
    "That is the dumbest thing I have heard today. Get lost, and don't come back here.",
    "Not my problem, you fool.",
)
POLITE_TEST = (
    "Gladly! Here is what I would do, and please ask me again at any time.",
    "Yes, I can help with that, thank you.",
    "You are welcome to ask. I hope that it goes well for you, and I am happy to tell you more.",
    "That sounds wonderful. Let me help you.",
    "Thank you, I would love to help you. Be patient, and you will do it well.",
)
RUDE_TEST = (
    "Stop asking me such stupid things and go away.",
    "I don't care, you idiot.",
    "Leave me alone. You are too dumb for that, and nobody wants to hear about it.",
    "How boring. Get lost.",
    "Do it yourself, you lazy fool. I hate it when people waste my time with this.",
)


def polite_pairs(count: int = 1000, seed: int = 0) -> list[dict[str, str]]:
    """Rows for train.py --pairs, each with another prompt."""
    rng = random.Random(seed)
    prompts = [ask.format(f"{verb} {thing}") for ask in ASKS for verb in VERBS for thing in THINGS]
    options = train.Config()
    encoding = data.encoding_of(demo=False)
    rows = []
    for prompt in rng.sample(prompts, count):
        # Where data.split will put it: the hash of the prompt decides.
        place = data.fraction_of(data.as_dialogue(prompt))
        is_test = options.val_share <= place < options.val_share + options.test_share
        polite_answers = POLITE_TEST if is_test else POLITE
        rude_answers = RUDE_TEST if is_test else RUDE
        polite_is_longer = len(rows) % 2 == 0
        couples = []
        for polite in polite_answers:
            for rude in rude_answers:
                longer = len(encoding.encode(f" {polite}")) - len(encoding.encode(f" {rude}"))
                if longer != 0 and (longer > 0) == polite_is_longer:
                    couples.append((polite, rude))
        polite, rude = rng.choice(couples)
        rows.append({"prompt": prompt, "chosen": polite, "rejected": rude})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("path", help="the file to write")
    args = parser.parse_args()
    conftest.offline_vocabulary()
    lines = [json.dumps(row) + "\n" for row in polite_pairs()]
    Path(args.path).write_text("".join(lines))


if __name__ == "__main__":
    main()
