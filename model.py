"""GPT-2 in one file: the model, generation, adapters, and OpenAI's weights in and out.

Read in this order: causal and Rows (how tokens see each other); MLP, Block, GPT2; generate; adapters;
files. Needs torch alone. Letters: B rows of T tokens, N tokens of a flat batch, C = n_embd, H heads
of D = C / H, V vocabulary. There is no dropout: DPO compares a policy with its reference token by
token, and a policy that flips coins differs from its own reference before it has learnt anything.
"""

import json
import math
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # 124M, 355M, 774M, 1.6B parameters


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2, under the names of its config.json; the defaults are the 124M model."""
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_positions: int = 1024  # the context: the longest row, in tokens
    vocab_size: int = 50257
    n_inner: int = 3072  # neurons of an MLP
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self):
        for f in fields(self):
            if type(getattr(self, f.name)) is not f.type or not 0 < getattr(self, f.name) < 2**31:
                raise ValueError(f"{f.name} is {getattr(self, f.name)!r}, no {f.type.__name__} above 0")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}, no multiple of n_head, {self.n_head}")


# Only in attention do tokens meet. How they meet is an argument of the model, `attend`: a function
# of a layer's queries, keys and values (..., 3, H, D) and of its number, giving (..., H, D).

def causal(qkv: Tensor, layer: int = 0) -> Tensor:
    """Each token sees itself and what stands before it in its row: (B, T, 3, H, D) to (B, T, H, D).

    Pads on the right of a row need no mask: no real token ever sees them.
    """
    q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, T, D) each
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Rows:
    """Attention of a flat batch: gather padded rows, attend causally in each, take the results back.

    rows: groups of rows of like length, each (R, T) int64: which of the N tokens stands there. A
    token may stand in several rows, as a prompt does in those of its responses; a pad holds any.
    back: (N,) int64: for each token one place in the R * T results of all groups, concatenated.
    """
    def __init__(self, rows: tuple[Tensor, ...], back: Tensor):
        self.rows, self.back = rows, back

    def __call__(self, qkv: Tensor, layer: int = 0) -> Tensor:
        rows = [qkv.index_select(0, row.flatten()).unflatten(0, row.shape) for row in self.rows]
        results = torch.cat([causal(row).flatten(0, 1) for row in rows])  # (sum of R * T, H, D)
        return results.index_select(0, self.back)  # (N, H, D)


class MLP(nn.Module):
    """n_embd -> n_inner -> n_embd with GELU, in its tanh form; an adapter is another one beside it."""
    def __init__(self, n_embd: int, n_inner: int):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, n_inner)
        self.c_proj = nn.Linear(n_inner, n_embd)
        self.adapter = None

    def neurons(self, x: Tensor) -> Tensor:
        return F.gelu(self.c_fc(x), approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        y = self.c_proj(self.neurons(x))
        return y if self.adapter is None else y + self.adapter(x)


class Block(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        c, self.n_head = config.n_embd, config.n_head
        self.ln_1, self.ln_2 = (nn.LayerNorm(c, config.layer_norm_epsilon) for _ in range(2))
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(c, 3 * c), "c_proj": nn.Linear(c, c)})
        self.mlp = MLP(c, config.n_inner)

    def forward(self, x: Tensor, attend: Callable, layer: int) -> Tensor:
        qkv = self.attn.c_attn(self.ln_1(x)).unflatten(-1, (3, self.n_head, -1))  # OpenAI's order
        x = x + self.attn.c_proj(attend(qkv, layer).flatten(-2))
        return x + self.mlp(self.ln_2(x))


def initialize(module: nn.Module, n_layer: int) -> None:
    """GPT-2's random start: N(0, 0.02), c_proj's divided by sqrt(2 n_layer), biases 0."""
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif "ln_" not in name:
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if "c_proj" in name else 0.02)


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019), its modules under the names of OpenAI's checkpoint."""
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # the head too: they are tied
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        initialize(self, config.n_layer)

    def hidden(self, tokens: Tensor, positions: Tensor | None = None,
               attend: Callable = causal, at: Tensor | None = None) -> Tensor:
        """What the head reads: (B, T, C), or (M, C) at the M flattened tokens that `at` names.

        tokens: int64, (B, T) for `causal`, else any shape that `attend` takes, with positions of
        that shape. at: (M,) int64. Raises ValueError for rows longer than the context.
        """
        if positions is None:
            if tokens.shape[-1] > self.config.n_positions:
                raise ValueError(f"rows of {tokens.shape[-1]} tokens, but a context of "
                                 f"{self.config.n_positions}: cut the rows")
            positions = torch.arange(tokens.shape[-1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        for layer, block in enumerate(self.h):
            x = block(x, attend, layer)
        return self.ln_f(x if at is None else x.flatten(0, -2).index_select(0, at))

    def forward(self, tokens: Tensor, positions: Tensor | None = None,
                attend: Callable = causal, at: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or (M, V) where `at` asks for them; the same arguments."""
        return F.linear(self.hidden(tokens, positions, attend, at), self.wte.weight)

    @staticmethod
    def from_pretrained(name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> "GPT2":
        return load_pretrained(name_or_path, dtype)  # at the end of this file


class Cache:
    """Attention over what earlier calls left, each row at its own length: the KV cache.

    Row b's token at position p is kept at [b, p] and sees the places 0 to p; a right pad is
    overwritten before a token can see it. Before each call of the model set `positions`, (B, T)
    int64, and `end`, above all of them.
    """
    def __init__(self, places: int):
        self.places, self.end, self.positions = places, 0, None
        self.kv: dict[int, Tensor] = {}  # layer: (2, B, places, H, D)

    def __call__(self, qkv: Tensor, layer: int) -> Tensor:
        if layer not in self.kv:
            self.kv[layer] = qkv.new_zeros(2, len(qkv), self.places, *qkv.shape[-2:])
        rows, places = (torch.arange(n, device=qkv.device) for n in (len(qkv), self.end))
        self.kv[layer][:, rows[:, None], self.positions] = qkv[:, :, 1:].movedim(2, 0)
        q, (k, v) = qkv[:, :, 0].transpose(1, 2), self.kv[layer][:, :, :self.end].transpose(2, 3)
        mask = (places <= self.positions[..., None])[:, None]  # (B, 1, T, end)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float,
           generator: torch.Generator) -> Tensor:
    """One token a row, (B,) int64, from logits (B, V): the likeliest at temperature 0.

    top_k > 0 leaves the k likeliest; top_p < 1, of those, the fewest whose probabilities reach p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    if top_k or top_p < 1:
        ordered, order = p.sort(descending=True)
        ordered[:, top_k or p.shape[-1]:] = 0.0
        before = ordered.cumsum(-1) - ordered  # the probability of the likelier ones
        ordered[before >= top_p * ordered.sum(-1, keepdim=True)] = 0.0
        p = p.scatter(-1, order, ordered)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(model: GPT2, prompts: list[list[int]], max_tokens: int, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, end_token: int = 50256,
             stop: Callable[[list[int]], bool] | None = None, seed: int = 0) -> list[list[int]]:
    """Continue prompts of any lengths, in one batch, by up to max_tokens ids; returns the new ids.

    An answer ends with end_token, which it then holds, or when stop(its ids so far) is true, or at
    max_tokens. `seed` is for a generator of this call; the global one stays untouched. Raises
    ValueError for an empty prompt, and when the longest prompt and max_tokens exceed the context.
    """
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    if shortest < 1 or max_tokens < 1 or longest + max_tokens > model.config.n_positions:
        raise ValueError(f"prompts of {shortest} to {longest} tokens, {max_tokens} to come: expected 1 or "
                         f"more each, {model.config.n_positions} together; cut prompts from the left")
    device, rows = model.wte.weight.device, list(range(len(prompts)))  # rows: each one's prompt
    generator, cache = torch.Generator(device).manual_seed(seed), Cache(longest + max_tokens)
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)  # (B, T)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    cache.positions = torch.arange(longest, device=device).repeat(len(prompts), 1)
    last = torch.arange(len(prompts), device=device) * longest + lengths - 1
    answers = [[] for _ in prompts]
    for cache.end in range(longest, longest + max_tokens):
        logits = model(tokens, cache.positions, cache, last)
        new = sample(logits, temperature, top_k, top_p, generator)
        for row, token in zip(rows, new.tolist(), strict=True):
            answers[row].append(token)
        left = [i for i, row in enumerate(rows) if answers[row][-1] != end_token
                and not (stop and stop(answers[row]))]
        if not left:
            break
        if len(left) < len(rows):
            rows, kept = [rows[i] for i in left], torch.tensor(left, device=device)
            new, lengths = new[kept], lengths[kept]
            cache.kv = {layer: kv[:, kept] for layer, kv in cache.kv.items()}
        tokens, cache.positions, lengths = new[:, None], lengths[:, None], lengths + 1
        last = torch.arange(len(rows), device=device)
    return answers


@torch.no_grad()
def strongest(mlp: MLP, x: Tensor, width: int) -> MLP:
    """A new MLP of the `width` neurons that write most on inputs x (n, C), standing in for all.

    A neuron writes its value times its column of c_proj: the largest in root mean square stay.
    Least squares over x adds to their columns and the bias what best replaces the dropped ones:
    nothing at full width, where the MLP stays itself.
    """
    values, w = mlp.neurons(x).double(), mlp.c_proj.weight.double()  # (n, n_inner), (C, n_inner)
    order = (values.square().mean(0).sqrt() * w.norm(dim=0)).argsort(descending=True)
    kept, dropped = order[:width].sort().values, order[width:]
    basis = F.pad(values[:, kept], (0, 1), value=1.0)  # (n, width + 1), the last for the bias
    gram = basis.T @ basis
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)  # ridge: for rare neurons
    extra = torch.linalg.solve(gram, basis.T @ (values[:, dropped] @ w[:, dropped].T))
    small = MLP(len(w), width).to(mlp.c_proj.weight)
    small.load_state_dict({
        "c_fc.weight": mlp.c_fc.weight[kept], "c_fc.bias": mlp.c_fc.bias[kept],
        "c_proj.weight": w[:, kept] + extra[:-1].T, "c_proj.bias": mlp.c_proj.bias + extra[-1]})
    return small


def add_adapters(model: GPT2, kind: str = "parallel", width: int = 64, init: str = "scratch",
                 layers: int = 0) -> GPT2:
    """Give the upper `layers` blocks (0: all) adapters of `width` neurons; changes, returns `model`.

    "parallel": a small MLP beside the frozen one (He et al. 2022, arXiv:2110.04366); its last layer
    is 0 at first, so that the model computes what it did; it alone trains. "replace": a small MLP
    for the old one, random (init "scratch") or of its strongest neurons on text that the model
    writes (init "pretrained"); all weights train. "none": all weights train. Else a ValueError.
    """
    pretrained = (kind, init) == ("replace", "pretrained")
    top = model.config.n_inner if pretrained else 2**20
    if (kind not in ("none", "parallel", "replace") or init not in ("scratch", "pretrained")
            or not (1 <= width <= top and 0 <= layers <= len(model.h))):
        raise ValueError(f"adapter {kind}, {init}, width {width}, {layers} layers: expected none, "
                         f"parallel or replace; scratch or pretrained; 1 to {top}; 0 to {len(model.h)}")
    if pretrained:
        end, length = model.config.vocab_size - 1, min(128, model.config.n_positions)
        text = sum(generate(model, [[end]] * 64, length - 1, end_token=end), [end])
        text = torch.tensor(text[:len(text) // length * length], device=model.wte.weight.device)
    model.requires_grad_(kind != "parallel")
    for block in model.h[-layers:] if kind != "none" else ():
        adapter = MLP(model.config.n_embd, width).to(model.wte.weight)
        initialize(adapter, model.config.n_layer)
        if kind == "parallel":
            nn.init.zeros_(adapter.c_proj.weight)
            block.mlp.adapter = adapter
        elif pretrained:
            seen: list[Tensor] = []
            with block.mlp.register_forward_pre_hook(lambda _, x, seen=seen: seen.extend(x)):
                model.hidden(text.view(-1, length))
            block.mlp = strongest(block.mlp, seen[0].flatten(0, 1), width)
        else:
            block.mlp = adapter
    return model


@torch.no_grad()
def merge_adapters(model: GPT2) -> GPT2:
    """A new, plain GPT-2 that computes what `model` does; it shares the weights that stay the same.

    The neurons of a block's MLP and of its adapter stand side by side in one MLP; blocks with fewer
    than the widest are filled up with neurons of zeros.
    """
    mlps = [[mlp for mlp in (block.mlp, block.mlp.adapter) if mlp] for block in model.h]
    inner = max(sum(mlp.c_fc.out_features for mlp in side) for side in mlps)
    state = {k: v for k, v in model.state_dict().items() if ".mlp." not in k}
    for layer, side in enumerate(mlps):
        fill = inner - sum(mlp.c_fc.out_features for mlp in side)
        name = f"h.{layer}.mlp.c_"
        state[name + "fc.weight"] = F.pad(torch.cat([m.c_fc.weight for m in side]), (0, 0, 0, fill))
        state[name + "fc.bias"] = F.pad(torch.cat([m.c_fc.bias for m in side]), (0, fill))
        state[name + "proj.weight"] = F.pad(
            torch.cat([m.c_proj.weight for m in side], 1), (0, fill))
        state[name + "proj.bias"] = sum(m.c_proj.bias for m in side)
    with torch.device("meta"):
        merged = GPT2(replace(model.config, n_inner=inner))
    merged.load_state_dict(state, assign=True)
    return merged


# Files. OpenAI stores these four kernels as (in, out), nn.Linear as (out, in): they are transposed
# on the way in and out. The attention's c_proj is square, so no check of shapes would notice.
TRANSPOSED = re.compile(r".*(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # a buffer among the tensors, no weight
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ASSUMED = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
           "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
           "reorder_and_upcast_attn": [False], "add_cross_attention": [False],
           "tie_word_embeddings": [True]}  # a config.json that asks for anything else is refused


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: F32, F16, BF16. Nothing in the file is trusted.

    The format: 8 bytes of length, as many of JSON {name: {dtype, shape, data_offsets}}, the data
    without holes. Raises ValueError before a tensor is made. The data is read straight into the
    tensors: one copy in memory, and no alignment needed (GPT-2's header ends at an odd byte).
    """
    def unique(items: list) -> dict:
        if len(dict(items)) < len(items):
            raise ValueError("a key stands twice")
        return dict(items)

    with open(path, "rb") as file:
        length, end = int.from_bytes(file.read(8), "little"), 0
        size = os.path.getsize(path) - 8 - length  # of the data
        try:
            if size < 0 or length > 2**22:
                raise ValueError(f"{size + 8 + length:,} bytes, a header of {length:,}")
            table = json.loads(file.read(length), object_pairs_hook=unique)
            table.pop("__metadata__", None)
            table = sorted((*e["data_offsets"], n, e["dtype"], e["shape"]) for n, e in table.items())
            for start, stop, name, dtype, shape in table:
                sane = all(type(n) is int and 0 <= n <= size for n in (start, stop, *shape[:9]))
                if not sane or len(shape) > 8 or (start, stop) != (
                        end, end + math.prod(shape) * DTYPES[dtype].itemsize):
                    raise ValueError(f"{name:.99} at {start} to {stop}, after {end} of {size}")
                end = stop
            if end != size:
                raise ValueError(f"{size:,} bytes of data, {end:,} in tensors")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: no whole safetensors file ({error!r:.300}); get it again"
                             ) from None
        tensors = {n: torch.empty(shape, dtype=DTYPES[dtype]) for _, _, n, dtype, shape in table}
        for tensor in tensors.values():
            file.readinto(tensor.view(-1).view(torch.uint8).numpy())
    return tensors


def load_pretrained(name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> GPT2:
    """A GPT-2, on the CPU, from model.safetensors or pytorch_model.bin with config.json beside it.

    name_or_path: a folder, such a file, or a name in NAMES, which stands for models/<name>, where
    data.fetch_model puts it. Raises FileNotFoundError or ValueError: what was found, and expected.
    A pytorch_model.bin is read with weights_only=True: no code in it runs.
    """
    path = Path(name_or_path)
    path = "models" / path if str(path) in NAMES and not path.exists() else path
    files = [path] if path.is_file() else [path / "model.safetensors", path / "pytorch_model.bin"]
    file = next((f for f in files if f.exists() and f.with_name("config.json").exists()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: expected config.json and model.safetensors or pytorch_model"
                                f".bin there, or the name of a model: {', '.join(NAMES)}")
    try:
        values = json.loads(file.with_name("config.json").read_bytes())
        for key, ours in ASSUMED.items():
            if values.get(key, ours[0]) not in ours:
                raise ValueError(f"{key} is {values[key]!r}, expected {' or '.join(map(str, ours))}")
        values["n_inner"] = values.get("n_inner") or 4 * values["n_embd"]
        values = {f.name: values.get(f.name, f.default) for f in fields(GPT2Config)}
        with torch.device("meta"):  # no memory yet: the weights will be those that are read
            model = GPT2(GPT2Config(**values))
        found = (read_safetensors(file) if file.suffix == ".safetensors"
                 else torch.load(file, map_location="cpu", weights_only=True))
        found = {name.removeprefix("transformer."): tensor for name, tensor in found.items()}
        if not torch.equal(found.pop("lm_head.weight", found["wte.weight"]), found["wte.weight"]):
            raise ValueError("lm_head.weight differs from wte.weight, expected one matrix for both")
        for name in list(found):
            tensor = found.pop(name)
            if not MASK.fullmatch(name):
                tensor = tensor.T if TRANSPOSED.fullmatch(name) else tensor
                found[name] = tensor.to(dtype).contiguous()
        model.load_state_dict(found, assign=True)  # names what is missing, surplus or misshapen
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError,
            pickle.UnpicklingError) as error:
        raise ValueError(f"{file}: no GPT-2 that this code can load: {error!s:.600}") from None
    return model


def save_pretrained(model: GPT2, folder: str | Path) -> None:
    """Write config.json and model.safetensors, adapters merged in, as `transformers` reads them.

    Each file is written aside and renamed: `folder` never holds half of one.
    """
    model = merge_adapters(model)
    state = {name: (t.T if TRANSPOSED.fullmatch(name) else t).contiguous().cpu()
             for name, t in model.state_dict().items()}
    codes, header, end = {dtype: code for code, dtype in DTYPES.items()}, {}, 0
    for name, t in state.items():
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape),
                        "data_offsets": [end, end := end + t.nbytes]}
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)  # aligned, for readers that map the file
    config = {key: ours[0] for key, ours in ASSUMED.items()} | asdict(model.config) | {
        "architectures": ["GPT2LMHeadModel"], "dtype": str(model.wte.weight.dtype)[6:],
        "bos_token_id": model.config.vocab_size - 1, "eos_token_id": model.config.vocab_size - 1}
    data = (t.view(-1).view(torch.uint8).numpy() for t in state.values())
    for name, parts in (("config.json", [json.dumps(config, indent=2).encode()]),
                        ("model.safetensors", chain([len(text).to_bytes(8, "little"), text], data))):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.part", "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
