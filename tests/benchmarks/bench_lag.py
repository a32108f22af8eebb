"""What `rollout_lag=1` hides: seconds of an iteration through a server that answers at a stated speed.

    PYTHONPATH=. python tests/benchmarks/bench_lag.py --delay 6 --passes 2 12 32

The server is a process of its own that speaks vLLM's protocol, samples from the adapters that it is sent, and answers
no request before `--delay` seconds are over, however many there are: as a card that completes a batch at once. The base
is that of the tests. The policy's updates are as long as `--passes` says. Medians of wall-clock seconds without the
first two iterations; "generate" is what the server took, "train" an iteration less what it has waited for that.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.ppo import tiny
from tests.vllm_stand_in import Sampling, StandIn

TOKENS = 12  # more than the probe's completions have, by which those of the run are known
BATCH, MICRO = 8, 4


class Slow(StandIn):
    """Answers rollouts when a stated time is over."""

    def __init__(self, delay: float, **options: Any):
        super().__init__(**options)
        self.delay = delay

    def complete(self, handler: Any, body: dict[str, Any]) -> None:
        handler.due = time.monotonic() + (self.delay if body["max_tokens"] == TOKENS else 0.0)
        super().complete(handler, body)

    def send(self, handler: Any, content: Any, status: int = 200, cut: int | None = None) -> None:  # type: ignore
        if handler.path == "/v1/completions":
            time.sleep(max(handler.due - time.monotonic(), 0.0))
        super().send(handler, content, status, cut)


def serve(base: Path, delay: float) -> None:
    """Say the address, and answer until the other end of the standard input is closed."""
    with Slow(delay, **Sampling(base).hooks()) as server:
        print(server.url, flush=True)
        sys.stdin.read()


def run(world: Path, folder: Path, url: str, passes: int, lag: int, rollouts: int) -> dict[str, float]:
    """Median seconds of one run."""
    from transformers import PrinterCallback

    starts: list[float] = []
    generated: list[float] = []
    trainer = tiny.trainer(
        world,
        folder,
        dataset=tiny.prompts(BATCH * 4),
        vllm_server_url=url,
        rollout_lag=lag,
        max_completion_length=TOKENS,
        per_device_train_batch_size=MICRO,
        steps_per_generation=BATCH // MICRO,
        num_iterations=passes,
        max_steps=passes * rollouts * BATCH // MICRO,
        learning_rate=1e-4,
        update_kl_target=0.5,
        logging_steps=1000,
        guard=False,
    )
    trainer.remove_callback(PrinterCallback)
    engine, score = trainer.vllm_generation.engine, trainer._generate_and_score_completions
    complete, waited = engine._complete, []

    def timed(*given: Any) -> Any:
        start = time.perf_counter()
        found = complete(*given)
        generated.append(time.perf_counter() - start)
        return found

    def begun(inputs: Any) -> Any:
        starts.append(time.perf_counter())
        generate = trainer._generate

        def waiting(prompts: Any) -> Any:
            start = time.perf_counter()
            found = generate(prompts)
            waited.append(time.perf_counter() - start)
            return found

        trainer._generate = waiting
        try:
            return score(inputs)
        finally:
            trainer._generate = generate

    engine._complete, trainer._generate_and_score_completions = timed, begun
    trainer.train()
    iterations = [b - a for a, b in pairwise(starts)][2:]
    trained = [whole - wait for whole, wait in zip(iterations, waited[2:-1], strict=True)]
    engine.close()
    return {
        "iteration": statistics.median(iterations),
        "generate": statistics.median(generated[2:]),
        "train": statistics.median(trained),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=6.0, help="Seconds that the server takes for a rollout.")
    parser.add_argument("--passes", type=int, nargs="+", default=[2, 12, 32], help="Over a rollout: length of updates.")
    parser.add_argument("--rollouts", type=int, default=9)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve, args.delay)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        world = tiny.build(Path(folder) / "world")
        own = [sys.executable, __file__, "--serve", str(world / "base"), "--delay", str(args.delay)]
        with subprocess.Popen(own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            for passes in args.passes:
                for lag in (0, 1):
                    name = Path(folder) / f"{passes}-{lag}"
                    found = run(world, name, url, passes, lag, args.rollouts)
                    rows.append({"passes": passes, "lag": lag} | found)
            server.stdin.close()
    print("\n| passes | rollout_lag | generate, s | train, s | iteration, s | over max(generate, train) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        ratio = row["iteration"] / max(row["generate"], row["train"])
        figures = " | ".join(f"{row[name]:.2f}" for name in ("generate", "train", "iteration"))
        print(f"| {row['passes']} | {row['lag']} | {figures} | {ratio:.2f} |")
    print(json.dumps({"delay": args.delay, "rollouts": args.rollouts}))


if __name__ == "__main__":
    main()
