"""Small byte-level language models in plain PyTorch: a Transformer (pre-norm, RMSNorm, causal attention), an LSTM."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, dim]
        batch, length, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, dim))
        return x + self.down(nn.functional.gelu(self.up(self.mlp_norm(x))))


class LanguageModel(nn.Module):
    """Logits over 256 bytes, `[B, S, 256]`, for bytes `[B, S]`."""

    def __init__(self, dim: int = 256, layers: int = 4, heads: int = 8, length: int = 256):
        super().__init__()
        self.length = length
        self.bytes, self.positions = nn.Embedding(256, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def sample(self, prompt: bytes, count: int, generator: torch.Generator) -> bytes:
        """`prompt` continued by `count` bytes at temperature 0.7."""
        tokens = torch.tensor([list(prompt)], device=self.head.weight.device)
        for _ in range(count):
            tokens = torch.cat([tokens, _next(self(tokens[:, -self.length :]), generator)], 1)
        return bytes(tokens[0].tolist())


class LSTMLanguageModel(nn.Module):
    """Logits over 256 bytes, `[B, S, 256]`, for bytes `[B, S]`, from layers of LSTM."""

    def __init__(self, dim: int = 256, layers: int = 2):
        super().__init__()
        self.bytes, self.head = nn.Embedding(256, dim), nn.Linear(dim, 256)
        self.lstm = nn.LSTM(dim, dim, layers, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.bytes(tokens))[0])

    @torch.no_grad()
    def sample(self, prompt: bytes, count: int, generator: torch.Generator) -> bytes:
        """`prompt` continued by `count` bytes at temperature 0.7; the state is handed on from byte to byte."""
        tokens, state = torch.tensor([list(prompt)], device=self.head.weight.device), None
        unread = tokens
        for _ in range(count):
            output, state = self.lstm(self.bytes(unread), state)
            unread = _next(self.head(output), generator)
            tokens = torch.cat([tokens, unread], 1)
        return bytes(tokens[0].tolist())


def _next(logits: Tensor, generator: torch.Generator) -> Tensor:
    """`[1, 1]`: a byte to follow the last of `[1, S, 256]`."""
    probabilities = (logits[0, -1].float().cpu() / 0.7).softmax(0)
    return torch.multinomial(probabilities, 1, generator=generator)[None].to(logits.device)
