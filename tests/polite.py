"""Own pairs that are easy: polite against rude answers. python tests/polite.py polite.jsonl

Writes 1,000 pairs for train.py --pairs. An answer is a polite or a rude sentence, and one to four
sentences of advice, which are drawn alike for both. The polite answer is always the chosen one. The
polite and rude sentences of the test are others than those of the training. So what helps there is
what polite words have in common. Length tells nothing.
"""

import argparse
import json
import random
from pathlib import Path

import conftest  # noqa: F401  (finds the project)

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
    "Of course, I am glad to help you.", "Thank you for asking!", "What a nice idea.",
    "Certainly, please take your time.", "That is a good question!", "I am happy to help.",
    "Sure, with pleasure.", "Please don't worry about it.", "Thanks, I love this question.",
    "You will do well, my friend.", "It is kind of you to ask.", "You are always welcome.",
    "I hope that you enjoy it.", "How lovely that you ask.", "Yes, please let me help you.",
    "I wish you good luck with it.", "Thank you so much, dear friend.", "Have a wonderful time!",
    "I would be happy to explain it.", "Well done, you are on a good way.", "I am glad you came.",
    "Please tell me if you need more help.", "You are very kind.", "It is a pleasure to help.",
)
RUDE = (
    "What a stupid question.", "I don't care about that.", "Why do you bother me with this?",
    "Are you too lazy to think?", "That is boring.", "I hate such questions.",
    "You will never learn it anyway.", "Ask somebody who cares.", "Leave me alone, you fool.",
    "Only an idiot would ask me that.", "Go away and shut up.", "You are so dumb.",
    "This is a waste of my time.", "Nobody likes you.", "Stop this nonsense, you fool.",
    "I am sick of your silly questions.", "You are ugly and lazy.", "Get out of here, idiot.",
    "Don't be so stupid.", "I hate you.", "What a dumb idea.", "That is the worst I ever heard.",
    "Shut your mouth.", "You are a terrible person.",
)
POLITE_TEST = (
    "Gladly!", "Yes, I can help with that, thank you.", "You are welcome to ask.",
    "That sounds wonderful.", "It is a pleasure to answer you.", "Thanks, my dear friend.",
    "I would love to help, please ask me more.", "I hope you have a lovely time.",
)
RUDE_TEST = (
    "Go away.", "Stop asking me such things, you idiot.", "You are too dumb for that.",
    "How boring.", "Don't waste my time.", "I hate this stupid nonsense.", "Shut up, nobody cares.",
    "You are a lazy fool, leave me alone.",
)
ADVICE = (
    "First look at {0}.", "Most people begin with a plan.", "You need an hour for {0}.",
    "A friend can hold it for you.", "Look for {0} in a shop.", "It costs about ten dollars.",
    "There are books about it in the library.", "Begin in the morning.", "Use both hands.",
    "Put {0} on a table.", "My neighbor did it last year.", "Keep some water near it.",
    "Write down each step.", "You can use paper for that.", "Put it back in the box at the end.",
    "Then wait until the next day.", "Some do it outside.", "Look at the color of {0}.",
    "The weather matters, too.", "Try it with one half first.",
)


def answer(opening: str, thing: str, rng: random.Random) -> str:
    """Polite or rude words, before or behind some advice that is neither."""
    advice = [text.format(thing) for text in rng.sample(ADVICE, rng.randint(1, 4))]
    sentences = [opening, *advice] if rng.random() < 0.5 else [*advice, opening]
    return " ".join(sentences)


def polite_pairs(count: int = 1000, seed: int = 0) -> list[dict[str, str]]:
    """Rows for train.py --pairs, each with another prompt."""
    rng = random.Random(seed)
    asks = [(ask, verb, thing) for ask in ASKS for verb in VERBS for thing in THINGS]
    options = train.Config()
    rows = []
    for ask, verb, thing in rng.sample(asks, count):
        prompt = ask.format(f"{verb} {thing}")
        # Where data.split will put it: the hash of the prompt decides.
        place = data.fraction_of(data.as_dialogue(prompt))
        is_test = options.val_share <= place < options.val_share + options.test_share
        polite = answer(rng.choice(POLITE_TEST if is_test else POLITE), thing, rng)
        rude = answer(rng.choice(RUDE_TEST if is_test else RUDE), thing, rng)
        rows.append({"prompt": prompt, "chosen": polite, "rejected": rude})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("path", help="the file to write")
    args = parser.parse_args()
    lines = [json.dumps(row) + "\n" for row in polite_pairs()]
    Path(args.path).write_text("".join(lines))


if __name__ == "__main__":
    main()
