"""Is it GPT-2? Loaded, adapted, merged, saved and generating, against `transformers`.

The weights are made here, in the layout of OpenAI's published files, and both libraries read them:
kernels as (in, out), no head, no prefix. Every bias and every LayerNorm differs from its default,
so that none can be forgotten unseen.
"""

import errno
import io
import itertools
import json
import math
import pickle
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import model as model_file
from dpo import dpo_loss
from model import (
    GPT2,
    MLP,
    GPT2Config,
    MLPWithAdapter,
    add_adapters,
    generate,
    generate_one,
    merge_adapters,
    save_pretrained,
    strongest_neurons,
)

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 61}
SIZES = {"gpt2": (12, 12), "gpt2-medium": (24, 16), "gpt2-large": (36, 20), "gpt2-xl": (48, 25)}
KERNELS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
PROMPTS = [[5, 17, 60, 2], [9], [33, 8, 8, 1, 40, 12, 7], [3, 3], [58, 21, 4]]


# Files in the published layout, and two libraries that read them.

def published(config: dict, seed: int = 3) -> dict[str, torch.Tensor]:
    """Random weights under OpenAI's names and shapes; logits spread over several nats."""
    width = config["n_embd"]
    inner = config.get("n_inner") or 4 * width
    shapes = {
        "wte.weight": (config["vocab_size"], width),
        "wpe.weight": (config["n_positions"], width),
    }
    for layer in range(config["n_layer"]):
        shapes |= {
            f"h.{layer}.ln_1.weight": (width,),
            f"h.{layer}.ln_1.bias": (width,),
            f"h.{layer}.ln_2.weight": (width,),
            f"h.{layer}.ln_2.bias": (width,),
            f"h.{layer}.attn.c_attn.weight": (width, 3 * width),
            f"h.{layer}.attn.c_attn.bias": (3 * width,),
            f"h.{layer}.attn.c_proj.weight": (width, width),
            f"h.{layer}.attn.c_proj.bias": (width,),
            f"h.{layer}.mlp.c_fc.weight": (width, inner),
            f"h.{layer}.mlp.c_fc.bias": (inner,),
            f"h.{layer}.mlp.c_proj.weight": (inner, width),
            f"h.{layer}.mlp.c_proj.bias": (width,),
        }
    shapes["ln_f.weight"] = (width,)
    shapes["ln_f.bias"] = (width,)

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(KERNELS):
            tensors[name] = noise / math.sqrt(shape[0])
        elif name in ("wte.weight", "wpe.weight"):
            tensors[name] = 0.02 * noise  # as small as GPT-2's: LayerNorm's epsilon counts
        elif name == "ln_f.weight":
            tensors[name] = 0.2 * noise + 40
        elif name.endswith("weight"):
            tensors[name] = 0.2 * noise + 1
        else:
            tensors[name] = 0.2 * noise
    return tensors


def write(folder: Path, tensors: dict, config: dict, file: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **config}
    (folder / "config.json").write_text(json.dumps(settings))
    if file.endswith("safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    return folder


def theirs_from(folder: Path, **options) -> transformers.GPT2LMHeadModel:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options)
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    return model.eval()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("small"), published(SMALL), SMALL)


@pytest.fixture
def ours(small) -> GPT2:
    return GPT2.from_pretrained(small)


@pytest.fixture(scope="module")
def theirs(small) -> transformers.GPT2LMHeadModel:
    return theirs_from(small)


def some_tokens(*shape: int, vocab: int = 61, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
    return (a.double() - b.double()).abs().max().item()


def tensors_of(model: GPT2) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# It is GPT-2.

@pytest.fixture(scope="module", params=SIZES)
def both(request, tmp_path_factory) -> tuple[GPT2, transformers.GPT2LMHeadModel]:
    """A size's layers and heads, each head 4 wide, read from one file by us and by them."""
    n_layer, n_head = SIZES[request.param]
    config = {**SMALL, "n_layer": n_layer, "n_head": n_head, "n_embd": 4 * n_head}
    folder = write(tmp_path_factory.mktemp(request.param), published(config), config)
    return GPT2.from_pretrained(folder), theirs_from(folder)


def test_logits_and_gradients_are_those_of_transformers(both):
    """Logits to 1e-4, each gradient of a DPO loss to 1e-4 of its norm."""
    ours, theirs = both
    tokens = some_tokens(4, 32)
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert far(ours(tokens), expected) < 1e-4
    assert expected.log_softmax(-1).std() > 1  # else 1e-4 would be easily met

    reference = responses_logp(expected, tokens) + torch.tensor([0.5, -1.0, 2.0, 0.25])
    for model in (ours, theirs):
        logits = ours(tokens) if model is ours else theirs(tokens).logits
        assert far(logits.log_softmax(-1), expected.log_softmax(-1)) < 1e-4
        policy = responses_logp(logits, tokens)
        loss, _, _ = dpo_loss(*policy.chunk(2), *reference.chunk(2), beta=0.3)
        loss.mean().backward()

    mine = {name: p.grad for name, p in ours.named_parameters()}
    other = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    assert mine.keys() == other.keys()
    for name in mine:
        expected = other[name].T if name.endswith(KERNELS) else other[name]
        assert (mine[name] - expected).norm() <= 1e-4 * expected.norm(), name


def responses_logp(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log pi of what follows the first 9 tokens of each row, (B,)."""
    logp = logits.log_softmax(-1)[:, :-1]
    return logp.gather(-1, tokens[:, 1:, None])[:, 8:, 0].sum(-1)


def greedy_of(theirs, prompt: list[int], max_tokens: int, end_token: int) -> list[int]:
    """The new ids of transformers' own greedy search."""
    output = theirs.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False,
                             attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                             eos_token_id=end_token, pad_token_id=0)
    return output[0, len(prompt):].tolist()


def test_greedy_text_of_each_size_is_that_of_transformers(both):
    ours, theirs = both
    answers = generate(ours, PROMPTS[:3], 8, temperature=0, end_token=60)
    assert answers == [greedy_of(theirs, prompt, 8, 60) for prompt in PROMPTS[:3]]
    assert len(set(map(tuple, answers))) > 1  # the prompt counts


def test_the_published_124M_file_loads_and_computes_the_same(tmp_path):
    """160 tensors, F32, no prefix, no head, 12 mask buffers: 124,439,808 parameters."""
    config = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257,
              "n_ctx": 1024, "resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1,
              "layer_norm_epsilon": 1e-05, "activation_function": "gelu_new"}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 1024, 1024).tril() for i in range(12)}
    tensors = published(config) | masks
    assert len(tensors) == 160
    write(tmp_path, tensors, config)
    del tensors, masks
    ours = GPT2.from_pretrained(tmp_path)
    assert ours.config == GPT2Config()
    assert sum(p.numel() for p in ours.parameters()) == 124_439_808
    tokens = some_tokens(1, 24, vocab=50257)
    with torch.no_grad():
        assert far(ours(tokens), theirs_from(tmp_path)(tokens).logits) < 1e-4


