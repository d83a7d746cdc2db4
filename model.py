"""GPT-2 in one file: the model, generation, adapters, and OpenAI's weights in and out.

Read in this order: causal and in_rows (how tokens see each other); GPT2 and its parts; generate;
adapters; files. Needs torch and numpy. Letters: B rows of T tokens, or N flat ones, C = n_embd, H
heads of D = C / H, V vocabulary. No dropout: DPO compares a policy with its reference token by
token, and one that flips coins differs from it before it has learnt anything.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS, INITS = ("parallel", "replace", "none"), ("scratch", "pretrained")  # see add_adapters

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
            if type(value := getattr(self, f.name)) is not f.type or not 0 < value < 2**31:
                raise ValueError(f"{f.name} is {value!r}, expected {f.type.__name__} above 0")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}, no multiple of n_head, {self.n_head}")

# Only in attention do tokens meet. How they meet is an argument of the model, `attend`: a function
# of a layer's queries, keys and values (..., 3, H, D) and of its number, giving (..., H, D).

def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(D)) v over what mask, (..., T, S) bool, allows: (B, H, T, D).

    q is (B, H, T, D), k and v (B, H, S, D). No mask: each token sees itself and what is before it.
    """
    if q.device.type != "cpu" or q.shape[-2] > 128:  # fused: keeps no (T, S) for the backward
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    if mask is None:  # written out: on a CPU, for rows so short, the fused one takes thrice as long
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)).div_(q.shape[-1] ** 0.5)
    return scores.masked_fill_(~mask, -math.inf).softmax(-1).to(v.dtype) @ v

def causal(qkv: Tensor, layer: int = 0) -> Tensor:
    """Each token sees itself and what is before it in its row: (B, T, 3, H, D) to (B, T, H, D)."""
    q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, T, D) each; right pads need no mask
    return attention(q, k, v).transpose(1, 2)

def in_rows(qkv: Tensor, layer: int, rows: tuple[Tensor, ...], back: Tensor) -> Tensor:
    """Attention of a flat batch: gather padded rows, attend causally in each, take results back.

    rows: groups of rows of like length, each (R, T) int64: which of the N tokens stands there; one
    may stand in several, as a prompt does in those of its responses, and a pad may be any token.
    back: (N,) int64: for each token one place in the R * T results of all groups, concatenated.
    """
    gathered = (qkv.index_select(0, row.flatten()).unflatten(0, row.shape) for row in rows)
    results = torch.cat([causal(row).flatten(0, 1) for row in gathered])  # (sum of R * T, H, D)
    return results.index_select(0, back)  # (N, H, D)

class MLP(nn.Module):
    """n_embd -> n_inner -> n_embd with GELU in its tanh form; an adapter is one more beside it."""
    def __init__(self, n_embd: int, n_inner: int):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, n_inner)
        self.c_proj = nn.Linear(n_inner, n_embd)
        self.adapter = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
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
    """GPT-2 (Radford et al. 2019), named as in OpenAI's files; from_pretrained: load_pretrained."""
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

        All int64: tokens (B, T), or of any shape that `attend` takes, positions of the same, and at
        (M,). Raises ValueError for rows longer than the context, where positions are not given.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[-1], device=tokens.device)
            if (length := len(positions)) > (context := self.config.n_positions):
                raise ValueError(f"rows of {length} tokens, a context of {context}: cut the rows")
        x = self.wte(tokens) + self.wpe(positions)
        for layer, block in enumerate(self.h):
            x = block(x, attend, layer)
        return self.ln_f(x if at is None else x.flatten(0, -2).index_select(0, at))

    def forward(self, tokens: Tensor, *args, **kwargs) -> Tensor:
        """Logits (B, T, V), or (M, V) where `at` asks for them; the arguments of hidden."""
        return F.linear(self.hidden(tokens, *args, **kwargs), self.wte.weight)

