"""Packed sequences: every token is found by its path, sees what it should, and no column is wasted."""

import copy
import pickle
import random
from dataclasses import fields
from itertools import combinations, pairwise

import pytest
import torch
from accelerate.utils import find_batch_size, send_to_device
from torch.distributed.utils import _to_kwargs
from torch.utils.data import DataLoader

from trl_ext.ops.packing import PART_OVERHEAD, _cuts, by_sequence, in_order, pack

PAD = 99


def random_groups(seed, groups=6, longest=9):
    """Groups of 1 to 5 sequences with a common prompt; (groups, starts)."""
    generator = random.Random(seed)
    found, starts = [], []
    for _ in range(groups):
        prompt = [generator.randrange(5) for _ in range(generator.randint(1, longest))]
        k = generator.randint(1, 5)
        found.append(
            [prompt + [generator.randrange(5) for _ in range(generator.randint(1, longest))] for _ in range(k)]
        )
        starts.append([len(prompt)] * k)
    return found, starts


def flat(groups):
    return [sequence for group in groups for sequence in group]


def seen_tokens(part, row, column):
    """The (token, position) pairs that a place sees, in order of position, by the mask that the model is given."""
    mask = part.model_inputs(torch.float32)["attention_mask"]
    columns = range(part.input_ids.shape[1])
    if mask.ndim == 2:
        seen = [j for j in columns if mask[row, j] and j <= column]
    else:
        seen = [j for j in columns if mask[row, 0, column, j] == 0]
    return sorted((int(part.position_ids[row, j]), int(part.input_ids[row, j])) for j in seen)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_every_token_of_every_sequence_sees_exactly_its_own_past(seed, share):
    groups, starts = random_groups(seed)
    sequences, all_starts = flat(groups), [start for group in starts for start in group]
    numbers = []
    for part in pack(groups, starts, PAD, share=share):
        width = part.input_ids.shape[1]
        numbers += part.sequences.tolist()
        for number, end in zip(part.sequences.tolist(), part.ends.tolist(), strict=True):
            ids = sequences[number]
            assert seen_tokens(part, end // width, end % width) == list(enumerate(ids))
        owners = part.owners.tolist()
        for number in set(owners):
            ids, start = sequences[number], all_starts[number]
            places = [i for i, owner in enumerate(owners) if owner == number]
            assert part.targets[places].tolist() == ids[start:]
            for t, source in enumerate(part.sources[places].tolist()):
                assert seen_tokens(part, source // width, source % width) == list(enumerate(ids[: start + t]))
    assert sorted(numbers) == list(range(len(sequences)))


def test_a_prompt_is_laid_out_once():
    groups = [[[1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 3, 7, 8]]]
    (part,) = pack(groups, [[3, 3, 3]], PAD)
    assert part.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert part.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 3, 4]]
    assert part.segments.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3]]
    assert part.ends.tolist() == [4, 5, 7]
    assert part.sources.tolist() == [2, 3, 2, 2, 6]


def test_what_responses_share_is_shared_too_but_each_keeps_a_token_of_its_own():
    (part,) = pack([[[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3]]], [[1, 1, 1]], PAD)
    assert part.input_ids.tolist() == [[1, 2, 3, 4, 3, 5, 3]]
    (part,) = pack([[[1, 2], [1, 2]]], [[1, 1]], PAD)  # duplicates
    assert part.input_ids.tolist() == [[1, 2, 2]]


