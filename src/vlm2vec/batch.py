"""Model inputs of several examples as one value, and grouping of rows into batches by tokens.

Shapes: B examples, L tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass
class Batch:
    """Model inputs of B examples. They can be split, moved and joined without knowledge of the backbone.

    Attributes:
        tensors: By name. The first dimension is the example, unless the name is in `rows`.
        rows: For each packed tensor (such as the images of all examples in sequence), the number of its rows that
            belong to each example, shape [B].
        padded: Names of tensors [B, L, ...] that share the token dimension of `attention_mask`. Splitting a batch drops
            positions that are padding in all remaining examples.
        fill: Padding value of `input_ids`. Other tensors are padded with zeros.
        left: Whether padding comes before the tokens.
        dropped: Text tokens of each example that exceeded the model's limit and were dropped, length B. Empty: none.
        host: Names of tensors that stay on the CPU, where the model reads their values.
    """

    tensors: dict[str, torch.Tensor]
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    padded: tuple[str, ...] = ("input_ids", "attention_mask")
    fill: int = 0
    left: bool = False
    dropped: tuple[int, ...] = ()
    host: tuple[str, ...] = ()

    @staticmethod
    def join(parts: Sequence[Batch]) -> Batch:
        """Concatenates batches in order and pads to the longest example. Batches without images may be among them."""
        import torch

        joined = dataclasses.replace(parts[0], tensors={}, rows={}, dropped=())
        if any(part.dropped for part in parts):
            joined.dropped = tuple(count for part in parts for count in part.dropped or (0,) * len(part))
        for name in dict.fromkeys(name for part in parts for name in part.tensors):
            packed = any(name in part.rows for part in parts)
            if packed:
                counts = [part.rows.get(name, torch.zeros(len(part), dtype=torch.long)) for part in parts]
                joined.rows[name] = torch.cat(counts)
            tensors = [part.tensors[name] for part in parts if name in part.tensors]
            if not packed and len(tensors) < len(parts):  # a token tensor that only examples with images have
                like = next(iter(tensors))
                tensors = [part.tensors.get(name, _blank(like, part)) for part in parts]
            left = joined.left and name in joined.padded
            value = joined.fill if name == "input_ids" else 0
            joined.tensors[name] = torch.cat(_same_shape(tensors, value, left))
        return joined

    def features(self) -> dict[str, Any]:
        """The batch as one flat dict, the form in which sentence-transformers moves inputs to a device."""
        rows = {f"rows.{name}": counts for name, counts in self.rows.items()}
        return {**self.tensors, **rows, "batch": dataclasses.replace(self, tensors={}, rows={})}

    @staticmethod
    def of_features(features: dict[str, Any]) -> Batch:
        """The batch of such a dict, whose entry "batch" is removed. Counts and `host` are on the CPU again."""
        empty: Batch = features.pop("batch")
        tensors, rows = {}, {}
        for name, value in features.items():
            if name.startswith("rows."):
                rows[name.removeprefix("rows.")] = value.cpu()
            else:
                tensors[name] = value.cpu() if name in empty.host else value
        return dataclasses.replace(empty, tensors=tensors, rows=rows)

    def __len__(self) -> int:
        for name, tensor in self.tensors.items():
            if name not in self.rows:
                return int(tensor.shape[0])
        raise AssertionError("a batch needs one tensor with an example dimension")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor of that name, or None."""
        return self.tensors.get(name)

    def slice(self, start: int, stop: int) -> Batch:
        """Examples `start` to `stop` - 1 with their packed rows. Padding beyond the longest is dropped."""
        tensors = {}
        for name, tensor in self.tensors.items():
            if name in self.rows:
                first = int(self.rows[name][:start].sum())
                tensors[name] = tensor[first : first + int(self.rows[name][start:stop].sum())]
            else:
                tensors[name] = tensor[start:stop]
        rows = {name: counts[start:stop] for name, counts in self.rows.items()}
        dropped = self.dropped[start:stop]
        return dataclasses.replace(self, tensors=tensors, rows=rows, dropped=dropped)._trimmed()

    def select(self, rows: Sequence[int]) -> Batch:
        """These examples in this order with their packed rows. Padding beyond the longest is dropped."""
        import torch

        index = torch.as_tensor(rows, dtype=torch.long)
        tensors = {}
        for name, tensor in self.tensors.items():
            if name in self.rows:
                tensors[name] = _blocks(tensor, self.rows[name].tolist(), rows)
            else:
                tensors[name] = tensor[index.to(tensor.device)]
        counts = {name: numbers[index] for name, numbers in self.rows.items()}
        dropped = tuple(self.dropped[row] for row in rows) if self.dropped else ()
        return dataclasses.replace(self, tensors=tensors, rows=counts, dropped=dropped)._trimmed()

    def lengths(self) -> list[int]:
        """Number of tokens of each example without padding. Visual tokens count if they are among the token ids."""
        mask = self.tensors.get("attention_mask")
        return [1] * len(self) if mask is None else [int(count) for count in mask.sum(dim=1)]

    def split(self, chunk_size: int) -> Iterator[Batch]:
        """Mini-batches of at most `chunk_size` examples in order. The last may be smaller."""
        for start in range(0, len(self), chunk_size):
            yield self.slice(start, min(start + chunk_size, len(self)))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device. A GPU copies from pinned memory, so the host does not wait for the copy."""
        import torch

        on_gpu = torch.device(device).type == "cuda"
        moved = dict(self.tensors)
        for name, tensor in self.tensors.items():
            if name not in self.host:
                pinned = tensor.pin_memory() if on_gpu and tensor.device.type == "cpu" else tensor
                moved[name] = pinned.to(device, non_blocking=on_gpu)
        return dataclasses.replace(self, tensors=moved)

    def _trimmed(self) -> Batch:
        mask = self.tensors.get("attention_mask")
        if mask is None or len(mask) == 0:
            return self
        used = mask.any(dim=0).nonzero()
        first, last = int(used[0]), int(used[-1]) + 1
        for name in self.padded:
            if name in self.tensors:
                self.tensors[name] = self.tensors[name][:, first:last]
        return self


def _blocks(tensor: torch.Tensor, counts: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
    """The blocks of rows of these examples. Copying whole blocks is several times faster than an index of single rows.

    Not `torch.cat`: under autocast it changes data types, and fails for float16 on a CPU.
    """
    ends = list(accumulate(counts))
    chosen = tensor.new_empty(sum(counts[row] for row in rows), *tensor.shape[1:])
    start = 0
    for row in rows:
        stop = start + counts[row]
        chosen[start:stop] = tensor[ends[row] - counts[row] : ends[row]]
        start = stop
    return chosen


def _blank(like: torch.Tensor, part: Batch) -> torch.Tensor:
    """Zeros for every token of `part`, with the inner shape of `like` [B, L, ...]."""
    return like.new_zeros(*part["input_ids"].shape, *[0] * (like.ndim - 2))


def _same_shape(tensors: Sequence[torch.Tensor], value: int, left: bool) -> list[torch.Tensor]:
    """Pads tensors to a common shape, except in the first dimension.

    Args:
        tensors: All with the same number of dimensions.
        value: Padding value.
        left: Whether the second dimension (tokens) is padded at its start.
    """
    from torch.nn.functional import pad

    full = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [want - size for want, size in zip(full, tensor.shape[1:], strict=True)]
        sides = [(lack, 0) if left and dim == 0 else (0, lack) for dim, lack in enumerate(missing)]
        gaps = [gap for side in reversed(sides) for gap in side]  # last dim first
        padded.append(pad(tensor, gaps, value=value) if any(missing) else tensor)
    return padded


def cut_by_tokens(
    lengths: Sequence[int], max_rows: int | None, max_tokens: int | None, enough: int | None = None
) -> list[list[int]]:
    """Groups rows of similar length, longest first. Padding stays low, and the first chunk needs the most memory.

    Args:
        lengths: Tokens of each row, visual tokens included.
        max_rows: Maximum rows per chunk. None: no limit.
        max_tokens: Maximum tokens per chunk, padding included (rows times its longest row). None: no limit. A row
            longer than this becomes a chunk alone.
        enough: If a chunk has at least this number of tokens, rows more than a quarter shorter than its longest row
            start a new chunk, which saves padding. None: no such limit.

    Returns:
        Positions in `lengths`, one list per chunk.
    """
    chunks: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        fits = chunks and (max_rows is None or len(chunks[-1]) < max_rows)
        longest = lengths[chunks[-1][0]] if chunks else 0
        if fits and enough is not None and len(chunks[-1]) * longest >= enough:
            fits = 4 * lengths[row] >= 3 * longest
        if fits and (max_tokens is None or (len(chunks[-1]) + 1) * longest <= max_tokens):
            chunks[-1].append(row)
        else:
            chunks.append([row])
    return chunks
