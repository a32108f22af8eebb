"""Several responses to one prompt as one sequence: the prompt is computed once, and padding hardly at all.

A row holds the tokens that the sequences of a group have in common, then the rest of each. Positions start again after
the common part, and the attention mask lets every token see the common part and what precedes it in its own sequence:
each sequence is computed as if it were alone. Rows of like length make a part, one pass of the model.

Which hidden state belongs to which token of which sequence is written down in flat indices, so that nobody needs to
know the layout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Sequences scored in one pass, for each one in a micro-batch of the update; that needs no more memory (docs/memory.md)
SCORED_PER_TRAINED = 2
PART_OVERHEAD = 256  # tokens that a further pass of the model is worth: fewer of padding are not worth one


@dataclass(slots=True)
class PackedBatch:
    """One pass of a model over packed sequences: b rows, L columns, n sequences, m response tokens; integers all.

    A flat place is row * L + column. Accelerate's loaders move it by `to`, as they do tensors.
    """

    input_ids: Tensor  # (b, L)
    position_ids: Tensor  # (b, L), counted in each sequence by itself
    attention_mask: Tensor  # (b, L), 0 for padding
    sequences: Tensor  # (n,), their numbers, counted through all groups
    ends: Tensor  # (n,), flat place of the token whose hidden state each is scored on
    targets: Tensor  # (m,), the response tokens
    sources: Tensor  # (m,), flat place of the token before each, whose hidden state predicts it
    owners: Tensor  # (m,), number of the sequence that each belongs to
    columns: Tensor  # (m,), its place in the response
    segments: Tensor | None = None  # (b, L), 0 for what a row's sequences share, k for the k-th's own, -1 for padding

    def to(self, device: torch.device | str | int | None, non_blocking: bool = False) -> "PackedBatch":
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """The same batch in page-locked memory: a loader with `pin_memory` calls this."""
        return self._each(Tensor.pin_memory)

    def model_inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the model takes: `input_ids`, `position_ids`, and an `attention_mask`.

        The mask is (b, L) where every row is one sequence, else additive (b, 1, L, L) of `dtype`: 0 where i may see j,
        that is j <= i, and j is common or of i's own sequence.
        """
        inputs = {name: getattr(self, name) for name in ("input_ids", "position_ids", "attention_mask")}
        if self.segments is None:
            return inputs
        width = self.segments.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=self.segments.device).tril()
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        seen = causal & ((key == 0) | (key == query)) & (key >= 0)
        seen |= torch.eye(width, dtype=torch.bool, device=seen.device)  # padding sees itself: no softmax of nothing
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return inputs | {"attention_mask": mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]}

    def _each(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {k: None if tensor is None else change(tensor) for k, tensor in tensors.items()}
        return PackedBatch(**changed)


class _Member(NamedTuple):
    number: int  # of the sequence, counted through all groups
    ids: list[int]
    start: int  # of its response
    end: int  # tokens up to and with the one that its score is read on


class _Row(NamedTuple):
    width: int
    common: int  # tokens that all members start with and that are laid out once
    members: list[_Member]


def pack(
    groups: Sequence[Sequence[list[int]]],
    starts: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    share: bool = True,
    max_columns: int | None = None,
    max_tokens: int | None = None,
    ends: Sequence[Sequence[int]] | None = None,
) -> list[PackedBatch]:
    """Lay out groups of token sequences in as few columns as pay off.

    Args:
        groups: For each group its K sequences of token ids, prompt and response, no padding. K may differ.
        starts: For each sequence where its response starts, from 1 to its length, where it has no token.
        pad_token_id: What fills rows of unequal length; it is never attended to.
        share: False lays every sequence out in a row of its own.
        max_columns: The widest row that the model can take; a group that would be wider is not shared.
        max_tokens: The largest part, padding included; a wider row is a part of its own.
        ends: For each sequence the number of tokens up to and with the one that its score is read on. Default: all.

    Returns:
        Parts, the widest first.

    Raises:
        ValueError: A group without sequences, or a start or an end outside its sequence.
    """
    if ends is None:
        ends = [[len(ids) for ids in group] for group in groups]
    rows: list[_Row] = []
    number = 0
    for group, group_starts, group_ends in zip(groups, starts, ends, strict=True):
        if not group:
            raise ValueError("a group has no sequence: leave out prompts without a response.")
        members = []
        for ids, start, end in zip(group, group_starts, group_ends, strict=True):
            if not 1 <= start <= len(ids):
                raise ValueError(
                    f"a response starts at token {start} of a sequence of {len(ids)} tokens: a prompt of at least one "
                    "token is needed."
                )
            if not 1 <= end <= len(ids):
                raise ValueError(
                    f"the score of a sequence of {len(ids)} tokens is to be read on token {end}: give 1 to {len(ids)}."
                )
            members.append(_Member(number, ids, start, end))
            number += 1
        common = _common_prefix(group) if share and len(group) > 1 else 0
        width = common + sum(len(ids) - common for ids in group)
        if common and (max_columns is None or width <= max_columns):
            rows.append(_Row(width, common, members))
        else:
            rows += [_Row(len(member.ids), 0, [member]) for member in members]
    rows.sort(key=lambda row: row.width)
    parts, stop = [], len(rows)
    for start in reversed(_cuts([row.width for row in rows], max_tokens)):
        parts.append(_laid_out(rows[start:stop], pad_token_id))
        stop = start
    return parts


def in_order(parts: Sequence[PackedBatch], per_sequence: Sequence[Tensor]) -> Tensor:
    """Concatenate per-sequence results of the parts, (n, ...) each, in the order of the sequences' numbers."""
    numbers = torch.cat([part.sequences for part in parts])
    return torch.cat(list(per_sequence))[numbers.argsort()]


def by_sequence(
    parts: Sequence[PackedBatch], per_token: Sequence[Tensor], shape: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Results for the response tokens of the parts, (m,) each, as one row per sequence.

    Args:
        parts, per_token: As in `in_order`.
        shape: (N, T), at least the number of sequences and the length of the longest response. Default: these.

    Returns:
        (values, mask), both (N, T): row i is sequence i, its response starting at column 0; values are 0 and mask is
        False where it has ended.
    """
    owners, columns = (torch.cat([getattr(part, name) for part in parts]) for name in ("owners", "columns"))
    if shape is None:
        count, longest = sum(len(part.sequences) for part in parts), int(columns.max()) + 1 if len(columns) else 0
        shape = count, longest
    values = torch.cat(list(per_token))
    mask = torch.zeros(shape, dtype=torch.bool, device=owners.device)
    mask = mask.index_put((owners, columns), torch.ones_like(owners, dtype=torch.bool))
    zeros = torch.zeros(shape, dtype=values.dtype, device=values.device)
    return zeros.index_put((owners, columns), values), mask


def _common_prefix(group: Sequence[list[int]]) -> int:
    """Length of what all sequences start with, at most one less than the shortest: each keeps a token of its own."""
    shortest = min(len(ids) for ids in group) - 1
    first, last = min(group), max(group)  # in lexicographic order: what these two share, all share
    for i in range(shortest):
        if first[i] != last[i]:
            return i
    return shortest


def _cuts(widths: list[int], max_tokens: int | None) -> list[int]:
    """Where parts start: rows of ascending width are cut where that saves most padding, while it is worth a pass."""
    starts, uncut = [], [(0, len(widths))] if widths else []
    while uncut:
        first, stop = uncut.pop()
        width = widths[stop - 1]
        saved, cut = max(((i - first) * (width - widths[i - 1]), i) for i in range(first + 1, stop + 1))
        if saved <= PART_OVERHEAD:
            if max_tokens is None or stop - first <= max(max_tokens // width, 1):
                starts.append(first)
                continue
            cut = stop - max(max_tokens // width, 1)
        uncut += [(first, cut), (cut, stop)]
    return sorted(starts)


def _laid_out(rows: list[_Row], pad_token_id: int) -> PackedBatch:
    width = max(row.width for row in rows)
    layout = {"input_ids": pad_token_id, "position_ids": 0, "attention_mask": 0, "segments": -1}
    grids = {name: torch.full((len(rows), width), fill, dtype=torch.long) for name, fill in layout.items()}
    flat: dict[str, list[int]] = {name: [] for name in ("sequences", "ends", "targets", "sources", "owners", "columns")}
    for r, row in enumerate(rows):
        common = row.common
        ids, positions, segments = list(row.members[0].ids[:common]), list(range(common)), [0] * common
        for k, member in enumerate(row.members, start=1):
            shift = r * width + len(ids) - common  # flat place of an own token, less its position
            length, response = len(member.ids), len(member.ids) - member.start
            ids += member.ids[common:]
            positions += range(common, length)
            segments += [k] * (length - common)
            places = [*range(r * width, r * width + common), *range(shift + common, shift + length)]
            flat["sequences"].append(member.number)
            flat["ends"].append(places[member.end - 1])
            flat["targets"] += member.ids[member.start :]
            flat["sources"] += places[member.start - 1 : -1]
            flat["owners"] += [member.number] * response
            flat["columns"] += range(response)
        for name, values in zip(layout, (ids, positions, [1] * row.width, segments), strict=True):
            grids[name][r, : row.width] = torch.tensor(values)
    if all(len(row.members) == 1 for row in rows):
        del grids["segments"]
    return PackedBatch(**grids, **{name: torch.tensor(values, dtype=torch.long) for name, values in flat.items()})