def test_without_sharing_the_mask_is_that_of_padding():
    (part,) = pack([[[1, 2, 3], [1, 2]]], [[1, 1]], PAD, share=False)
    inputs = part.model_inputs(torch.float32)
    assert inputs["input_ids"].tolist() == [[1, 2, PAD], [1, 2, 3]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert inputs["position_ids"].tolist()[1] == [0, 1, 2]


def test_padding_sees_itself_and_is_seen_by_nothing_else():
    groups, starts = [[[1, 2, 3], [1, 4]], [[1] * 9, [1] * 8 + [2]]], [[1, 1], [2, 2]]
    parts = pack(groups, starts, PAD)
    (part,) = parts
    mask, padding = part.model_inputs(torch.float32)["attention_mask"][:, 0], part.segments < 0
    assert padding.any()
    for row, column in padding.nonzero().tolist():
        assert (mask[row, column] == 0).sum() >= 1
        assert mask[row, column, column] == 0
        assert (mask[row, ~padding[row], column] < -1e30).all()


def tokens(parts):
    return sum(part.input_ids.numel() for part in parts)


def test_sharing_never_lays_out_more_and_parts_pay_for_themselves():
    for seed in range(6):
        groups, starts = random_groups(seed, longest=200)
        shared, alone = pack(groups, starts, PAD), pack(groups, starts, PAD, share=False)
        cost = {k: tokens(v) + PART_OVERHEAD * len(v) for k, v in (("shared", shared), ("alone", alone))}
        assert cost["shared"] <= cost["alone"]
        widths = sorted(len(sequence) for sequence in flat(groups))
        one_part = len(widths) * widths[-1] + PART_OVERHEAD
        one_each = sum(widths) + PART_OVERHEAD * len(widths)
        assert cost["alone"] <= min(one_part, one_each)


def test_rows_of_very_different_width_become_parts_of_their_own():
    short, long = [[[1, 2]], [[1, 3]]], [[[1] * 1000]]
    parts = pack(short + long, [[1], [1], [1]], PAD)
    assert sorted(tuple(part.input_ids.shape) for part in parts) == [(1, 1000), (2, 2)]
    # The widest comes first: what does not fit into memory shows at once
    assert parts[0].input_ids.shape == (1, 1000)


def test_max_columns_is_respected():
    groups, starts = [[[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 7, 8]], [[1, 2], [1, 3]]], [[2] * 3, [1] * 2]
    assert max(part.input_ids.shape[1] for part in pack(groups, starts, PAD)) == 8
    limited = pack(groups, starts, PAD, max_columns=7)
    assert max(part.input_ids.shape[1] for part in limited) == 4
    assert sorted(number for part in limited for number in part.sequences.tolist()) == [0, 1, 2, 3, 4]


def test_results_come_back_in_the_order_of_the_sequences():
    groups, starts = random_groups(2, longest=300)
    parts = pack(groups, starts, PAD)
    assert len(parts) > 1
    sequences = flat(groups)
    ends = in_order(parts, [part.input_ids.flatten()[part.ends] for part in parts])
    assert ends.tolist() == [sequence[-1] for sequence in sequences]
    values, mask = by_sequence(parts, [part.targets.double() for part in parts])
    responses = [s[start:] for s, start in zip(sequences, (s for group in starts for s in group), strict=True)]
    assert mask.sum(1).tolist() == [len(response) for response in responses]
    assert values.shape[1] == max(len(response) for response in responses)
    for row, kept, response in zip(values, mask, responses, strict=True):
        assert row[kept].tolist() == response
        assert kept.tolist() == sorted(kept.tolist(), reverse=True)  # from column 0 on
        assert (row[~kept] == 0).all()


def test_a_response_without_a_token_has_an_empty_row():
    parts = pack([[[1, 2]], [[3, 4, 5]]], [[2], [1]], PAD)
    values, mask = by_sequence(parts, [part.targets for part in parts])
    assert (values.tolist(), mask.tolist()) == ([[0, 0], [4, 5]], [[False, False], [True, True]])
    ends = in_order(parts, [part.input_ids.flatten()[part.ends] for part in parts])
    assert ends.tolist() == [2, 5]
    parts = pack([[[1, 2]]], [[2]], PAD)
    assert by_sequence(parts, [torch.zeros(0)])[0].shape == (1, 0)
    assert by_sequence(parts, [torch.zeros(0)], (1, 3))[0].tolist() == [[0, 0, 0]]


def test_max_tokens_is_respected():
    groups, starts = random_groups(0, longest=40)
    sequences = flat(groups)
    widest = max(map(len, sequences))
    for limit in (1, widest, 3 * widest):
        parts = pack(groups, starts, PAD, share=False, max_tokens=limit)
        for part in parts:
            assert part.input_ids.numel() <= limit or len(part.input_ids) == 1
        ends = in_order(parts, [part.input_ids.flatten()[part.ends] for part in parts])
        assert ends.tolist() == [sequence[-1] for sequence in sequences]
    assert len(pack(groups, starts, PAD, share=False, max_tokens=1)) == len(sequences)


@pytest.mark.parametrize(
    ("groups", "starts", "message"),
    [
        ([[]], [[]], "no sequence"),
        ([[[1, 2]]], [[3]], "starts at token 3 of a sequence of 2"),
        ([[[1, 2]]], [[0]], "starts at token 0 of a sequence of 2"),
        ([[[1, 2], [1, 3]]], [[1]], "argument"),
    ],
)
def test_bad_input_is_named(groups, starts, message):
    with pytest.raises(ValueError, match=message):
        pack(groups, starts, PAD)


@pytest.mark.parametrize("share", [True, False])
def test_a_score_is_read_on_the_token_that_ends_say(share):
    groups, starts = random_groups(3)
    sequences = flat(groups)
    lengths = [1 + len(sequence) // (i % 3 + 1) - (i % 2) for i, sequence in enumerate(sequences)]
    lengths = [min(max(n, 1), len(sequence)) for n, sequence in zip(lengths, sequences, strict=True)]
    left, ends = list(lengths), []
    for group in groups:
        ends.append([left.pop(0) for _ in group])
    for part in pack(groups, starts, PAD, share=share, ends=ends):
        width = part.input_ids.shape[1]
        for number, end in zip(part.sequences.tolist(), part.ends.tolist(), strict=True):
            ids = sequences[number][: lengths[number]]
            assert seen_tokens(part, end // width, end % width) == list(enumerate(ids))
    default = pack(groups, starts, PAD, share=share)
    for here, there in zip(pack(groups, starts, PAD, share=share, ends=ends), default, strict=True):
        assert torch.equal(here.targets, there.targets)
        assert torch.equal(here.sources, there.sources)
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"2 tokens is to be read on token {wrong}"):
            pack([[[1, 2]]], [[1]], PAD, ends=[[wrong]])


def as_dict(part):
    return {field.name: getattr(part, field.name) for field in fields(part)}


def same(first, second):
    pairs = zip(as_dict(first).values(), as_dict(second).values(), strict=True)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("share", [True, False])
def test_a_batch_comes_through_what_carries_it_from_loader_to_model(share):
    """Pickling, accelerate's and the Trainer's ways to a device, and the keyword arguments of a wrapped forward."""
    (part, *_) = pack(*random_groups(1), PAD, share=share)
    assert same(pickle.loads(pickle.dumps(part)), part)
    assert same(copy.deepcopy(part), part)
    inputs = {"parts": [part], "prompts": torch.ones(3)}
    for moved in (
        send_to_device(inputs, "meta"),
        send_to_device(inputs, "meta", non_blocking=True),
        _to_kwargs((), send_to_device(inputs, "meta"), torch.device("meta"), False)[1][0],
    ):
        (there,) = moved["parts"]
        assert {name: tensor.device.type for name, tensor in as_dict(there).items() if tensor is not None} == {
            name: "meta" for name, tensor in as_dict(part).items() if tensor is not None
        }
    assert same(part.to("cpu"), part)
    assert find_batch_size({"prompts": torch.ones(3), "parts": [part]}) == 3


def test_workers_of_a_loader_hand_batches_over():
    groups, starts = random_groups(1)
    rows = list(zip(groups, starts, strict=True))
    loader = DataLoader(rows, batch_size=3, num_workers=1, collate_fn=collate, multiprocessing_context="fork")
    for i, parts in enumerate(loader):
        expected = pack(groups[3 * i : 3 * i + 3], starts[3 * i : 3 * i + 3], PAD)
        assert all(same(a, b) for a, b in zip(parts, expected, strict=True))


def collate(rows):
    return pack(*zip(*rows, strict=True), PAD)


def test_no_groups_make_no_parts():
    assert pack([], [], 0) == []


@pytest.mark.parametrize("max_tokens", [None, 600])
def test_cuts_lay_out_hardly_more_than_the_best_ones(max_tokens):
    """Of all ways to cut 8 rows, in tokens and `PART_OVERHEAD` a part; over many draws the mean is within 2 %."""
    generator, laid_out, fewest = random.Random(0), 0, 0
    for _ in range(100):
        widths = sorted(generator.randint(10, 500) for _ in range(8))

        def cost(starts, widths=widths):
            parts = [(stop - start, widths[stop - 1]) for start, stop in pairwise([*starts, len(widths)])]
            fits = all(max_tokens is None or rows == 1 or rows * width <= max_tokens for rows, width in parts)
            return sum(rows * width + PART_OVERHEAD for rows, width in parts) if fits else float("inf")

        ways = ([0, *cuts] for k in range(8) for cuts in combinations(range(1, 8), k))
        laid_out += cost(_cuts(widths, max_tokens))
        fewest += min(map(cost, ways))
    assert fewest <= laid_out < 1.02 * fewest
