"""At home elsewhere: what a run leaves, in transformers; what pip and uv install."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import conftest
import pytest
import tiktoken
import torch
import transformers

import data
import train
from model import GPT2, GPT2Config, generate, save_pretrained

ROOT = Path(train.__file__).parent


@pytest.fixture
def config(tmp_path) -> train.Config:
    """The options of a run whose model has a vocabulary beside it, in the oldest of its forms."""
    source = tmp_path / "gpt2"
    torch.manual_seed(0)
    save_pretrained(GPT2(GPT2Config(2, 2, 16, 64, 50257, 64)), source)
    shutil.copy(conftest.vocabulary() / "encoder.json", source / "vocab.json")
    shutil.copy(conftest.vocabulary() / "vocab.bpe", source / "merges.txt")
    return train.Config(model=str(source), out=str(tmp_path / "out"))


@pytest.fixture
def best(config, tmp_path) -> Path:
    """The folder best of that run: its model, and its tokenizer."""
    folder = tmp_path / "best"
    save_pretrained(GPT2.from_pretrained(config.model), folder)
    train.save_tokenizer(config, folder)
    return folder


QUESTION = "What's <b>100 plus  7</b>?\nüñ 日本"


def test_a_chat_message_becomes_the_prompt_that_training_had(best):
    """To the id, with trailing spaces cut; and a dialogue of several turns as in hh-rlhf."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(best)
    chat = [{"role": "user", "content": f" {QUESTION}\n"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    encoding = tiktoken.get_encoding("gpt2")
    assert ids == encoding.encode_ordinary(data.as_dialogue(QUESTION))

    chat += [{"role": "assistant", "content": "107."}, {"role": "user", "content": "Sure?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == (f"\n\nHuman: {QUESTION}\n\nAssistant: 107.\n\nHuman: Sure?\n\nAssistant:")
    text = tokenizer.apply_chat_template(chat[:2], tokenize=False)
    assert text == f"\n\nHuman: {QUESTION}\n\nAssistant: 107."


def test_a_role_that_no_pair_has_is_refused_by_name(best):
    tokenizer = transformers.AutoTokenizer.from_pretrained(best)
    with pytest.raises(Exception, match="expected the roles user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be kind."}])


def test_the_tokenizer_ends_texts_with_gpt2_s_token(best):
    tokenizer = transformers.AutoTokenizer.from_pretrained(best)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 50256
    assert tokenizer.unk_token == "<|endoftext|>"      # and no token that GPT-2 doesn't have
    assert len(tokenizer) == 50257


def test_the_pipeline_of_transformers_answers_a_chat_message_as_we_do(best):
    """Greedily, the same ids as our own generation."""
    chat = [{"role": "user", "content": QUESTION}]
    answer = transformers.pipeline("text-generation", model=str(best))(
        chat, max_new_tokens=8, do_sample=False)
    encoding = tiktoken.get_encoding("gpt2")
    prompt = encoding.encode_ordinary(data.as_dialogue(QUESTION))
    (ours,) = generate(GPT2.from_pretrained(best), [prompt], 8, temperature=0)
    assert answer[0]["generated_text"][-1] == {"role": "assistant",
                                               "content": encoding.decode(ours)}


def test_of_a_source_without_a_vocabulary_only_the_settings_are_written(config, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        Path(config.model, name).unlink()
    (tmp_path / "best").mkdir()
    train.save_tokenizer(config, tmp_path / "best")
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["tokenizer_config.json"]


def test_the_vocabulary_of_the_hub_is_passed_on_and_the_settings_are_our_own(config, tmp_path):
    """Whether the model was given as a folder or as a file."""
    source = Path(config.model)
    for name in (*data.TOKENIZER_FILES, "tokenizer_config.json"):
        (source / name).write_text(f'"{name}"')
    for model in (source, source / "model.safetensors"):
        (tmp_path / "best").mkdir()
        train.save_tokenizer(train.Config(model=str(model)), tmp_path / "best")
        for name in data.TOKENIZER_FILES:
            assert (tmp_path / "best" / name).read_text() == f'"{name}"'
        settings = json.loads((tmp_path / "best" / "tokenizer_config.json").read_text())
        assert settings["chat_template"] == train.CHAT_TEMPLATE
        shutil.rmtree(tmp_path / "best")


def test_older_readers_find_the_context_by_its_older_name(best):
    config = json.loads((best / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 64


def test_pip_and_uv_install_the_same():
    """pyproject.toml against the two requirements files. uv makes no package of flat scripts, and
    installs what tests need only when it is asked to."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime = (ROOT / "requirements.txt").read_text().split()
    first, *development = (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert project["project"]["dependencies"] == runtime
    assert first == "-r requirements.txt"
    assert project["dependency-groups"]["dev"] == development
    assert project["tool"]["uv"] == {"package": False, "default-groups": []}


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited[1] == project["project"]["version"]