GPT2_124M = Path(__file__).parents[1] / "models" / "gpt2"


@pytest.mark.skipif(not (GPT2_124M / "model.safetensors").exists(),
                    reason="needs OpenAI's weights in models/gpt2: data.fetch_model('gpt2')")
def test_known_answers_of_openai_s_124M():
    """What GPT-2 124M is known to say; the second from the tests of `transformers`."""
    model = GPT2.from_pretrained(GPT2_124M)
    with torch.no_grad():
        logits = model(torch.tensor([[15496, 11, 314, 1101, 257, 3303, 2746, 11]]))[0, -1]
    values, ids = logits.topk(5)  # after "Hello, I'm a language model,"
    assert ids[0] == 407  # " not"
    expected = [-94.6874, -94.768, -95.112, -95.482, -95.506]
    assert values.tolist() == pytest.approx(expected, abs=1e-3)
    assert generate(model, [[464, 3290]], 18, temperature=0) == [  # "The dog"
        [373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198,
         464, 3290]]


def test_a_config_without_values_means_the_124M_model():
    assert (GPT2Config().n_inner, GPT2Config().layer_norm_epsilon) == (3072, 1e-5)


def test_new_weights_are_drawn_as_gpt2_s_were():
    """N(0, 0.02), c_proj's divided by the root of twice the layers: 8 layers give 0.005."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(8, 4, 64, 32, 500, 256))
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.h[3].attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.005, rel=0.03)
    assert not model.h[7].attn.c_proj.bias.any() and (model.ln_f.weight == 1).all()


def test_the_same_tokens_give_the_same_logits_in_training_mode(ours):
    """There is no dropout anywhere."""
    tokens = some_tokens(2, 9)
    assert torch.equal(ours.train()(tokens), ours.eval()(tokens))


def test_rows_beyond_the_context_are_an_error_with_both_numbers(ours):
    ours(some_tokens(1, 32))
    with pytest.raises(ValueError, match=r"33 .*32"):
        ours(some_tokens(1, 33))


def test_plain_attention_is_pytorchs():
    """Causal rows, and a row in which the last token sees itself alone."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64)
    attn_mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    attn_mask[1, :, 5, :5] = False
    found = model_file.plain_attention(q, k, v, attn_mask)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[1, :, 5], v[1, :, 5])
    causal = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(found[0], causal[0], rtol=1e-12, atol=1e-12)


# A packed batch.