def cached(qkv: Tensor, layer: int, kv: Tensor, positions: Tensor) -> Tensor:
    """Attention over what earlier calls left in kv (n_layer, 2, B, H, places, D): the KV cache.

    The token at position p of a row, as `positions` (B, T) int64 says, is kept at place p and sees
    places 0 to p. Rows may be of any lengths: a right pad is overwritten before it can be seen.
    """
    rows, places = (torch.arange(n, device=qkv.device) for n in (len(qkv), kv.shape[4]))
    kv[layer].transpose(2, 3)[:, rows[:, None], positions] = qkv[:, :, 1:].movedim(2, 0).to(kv)
    mask = places <= positions[:, None, :, None]  # (B, 1, T, places)
    return attention(qkv[:, :, 0].transpose(1, 2), *kv[layer], mask).transpose(1, 2)

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
        fewest = before < top_p * ordered.sum(-1, keepdim=True)
        ordered[:, 1:] *= fewest[:, 1:]  # the likeliest stays
        p = p.scatter(-1, order, ordered)
    # By the inverse of the distribution function: torch.multinomial draws a number for each token.
    cdf = p.cumsum(-1)
    drawn = 1 - torch.rand(len(p), 1, generator=generator, device=p.device)  # in (0, 1]
    return torch.searchsorted(cdf, drawn * cdf[:, -1:])[:, 0]

@torch.no_grad()
def generate(model: GPT2, prompts: list[list[int]], max_tokens: int, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, end_token: int = 50256,
             stop: Callable[[list[int]], bool] | None = None, seed: int = 0) -> list[list[int]]:
    """Continue prompts of any lengths, in one batch, by up to max_tokens ids; returns the new ids.

    An answer ends with end_token, which it then holds, where stop(its ids so far) is true, or at
    max_tokens. No global generator is read or set. Raises ValueError for an empty prompt, and if
    the longest prompt and max_tokens exceed the context.
    """
    c, weight = model.config, model.wte.weight
    short, long = min(map(len, prompts)), max(map(len, prompts))
    if short < 1 or max_tokens < 1 or (places := long + max_tokens) > c.n_positions:
        raise ValueError(f"prompts of {short} to {long} tokens, {max_tokens} to come: expected 1 "
                         f"or more, {c.n_positions} together; cut prompts from the left")
    tensor = partial(torch.tensor, device=weight.device)
    generator = torch.Generator(weight.device).manual_seed(seed)
    kv = weight.new_zeros(c.n_layer, 2, len(prompts), c.n_head, places, c.n_embd // c.n_head)
    tokens = tensor([p + [0] * (long - len(p)) for p in prompts])  # (B, T)
    positions, lengths = tensor([range(long)] * len(prompts)), tensor([len(p) for p in prompts])
    last = tensor([row * long + len(p) - 1 for row, p in enumerate(prompts)])
    going = answers = [[] for _ in prompts]  # going: those that still grow, one a row of the batch
    for end in range(long, places):
        attend = partial(cached, kv=kv[..., :end, :], positions=positions)
        new = sample(model(tokens, positions, attend, last), temperature, top_k, top_p, generator)
        for answer, token in zip(going, new.tolist(), strict=True):
            answer.append(token)
        kept = [row for row, answer in enumerate(going)
                if answer[-1] != end_token and not (stop and stop(answer))]
        if not kept:
            break
        if len(kept) < len(going):
            going, rows = [going[row] for row in kept], tensor(kept)
            kv, new, lengths = kv[:, :, rows], new[rows], lengths[rows]
        tokens, positions, lengths = new[:, None], lengths[:, None], lengths + 1
        last = torch.arange(len(going), device=weight.device)
    return answers

@torch.no_grad()
def strongest(model: GPT2, mlp: MLP, text: Tensor, width: int) -> MLP:
    """A new MLP of the `width` neurons of `mlp` that write most on text (B, T), to stand for all.

    A neuron writes its value times its column of c_proj: the largest in root mean square stay, in
    their order; what the others write on average goes into the bias. Of full width: as `mlp`.
    """
    seen: list[Tensor] = []
    with mlp.c_proj.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs)):
        model.hidden(text)
    values, columns = seen[0].flatten(0, 1), mlp.c_proj.weight  # (B * T, n), (C, n)
    order = (values.square().mean(0).sqrt() * columns.norm(dim=0)).argsort(descending=True)
    kept, others = order[:width].sort().values, order[width:]
    small = MLP(len(columns), width).to(columns)
    small.load_state_dict({
        "c_fc.weight": mlp.c_fc.weight[kept], "c_fc.bias": mlp.c_fc.bias[kept],
        "c_proj.weight": columns[:, kept],
        "c_proj.bias": mlp.c_proj.bias + columns[:, others] @ values[:, others].mean(0)})
    return small

