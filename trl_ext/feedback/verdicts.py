"""Verdicts that need no prompt: by the scores of reward models, and by people's labels."""

from collections.abc import Iterable, Sequence

from trl_ext.feedback.exchange import check_labels, count_votes
from trl_ext.feedback.judge import Judged
from trl_ext.feedback.labels import Label
from trl_ext.feedback.pairs import Pair


def judge_by_scores(pairs: Sequence[Pair], scores: Sequence[tuple[float, float] | None]) -> list[Judged]:
    """The answer with the higher score wins; equal answers and equal scores are ties.

    A reward model scores each answer alone, so both orders say the same: no verdict is inconsistent.

    Args:
        pairs: N.
        scores: Of the answers of A and of B, N; None where they could not be scored, which is a failure.

    Raises:
        ValueError: Not one for each pair.
    """
    if len(pairs) != len(scores):
        raise ValueError(f"{len(scores)} scores for {len(pairs)} pairs: give one for each.")
    found = []
    for pair, both in zip(pairs, scores, strict=True):
        if pair.a.strip() == pair.b.strip():
            verdict = "tie"
        elif both is None:
            found.append(Judged(pair, "failed", False, (None, None), ("no score: longer than the model can read",) * 2))
            continue
        else:
            verdict = "a" if both[0] > both[1] else "b" if both[0] < both[1] else "tie"
        found.append(Judged(pair, verdict, True, (verdict, verdict)))
    return found


def judge_by_people(pairs: Sequence[Pair], labels: Iterable[Label]) -> list[Judged]:
    """What most annotators say of each pair; as many on both sides are a tie.

    Where one answer is empty nobody is asked, and the other one wins.

    Each annotator sees a pair in one order, drawn for them, so no verdict is inconsistent; `trl-ext agreement` says how
    far they agree. A pair without a label has failed, and counts for nothing else; equal answers are ties.

    Args:
        pairs: a is the answer of policy A, b of B.
        labels: Of these pairs.

    Raises:
        ValueError: Labels of other pairs.
    """
    votes, found = count_votes(check_labels(pairs, labels)), []
    for pair in pairs:
        vote = votes.get(pair.id)
        if pair.a.strip() == pair.b.strip():
            found.append(Judged(pair, "tie", True, ("tie", "tie")))
        elif not pair.a.strip() or not pair.b.strip():
            verdict = "a" if pair.a.strip() else "b"
            found.append(Judged(pair, verdict, True, (verdict, verdict)))
        elif vote is None:
            found.append(Judged(pair, "failed", False, (None, None), ("no label: nobody has labelled it",)))
        else:
            verdict = "tie" if vote.soft_label == 0.5 else "a" if vote.soft_label > 0.5 else "b"
            found.append(Judged(pair, verdict, True, (verdict, verdict)))
    return found
