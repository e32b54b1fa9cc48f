"""A decoder as loops over tokens and heads, float64 numpy, written from the formulas of the papers.

RMSNorm (arXiv:1910.07467), rotary embedding (arXiv:2104.09864), grouped queries (arXiv:2305.13245), SwiGLU
(arXiv:2002.05202), pre-norm residual blocks (arXiv:2307.09288); query and key norms as in Qwen 3 (arXiv:2505.09388).
"""

import numpy as np


def rms_norm(x, scale, eps):
    return scale * x / np.sqrt(np.mean(x * x) + eps)


def rotated(x, position, frequencies):
    """Channel i and channel i + d/2 are the real and imaginary part of a number turned by position * frequency."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequencies)
    return np.concatenate([turned.real, turned.imag])


def attention(params, x, positions, sees, frequencies, *, heads, kv_heads, eps):
    """x [T, D]; sees[i] lists the j that token i looks at. Returns [T, D]."""

    def project(name, token):
        out = token @ params[name]["kernel"]
        return out + params[name]["bias"] if "bias" in params[name] else out

    def head(name, i, index, count, norm):
        out = np.split(project(name, x[i]), count)[index]
        if norm in params:
            out = rms_norm(out, params[norm]["scale"], eps)
        return rotated(out, positions[i], frequencies)

    mixed = []
    for i in range(len(x)):
        per_head = []
        for h in range(heads):
            shared = h // (heads // kv_heads)
            query = head("q", i, h, heads, "q_norm")
            keys = [head("k", j, shared, kv_heads, "k_norm") for j in sees[i]]
            values = [np.split(project("v", x[j]), kv_heads)[shared] for j in sees[i]]
            weights = np.exp([query @ key / np.sqrt(len(query)) for key in keys])
            per_head.append(sum(w * v for w, v in zip(weights, values)) / np.sum(weights))
        mixed.append(np.concatenate(per_head))
    return np.stack(mixed) @ params["o"]["kernel"]


def mlp(params, x):
    gate = x @ params["gate"]["kernel"]
    return (gate / (1 + np.exp(-gate)) * (x @ params["up"]["kernel"])) @ params["down"]["kernel"]


def logits(params, tokens, *, heads, kv_heads, eps, frequencies, positions=None, sees=None):
    """One row of tokens, plain causal unless told otherwise. Returns [T, V]."""
    positions = range(len(tokens)) if positions is None else positions
    sees = [range(i + 1) for i in range(len(tokens))] if sees is None else sees
    x = params["embed"]["embedding"][np.asarray(tokens)]
    for layer in range(len(params["layers"]["attn_norm"]["scale"])):
        block = pick(params["layers"], layer)
        normed = np.stack([rms_norm(row, block["attn_norm"]["scale"], eps) for row in x])
        x = x + attention(block["attn"], normed, positions, sees, frequencies, heads=heads, kv_heads=kv_heads, eps=eps)
        x = x + mlp(block["mlp"], np.stack([rms_norm(row, block["mlp_norm"]["scale"], eps) for row in x]))
    x = np.stack([rms_norm(row, params["final_norm"]["scale"], eps) for row in x])
    return x @ (params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T)


def pick(tree, index):
    return {key: pick(value, index) if isinstance(value, dict) else value[index] for key, value in tree.items()}


def frequencies(head_dim, theta):
    return np.array([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)])


def llama3_frequencies(head_dim, theta, *, factor, low, high, original):
    """Frequency by frequency, by the wavelength in tokens, as the three cases are usually told."""
    scaled = []
    for frequency in frequencies(head_dim, theta):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            scaled.append(frequency)
        elif wavelength > original / low:
            scaled.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(scaled)


def layout(segments, parents=None):
    """Positions and who sees whom of one packed row, token by token; a padding token has position 0 and sees nobody."""
    positions, sees = [], []
    for i, segment in enumerate(segments):
        parent = 0 if parents is None else parents[i]
        own = [j for j in range(i) if segments[j] == segment]
        prompt = [j for j in range(len(segments)) if parent != 0 and segments[j] == parent]
        positions.append(len(own) + len(prompt) if segment != 0 else 0)
        sees.append([*[j for j in prompt if j <= i], *own, i] if segment != 0 else [])
    return positions, sees
