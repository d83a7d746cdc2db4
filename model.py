"""GPT-2 in one file: the model, generation, adapters, and OpenAI's weights in and out.

Read from top to bottom:

1. the model           GPT2Config, CausalSelfAttention, MLP, Block, GPT2
2. generation          answers to prompts, with a KV cache
3. adapters            small MLPs beside GPT-2's own MLPs, or in their place
4. files               OpenAI's weights, as the Hugging Face hub has them, and back

Needs torch, and numpy for reading and writing files. The letters in the shapes: R rows, T tokens of
a row, C width (n_embd), H heads, D width of a head (C / H), V tokens of the vocabulary, S places of
a row in the KV cache.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# 1. The model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2, under the names of its config.json. The defaults are the 124M model."""
    n_layer: int = 12
    n_head: int = 12               # divides n_embd
    n_embd: int = 768
    n_positions: int = 1024        # the context: the longest text, in tokens
    vocab_size: int = 50257
    n_inner: int = 3072            # the neurons of an MLP
    layer_norm_epsilon: float = 1e-5


def plain_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
    """What scaled_dot_product_attention computes: q, k and v (R, H, T, D) -> (R, H, T, D).

    attn_mask (R, 1, T, T) bool: the same for all heads. tests/test_model.py holds the two equal.
    """
    scores = q @ k.transpose(-2, -1)                   # (R, H, T, T): of each token for each other
    scores = scores / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~attn_mask, -math.inf)
    return scores.softmax(-1) @ v                      # a mean of v over the tokens that are seen


class CausalSelfAttention(nn.Module):
    """Each token takes in what the tokens that it sees hold: itself and those before it.

    This is the only place where tokens meet. Everywhere else each token is computed alone.
    """

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Rows of tokens: (R, T, C) -> (R, T, C).

        attn_mask (R, T, T) bool: at [r, t, s] whether token t of row r sees its token s. If it is
        left out, a token sees itself and those before it.

        scaled_dot_product_attention computes what plain_attention does, faster.
        """
        q, k, v = self.heads(self.c_attn(x))                           # (R, H, T, D) each
        if attn_mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask[:, None])
        y = y.transpose(1, 2).flatten(2)                               # (R, T, C)
        return self.c_proj(y)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head: (R, T, 3C) -> (R, H, T, D) each."""
        q, k, v = qkv.chunk(3, dim=-1)                                 # (R, T, C) each
        q = q.unflatten(-1, (self.n_head, -1)).transpose(1, 2)         # (R, H, T, D)
        k = k.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        v = v.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        return q, k, v


