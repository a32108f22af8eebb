"""Run by test_two_processes.py, once for each rank: python two_processes.py RANK RENDEZVOUS_FILE RESULT_FILE"""

import json
import os
import sys

import torch
import torch.distributed as dist

from trl_ext.ops.masking import masked_whiten
from trl_ext.ops.moments import RunningMoments

SCORES = [  # batches of (rank 0, rank 1): different lengths, and nothing at all from one of them
    ([1.0, 2.0, 4.0], [3.0]),
    ([], [10.0, -2.0]),
    ([0.5, 1.5], [3.0, 3.0, 5.0, -20.0]),
]
VALUES = ([[1.0, 2.0, 99.0]], [[6.0, 7.0, -3.0]])
MASKS = ([[1, 1, 0]], [[1, 1, 1]])


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(x)
    return x


def main() -> None:
    rank, folder = int(os.environ["RANK"]), sys.argv[1]
    dist.init_process_group("gloo")
    moments, seen = RunningMoments(), []
    for batch in SCORES:
        moments.update(torch.tensor(batch[rank]))
        seen.append([moments.count, moments.mean, moments.std])

    errors = []
    for bad in ([float("nan")], [1.0]), ([], []):  # bad on rank 0 only; empty on both
        try:
            moments.update(torch.tensor(bad[rank]))
        except ValueError as error:
            errors.append(str(error))
    whitened = masked_whiten(torch.tensor(VALUES[rank]), torch.tensor(MASKS[rank]), reduce=all_reduce)
    nothing = masked_whiten(torch.tensor(VALUES[rank]), torch.tensor(MASKS[rank]) * rank, reduce=all_reduce)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(
            {
                "seen": seen,
                "after_errors": moments.state_dict(),
                "errors": errors,
                "whitened": whitened.tolist(),
                "nothing_on_rank_0": nothing.tolist(),
            },
            file,
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
