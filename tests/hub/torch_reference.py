"""The official models in NumPy, in torch's layout and with torch's names, from the papers' text.

Float64 throughout, so that a comparison measures the rounding of the other side. Nothing here knows
how jaxllm stores or computes anything.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


# -- DnD-Transformer (arXiv:2410.01912) and LlamaGen ----------------------------------------------


def fake_dnd(
    rng, *, codes, dim, layers, depth, class_rows, heads, kv_heads, hidden, llamagen=False
):
    """A random state dict with the official names and shapes."""
    head_dim = dim // heads
    shapes = {
        "cls_embedding.embedding_table.weight": (class_rows, dim),
        "tok_embeddings.weight": (codes, dim),
    }
    for i in range(layers):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (dim + 2 * kv_heads * head_dim, dim),
            f"layers.{i}.attention.wo.weight": (dim, dim),
            f"layers.{i}.feed_forward.w1.weight": (hidden, dim),
            f"layers.{i}.feed_forward.w3.weight": (hidden, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, hidden),
            f"layers.{i}.attention_norm.weight": (dim,),
            f"layers.{i}.ffn_norm.weight": (dim,),
        }
    for i in range(depth):
        index = "" if llamagen else f".{i}"
        shapes |= {f"norm{index}.weight": (dim,), f"output{index}.weight": (codes, dim)}
    return fill(rng, shapes)


def fill(rng, shapes):
    """Norm scales near 1, matrices that keep the size of their input, everything float32."""
    tensors = {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape)
        if name.endswith("running_var"):
            x = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("weight") and len(shape) == 1:
            x = 1 + 0.2 * x
        elif len(shape) > 1 and "embed" not in name and "codebook" not in name:
            x *= np.prod(shape[1:]) ** -0.5
        else:
            x *= 0.5
        tensors[name] = x.astype(np.float32)
    return tensors


def rms_norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def rotary_factors(grid, head_dim):
    """Complex [1 + cells, head_dim / 2]: zero for the class token, then row pairs, column pairs."""
    quarter = head_dim // 4
    frequencies = 10000.0 ** (-2 * np.arange(quarter) / (head_dim // 2))
    rows = [np.zeros(2 * quarter, complex)]
    for row in range(grid):
        for column in range(grid):
            angles = np.concatenate([row * frequencies, column * frequencies])
            rows.append(np.exp(1j * angles))
    return np.array(rows)


def rotate(x, factors):
    """x [B, T, heads, head_dim]: neighbours (0, 1), (2, 3), ... are complex numbers."""
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * factors[None, :, None]
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = pairs.real, pairs.imag
    return out


def dnd_logits(tensors, codes, classes, *, heads, kv_heads, head_layers, grid):
    """Teacher-forced logits [B, cells, depth, V] of codes [B, cells, depth]."""
    t = {name: x.astype(np.float64) for name, x in tensors.items()}
    table = t["tok_embeddings.weight"]
    dim, cells, depth = table.shape[1], codes.shape[1], codes.shape[2]
    head_dim = dim // heads
    factors = rotary_factors(grid, head_dim)[:cells]
    h = np.empty((len(codes), cells, dim))
    h[:, 0] = t["cls_embedding.embedding_table.weight"][classes]
    h[:, 1:] = sum(table[codes[:, :-1, i]] for i in range(depth))
    future = np.triu(np.full((cells, cells), -np.inf), 1)
    logits = []
    for layer in range(head_layers[-1] + 1):
        w = {n.split(".", 2)[2]: x for n, x in t.items() if n.startswith(f"layers.{layer}.")}
        qkv = rms_norm(h, w["attention_norm.weight"]) @ w["attention.wqkv.weight"].T
        kv = kv_heads * head_dim
        q, k, v = (
            part.reshape(len(codes), cells, -1, head_dim)
            for part in (qkv[..., :dim], qkv[..., dim : dim + kv], qkv[..., dim + kv :])
        )
        q, k = rotate(q, factors), rotate(k, factors)
        mixed = np.empty_like(q)
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = np.einsum("btd,bsd->bts", q[:, :, head], k[:, :, shared]) / head_dim**0.5
            mixed[:, :, head] = softmax(scores + future) @ v[:, :, shared]
        h = h + mixed.reshape(h.shape) @ w["attention.wo.weight"].T
        x = rms_norm(h, w["ffn_norm.weight"])
        gated = silu(x @ w["feed_forward.w1.weight"].T) * (x @ w["feed_forward.w3.weight"].T)
        h = h + gated @ w["feed_forward.w2.weight"].T
        if layer in head_layers:
            i = head_layers.index(layer)
            index = "" if "norm.weight" in t else f".{i}"
            logits.append(rms_norm(h, t[f"norm{index}.weight"]) @ t[f"output{index}.weight"].T)
            if i + 1 < depth:
                h = h + table[codes[..., i]]
    return np.stack(logits, axis=2)


# -- RQ-VAE (arXiv:2203.01941) --------------------------------------------------------------------


def fake_tokenizer(rng, *, width, multipliers, blocks, attention, latent, code_dim, codes, depth):
    """A random state dict of an RQ-VAE with a separate codebook for each depth."""
    shapes = {}

    def conv(name, inputs, outputs, size=3):
        shapes[f"{name}.weight"] = (outputs, inputs, size, size)
        shapes[f"{name}.bias"] = (outputs,)

    def norm(name, channels):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    def residual(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attend(name, channels):
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    def middle(name, channels):
        residual(f"{name}.mid.block_1", channels, channels)
        attend(f"{name}.mid.attn_1", channels)
        residual(f"{name}.mid.block_2", channels, channels)

    last = len(multipliers) - 1
    conv("encoder.conv_in", 3, width)
    channels = width
    for level, multiplier in enumerate(multipliers):
        for block in range(blocks):
            residual(f"encoder.down.{level}.block.{block}", channels, width * multiplier)
            channels = width * multiplier
            if level in attention:
                attend(f"encoder.down.{level}.attn.{block}", channels)
        if level < last:
            conv(f"encoder.down.{level}.downsample.conv", channels, channels)
    middle("encoder", channels)
    norm("encoder.norm_out", channels)
    conv("encoder.conv_out", channels, latent)
    conv("decoder.conv_in", latent, channels)
    middle("decoder", channels)
    for level in range(last, -1, -1):
        for block in range(blocks + 1):
            residual(f"decoder.up.{level}.block.{block}", channels, width * multipliers[level])
            channels = width * multipliers[level]
            if level in attention:
                attend(f"decoder.up.{level}.attn.{block}", channels)
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", channels, channels)
    norm("decoder.norm_out", channels)
    conv("decoder.conv_out", channels, 3)
    conv("quant_conv", latent, code_dim, 1)
    conv("post_quant_conv", code_dim, latent, 1)
    for i in range(depth):
        shapes[f"quantizer.codebooks.{i}.weight"] = (codes + 1, code_dim)
        shapes[f"quantizer.codebooks.{i}.cluster_size_ema"] = (codes,)
        shapes[f"quantizer.codebooks.{i}.embed_ema"] = (codes, code_dim)
    tensors = fill(rng, shapes)
    for i in range(depth):
        tensors[f"quantizer.codebooks.{i}.weight"][-1] = 0
    return tensors


def share_codebook(tensors):
    """The same state dict with the first codebook at every depth."""
    return {
        name: tensors[f"quantizer.codebooks.0.{name.split('.', 3)[3]}"]
        if name.startswith("quantizer.codebooks.")
        else x
        for name, x in tensors.items()
    }


def convolve(x, weight, bias=None, stride=1, padding=None):
    """x [B, C, H, W], weight [out, in, h, w]; padding ((top, bottom), (left, right))."""
    size = weight.shape[-1]
    padding = padding or ((size // 2, size // 2),) * 2
    x = np.pad(x, ((0, 0), (0, 0), *padding))
    windows = sliding_window_view(x, weight.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    y = np.tensordot(windows, weight, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)
    return y if bias is None else y + bias[:, None, None]


class Tokenizer:
    """Encoder, quantizer and decoder of a state dict; images [B, 3, H, W]."""

    def __init__(self, tensors, *, groups, levels, depth):
        self.t = {name: x.astype(np.float64) for name, x in tensors.items()}
        self.groups, self.levels, self.depth = groups, levels, depth

    def conv(self, name, x, **options):
        return convolve(x, self.t[f"{name}.weight"], self.t[f"{name}.bias"], **options)

    def norm(self, name, x):
        grouped = x.reshape(len(x), self.groups, -1)
        mean, var = grouped.mean(-1, keepdims=True), grouped.var(-1, keepdims=True)
        normal = ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
        weight, bias = (self.t[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return normal * weight + bias

    def residual(self, name, x):
        h = self.conv(f"{name}.conv1", silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", silu(self.norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.nin_shortcut", x) if h.shape != x.shape else x)

    def attend(self, name, x):
        normal = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", normal).reshape(*x.shape[:2], -1) for part in "qkv")
        weights = softmax(np.einsum("bct,bcs->bts", q, k) * x.shape[1] ** -0.5)
        return x + self.conv(
            f"{name}.proj_out", np.einsum("bts,bcs->bct", weights, v).reshape(x.shape)
        )

    def level(self, name, x):
        block = 0
        while f"{name}.block.{block}.conv1.weight" in self.t:
            x = self.residual(f"{name}.block.{block}", x)
            if f"{name}.attn.{block}.q.weight" in self.t:
                x = self.attend(f"{name}.attn.{block}", x)
            block += 1
        return x

    def middle(self, name, x):
        x = self.attend(f"{name}.mid.attn_1", self.residual(f"{name}.mid.block_1", x))
        return self.residual(f"{name}.mid.block_2", x)

    def encode(self, images):
        """[B, h, w, code_dim]."""
        x = self.conv("encoder.conv_in", images)
        for i in range(self.levels):
            x = self.level(f"encoder.down.{i}", x)
            if i < self.levels - 1:
                one_sided = ((0, 1), (0, 1))
                x = self.conv(f"encoder.down.{i}.downsample.conv", x, stride=2, padding=one_sided)
        x = silu(self.norm("encoder.norm_out", self.middle("encoder", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x)).transpose(0, 2, 3, 1)

    def quantize(self, latents):
        """Codes [B, h, w, depth]: the nearest entry to what the depths before have left."""
        rest, codes = latents, []
        for i in range(self.depth):
            book = self.t[f"quantizer.codebooks.{i}.weight"][:-1]
            codes.append(((rest[..., None, :] - book) ** 2).sum(-1).argmin(-1))
            rest = rest - book[codes[-1]]
        return np.stack(codes, -1)

    def decode(self, codes):
        """Images [B, 3, H, W] of codes [B, h, w, depth]."""
        books = [self.t[f"quantizer.codebooks.{i}.weight"] for i in range(codes.shape[-1])]
        z = sum(book[codes[..., i]] for i, book in enumerate(books)).transpose(0, 3, 1, 2)
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z))
        x = self.middle("decoder", x)
        for i in reversed(range(self.levels)):
            x = self.level(f"decoder.up.{i}", x)
            if i > 0:
                x = x.repeat(2, axis=2).repeat(2, axis=3)
                x = self.conv(f"decoder.up.{i}.upsample.conv", x)
        return self.conv("decoder.conv_out", silu(self.norm("decoder.norm_out", x)))


# -- PatchGAN discriminator (arXiv:1611.07004) ----------------------------------------------------


def fake_discriminator(rng, *, width):
    """A random state dict of the discriminator with two layers."""
    shapes = {
        "main.0.weight": (width, 3, 4, 4),
        "main.0.bias": (width,),
        "main.2.weight": (2 * width, width, 4, 4),
        "main.5.weight": (4 * width, 2 * width, 4, 4),
        "main.8.weight": (1, 4 * width, 4, 4),
        "main.8.bias": (1,),
    }
    for index, channels in ((3, 2 * width), (6, 4 * width)):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"main.{index}.{part}"] = (channels,)
    counters = {f"main.{i}.num_batches_tracked": np.array(7) for i in (3, 6)}
    return fill(rng, shapes) | counters


def discriminate(tensors, images):
    """Evaluation-mode logits [B, 1, h, w] of images [B, 3, H, W]."""
    t = {name: x.astype(np.float64) for name, x in tensors.items()}
    pad = ((1, 1), (1, 1))

    def leaky(x):
        return np.where(x > 0, x, 0.2 * x)

    def batch_norm(i, x):
        mean, var, weight, bias = (
            t[f"main.{i}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * weight + bias

    x = leaky(convolve(images, t["main.0.weight"], t["main.0.bias"], 2, pad))
    x = leaky(batch_norm(3, convolve(x, t["main.2.weight"], None, 2, pad)))
    x = leaky(batch_norm(6, convolve(x, t["main.5.weight"], None, 1, pad)))
    return convolve(x, t["main.8.weight"], t["main.8.bias"], 1, pad)