class MLP(nn.Module):
    """Two linear layers with GELU, in its tanh form, between them: C -> n_inner -> C."""

    def __init__(self, n_embd: int, n_inner: int):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, n_inner)
        self.c_proj = nn.Linear(n_inner, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        x = F.gelu(x, approximate="tanh")
        return self.c_proj(x)


class Block(nn.Module):
    """One layer: attention, then an MLP, each added to what came in."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config.n_embd, config.n_inner)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), attn_mask)
        x = x + self.mlp(self.ln_2(x))
        return x


def initialize(module: nn.Module, n_layer: int) -> None:
    """The random start of `transformers`: normal with deviation 0.02, biases 0. LayerNorms stay as
    PyTorch makes them, with weights of 1 and biases of 0.

    Each layer adds the outputs of two c_proj to x. Their weights start smaller, divided by the
    square root of 2 * n_layer, so that the size of x does not grow with the number of layers.
    """
    for name, part in module.named_modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            std = 0.02
            if name.endswith("c_proj"):
                std = 0.02 / math.sqrt(2 * n_layer)
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019), with the names of the weights that the Hugging Face hub has.

    GPT-2 was pretrained with dropout. There is no dropout here, not even after train(): nothing
    random may stand between DPO's policy and its reference.

    >>> model = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=8, n_inner=32))
    >>> model(torch.tensor([[464, 3290, 318]])).shape
    torch.Size([1, 3, 50257])
    """

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)   # of tokens
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)  # of positions
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        initialize(self, config.n_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (R, T) int64 -> logits (R, T, V): position t predicts token t + 1.

        Raises ValueError for rows that are longer than the context.
        """
        length = tokens.shape[1]
        context = self.config.n_positions
        if length > context:
            raise ValueError(f"rows of {length} tokens, expected at most {context}, the context of "
                             f"this model: cut the rows")
        positions = torch.arange(length, device=tokens.device)        # (T,)
        return self.logits(self.hidden(tokens, positions))

    def hidden(self, tokens: Tensor, positions: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """All but the head: tokens (R, T) int64 -> (R, T, C).

        positions (T,) or (R, T) int64: of each token in its text, below the context's length.
        attn_mask: see CausalSelfAttention. dpo.packed_logps has rows of several texts, which need
        one.
        """
        x = self.wte(tokens) + self.wpe(positions)                    # (R, T, C)
        for block in self.h:
            x = block(x, attn_mask)
        return self.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """The head: (..., C) -> (..., V). Its weights are those of the embedding ("tied")."""
        return F.linear(x, self.wte.weight)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path,
                        dtype: torch.dtype = torch.float32) -> "GPT2":
        """Load a GPT-2, on the CPU, from model.safetensors or pytorch_model.bin.

        name_or_path: a folder, or such a file, with config.json beside it; or a name like "gpt2",
        for the folder models/gpt2, which data.fetch_model fills. No code in a file is run. Raises
        FileNotFoundError, or ValueError for a damaged file and for a model that is no GPT-2.
        """
        file = find_weights(name_or_path)
        try:
            config = read_config(file.with_name("config.json"))
            with torch.device("meta"):                 # the shapes alone: no memory, no numbers
                model = cls(config)
            weights = read_weights(file, dtype)
            # The weights become the model's parameters, and train like any others. An error names
            # those that are missing or of a wrong shape.
            model.load_state_dict(weights, assign=True)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file, a pickle above all, raises whatever it likes
            raise ValueError(f"{file}: can't be loaded as a GPT-2: {str(error)[:600]}; if the file "
                             f"is damaged, delete it") from error
        return model


# 2. Generation ----------------------------------------------------------------------------------


@torch.no_grad()
def generate_one(model: GPT2, prompt: list[int], max_tokens: int, temperature: float = 1.0,
                 top_p: float = 1.0, end_token: int = 50256, seed: int = 0) -> list[int]:
    """An answer to one prompt: up to max_tokens ids, with end_token as the last if it comes.

    This is the plain form: for each new token the model reads the whole row once more. With a
    single prompt `generate` computes the same, but for rounding, and faster.
    temperature, top_p: see sample.
    """
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    answer = []
    while len(answer) < max_tokens and end_token not in answer:
        tokens = torch.tensor([prompt + answer], device=device)             # (1, T)
        logits = model(tokens)[:, -1]                                       # (1, V)
        new = sample(logits, temperature, top_p, generator)                 # (1,)
        answer += new.tolist()
    return answer


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token of each row: logits (R, V) -> (R,) int64.

    temperature 1 draws from the model's own probabilities, a lower one prefers the likelier tokens,
    and 0 takes the likeliest.

    top_p (Holtzman et al. 2020, arXiv:1904.09751): only the likeliest tokens may be drawn, the
    fewest whose probabilities add up to at least top_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        # With the numbers of an example: top_p 0.7, probabilities 0.2 0.5 0.3.
        ordered, order = probabilities.sort(descending=True)           # 0.5 0.3 0.2
        up_to_here = ordered.cumsum(-1)                # 0.5 0.8 1.0: of a token and likelier ones
        likelier = up_to_here - ordered                # 0.0 0.5 0.8: of the likelier ones alone
        keep = likelier < top_p                        # the first two: 0.5 alone is not 0.7 yet
        keep[:, 0] = True                              # the likeliest, whatever top_p is
        ordered = ordered.masked_fill(~keep, 0.0)
        # Back to the order of the vocabulary.
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(model: GPT2, prompts: list[list[int]], max_tokens: int, temperature: float = 1.0,
             top_p: float = 1.0, end_token: int = 50256,
             stop: Callable[[list[int]], bool] | None = None, seed: int = 0) -> list[list[int]]:
    """Answers to prompts of any lengths, all at once: up to max_tokens new ids for each.

    It is generate_one for many prompts, and with a cache, so that no token is read twice.

    An answer ends with end_token, which it then holds, or where stop(ids of the answer) is true, or
    at max_tokens. temperature, top_p: see sample. On one machine the same seed gives the same
    answers; torch's own generator is left alone. Raises ValueError for an empty prompt, and if the
    longest prompt and max_tokens exceed the context together.
    """
    config = model.config
    device = model.wte.weight.device
    if not prompts or [] in prompts:
        raise ValueError("there is no prompt, or an empty one: expected at least one token in each")
    longest = max(len(prompt) for prompt in prompts)
    places = longest + max_tokens                      # of a row, in the cache
    if max_tokens < 1 or places > config.n_positions:
        raise ValueError(f"prompts of up to {longest} tokens and answers of {max_tokens}: expected "
                         f"at least 1 for an answer, and {config.n_positions} together at most; "
                         f"cut the prompts from the left")

    # The KV cache: keys and values of what was read.
    shape = (config.n_layer, len(prompts), places, config.n_head, config.n_embd // config.n_head)
    keys = torch.zeros(shape, dtype=model.wte.weight.dtype, device=device)
    values = torch.zeros_like(keys)

    # The first call reads the prompts, padded on the right. Each later call reads one token of each
    # row. With the prompts a b and c d e f, x for padding, 1 and 2 for tokens of the answers, and
    # dots for what is still empty, the cache then holds
    #
    #     place                 0 1 2 3 4 5 6
    #     after the first call  a b x x . . .     c d e f . . .
    #     after the second      a b 1 x . . .     c d e f 1 . .
    #     after the third       a b 1 2 . . .     c d e f 1 2 .
    #
    # A token sees the places up to its own. So no token of an answer sees padding: by its turn, the
    # places before it hold the prompt and the answer's earlier tokens, which have overwritten x.
    padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
    tokens = torch.tensor(padded, device=device)                            # (R, T)
    positions = torch.arange(longest, device=device).expand(len(prompts), -1)
    hidden = cached_hidden(model, tokens, positions, keys, values)          # (R, T, C)

    # The next token is predicted at the last token of each prompt.
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows = torch.arange(len(prompts), device=device)
    hidden = hidden[rows, lengths - 1]                                      # (R, C)

    generator = torch.Generator(device).manual_seed(seed)
    answers = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for step in range(max_tokens):
        logits = model.logits(hidden)                                       # (R, V)
        new = sample(logits, temperature, top_p, generator)                 # (R,)
        for i, token in enumerate(new.tolist()):
            if ended[i]:
                continue                               # this row still runs along, unread
            answers[i].append(token)
            if token == end_token or len(answers[i]) == max_tokens:
                ended[i] = True
            elif stop is not None and stop(answers[i]):
                ended[i] = True
        if all(ended):
            break

        # Read the new token of each row, which stands behind all others.
        positions = lengths + step                                          # (R,)
        hidden = cached_hidden(model, new[:, None], positions[:, None], keys, values)
        hidden = hidden[:, 0]                                               # (R, 1, C) -> (R, C)
    return answers


def cached_hidden(model: GPT2, tokens: Tensor, positions: Tensor, keys: Tensor,
                  values: Tensor) -> Tensor:
    """The last hidden states, for the next tokens of rows: (R, T) int64 -> (R, T, C).

    positions (R, T) int64: the places at which the tokens stand in their rows.
    keys, values (n_layer, R, S, H, D): the KV cache, of all layers.
    """
    x = model.wte(tokens) + model.wpe(positions)
    for layer, block in enumerate(model.h):
        attended = cached_attention(block.attn, block.ln_1(x), positions, keys[layer],
                                    values[layer])
        x = x + attended
        x = x + block.mlp(block.ln_2(x))
    return model.ln_f(x)


def cached_attention(attn: CausalSelfAttention, x: Tensor, positions: Tensor, keys: Tensor,
                     values: Tensor) -> Tensor:
    """Attention where a token also sees what earlier calls read: (R, T, C) -> (R, T, C).

    keys, values (R, S, H, D): of the tokens at the S places of a row, as far as they were read. The
    keys and values of this call's tokens are written into them, at their places.
    """
    q, k, v = attn.heads(attn.c_attn(x))                           # (R, H, T, D) each
    row = torch.arange(len(positions), device=x.device)[:, None]   # (R, 1)
    # At [r, positions[r, t]], for each row r and each of its tokens t.
    keys[row, positions] = k.transpose(1, 2).to(keys.dtype)        # (R, T, H, D)
    values[row, positions] = v.transpose(1, 2).to(values.dtype)

    places = torch.arange(keys.shape[1], device=x.device)          # (S,)
    own_place = positions[:, None, :, None]                        # (R, 1, T, 1)
    attn_mask = places <= own_place                                # (R, 1, T, S), for all heads
    # Under autocast q may be of another dtype than the cache.
    all_k = keys.transpose(1, 2).to(q.dtype)                       # (R, H, S, D)
    all_v = values.transpose(1, 2).to(q.dtype)
    y = F.scaled_dot_product_attention(q, all_k, all_v, attn_mask=attn_mask)  # (R, H, T, D)
    y = y.transpose(1, 2).flatten(2)                               # (R, T, C)
    return attn.c_proj(y)


# 3. Adapters ------------------------------------------------------------------------------------
#
# An adapter is an MLP as GPT-2 has it, only narrower. Houlsby et al. 2019 (arXiv:1902.00751) put
# adapters behind attention and behind the MLP. A parallel adapter stands beside the MLP (He et al.
# 2022, arXiv:2110.04366). As ours has GPT-2's own form, MLP and adapter can be merged into one
# MLP after training. A replacing adapter takes the MLP's place.

ADAPTERS = ("parallel", "replace", "none")
ADAPTER_INITS = ("scratch", "pretrained")


class MLPWithAdapter(nn.Module):
    """What takes an MLP's place: the MLP, and beside it an adapter whose output is added."""

    def __init__(self, mlp: MLP, adapter: MLP):
        super().__init__()
        self.mlp = mlp
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.adapter(x)


def add_adapters(model: GPT2, kind: str = "parallel", width: int = 64,
                 init: str = "scratch") -> GPT2:
    """Give every block an adapter of `width` neurons. Changes the model, and returns it.

    "parallel": an adapter beside each MLP. Its last layer is 0 at first, so that the model computes
    exactly what it did. Its first layer is random, so the last one has a gradient at once, and the
    first one as soon as the last has moved. The adapters alone train.
    "replace": an adapter in the place of each MLP, either random (init "scratch") or made of the
    MLP's own strongest neurons (init "pretrained"). All weights train.
    "none": no adapter. All weights train.

    Random weights are drawn from torch's global generator. Raises ValueError for another kind, init
    or width, and for a model that has parallel adapters already.
    """
    config = model.config
    if kind not in ADAPTERS or init not in ADAPTER_INITS:
        raise ValueError(f"an adapter of kind {kind!r} with init {init!r}: expected a kind of "
                         f"{ADAPTERS} and an init of {ADAPTER_INITS}")
    if not 1 <= width <= config.n_inner:
        raise ValueError(f"an adapter of {width} neurons: expected 1 to {config.n_inner}")
    if isinstance(model.h[0].mlp, MLPWithAdapter):
        raise ValueError("the model has adapters already: expected none; merge_adapters first")

    model.requires_grad_(True)
    if kind == "none":
        return model
    if kind == "parallel":
        model.requires_grad_(False)                    # but the new adapters will train
        for block in model.h:
            adapter = new_adapter(model, width)
            nn.init.zeros_(adapter.c_proj.weight)      # its bias is 0 already
            block.mlp = MLPWithAdapter(block.mlp, adapter)
    else:
        for block in model.h:
            if init == "scratch":
                block.mlp = new_adapter(model, width)
            else:
                block.mlp = strongest_neurons(block.mlp, width)
        model.config = dataclasses.replace(config, n_inner=width)
    return model


def new_adapter(model: GPT2, width: int) -> MLP:
    """A random MLP of `width` neurons, on the model's device and in its dtype."""
    adapter = MLP(model.config.n_embd, width)
    initialize(adapter, model.config.n_layer)
    weight = model.wte.weight
    return adapter.to(device=weight.device, dtype=weight.dtype)


@torch.no_grad()
def strongest_neurons(mlp: MLP, width: int) -> MLP:
    """A new MLP of the `width` neurons of `mlp` with the largest weights, in their old order.

    A neuron reads by its row of c_fc.weight, and writes by its column of c_proj.weight. So its
    strength is taken to be the product of their lengths. SFT has to make up for the other neurons.
    """
    reads = mlp.c_fc.weight.norm(dim=1)                # (n_inner,)
    writes = mlp.c_proj.weight.norm(dim=0)             # (n_inner,)
    order = (reads * writes).argsort(descending=True)
    kept = order[:width].sort().values

    small = MLP(len(mlp.c_proj.bias), width).to(device=reads.device, dtype=reads.dtype)
    small.c_fc.weight.copy_(mlp.c_fc.weight[kept])
    small.c_fc.bias.copy_(mlp.c_fc.bias[kept])
    small.c_proj.weight.copy_(mlp.c_proj.weight[:, kept])
    small.c_proj.bias.copy_(mlp.c_proj.bias)
    return small


@torch.no_grad()
def merge_adapters(model: GPT2) -> GPT2:
    """A new, plain GPT-2 that computes what `model` does, but for rounding. It shares all weights
    but those of MLPs with adapters.

    An MLP with an adapter beside it is one MLP, with the neurons of both: see merged_mlp.
    """
    state = {}
    for name, weight in model.state_dict().items():
        if ".mlp." not in name:
            state[name] = weight
    for layer, block in enumerate(model.h):
        mlp = block.mlp
        if isinstance(mlp, MLPWithAdapter):
            mlp = merged_mlp(mlp.mlp, mlp.adapter)
        for name, weight in mlp.state_dict().items():
            state[f"h.{layer}.mlp.{name}"] = weight

    n_inner = len(state["h.0.mlp.c_fc.bias"])
    with torch.device("meta"):                         # the shapes alone: `state` has the weights
        merged = GPT2(dataclasses.replace(model.config, n_inner=n_inner))
    merged.load_state_dict(state, assign=True)
    return merged


@torch.no_grad()
def merged_mlp(mlp: MLP, adapter: MLP) -> MLP:
    """One MLP with the neurons of both, the MLP's own first.

    gelu acts on each neuron by itself, and c_proj adds up what all of them write.
    """
    weight = mlp.c_fc.weight
    n_embd = len(mlp.c_proj.bias)
    n_inner = len(mlp.c_fc.bias) + len(adapter.c_fc.bias)
    merged = MLP(n_embd, n_inner).to(device=weight.device, dtype=weight.dtype)
    merged.c_fc.weight.copy_(torch.cat([mlp.c_fc.weight, adapter.c_fc.weight], dim=0))
    merged.c_fc.bias.copy_(torch.cat([mlp.c_fc.bias, adapter.c_fc.bias], dim=0))
    merged.c_proj.weight.copy_(torch.cat([mlp.c_proj.weight, adapter.c_proj.weight], dim=1))
    merged.c_proj.bias.copy_(mlp.c_proj.bias + adapter.c_proj.bias)
    return merged


# 4. Files ---------------------------------------------------------------------------------------
#
# Nothing here is about DPO. One calls `GPT2.from_pretrained` and `save_pretrained`. (train.py and
# judge.py also use `write_whole`, judge.py `find_weights`.)

# GPT-2's files hold these four matrices as (in, out), nn.Linear holds them as (out, in). They are
# transposed on the way in and on the way out. The attention's c_proj is square: if its transpose
# were forgotten, no check of shapes would notice.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# Settings of config.json that change what a GPT-2 computes, each with the values under which it
# computes what the model above does.
ASSUMED = {
    "model_type": ["gpt2"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "reorder_and_upcast_attn": [False],
    "add_cross_attention": [False],
    "tie_word_embeddings": [True],
}

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def find_weights(name_or_path: str | Path) -> Path:
    """The file of weights that a folder, a file or a name of a model means."""
    path = Path(name_or_path)
    if not path.exists():
        path = Path("models", name_or_path)
    for file in (path, path / "model.safetensors", path / "pytorch_model.bin"):
        if file.is_file() and file.with_name("config.json").exists():
            return file
    raise FileNotFoundError(f"{path}: expected model.safetensors or pytorch_model.bin there, "
                            f"beside a config.json; data.fetch_model('gpt2') downloads GPT-2's")


def read_config(path: Path) -> GPT2Config:
    """The GPT2Config of a config.json, which may come from anybody.

    Raises ValueError for a setting that this code doesn't compute, for a number that is no number
    or is absurd, and where n_head does not divide n_embd.
    """
    settings = json.loads(path.read_bytes())
    for name, known in ASSUMED.items():
        value = settings.get(name, known[0])
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {known}")

    shape = {}
    for field in fields(GPT2Config):
        shape[field.name] = settings.get(field.name, field.default)
    if settings.get("n_inner") is None:
        shape["n_inner"] = 4 * shape["n_embd"]

    for field in fields(GPT2Config):
        value = shape[field.name]
        # field.type is the annotation: int or float. (isinstance would take True for an int.)
        if type(value) is not field.type:
            raise ValueError(f"{field.name} is {value!r}, expected {field.type.__name__}")
        if not 0 < value < 2**31:
            raise ValueError(f"{field.name} is {value}, expected a number above 0 and below "
                             f"{2**31}")
    if shape["n_embd"] % shape["n_head"] != 0:
        raise ValueError(f"n_embd is {shape['n_embd']}, expected a multiple of n_head, which is "
                         f"{shape['n_head']}")
    return GPT2Config(**shape)


def read_weights(file: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in a file, under our names and in the layout of nn.Linear."""
    if file.suffix == ".safetensors":
        tensors = read_safetensors(file)
    else:
        tensors = torch.load(file, map_location="cpu", weights_only=True).items()

    weights = {}
    for name, tensor in tensors:
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue       # "h.0.attn.bias": causal masks, which the hub's files hold, too
        if name.endswith(TRANSPOSED):
            tensor = tensor.T
        weights[name] = tensor.to(dtype).contiguous()

    head = weights.pop("lm_head.weight", None)         # some files repeat the embedding as a head
    if head is not None and not torch.equal(head, weights["wte.weight"]):
        raise ValueError("lm_head.weight differs from wte.weight, expected one matrix for both")
    return weights


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a safetensors file. Raises an error, of any kind, if it is not of this
    form. (The format has no checksum: a changed number goes unnoticed.)

    The format has three parts:

        8 bytes      the length of the header
        the header   JSON: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
        the data     one tensor after the other, without holes

    The data may begin at an odd byte, as it does in GPT-2's file, so tensors are read, not mapped.
    """
    with open(path, "rb") as file:
        header, data_size = read_header(file, path.stat().st_size)
        end = 0                                        # of the tensors read so far, in the data
        for name, entry in sorted(header.items(), key=data_offsets):
            start, stop = entry["data_offsets"]
            shape = entry["shape"]
            dtype = DTYPES[entry["dtype"]]
            check_numbers([start, stop, *shape], data_size)
            if start != end or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name:.99} has the shape {shape} at bytes {start} to {stop}, "
                                 f"expected it to begin at {end} and to fit")
            tensor = torch.empty(shape, dtype=dtype)
            its_bytes = tensor.view(-1).view(torch.uint8).numpy()      # not a copy: its memory
            file.readinto(its_bytes)                                   # so this fills the tensor
            yield name, tensor
            end = stop
    if end != data_size:
        raise ValueError(f"{data_size:,} bytes of data, expected the {end:,} of the tensors")


def read_header(file: BinaryIO, file_size: int) -> tuple[dict, int]:
    """The header of a safetensors file, and how many bytes of data stand behind it."""
    header_size = int.from_bytes(file.read(8), "little")
    data_size = file_size - 8 - header_size
    if data_size < 0:
        raise ValueError(f"{file_size:,} bytes, expected more: the header alone has "
                         f"{header_size:,}")
    header = json.loads(file.read(header_size), object_pairs_hook=without_repeats)
    header.pop("__metadata__", None)
    return header, data_size


def without_repeats(items: list[tuple[str, object]]) -> dict:
    """A JSON object as a dict. ValueError where a key stands twice: json would keep the last."""
    keys = [key for key, _ in items]
    if len(set(keys)) != len(keys):
        raise ValueError("a key stands twice in the header")
    return dict(items)


def data_offsets(item: tuple[str, dict]) -> list[int]:
    """Where the tensor of a header's item begins and ends: sorts them as they stand in the data."""
    return item[1]["data_offsets"]


def check_numbers(numbers: list, most: int) -> None:
    """ValueError unless these are integers from 0 to `most`, and not absurdly many.

    A file may come from anybody. Without this check a shape of a million numbers would take minutes
    to multiply, and two negative numbers would have the right product.
    """
    if len(numbers) > 10:                              # a start, a stop, and a shape
        raise ValueError(f"a shape of {len(numbers) - 2} numbers, expected at most 8")
    for number in numbers:
        if type(number) is not int or not 0 <= number <= most:
            raise ValueError(f"{number!r:.99}, expected an integer from 0 to {most:,}")


def save_pretrained(model: GPT2, folder: str | Path) -> None:
    """Write config.json and model.safetensors, with adapters merged in, as `transformers` reads it.

    Both are written under other names, and renamed when they are whole. So if the disk is full, the
    old files stay as they were.
    """
    model = merge_adapters(model)
    end_of_text = model.config.vocab_size - 1
    config = {name: known[0] for name, known in ASSUMED.items()}
    config |= asdict(model.config)
    config |= {"architectures": ["GPT2LMHeadModel"], "bos_token_id": end_of_text,
               "eos_token_id": end_of_text,
               "n_ctx": model.config.n_positions,      # its older name, which some readers expect
               "dtype": str(model.wte.weight.dtype).removeprefix("torch.")}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config_part = write_part(folder / "config.json", [json.dumps(config, indent=2).encode()])
    weights_part = write_part(folder / "model.safetensors", safetensors_bytes(model))
    config_part.replace(folder / "config.json")
    weights_part.replace(folder / "model.safetensors")


def safetensors_bytes(model: GPT2) -> Iterator:
    """The parts of the model's safetensors file, in OpenAI's layout: see read_safetensors."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    tensors = []
    end = 0
    for name, tensor in model.state_dict().items():
        if name.endswith(TRANSPOSED):
            tensor = tensor.T
        if tensor.dtype not in codes:
            raise ValueError(f"{name} is {tensor.dtype}, expected one of {list(codes)}")
        tensor = tensor.cpu().contiguous()
        start = end
        end = start + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
        tensors.append(tensor)

    text = json.dumps(header).encode()
    while len(text) % 8 != 0:                          # aligned, for readers that map the file
        text += b" "
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors:
        yield tensor.view(-1).view(torch.uint8).numpy()


def write_whole(path: Path, parts: Iterator | list) -> None:
    """Write parts of bytes to a file that gets its name only when all of them are written."""
    write_part(path, parts).replace(path)


def write_part(path: Path, parts: Iterator | list) -> Path:
    """Write parts of bytes to <path>.part, and return that name."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.writelines(parts)
    return part