def add_adapters(model: GPT2, kind: str = "parallel", width: int = 64, init: str = "scratch",
                 layers: int = 0) -> GPT2:
    """Give the upper `layers` blocks (0: all) adapters of `width` neurons; returns the same model.

    "parallel": a small MLP beside the old one (He et al. 2022, arXiv:2110.04366); its last layer is
    0 at first, so that the model computes what it did; it alone trains. "replace": a small MLP for
    the old one, random (init "scratch") or of its strongest neurons on text that the model writes
    ("pretrained"); all weights train, as they do with "none". Random weights are drawn from torch's
    global generator. Raises ValueError for anything else.
    """
    c, sizes = model.config, 1 <= width <= model.config.n_inner and 0 <= layers <= len(model.h)
    if kind not in KINDS or init not in INITS or not sizes:
        raise ValueError(f"adapters {kind}, {init}, width {width}, {layers} layers: expected "
                         f"{KINDS}, {INITS}, 1 to {c.n_inner}, 0 to {c.n_layer}")
    if pretrained := (kind, init) == ("replace", "pretrained"):
        ids = generate(model, [[c.vocab_size - 1]] * 64, min(128, c.n_positions) - 1, end_token=-1)
        text = torch.tensor(ids, device=model.wte.weight.device)
    model.requires_grad_(kind != "parallel")
    for block in model.h[-layers:] if kind != "none" else ():
        adapter = MLP(c.n_embd, width).to(model.wte.weight)
        initialize(adapter, c.n_layer)
        if kind == "parallel":
            nn.init.zeros_(adapter.c_proj.weight)
            block.mlp.adapter = adapter
        else:
            block.mlp = strongest(model, block.mlp, text, width) if pretrained else adapter
    return model

@torch.no_grad()
def merge_adapters(model: GPT2) -> GPT2:
    """A new, plain GPT-2 that computes what `model` does; it shares the weights outside the MLPs.

    The neurons of an adapter join those of its MLP; blocks with fewer than the widest get zeros.
    """
    mlps = [[mlp for mlp in (block.mlp, block.mlp.adapter) if mlp] for block in model.h]
    widest = max(sum(mlp.c_fc.out_features for mlp in side) for side in mlps)
    state = {name: p for name, p in model.state_dict().items() if ".mlp." not in name}
    for layer, side in enumerate(mlps):
        for name, dim in (("c_fc.weight", 0), ("c_fc.bias", 0), ("c_proj.weight", 1)):
            p = torch.cat([mlp.get_parameter(name) for mlp in side], dim).movedim(dim, -1)
            state[f"h.{layer}.mlp.{name}"] = F.pad(p, (0, widest - p.shape[-1])).movedim(-1, dim)
        state[f"h.{layer}.mlp.c_proj.bias"] = sum(mlp.c_proj.bias for mlp in side)
    with torch.device("meta"):
        merged = GPT2(replace(model.config, n_inner=widest))
    merged.load_state_dict(state, assign=True)
    return merged

# Files. OpenAI stores these four kernels as (in, out), nn.Linear as (out, in): they are transposed
# on the way in and out. The attention's c_proj is square, so no check of shapes would notice.
KERNELS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ASSUMED = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
           "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
           "reorder_and_upcast_attn": [False], "add_cross_attention": [False],
           "tie_word_embeddings": [True]}  # a config.json that asks for anything else is refused