def test_a_packed_row_computes_what_padded_rows_do(ours):
    """One prompt (5, 6) with the responses (7, 8, 9) and (10,), each token once, in a row with
    another text (11, 12). Logits and gradients are those of three rows."""
    padded = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 10, 0, 0], [11, 12, 0, 0, 0]])
    expected = ours(padded)[[0, 0, 0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 2, 0, 1]]

    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 2, 0, 1]])
    attn_mask = torch.ones(1, 8, 8, dtype=torch.bool).tril()
    attn_mask[0, 5, 2:5] = False                       # 10 does not see 7, 8, 9
    attn_mask[0, 6:, :6] = False                       # 11 and 12 see nothing before them
    logits = ours.logits(ours.hidden(tokens, positions, attn_mask))[0]
    assert far(logits, expected) < 1e-5

    gradient = gradient_of(ours, logits)
    expected_gradient = gradient_of(ours, expected)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def gradient_of(model: GPT2, logits: torch.Tensor) -> torch.Tensor:
    """All gradients, in one line, of a sum in which each logit has another weight."""
    weight = torch.linspace(-1, 2, logits.numel()).view_as(logits)
    gradients = torch.autograd.grad((logits * weight).sum(), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


# Loading.

def test_every_dtype_is_read_bit_for_bit_and_computed_in_the_one_asked_for(tmp_path):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        stored = {name: value.to(dtype) for name, value in published(SMALL).items()}
        write(tmp_path, stored, SMALL)
        model = GPT2.from_pretrained(tmp_path)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert torch.equal(model.wte.weight, stored["wte.weight"].float())
        assert torch.equal(model.h[1].mlp.c_fc.weight, stored["h.1.mlp.c_fc.weight"].T.float())
        asked = GPT2.from_pretrained(tmp_path, dtype=dtype)
        assert torch.equal(asked.h[0].attn.c_attn.bias, stored["h.0.attn.c_attn.bias"])


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("extras", ["none", "masks and head"])
def test_prefix_mask_buffers_and_a_tied_head_change_nothing(file, prefix, extras, ours, tmp_path):
    tensors = published(SMALL)
    if extras != "none":
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors = {prefix + name: value for name, value in tensors.items()}
    if extras != "none":
        tensors["lm_head.weight"] = tensors[prefix + "wte.weight"].clone()
    write(tmp_path, tensors, SMALL, file)
    assert same(tensors_of(GPT2.from_pretrained(tmp_path)), tensors_of(ours))
    assert same(tensors_of(GPT2.from_pretrained(tmp_path / file)), tensors_of(ours))


def test_a_head_of_its_own_is_refused(tmp_path):
    tensors = published(SMALL)
    tensors["lm_head.weight"] = tensors["wte.weight"] + 1e-3
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from wte\.weight"):
        GPT2.from_pretrained(write(tmp_path, tensors, SMALL))


def test_code_in_a_pickle_does_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (ran,)

    write(tmp_path, {**published(SMALL), "h.9.bomb": Bomb()}, SMALL, "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        GPT2.from_pretrained(tmp_path)
    assert not ran.exists()
    for broken in (b"", b"\x80", pickle.dumps(Bomb(), protocol=2), b"PK\x03\x04 no zip"):
        (tmp_path / "pytorch_model.bin").write_bytes(broken)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
            GPT2.from_pretrained(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("key, value", [
    ("activation_function", "relu"), ("activation_function", "gelu"), ("scale_attn_weights", False),
    ("scale_attn_by_inverse_layer_idx", True), ("reorder_and_upcast_attn", True),
    ("add_cross_attention", True), ("tie_word_embeddings", False), ("model_type", "gpt_neo"),
    ("n_layer", 0), ("n_layer", True), ("n_embd", "16"), ("n_embd", 16.0), ("n_head", 3),
    ("n_inner", -1), ("n_positions", None), ("vocab_size", 2**40), ("layer_norm_epsilon", 0.0),
    ("layer_norm_epsilon", float("nan"))])
def test_a_config_that_asks_for_something_else_is_refused_by_name(key, value, tmp_path):
    write(tmp_path, published(SMALL), {**SMALL, key: value})
    with pytest.raises(ValueError, match=key):
        GPT2.from_pretrained(tmp_path)


def test_settings_that_mean_the_same_are_accepted(small, ours, tmp_path):
    """The other name of tanh GELU, an explicit width, a width left open, dropout for training."""
    config = {**SMALL, "activation_function": "gelu_pytorch_tanh", "n_inner": 64}
    assert same(tensors_of(GPT2.from_pretrained(write(tmp_path, published(SMALL), config))),
                tensors_of(ours))
    config = {**SMALL, "n_inner": None, "resid_pdrop": 0.1, "scale_attn_weights": True}
    assert same(tensors_of(GPT2.from_pretrained(write(tmp_path, published(SMALL), config))),
                tensors_of(ours))


def test_the_config_decides_inner_width_and_epsilon(tmp_path):
    config = {**SMALL, "n_inner": 24, "layer_norm_epsilon": 1e-3}
    write(tmp_path, published(config), config)
    with torch.no_grad():
        assert far(GPT2.from_pretrained(tmp_path)(some_tokens(1, 9)),
                   theirs_from(tmp_path)(some_tokens(1, 9)).logits) < 1e-4


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '{"n_head": 2}', '{"n_layer": 2'])
def test_a_broken_config_is_a_value_error_that_names_the_folder(text, small, tmp_path):
    write(tmp_path, published(SMALL), SMALL)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=tmp_path.name):
        GPT2.from_pretrained(tmp_path)


def test_missing_surplus_and_misshapen_tensors_name_themselves(tmp_path):
    whole = published(SMALL)
    missing = {name: value for name, value in whole.items() if name != "h.1.attn.c_proj.bias"}
    surplus = whole | {"h.2.ln_1.bias": torch.zeros(16)}
    look_alike = whole | {"h.0.attn.bias_": torch.zeros(1, 1, 32, 32)}
    misshapen = whole | {"h.0.mlp.c_fc.weight": torch.zeros(16, 63)}
    turned = whole | {"h.0.mlp.c_fc.weight": whole["h.0.mlp.c_fc.weight"].T.contiguous()}
    for tensors, expected in ((missing, r"h\.1\.attn\.c_proj\.bias"),
                              (surplus, r"h\.2\.ln_1\.bias"), (look_alike, r"h\.0\.attn\.bias_"),
                              (misshapen, r"h\.0\.mlp\.c_fc\.weight.*63, 16.*64, 16"),
                              (turned, r"h\.0\.mlp\.c_fc\.weight.*16, 64.*64, 16")):
        for file in ("model.safetensors", "pytorch_model.bin"):
            folder = write(tmp_path / file, tensors, SMALL, file)
            with pytest.raises(ValueError, match=f"(?s){expected}"):
                GPT2.from_pretrained(folder)


