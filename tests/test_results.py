"""Claims about what is measured: the pool, its folds, the tables; and about the polite pairs."""

import csv
import gzip
import json
import math
from pathlib import Path

import bugs
import frontier
import polite
import probe
import pytest
import torch

import data
import results
import train


def dialogue(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def row(question: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": dialogue(question, chosen), "rejected": dialogue(question, rejected)}


@pytest.fixture
def hh(tmp_path):
    """Pairs of three questions in train, one in test; "Why?" also opens a longer dialogue."""

    longer = dialogue("Why?", "So.") + dialogue("But why?", "")
    files = {
        "harmless-base/train": [row("Why?", "So.", "No."), row("How?", "Well.", "Badly."),
                                {"chosen": longer + "Good.", "rejected": longer + "Bad."}],
        "helpful-online/test": [row("Why?", "Hm.", "Eh."), row("When?", "Now.", "Never.")],
    }
    for name, rows in files.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.parent.mkdir()
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return tmp_path


def test_a_question_that_opens_a_longer_dialogue_leaves_the_pool(hh, capsys):
    """From train and test files alike, and counted."""
    pool = results.clean_pool(hh)
    assert [pair.prompt for pair in pool["harmless"]] == ["\n\nHuman: How?\n\nAssistant:"]
    assert [pair.prompt for pair in pool["helpful"]] == ["\n\nHuman: When?\n\nAssistant:"]
    assert "4 pairs, 2 left out" in capsys.readouterr().out


def test_each_pair_is_tested_in_one_fold_by_its_prompt_and_trained_on_in_the_others(tmp_path):
    pool = {"harmless": [], "helpful": []}
    for i in range(60):
        kind = "harmless" if i % 3 else "helpful"
        pool[kind].append(data.Pair(f"\n\nHuman: {i // 2}\n\nAssistant:", f" {i}", " no"))
    tested = []
    for fold in range(results.FOLDS):
        folder = tmp_path / str(fold)
        results.write_fold(pool, fold, folder)
        test, kinds = results.pairs_of_fold(folder, "test")
        trained, _ = results.pairs_of_fold(folder, "train")
        assert sorted(test + trained) == sorted(pool["harmless"] + pool["helpful"])
        assert not {pair.prompt for pair in test} & {pair.prompt for pair in trained}
        assert [kind == "h" for kind in kinds] == [pair in pool["harmless"] for pair in test]
        tested += test
    assert sorted(tested) == sorted(pool["harmless"] + pool["helpful"])


def test_a_fold_is_no_part_of_a_validation_split():
    """Both come of a hash of the prompt; were it the same hash, each validation set would be of one
    fold."""
    pairs = [data.Pair(f"\n\nHuman: {i}\n\nAssistant:", " a", " b") for i in range(400)]
    splits, _ = data.split(pairs, [], 0.1, 0.1)
    folds = {results.fold_of(pair) for pair in splits["val"]}
    assert folds == set(range(results.FOLDS))


def test_scores_and_differences_of_worked_rows():
    """Three pairs won, one tied, one lost: 0.7. Against a baseline that wins the last alone."""
    assert results.scores_of([3.0, 0.1, 2.0, 0.0, -1.0]) == "22210"
    assert results.mean_score("22210") == pytest.approx(0.7)
    assert results.where("22210", "hh--h", "h") == "220"
    # Differences 1, 1, 1, 0.5, -1: mean 0.5, deviation 0.866, 1.96 * 0.866 / sqrt(5) = 0.759.
    assert results.difference("22210", "00002") == "+0.500 +- 0.759"


def test_the_loss_of_worked_margins_with_its_interval():
    """Margins of 10 and -20 nats, beta 0.1: -log sigmoid(1) = 0.3133 and -log sigmoid(-2) = 2.1269.
    Their deviation is 1.2824, and 1.96 * 1.2824 / sqrt(2) = 1.7773."""
    loss, error = results.loss_and_error(torch.tensor([10.0, -20.0]), beta=0.1)
    assert loss == pytest.approx((0.3133 + 2.1269) / 2, abs=1e-4)
    assert error == pytest.approx(1.7773, abs=1e-3)


def test_polite_answers_of_the_test_are_no_answers_of_the_training():
    """A thousand prompts; the polite answer is chosen; and length tells nothing."""
    rows = polite.polite_pairs()
    assert len({row["prompt"] for row in rows}) == len(rows) == 1000
    options = train.Config()
    pairs = [data.Pair(data.as_dialogue(row["prompt"]), row["chosen"], row["rejected"])
             for row in rows]
    splits, _ = data.split(pairs, [], options.val_share, options.test_share)
    assert 150 < len(splits["test"]) < 250
    sentences = {"train": (polite.POLITE, polite.RUDE), "val": (polite.POLITE, polite.RUDE),
                 "test": (polite.POLITE_TEST, polite.RUDE_TEST)}
    for name, (kind_ones, rude_ones) in sentences.items():
        for pair in splits[name]:
            assert sum(sentence in pair.chosen for sentence in kind_ones) >= 1
            assert sum(sentence in pair.rejected for sentence in rude_ones) >= 1
    assert not set(polite.POLITE) & set(polite.POLITE_TEST)
    assert not set(polite.RUDE) & set(polite.RUDE_TEST)
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in splits["test"])
    assert 0.4 < longer / len(splits["test"]) < 0.6


def test_the_optimum_of_the_frontier():
    """A reference that gives half of its answers a reward of 4; beta such that exp(4 / beta) is 3:
    odds of 3 to 1. KL: 0.75 log(0.75 / 0.5) + 0.25 log(0.25 / 0.5) = 0.1308."""
    kl, reward = frontier.optimum(0.5, 4 / math.log(3))
    assert kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert reward == pytest.approx(3.0)


def test_the_frontier_measures_a_run(monkeypatch, capsys):
    """A short demo, which stays close to its reference, and 40 answers."""
    real_pairs = data.demo_pairs
    monkeypatch.setattr(data, "demo_pairs", lambda count, seed: real_pairs(150, seed))
    point = frontier.measure(beta=8.0, count=40)
    assert point.beta == 8.0
    assert 0 < point.share < 1
    assert abs(point.kl) < 0.5
    assert point.kl_error > 0
    assert 0 < point.reward < 4


def test_the_tables_in_results_are_those_of_runs_csv():
    page = (Path(bugs.ROOT) / "results" / "README.md").read_text()
    for part in results.tables().split("\n\n"):
        assert part in page


def test_the_table_of_linear_models_in_results_is_that_of_probe_csv():
    page = (Path(bugs.ROOT) / "results" / "README.md").read_text()
    assert probe.table() in page
    lines = results.read_csv(probe.CSV)
    assert {(line["row"], line["fold"]) for line in lines} == {
        (row, str(fold)) for row in probe.ROWS for fold in range(results.FOLDS)}
    assert f"commit {lines[0]['commit']}" in page
    # What the best row's interval is on the 261 pairs of the test files.
    error = float(probe.table().split(probe.WORDS_BY_KIND)[1].split("+- ")[1].split(" ")[0])
    count = sum(len(line["margins"].split()) for line in lines if line["row"] == probe.HIDDEN)
    assert f"± {error * math.sqrt(count / 261):.3f} for the best row" in " ".join(page.split())


def test_a_linear_model_of_one_feature():
    """Three pairs say 1, one says -1. So sigmoid(w) is 3 / 4, and w is log 3. With weight decay
    c the derivative is -3/4 sigmoid(-w) + 1/4 sigmoid(w) + c w = 0, and w is smaller."""
    features = torch.tensor([[1.0], [1.0], [1.0], [-1.0]]).double()
    assert probe.fit(features, 0.0).item() == pytest.approx(math.log(3), abs=1e-5)
    w = probe.fit(features, 0.1).item()
    assert 0 < w < math.log(3)
    slope = -3 / 4 / (1 + math.exp(w)) + 1 / 4 / (1 + math.exp(-w)) + 0.1 * w
    assert slope == pytest.approx(0, abs=1e-6)


def test_the_linear_model_does_not_look_at_the_test():
    """Test pairs with features a hundred times as large have margins a hundred times as large."""
    torch.manual_seed(0)
    features = torch.randn(40, 3).double() + 0.3
    trained = torch.arange(40) < 30
    held_out = torch.arange(40) % 4 == 0
    decay, margins = probe.margins_of_fold(features, trained, held_out)
    larger = torch.where(trained[:, None], features, 100 * features)
    assert probe.margins_of_fold(larger, trained, held_out)[0] == decay
    torch.testing.assert_close(probe.margins_of_fold(larger, trained, held_out)[1], 100 * margins)


def test_the_words_of_the_test_are_not_counted():
    """The last pair is not trained on: "rare" stands in enough answers only with it."""
    answers = [("Good rare rare", "bad"), ("good rare", "Bad bad"), ("good", "bad")]
    pairs = [data.Pair("?", chosen, rejected) for chosen, rejected in [*answers, ("rare", "good")]]
    features = probe.word_features(pairs, [True, True, True, False])
    # Two words, each in 3 of 6 answers: "bad" and "good". Rejected answers hold only "bad".
    assert features.tolist() == [[-1.0, 1.0]] * 3 + [[0.0, -1.0]]
    assert probe.word_features(pairs, [True] * 4).shape == (4, 3)
    logs = [[math.log(4 / 2)], [math.log(3 / 3)], [math.log(2 / 2)], [math.log(2 / 2)]]
    torch.testing.assert_close(probe.length_features(pairs), torch.tensor(logs).double())


def test_the_main_table_has_the_folds_that_have_every_row():
    names = (*results.BASELINES, *results.ROWS)
    lines = [{"row": name, "fold": fold} for fold in "0123" for name in names]
    assert results.whole_folds(lines) == ["0", "1", "2", "3"]
    for number, line in enumerate(lines):
        without = lines[:number] + lines[number + 1:]
        assert results.whole_folds(without) == [fold for fold in "0123" if fold != line["fold"]]


def test_the_bug_collection_in_results_is_that_of_its_file():
    """Every bug has its row, and each was caught."""
    page = (Path(bugs.ROOT) / "results" / "README.md").read_text()
    assert bugs.table() in page
    with open(bugs.CSV, newline="") as file:
        rows = {row["bug"]: row for row in csv.DictReader(file)}
    assert set(rows) == {bug.name for bug in bugs.BUGS} | {"(none)"}
    assert all(rows[bug.name]["caught"] == "yes" for bug in bugs.BUGS)


def test_each_patch_finds_its_line(tmp_path):
    """In the code of today. A text that is gone is an error that names the bug."""
    bugs.copy_project(tmp_path)
    before = {name: (tmp_path / name).read_text() for name in ("dpo.py", "data.py", "model.py",
                                                               "train.py", "judge.py")}
    for bug in bugs.BUGS:
        bugs.apply(bug, tmp_path)
        changed = [name for name in before if (tmp_path / name).read_text() != before[name]]
        assert changed == sorted({name for name, _, _ in bug.patches}, key=list(before).index)
        for name in changed:
            (tmp_path / name).write_text(before[name])
    gone = bugs.BUGS[0]._replace(patches=[("dpo.py", "no such text", "")])
    with pytest.raises(ValueError, match=r"no shift: 'no such text' stands in dpo.py 0 times"):
        bugs.apply(gone, tmp_path)