def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a safetensors file, F32, F16 or BF16; some error where it is not whole.

    The format: 8 bytes of length, as many of JSON {name: {dtype, shape, data_offsets}}, the data
    without holes. Nothing in it is trusted. The data may begin at an odd byte, as GPT-2's does.
    """
    with open(path, "rb") as file:
        length, end = int.from_bytes(file.read(8), "little"), 0
        size = path.stat().st_size - 8 - length  # of the data
        if size < 0:
            raise ValueError(f"{size + 8 + length:,} bytes, with a header of {length:,}")
        header = json.loads(text := file.read(length))
        header.pop("__metadata__", None)
        if any(text.count(b'"%s"' % k) != len(header) for k in b"dtype shape data_offsets".split()):
            raise ValueError("a key stands twice")
        for name, meta in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (start, stop), shape, dtype = meta["data_offsets"], meta["shape"], DTYPES[meta["dtype"]]
            sane = len(shape) < 9 and all(  # a product of a million sides would take minutes
                type(n) is int and 0 <= n <= size for n in (start, stop, *shape))
            if not sane or start != end or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name:.99} at {start} to {stop}, after {end} of {size}")
            tensor, end = torch.empty(shape, dtype=dtype), stop
            file.readinto(tensor.view(-1).view(torch.uint8).numpy())
            yield name, tensor
    if end != size:
        raise ValueError(f"{size:,} bytes of data, {end:,} in tensors")

def load_pretrained(name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> GPT2:
    """A GPT-2, on the CPU, from model.safetensors or pytorch_model.bin with config.json beside it.

    name_or_path: a folder, such a file, or a name like gpt2: then the folder models/gpt2, which
    data.fetch_model fills. Raises FileNotFoundError or ValueError. No code in a file is run.
    """
    path = Path(name_or_path) if Path(name_or_path).exists() else Path("models", name_or_path)
    files = [path, path / "model.safetensors", path / "pytorch_model.bin"]
    file = next((f for f in files if f.is_file() and f.with_name("config.json").exists()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: expected model.safetensors or pytorch_model.bin there, "
                                f"beside a config.json; data.fetch_model downloads gpt2")
    try:
        values, weights = json.loads(file.with_name("config.json").read_bytes()), {}
        for key, ours in ASSUMED.items():
            if values.get(key, ours[0]) not in ours:
                raise ValueError(f"{key} is {values[key]!r}, expected one of {ours}")
        shape = {f.name: values.get(f.name, f.default) for f in fields(GPT2Config)}
        shape["n_inner"] = values.get("n_inner") or 4 * shape["n_embd"]
        with torch.device("meta"):  # no memory yet: the weights will be those that are read
            model = GPT2(GPT2Config(**shape))
        for name, p in (read_safetensors(file) if file.suffix == ".safetensors" else
                        torch.load(file, map_location="cpu", weights_only=True).items()):
            name = name.removeprefix("transformer.")
            if not name.endswith((".attn.bias", ".attn.masked_bias")):  # masks, no weights
                weights[name] = (p.T if name.endswith(KERNELS) else p).to(dtype).contiguous()
        head = weights.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, weights["wte.weight"]):
            raise ValueError("lm_head.weight differs from wte.weight, expected one matrix for both")
        model.load_state_dict(weights, assign=True)  # names what is missing, surplus or misshapen
    except Exception as error:  # a damaged file, a pickle above all, raises whatever it likes
        raise ValueError(f"{file}: damaged (then delete it), or no GPT-2 that this code can load: "
                         f"{error!s:.600}") from error
    return model
GPT2.from_pretrained = staticmethod(load_pretrained)

def save_pretrained(model: GPT2, folder: str | Path) -> None:
    """Write config.json and model.safetensors, adapters merged in, as `transformers` reads them."""
    model = merge_adapters(model)
    state = {name: (p.T if name.endswith(KERNELS) else p).contiguous().cpu()
             for name, p in model.state_dict().items()}
    header, end, codes = {}, 0, {dtype: code for code, dtype in DTYPES.items()}
    for name, p in state.items():
        header[name] = {"dtype": codes[p.dtype], "shape": list(p.shape),
                        "data_offsets": [end, end := end + p.nbytes]}
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)  # aligned, for readers that map the file
    config = {key: ours[0] for key, ours in ASSUMED.items()} | asdict(model.config) | {
        "architectures": ["GPT2LMHeadModel"], "dtype": str(model.wte.weight.dtype)[6:],
        "bos_token_id": model.config.vocab_size - 1, "eos_token_id": model.config.vocab_size - 1}
    tensors = [p.view(-1).view(torch.uint8).numpy() for p in state.values()]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, parts in (("config.json", [json.dumps(config, indent=2).encode()]),
                        ("model.safetensors", [len(text).to_bytes(8, "little"), text, *tensors])):
        part = Path(folder, f"{name}.part")  # a file has its name only when it is whole
        with open(part, "wb") as file:
            file.writelines(parts)
        part.replace(Path(folder, name))
