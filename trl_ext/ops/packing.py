"""Several responses to one prompt as one sequence: the prompt is computed once, and padding hardly at all.

A row holds the tokens that the sequences of a group have in common, then the rest of each. Positions start again after
the common part, and the attention mask lets every token see the common part and what precedes it in its own sequence:
each sequence is computed as if it were alone. Rows of like length make a part, one pass of the model.

Which hidden state belongs to which token of which sequence is written down in flat indices, so that nobody needs to
know the layout.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Sequences scored in one pass, for each one in a micro-batch of the update; that needs no more memory (docs/memory.md)
SCORED_PER_TRAINED = 2
PART_OVERHEAD = 256  # tokens that a further pass of the model is worth: fewer of padding are not worth one

Part = dict[str, Tensor]


def pack(
    groups: Sequence[Sequence[list[int]]],
    starts: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    share: bool = True,
    max_columns: int | None = None,
    max_tokens: int | None = None,
) -> list[Part]:
    """Lay out groups of token sequences in as few columns as pay off.

    Args:
        groups: For each group its K sequences of token ids, prompt and response, no padding. K may differ.
        starts: For each sequence where its response starts, from 1 to its length, where it has no token.
        pad_token_id: What fills rows of unequal length; it is never attended to.
        share: False lays every sequence out in a row of its own.
        max_columns: The widest row that the model can take; a group that would be wider is not shared.
        max_tokens: The largest part, padding included; a wider row is a part of its own.

    Returns:
        Parts, each a dict of tensors for `part_inputs` and the reader of its hidden states. With b rows and L columns,
        n sequences in it and m response tokens:

        `input_ids`, `position_ids`, `attention_mask` (b, L); `sequences` (n,): their numbers, counted through all
        groups; `ends` (n,): flat places (row * L + column) of their last tokens; `targets` (m,): response tokens;
        `sources` (m,): flat place of the token before each, whose hidden state predicts it; `owners` (m,): number of
        the sequence that each belongs to; `columns` (m,): its place in the response. And `segments` (b, L) where a row
        holds several sequences: 0 for what they have in common, k for the own tokens of the k-th, -1 for padding.

    Raises:
        ValueError: A group without sequences, or a start outside its sequence.
    """
    rows, number = [], 0
    for group, group_starts in zip(groups, starts, strict=True):
        if not group:
            raise ValueError("a group has no sequence: leave out prompts without a response.")
        for ids, start in zip(group, group_starts, strict=True):
            if not 1 <= start <= len(ids):
                raise ValueError(
                    f"a response starts at token {start} of a sequence of {len(ids)} tokens: a prompt of at least one "
                    "token is needed."
                )
        numbered = list(range(number, number + len(group)))
        number += len(group)
        common = _common_prefix(group) if share and len(group) > 1 else 0
        width = common + sum(len(ids) - common for ids in group)
        if common and (max_columns is None or width <= max_columns):
            rows.append((width, common, list(zip(numbered, group, group_starts, strict=True))))
        else:
            rows += [(len(ids), 0, [(i, ids, s)]) for i, ids, s in zip(numbered, group, group_starts, strict=True)]
    rows.sort(key=lambda row: row[0])
    parts, stop = [], len(rows)
    for start in reversed(_cuts([row[0] for row in rows], max_tokens)):
        parts.append(_part(rows[start:stop], pad_token_id))
        stop = start
    return parts


def part_inputs(part: Part, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the model takes: `input_ids`, `position_ids`, and an `attention_mask`.

    The mask is (b, L) where every row is one sequence, else additive (b, 1, L, L) of `dtype`: 0 where i may see j, that
    is j <= i, and j is common or of i's own sequence.
    """
    inputs = {name: part[name] for name in ("input_ids", "position_ids", "attention_mask")}
    if "segments" not in part:
        return inputs
    segments = part["segments"]
    width = segments.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    seen = causal & ((key == 0) | (key == query)) & (key >= 0)
    seen |= torch.eye(width, dtype=torch.bool, device=segments.device)  # padding sees itself: no softmax of nothing
    mask = torch.zeros(seen.shape, dtype=dtype, device=segments.device)
    return inputs | {"attention_mask": mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]}


def in_order(parts: Sequence[Part], per_sequence: Sequence[Tensor]) -> Tensor:
    """Concatenate per-sequence results of the parts, (n, ...) each, in the order of the sequences' numbers."""
    numbers = torch.cat([part["sequences"] for part in parts])
    return torch.cat(list(per_sequence))[numbers.argsort()]


def by_sequence(
    parts: Sequence[Part], per_token: Sequence[Tensor], shape: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Results for the response tokens of the parts, (m,) each, as one row per sequence.

    Args:
        parts, per_token: As in `in_order`.
        shape: (N, T), at least the number of sequences and the length of the longest response. Default: these.

    Returns:
        (values, mask), both (N, T): row i is sequence i, its response starting at column 0; values are 0 and mask is
        False where it has ended.
    """
    owners, columns = (torch.cat([part[name] for part in parts]) for name in ("owners", "columns"))
    if shape is None:
        count, longest = sum(len(part["sequences"]) for part in parts), int(columns.max()) + 1 if len(columns) else 0
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
    """Where to cut rows of ascending width into parts, so that tokens, padding and `PART_OVERHEAD`, are fewest."""
    best, cut = [0], [0]
    for stop in range(1, len(widths) + 1):
        width = widths[stop - 1]
        first = 0 if max_tokens is None else max(stop - max(max_tokens // width, 1), 0)
        costs = [best[start] + (stop - start) * width + PART_OVERHEAD for start in range(first, stop)]
        best.append(min(costs))
        cut.append(first + costs.index(best[-1]))
    starts, stop = [], len(widths)
    while stop > 0:
        stop = cut[stop]
        starts.append(stop)
    return starts[::-1]


def _part(rows: list[tuple[int, int, list[Any]]], pad_token_id: int) -> Part:
    width = max(row[0] for row in rows)
    layout = {"input_ids": pad_token_id, "position_ids": 0, "attention_mask": 0, "segments": -1}
    grids = {name: torch.full((len(rows), width), fill, dtype=torch.long) for name, fill in layout.items()}
    flat: dict[str, list[int]] = {name: [] for name in ("sequences", "ends", "targets", "sources", "owners", "columns")}
    for r, (used, common, members) in enumerate(rows):
        ids, positions, segments = list(members[0][1][:common]), list(range(common)), [0] * common
        for k, (number, sequence, start) in enumerate(members, start=1):
            shift = r * width + len(ids) - common  # flat place of an own token, less its position
            own, response = len(sequence) - common, len(sequence) - start
            ids += sequence[common:]
            positions += range(common, len(sequence))
            segments += [k] * own
            places = [*range(r * width, r * width + common), *range(shift + common, shift + len(sequence))]
            flat["sequences"].append(number)
            flat["ends"].append(places[-1])
            flat["targets"] += sequence[start:]
            flat["sources"] += places[start - 1 : -1]
            flat["owners"] += [number] * response
            flat["columns"] += range(response)
        for name, values in zip(layout, (ids, positions, [1] * used, segments), strict=True):
            grids[name][r, :used] = torch.tensor(values)
    if all(len(members) == 1 for _, _, members in rows):
        del grids["segments"]
    return grids | {name: torch.tensor(values, dtype=torch.long) for name, values in flat.items()}
