"""Padded batches as the packed ones that the roles' passes take."""

from trl_ext.ops.packing import pack


def packed(ids, mask, completion_length):
    """(B, L) prompts padded left and completions padded right to so many columns, as `parts` and `shape`."""
    sequences = [[row[kept.bool()].tolist()] for row, kept in zip(ids, mask, strict=True)]
    starts = [[n] for n in mask[:, :-completion_length].sum(1).tolist()]
    return {"parts": pack(sequences, starts, 0, share=False), "shape": (len(ids), completion_length)}