def test_a_name_of_openai_stands_for_its_folder_under_models(ours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gpt2-medium.*expected"):
        GPT2.from_pretrained("gpt2-medium")
    write(tmp_path / "models" / "gpt2-medium", published(SMALL), SMALL)
    assert same(tensors_of(GPT2.from_pretrained("gpt2-medium")), tensors_of(ours))


def test_weights_without_their_config_are_an_error_that_says_what_is_expected(small, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((small / "model.safetensors").read_bytes())
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors .*config\.json"):
            GPT2.from_pretrained(path)


PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from model import GPT2
def kib(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
GPT2.from_pretrained(sys.argv[2])
before = kib("VmHWM")
model = GPT2.from_pretrained(sys.argv[3])
print(kib("VmHWM") - before, sum(p.nbytes for p in model.parameters()) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_loading_needs_memory_for_about_one_copy_of_the_model(small, tmp_path):
    config = {"n_layer": 4, "n_head": 8, "n_embd": 512, "n_positions": 256, "vocab_size": 8000}
    folder = write(tmp_path, published(config), config)
    code = Path(model_file.__file__).parent
    run = subprocess.run([sys.executable, "-c", PEAK, code, small, folder],
                         capture_output=True, text=True, check=True)
    peak, size = map(int, run.stdout.split())
    assert size > 60_000 and peak < 1.3 * size, f"{peak:,} KiB for a model of {size:,} KiB"


# The safetensors reader trusts nothing.

def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of these parts; a header that is not bytes is written as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: object, start: object, stop: object, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


SEEN: set[type] = set()  # kinds of errors of the reader, shown to be the loader's ValueError


def read(path: Path) -> dict[str, torch.Tensor]:
    """The reader's tensors, or the ValueError that from_pretrained makes of what went wrong."""
    try:
        return dict(model_file.read_safetensors(path))
    except Exception as error:
        if type(error) not in SEEN:
            path.with_name("config.json").write_text(json.dumps(SMALL))
            with pytest.raises(ValueError, match=path.name):
                GPT2.from_pretrained(path)
            SEEN.add(type(error))
        raise ValueError(path.name) from error


ONE = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
REFUSED = {
    "an empty file": b"",
    "half a length": b"\x07\0\0\0",
    "a header and nothing in it": raw(b""),
    "a header of 2**64 - 1 bytes": raw({}, length=2**64 - 1),
    "a header of 2**40 bytes": raw({}, length=2**40),
    "a header one byte longer than the file": raw({"a": entry([0], 0, 0)})[:-1],
    "negative offsets": raw({"a": entry([1], -4, 0)}, bytes(4)),
    "a start behind the end": raw({"a": entry([1], 4, 0)}, bytes(4)),
    "overlapping tensors": raw({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "the same bytes twice": raw({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)),
    "a hole between tensors": raw({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "a hole at the start": raw({"a": entry([1], 4, 8)}, bytes(8)),
    "bytes after the last tensor": raw({"a": entry([1], 0, 4)}, bytes(5)),
    "a tensor beyond the end": raw({"a": entry([2], 0, 8)}, bytes(7)),
    "more bytes than the shape has": raw({"a": entry([1], 0, 8)}, bytes(8)),
    "fewer bytes than the shape has": raw({"a": entry([3], 0, 8)}, bytes(8)),
    "a dtype that is not read here": raw({"a": entry([1], 0, 8, "F64")}, bytes(8)),
    "a dtype of a known size": raw({"a": entry([1], 0, 4, "I32")}, bytes(4)),
    "a dtype in small letters": raw({"a": entry([1], 0, 4, "f32")}, bytes(4)),
    "no dtype": raw({"a": entry([1], 0, 4, None)}, bytes(4)),
    "a list of dtypes": raw({"a": entry([1], 0, 4, ["F32"])}, bytes(4)),
    "a name twice": raw(b'{"a":%b,"a":%b}' % (ONE, ONE), bytes(4)),
    "a key twice": raw(b'{"a":{"shape":[9],%b}' % ONE[1:] + b"}", bytes(4)),
    "a shape of 2**60": raw({"a": entry([2**60], 0, 2**62)}, bytes(4)),
    "a shape of 2**60, few bytes": raw({"a": entry([2**60], 0, 4)}, bytes(4)),
    "a product that wraps to 0": raw({"a": entry([2**32, 2**32], 0, 0)}),
    "nothing, 2**60 times": raw({"a": entry([0, 2**60], 0, 0)}),
    "nothing, with strides that overflow": raw(
        {"a": entry([2**18], 0, 2**20), "b": entry([2**20] * 7 + [0], 2**20, 2**20)}, bytes(2**20)),
    "two negative sides": raw({"a": entry([-1, -1], 0, 4)}, bytes(4)),
    "a hundred sides": raw({"a": entry([1] * 100, 0, 4)}, bytes(4)),
    "a boolean side": raw({"a": entry([True], 0, 4)}, bytes(4)),
    "a boolean offset": raw({"a": entry([1], False, 4)}, bytes(4)),
    "a float side": raw({"a": entry([1.0], 0, 4)}, bytes(4)),
    "a float offset": raw({"a": entry([1], 0, 4.0)}, bytes(4)),
    "a text for a side": raw({"a": entry(["1"], 0, 4)}, bytes(4)),
    "a text for a shape": raw({"a": entry("1", 0, 4)}, bytes(4)),
    "a text for an offset": raw({"a": entry([1], "0", "4")}, bytes(4)),
    "a list for an offset": raw({"a": entry([1], [0], [4])}, bytes(4)),
    "a number for a shape": raw({"a": entry(1, 0, 4)}, bytes(4)),
    "an object for a shape": raw({"a": entry({"0": 1}, 0, 4)}, bytes(4)),
    "an empty text for a shape": raw({"a": entry("", 0, 4)}, bytes(4)),
    "an empty object for a shape": raw({"a": entry({}, 0, 4)}, bytes(4)),
    "NaN for a side": raw({"a": entry([math.nan], 0, 4)}, bytes(4)),
    "an infinite offset": raw({"a": entry([1], 0, math.inf)}, bytes(4)),
    "an offset of 5,000 digits": raw(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,%b]}}' % (b"9" * 5000), bytes(4)),
    "one offset": raw({"a": entry([1], 0, 4) | {"data_offsets": [4]}}, bytes(4)),
    "three offsets": raw({"a": entry([1], 0, 4) | {"data_offsets": [0, 4, 4]}}, bytes(4)),
    "no shape": raw({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "an entry that is a list": raw({"a": ["F32", [1], [0, 4]]}, bytes(4)),
    "an entry that is nothing": raw({"a": None}, bytes(4)),
    "a header that is a list": raw([entry([1], 0, 4)], bytes(4)),
    "a header that is a number": raw(3),
    "a header that is nothing": raw(None),
    "a header that is no JSON": raw(b"{'a': 1}"),
    "a header that is no UTF-8": raw(b'{"\xff\xfe": 1}'),
    "two headers": raw(b"{}{}"),
    "deep lists": raw(b"[" * 100_000),
    "deep objects": raw(b'{"a":' * 100_000),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_safetensors_file_is_a_value_error_at_once(name, tmp_path):
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(REFUSED[name])
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"wrong\.safetensors"):
        read(path)
    assert time.perf_counter() - start < 2


def test_a_header_that_cannot_be_is_not_even_read(tmp_path):
    """Its length is held against the file's before so many bytes are asked for."""
    path = tmp_path / "long.safetensors"
    for length in (2**64 - 1, 2**40, 3):
        path.write_bytes(raw(b"{}", length=length))
        with pytest.raises(ValueError, match=f"10 bytes.*{length:,}"):
            list(model_file.read_safetensors(path))


def test_what_the_format_allows_is_read(tmp_path):
    """A scalar, empty tensors, any order of names, spaces, metadata, a header of odd length."""
    scalar = torch.tensor(3.5)
    matrix = torch.arange(6, dtype=torch.float16).view(2, 3)
    data = scalar.numpy().tobytes() + matrix.numpy().tobytes()
    header = {"z": entry([], 0, 4), "__metadata__": {"format": "pt"},
              "a": entry([2, 3], 4, 16, "F16"), "nothing": entry([0, 2], 16, 16),
              "nothing, where a begins": entry([0], 4, 4)}
    expected = {"z": scalar, "a": matrix, "nothing": torch.empty(0, 2),
                "nothing, where a begins": torch.empty(0)}
    path = tmp_path / "odd.safetensors"
    for spaces in range(4):
        path.write_bytes(raw(json.dumps(header).encode() + b" " * spaces, data))
        assert same(read(path), expected)


def test_what_other_programs_ask_of_our_files(tmp_path):
    """Data that begins at a multiple of 8 bytes, whose header says that it is torch's (older
    transformers insist), and the settings that have an older name or tell the dtype."""
    for n_inner in range(1, 9):                        # headers of several lengths
        save_pretrained(GPT2(GPT2Config(1, 1, 2, 3, 5, n_inner)), tmp_path)
        whole = (tmp_path / "model.safetensors").read_bytes()
        header_size = int.from_bytes(whole[:8], "little")
        assert header_size % 8 == 0
    assert json.loads(whole[8:8 + header_size])["__metadata__"] == {"format": "pt"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["n_ctx"], config["dtype"]) == (3, "float32")


def test_a_shape_of_eight_numbers_is_read_and_one_of_nine_is_not(tmp_path):
    path = tmp_path / "shape.safetensors"
    path.write_bytes(raw({"a": entry([1] * 8, 0, 4)}, bytes(4)))
    assert read(path)["a"].shape == (1,) * 8
    path.write_bytes(raw({"a": entry([1] * 9, 0, 4)}, bytes(4)))
    with pytest.raises(ValueError):
        read(path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    """At each byte of the header, and at some of the data."""
    save_pretrained(GPT2(GPT2Config(1, 1, 2, 3, 5, 4)), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    data_start = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "cut.safetensors"
    for end in (*range(data_start + 1), len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"cut\.safetensors"):
            read(path)


def test_a_damaged_header_is_refused_or_harmless(tmp_path):
    """Random bytes at random places of the header, and files of nothing else: a ValueError, or the
    very same numbers (where the damage met a name, a space or the metadata)."""
    save_pretrained(GPT2(GPT2Config(1, 1, 2, 3, 5, 4)), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    data_start = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "damaged.safetensors"
    rng = random.Random(0)
    outcomes = Counter()
    for _ in range(900):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 5])):
            damaged[rng.randrange(data_start)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            tensors = read(path)
        except ValueError:
            outcomes["refused"] += 1
            continue
        outcomes["harmless"] += 1
        assert b"".join(t.numpy().tobytes() for t in tensors.values()) == whole[data_start:]
    assert outcomes["refused"] > 300 and outcomes["harmless"] > 30
    for size in (9, 100, 5000):
        path.write_bytes(rng.randbytes(size))
        with pytest.raises(ValueError, match=r"damaged\.safetensors"):
            read(path)


# Saving.

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformers_and_we_read_what_was_saved(dtype, small, tmp_path):
    """With adapters of another width in it: the same logits; in our loader the same bits."""
    model = GPT2.from_pretrained(small, dtype=dtype)
    add_adapters(model, "parallel", width=5)
    for block in model.h:
        torch.nn.init.normal_(block.mlp.adapter.c_proj.weight, std=0.3)
        torch.nn.init.normal_(block.mlp.adapter.c_proj.bias, std=0.3)
    save_pretrained(model, tmp_path)
    merged = merge_adapters(model)
    tokens = some_tokens(3, 20)
    theirs = theirs_from(tmp_path, dtype=dtype)
    assert theirs.config.n_inner == 69 and theirs.dtype == dtype
    with torch.no_grad():
        assert far(theirs.float()(tokens).logits, merged.float()(tokens)) < 1e-4
        if dtype == torch.float32:
            assert far(theirs(tokens).logits, model(tokens)) < 1e-4
    assert same(tensors_of(GPT2.from_pretrained(tmp_path, dtype=dtype)),
                tensors_of(merge_adapters(model)))
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_what_was_loaded_gives_the_published_tensors_back(small, ours, tmp_path):
    save_pretrained(ours, tmp_path / "new" / "folder")
    assert same(load_file(tmp_path / "new" / "folder" / "model.safetensors"), published(SMALL))


def test_a_save_that_breaks_off_leaves_the_old_files_whole(small, tmp_path, monkeypatch):
    model = GPT2.from_pretrained(small)
    save_pretrained(model, tmp_path)
    before = tensors_of(model)

    rename = Path.replace

    def full(part, name):
        if name.suffix == ".safetensors":
            raise OSError("no space left on device")
        return rename(part, name)

    monkeypatch.setattr(Path, "replace", full)
    torch.nn.init.zeros_(model.wte.weight)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(model, tmp_path)
    assert same(tensors_of(GPT2.from_pretrained(tmp_path)), before)


class FullDisk(io.FileIO):
    """A new file on a disk that has room for `room` more bytes of it."""
    room = 0

    def write(self, data) -> int:
        left = self.room - self.tell()
        if len(data) > left:
            super().write(data[:left])
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("room", [0, 100, 20_000])
def test_a_full_disk_is_an_os_error_and_leaves_the_old_files_as_they_were(room, ours, tmp_path,
                                                                          monkeypatch):
    """config.json has more than 100 bytes and fits into 20,000; model.safetensors has 38,000.

    The new model has another n_inner, so a new config.json beside the old weights would be noticed.
    """
    save_pretrained(ours, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert 100 < len(before["config.json"]) < 20_000 < len(before["model.safetensors"])
    loaded = tensors_of(GPT2.from_pretrained(tmp_path))

    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr(model_file, "open", FullDisk, raising=False)
    with pytest.raises(OSError) as caught:
        save_pretrained(add_adapters(ours, "parallel", width=5), tmp_path)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()

    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert same(tensors_of(GPT2.from_pretrained(tmp_path)), loaded)
    save_pretrained(ours, tmp_path)  # with room again, what was left behind is no hindrance
    assert GPT2.from_pretrained(tmp_path).config.n_inner == 69
    assert {file.name for file in tmp_path.iterdir()} == before.keys()


# Adapters.

def count(model: GPT2, trained: bool = True) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def test_a_parallel_adapter_is_the_identity_at_first_and_alone_trains(ours):
    """16 wide, 5 neurons: (16 + 1) * 5 + (5 + 1) * 16 = 181 parameters in each of 2 layers."""
    tokens = some_tokens(2, 11)
    before = tensors_of(ours)
    expected = ours(tokens)
    assert add_adapters(ours, "parallel", width=5) is ours
    assert torch.equal(ours(tokens), expected)
    assert count(ours) == 2 * 181
    assert all((".adapter." in name) == p.requires_grad for name, p in ours.named_parameters())

    optimizer = torch.optim.SGD((p for p in ours.parameters() if p.requires_grad), lr=0.1)
    start = tensors_of(ours)
    for _ in range(2):  # the first step moves the last layer alone: it was 0
        ours(tokens).log_softmax(-1)[..., 3].mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = ours.state_dict()
    old_weights = {name.replace(".mlp.mlp.", ".mlp."): value for name, value in after.items()
                   if ".adapter." not in name}
    assert same(old_weights, before)
    for layer in range(2):
        for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"):
            name = f"h.{layer}.mlp.adapter.{name}"
            assert not torch.equal(after[name], start[name]), name
    assert far(ours(tokens), expected) > 1e-3


def test_an_mlp_with_an_adapter_takes_the_mlp_s_place_and_its_parameters_names(ours):
    """h.0.mlp.c_fc.weight is now h.0.mlp.mlp.c_fc.weight, the same tensor; beside it stands
    h.0.mlp.adapter.c_fc.weight. The outputs are added."""
    mlp = ours.h[0].mlp
    before = dict(ours.named_parameters())
    add_adapters(ours, "parallel", width=5)
    assert type(ours.h[0].mlp) is MLPWithAdapter and ours.h[0].mlp.mlp is mlp

    after = dict(ours.named_parameters())
    for name, parameter in before.items():
        assert after.pop(name.replace(".mlp.", ".mlp.mlp.")) is parameter
    assert sorted((name, tuple(p.shape)) for name, p in after.items()) == [
        ("h.0.mlp.adapter.c_fc.bias", (5,)), ("h.0.mlp.adapter.c_fc.weight", (5, 16)),
        ("h.0.mlp.adapter.c_proj.bias", (16,)), ("h.0.mlp.adapter.c_proj.weight", (16, 5)),
        ("h.1.mlp.adapter.c_fc.bias", (5,)), ("h.1.mlp.adapter.c_fc.weight", (5, 16)),
        ("h.1.mlp.adapter.c_proj.bias", (16,)), ("h.1.mlp.adapter.c_proj.weight", (16, 5))]

    torch.nn.init.normal_(ours.h[0].mlp.adapter.c_proj.weight)
    x = torch.randn(3, 16)
    assert torch.equal(ours.h[0].mlp(x), mlp(x) + ours.h[0].mlp.adapter(x))
    assert far(ours.h[0].mlp(x), mlp(x)) > 0.01


@pytest.mark.parametrize("init", ["scratch", "pretrained"])
def test_a_replacing_adapter_takes_the_place_of_the_mlp_and_everything_trains(init, ours):
    """The MLP had (16 + 1) * 64 + (64 + 1) * 16 = 2128 parameters; 5 neurons have 181."""
    before = count(ours)
    add_adapters(ours, "replace", width=5, init=init)
    assert ours.config.n_inner == 5
    assert count(ours) == count(ours, trained=False) == before - 2 * (2128 - 181)
    assert ours.h[0].mlp.c_fc.weight.shape == (5, 16)
    assert ours.h[0].mlp.c_proj.weight.std() > 0
    ours(some_tokens(1, 8)).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in ours.parameters())


def test_kind_none_trains_every_weight(ours):
    """Also of a model that was frozen."""
    before = dict(ours.requires_grad_(False).named_parameters())
    assert add_adapters(ours, "none") is ours
    assert dict(ours.named_parameters()) == before
    assert count(ours) == count(ours, trained=False)


@pytest.mark.parametrize("kind, init", [("parallel", "scratch"), ("replace", "scratch"),
                                        ("replace", "pretrained"), ("none", "scratch")])
def test_merging_gives_a_plain_model_with_the_same_logits(kind, init, ours):
    """With every number of an adapter other than 0, as after training; `model` stays as it was."""
    add_adapters(ours, kind, width=6, init=init)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if ".mlp." in name:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    before = tensors_of(ours)
    tokens = some_tokens(2, 13)
    merged = merge_adapters(ours)
    assert merged.config.n_inner == {"parallel": 70, "replace": 6, "none": 64}[kind]
    assert tensors_of(merged).keys() == tensors_of(GPT2(merged.config)).keys()
    assert far(merged(tokens), ours(tokens)) < 1e-5
    assert same(tensors_of(ours), before)


@pytest.mark.parametrize("init", ["scratch", "pretrained"])
def test_transformers_reads_replaced_mlps_too(init, ours, tmp_path):
    add_adapters(ours, "replace", width=7, init=init)
    save_pretrained(ours, tmp_path)
    theirs = theirs_from(tmp_path)
    tokens = some_tokens(2, 9)
    assert theirs.config.n_inner == 7
    with torch.no_grad():
        assert far(theirs(tokens).logits, ours(tokens)) < 1e-4


def mlp_inputs(model: GPT2, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What each layer's MLP reads in a forward pass."""
    seen = []
    hooks = [block.mlp.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
             for block in model.h]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def mlp_errors(model: GPT2, tokens: torch.Tensor, width: int, small: Path) -> list[float]:
    """Each layer's relative error when its MLP is replaced by `width` of its neurons, on tokens."""
    smaller = GPT2.from_pretrained(small)
    add_adapters(smaller, "replace", width=width, init="pretrained")
    errors = []
    for layer, x in enumerate(mlp_inputs(model, tokens)):
        y = model.h[layer].mlp(x)
        errors.append(((smaller.h[layer].mlp(x) - y).norm() / y.norm()).item())
    return errors


@torch.no_grad()
def test_the_neurons_that_stay_have_the_largest_weights():
    """Four neurons that read one number and write one. Their strengths: 1 * 6, |-4| * 2, 3 * 0.5
    and 0.5 * |-20|, so number 3 and number 1 stay, in their order. The biases count for nothing."""
    mlp = MLP(1, 4)
    mlp.c_fc.weight.copy_(torch.tensor([[1.0], [-4.0], [3.0], [0.5]]))
    mlp.c_fc.bias.copy_(torch.tensor([90.0, -1.0, 80.0, 2.0]))
    mlp.c_proj.weight.copy_(torch.tensor([[6.0, 2.0, 0.5, -20.0]]))
    mlp.c_proj.bias.copy_(torch.tensor([7.0]))
    small = strongest_neurons(mlp, 2)
    assert small.c_fc.weight.tolist() == [[-4.0], [0.5]]
    assert small.c_fc.bias.tolist() == [-1.0, 2.0]
    assert small.c_proj.weight.tolist() == [[2.0, -20.0]]
    assert small.c_proj.bias.tolist() == [7.0]


def test_a_replacement_from_pretrained_neurons_is_exact_at_full_width(small, ours):
    """Number for number: the neurons in their order, and not one weight corrected."""
    before = tensors_of(ours)
    add_adapters(ours, "replace", width=64, init="pretrained")
    after = tensors_of(ours)
    assert before.keys() == after.keys()
    assert max(far(before[name], after[name]) for name in before) < 1e-6


def test_its_error_grows_as_its_width_falls_and_is_less_than_that_of_any_neurons(small, ours):
    """On tokens that it never saw; "any" are the first neurons of the old MLP, as they stand."""
    tokens = some_tokens(8, 32)
    errors = [sum(mlp_errors(ours, tokens, width, small)) for width in (64, 48, 32, 16, 4)]
    assert errors == sorted(errors) and errors[0] < 1e-5 and errors[1] > 0.01
    mlp = ours.h[0].mlp
    x = ours.h[0].ln_2(ours.wte(tokens))
    for width, error in ((32, errors[2]), (16, errors[3])):
        values = torch.nn.functional.gelu(mlp.c_fc(x)[..., :width], approximate="tanh")
        part = values @ mlp.c_proj.weight[:, :width].T + mlp.c_proj.bias
        assert error / 2 < 0.95 * (part - mlp(x)).norm() / mlp(x).norm()


@pytest.mark.parametrize("wrong", [
    {"kind": "lora"}, {"init": "zeros"}, {"width": 0}, {"width": -4}, {"width": 65},
    {"kind": "replace", "init": "pretrained", "width": 65}])
def test_adapters_that_cannot_be_are_refused_with_the_value(wrong, ours):
    before = tensors_of(ours)
    with pytest.raises(ValueError, match=str(list(wrong.values())[-1])):
        add_adapters(ours, **wrong)
    assert same(tensors_of(ours), before)


# Generation.

@pytest.mark.parametrize("temperature, top_p", [(0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_the_plain_form_gives_the_same_answers(temperature, top_p, ours):
    free = generate(ours, PROMPTS[:1], 20, temperature, top_p, end_token=-1, seed=3)[0]
    for end_token in (-1, free[7]):
        plain = generate_one(ours, PROMPTS[0], 20, temperature, top_p, end_token, seed=3)
        assert plain == generate(ours, PROMPTS[:1], 20, temperature, top_p, end_token, seed=3)[0]
        assert len(plain) == (20 if end_token == -1 else free.index(free[7]) + 1)
    if temperature > 0:
        assert generate_one(ours, PROMPTS[0], 20, temperature, top_p, -1, seed=4) != free


def test_greedy_is_the_same_alone_in_a_batch_without_a_cache_and_in_transformers(ours, theirs):
    """Prompts of 1 to 7 tokens; the end token is one that the first answer holds."""
    free = generate(ours, PROMPTS, 20, temperature=0, end_token=-1)
    assert all(len(set(answer)) > 4 for answer in free)  # no loop of one token: positions count
    end = free[0][6]
    answers = generate(ours, PROMPTS, 20, temperature=0, end_token=end)
    assert len({len(answer) for answer in answers}) > 1
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert generate(ours, [prompt], 20, temperature=0, end_token=end) == [answer]
        assert generate_one(ours, prompt, 20, 0, end_token=end) == answer
        assert greedy_of(theirs, prompt, 20, end) == answer


def test_generation_reaches_the_last_place_of_the_context_and_no_further(ours):
    """A context of 32: 7 + 25 tokens fit, 7 + 26 do not."""
    answer = generate(ours, [PROMPTS[2], [9]], 25, temperature=0, end_token=-1)
    assert answer[0] == generate_one(ours, PROMPTS[2], 25, 0, end_token=-1)
    with pytest.raises(ValueError, match=r"7 tokens .* 26: .*32"):
        generate(ours, [PROMPTS[2], [9]], 26)


@pytest.mark.parametrize("prompts, max_tokens", [([[1], []], 5), ([], 5), ([[1]], 0)])
def test_empty_prompts_and_no_tokens_to_come_are_errors(prompts, max_tokens, ours):
    with pytest.raises(ValueError):
        generate(ours, prompts, max_tokens)


def test_an_answer_ends_with_the_end_token_and_holds_it(ours):
    free = generate(ours, PROMPTS, 15, temperature=0, end_token=-1)
    end = free[2][4]
    answers = generate(ours, PROMPTS, 15, temperature=0, end_token=end)
    for answer, longer in zip(answers, free, strict=True):
        length = longer.index(end) + 1 if end in longer else 15
        assert answer == longer[:length]


@pytest.mark.parametrize("early", range(5))
def test_a_row_that_ended_changes_no_other_row_and_gets_no_id_more(early, ours):
    """One row ends with its first, third or tenth token, and so does a row that begins alike. The
    others go on, as if they were alone: also where the longest prompt is the one that ends."""
    alone = [generate(ours, [prompt], 20, temperature=0, end_token=-1)[0] for prompt in PROMPTS]
    for length in (1, 3, 10):
        end = alone[early][:length]
        answers = generate(ours, PROMPTS, 20, temperature=0, end_token=-1,
                           stop=lambda answer, end=end: answer == end)
        assert answers[early] == end
        assert answers == [end if answer[:length] == end else answer for answer in alone]
        assert sum(len(answer) == 20 for answer in answers) >= 3


def test_stop_sees_the_new_ids_of_one_answer_and_ends_it(ours):
    """It may look at text: here, an answer ends once its ids sum to more than 150."""
    free = generate(ours, PROMPTS, 15, temperature=0, end_token=-1)
    seen = []

    def stop(answer: list[int]) -> bool:
        seen.append(list(answer))
        return sum(answer) > 150

    answers = generate(ours, PROMPTS, 15, temperature=0, end_token=-1, stop=stop)
    for answer, longer in zip(answers, free, strict=True):
        sums = list(itertools.accumulate(longer))
        length = next((i for i, s in enumerate(sums, 1) if s > 150), 15)
        assert answer == longer[:length]
        assert all(longer[:n] in seen for n in range(1, len(answer) + 1))
    assert len(seen) == sum(len(answer) for answer in answers)  # never asked again after the end
    assert len({len(answer) for answer in answers}) > 1


def test_a_seed_gives_the_same_answers_and_leaves_the_global_generator_alone(ours):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, again, other = (generate(ours, PROMPTS, 10, seed=seed) for seed in (3, 3, 4))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_runs_in_half_precision_and_under_autocast(ours):
    """The cache takes what attention gives it, whatever the dtype of the weights."""
    with torch.autocast("cpu", torch.bfloat16):
        answers = generate(ours, PROMPTS, 3, temperature=0, end_token=-1)
    answers += generate(ours.bfloat16(), PROMPTS, 3, temperature=0, end_token=-1)
    assert [len(answer) for answer in answers] == [3] * 10


def test_generation_leaves_mode_and_gradients_as_they_were(ours):
    ours.train()
    generate(ours, PROMPTS, 3)
    assert ours.training and torch.is_grad_enabled()


# Probabilities 0.15, 0.5, 0.1, 0.25 of the tokens 0 to 3; 4,000 rows of them are drawn at once.
@pytest.mark.parametrize("temperature, top_p, expected", [
    (1.0, 1.0, [0.15, 0.5, 0.1, 0.25]),
    (0.5, 1.0, [0.0225 / 0.345, 0.25 / 0.345, 0.01 / 0.345, 0.0625 / 0.345]),  # their squares
    (1.0, 0.49, [0, 1, 0, 0]),
    (1.0, 0.0, [0, 1, 0, 0]),  # one token is always left
    (1.0, 0.51, [0, 2 / 3, 0, 1 / 3]),
    (1.0, 0.74, [0, 2 / 3, 0, 1 / 3]),
    (1.0, 0.76, [0.15 / 0.9, 0.5 / 0.9, 0, 0.25 / 0.9]),
    (2.0, 0.6, [0, 0.5**0.5 / (0.5**0.5 + 0.5), 0, 0.5 / (0.5**0.5 + 0.5)]),
    (0.0, 1.0, [0, 1, 0, 0])])
def test_sampling_draws_with_the_probabilities_it_should(temperature, top_p, expected):
    logits = torch.tensor([0.15, 0.5, 0.1, 0.25]).log().repeat(4000, 1) - 3.0
    generator = torch.Generator().manual_seed(1)
    drawn = model_file.sample(logits, temperature, top_p, generator).bincount(minlength=4)
    for share, p in zip((drawn / 4000).tolist(), expected, strict=True):
        assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / 4000)


def test_each_row_is_sampled_by_its_own_probabilities():
    logits = torch.tensor([[0.0, 9.0, 1.0], [9.0, 0.0, 1.0], [0.0, 1.0, 9.0]])
    drawn = model_file.sample(logits, 1.0, 0.9, torch.Generator().manual_seed(0))
    assert drawn.tolist() == [1, 0, 2]


def test_a_model_that_has_adapters_gets_no_second_ones(ours):
    add_adapters(ours, "parallel", width=3)
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(ours, "replace", width=3)


def test_a_dtype_that_no_reader_takes_is_refused_before_a_file_is_replaced(ours, tmp_path):
    with pytest.raises(ValueError, match=r"wte\.weight is torch\.float64, expected"):
        save_pretrained(ours.double(), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_adapters_have_the_models_dtype():
    model = add_adapters(GPT2(GPT2Config(**SMALL, n_inner=64)).double(), "parallel", 4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_safetensors_are_read_without_their_own_package(tmp_path, monkeypatch):
    """torch.load would read them, too, but only with that package."""
    model = GPT2(GPT2Config(**SMALL, n_inner=64))
    save_pretrained(model, tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert torch.equal(GPT2.from_pretrained(tmp_path).wte.weight, model.wte.weight)


def test_an_adapter_may_have_one_neuron():
    model = add_adapters(GPT2(GPT2Config(**SMALL, n_inner=64)), "parallel", 1)
    assert model.h[0].mlp.adapter.c_fc.weight.shape == (1, 16)


def test_top_p_keeps_no_token_once_the_likelier_ones_have_all_of_it():
    """Two tokens of 1/2 each: with top_p 1/2 the first of them is enough."""
    logits = torch.zeros(200, 2)
    generator = torch.Generator().manual_seed(0)
    assert len(set(model_file.sample(logits, 1.0, 0.5, generator).tolist())) == 1
    assert len(set(model_file.sample(logits, 1.0, 0.51, generator).tolist())) == 2


def test_the_saved_config_tells_the_class_and_the_end_of_text(tmp_path):
    """What transformers, vLLM and llama.cpp look for beside the sizes."""
    save_pretrained(GPT2(GPT2Config(**SMALL, n_inner=64)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert (config["bos_token_id"], config["eos_token_id"]) == (60, 60)   # the last of 61 tokens
