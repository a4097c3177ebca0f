"""QueCC as modules of torch put together, for pictures that divide into equal cells: the reference of `quecc`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PlainQueCC(nn.Module):
    """width: of the states. read: of all levels together. hidden: of the LLM. cell: patches, down and across."""

    def __init__(self, width: int, read: int, hidden: int, heads: int, cell: tuple[int, int], seed: int = 0) -> None:
        super().__init__()
        self.text = nn.Sequential(nn.Linear(hidden, width), nn.LayerNorm(width, eps=1e-6))
        self.query, self.key, self.value = (
            nn.Sequential(nn.Linear(read, inner), nn.GELU(), nn.Linear(inner, width), nn.LayerNorm(width, eps=1e-6))
            for read, inner in ((width, width // 2), (read, width // 4), (read, width))
        )
        self.shrink = nn.Conv2d(width, width, cell, stride=cell, groups=width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        norms = {id(module.weight) for module in self.modules() if isinstance(module, nn.LayerNorm)}
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=rng) / parameter[0].numel() ** 0.5
                parameter.copy_(noise * 2 if parameter.ndim > 1 else noise / 4 + (id(parameter) in norms))
                # A file of weights holds matrices in half precision, and biases of heads as matrices.
                if parameter.ndim > 1 or parameter is self.attention.in_proj_bias:
                    parameter.copy_(parameter.to(torch.bfloat16))

    @torch.no_grad()
    def forward(self, states: Tensor, levels: Tensor, question: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Of one picture. states: (n, width). levels: (n, read). question: (hidden,), or None.

        Returns (cells, hidden), row by row.
        """
        queries = self.shrink(self.asked(states, question).T.unflatten(1, grid)[None])[0]
        keys, values = (read(levels).unflatten(0, grid) for read in (self.key, self.value))
        height, width = self.shrink.kernel_size
        made = []
        for row in range(queries.shape[1]):
            for column in range(queries.shape[2]):
                rows = slice(row * height, (row + 1) * height)
                columns = slice(column * width, (column + 1) * width)
                key, value = (part[rows, columns].flatten(0, 1) for part in (keys, values))
                made.append(self.attention(queries[:, row, column][None], key, value)[0][0])
        return self.projector(torch.stack(made))

    def asked(self, states: Tensor, question: Tensor | None) -> Tensor:
        """(n, width) what queries are made of."""
        return self.query(states if question is None else states + self.text(question))

    @torch.no_grad()
    def by_cell(
        self, states: Tensor, levels: Tensor, question: Tensor | None, cells: list[list[int]], grid: tuple[int, int]
    ) -> dict[int, Tensor]:
        """The same for any rectangles of patches: the token of each, by the patch amid it (of two, the earlier)."""
        patches, keys, values = self.asked(states, question), self.key(levels), self.value(levels)
        kernel, tokens = self.shrink.weight[:, 0], {}
        for cell in cells:
            (top, left), (bottom, right) = divmod(cell[0], grid[1]), divmod(cell[-1], grid[1])
            height, width = bottom - top + 1, right - left + 1
            query = torch.zeros_like(patches[0])
            for patch in cell:
                row, column = patch // grid[1] - top, patch % grid[1] - left
                # The middle of the patch, as a part of the cell, stretched over the kernel.
                down = (2 * row + 1) * kernel.shape[1] // (2 * height)
                across = (2 * column + 1) * kernel.shape[2] // (2 * width)
                query += kernel[:, down, across] * patches[patch]
            query = query * kernel[0].numel() / len(cell) + self.shrink.bias
            read = self.attention(query[None], keys[cell], values[cell])[0][0]
            tokens[(top + bottom) // 2 * grid[1] + (left + right) // 2] = self.projector(read)
        return tokens

    def weights(self) -> dict[str, Tensor]:
        """The same as the method names them."""
        named = {
            "text.weight": self.text[0].weight,
            "text.bias": self.text[0].bias,
            "text.norm.weight": self.text[1].weight,
            "text.norm.bias": self.text[1].bias,
            "cell.weight": self.shrink.weight[:, 0],
            "cell.bias": self.shrink.bias,
            "attend.in.weight": self.attention.in_proj_weight.unflatten(0, (3, self.attention.num_heads, -1)),
            "attend.in.bias": self.attention.in_proj_bias.unflatten(0, (3, self.attention.num_heads, -1)),
            "attend.out.weight": self.attention.out_proj.weight,
            "attend.out.bias": self.attention.out_proj.bias,
        }
        for name in ("query", "key", "value"):
            first, _, second, norm = getattr(self, name)
            named |= {f"{name}.norm.weight": norm.weight, f"{name}.norm.bias": norm.bias}
            named |= {f"{name}.0.weight": first.weight, f"{name}.0.bias": first.bias}
            named |= {f"{name}.1.weight": second.weight, f"{name}.1.bias": second.bias}
        first, _, second = self.projector
        named |= {"project.0.weight": first.weight, "project.0.bias": first.bias}
        named |= {"project.1.weight": second.weight, "project.1.bias": second.bias}
        return {name: tensor.detach() for name, tensor in named.items()}
