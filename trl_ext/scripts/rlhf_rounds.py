"""What `trl-ext rlhf` does between its trainings: answers, pairs, labels; figures of each round; the judgement."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_ext.run_identity import data_facts, digest_of
from trl_ext.scripts.judging import (
    adapter_scores,
    ask_model,
    differing,
    judge_kind,
    member_scores,
    model_judge_of,
    open_judge,
    wait_for_people,
)
from trl_ext.scripts.rlhf_facts import BEGUN, begin, digest, done, ended_early, finish, model_facts
from trl_ext.scripts.rlhf_stages import Work, paying
from trl_ext.scripts.rlhf_summary import table_of
from trl_ext.scripts.running import write_json
from trl_ext.scripts.tables import print_table

NOISE = 0.25  # temperature of the embedded world's reader: about 7 of 10 labels agree with the gold reward
SAMPLED_AT_A_TIME = 128
RESAMPLES = 1000


def answer(work: Work, policy: Path, prompts: Any, path: Path, count: int) -> list[dict[str, Any]]:
    """Answers of a policy to each prompt, in a file that is gone on with; in the order of the prompts.

    A vLLM server samples them where it samples the rollouts.
    """
    from trl_ext import SharedBaseModel
    from trl_ext.generation.vllm_probe import checked_engine
    from trl_ext.generation.vllm_server import SamplingParameters
    from trl_ext.roles import read_adapter
    from trl_ext.rrhf import SamplingConfig, sample_responses
    from trl_ext.rrhf.response_log import read_records

    args = SamplingConfig(
        [f"nucleus:{count}" if work.training.top_p < 1 else f"temperature:{count}"],
        sampling_temperature=work.training.temperature,
        sampling_top_p=work.training.top_p,
        max_new_tokens=work.training.max_completion_length,
        sampling_batch_size=SAMPLED_AT_A_TIME,
        sampling_seed=work.training.seed,
    )
    model = SharedBaseModel(work.base, read_adapter(policy, "policy_adapter"), with_critic=False)
    engine = None
    if work.training.vllm_server_url is not None:
        encoder, seed = work.encoder, args.sampling_seed
        parameters = SamplingParameters(
            args.max_new_tokens, tuple(encoder.end_ids), args.sampling_temperature, args.sampling_top_p
        )
        engine = checked_engine(model, work.training, parameters, encoder.tokenizer, path.parent, owner=path, seed=seed)
    sample_responses(model, work.encoder, prompts, path, args, None, {"policy": digest(policy)}, engine)
    if engine is not None:
        engine.close()
    model.unload()
    return sorted(read_records(path), key=lambda row: row["index"])


def sampling_facts(work: Work, prompts: Any, *policies: Path) -> dict[str, Any]:
    """What answers hang on: the policies, the prompts, and how they are sampled."""
    names = ("seed", "temperature", "top_p", "max_completion_length", "chat_template_kwargs")
    options = {name: getattr(work.training, name) for name in names}
    return options | {"policies": [digest(each) for each in policies]} | data_facts("prompts", prompts)


def answers_path(folder: Path, facts: Mapping[str, Any]) -> Path:
    """A file of answers, named by what they hang on: those of other prompts are in another one."""
    return folder / f"answers_{digest_of([json.dumps(facts, sort_keys=True).encode()])}.jsonl"


# ---------------------------------------------------------------------- labels between two rounds


def label_round(work: Work, number: int, policy: Path, rewards: Sequence[Path], sets: Mapping[str, Any]) -> Any:
    """Labelled pairs of answers by the policy of the round before, as preferences; once written they stay.

    Args:
        work: What is shared.
        number: Of the round that they are for.
        policy: Of the round before.
        rewards: Of the round before: they say which pairs are worth a label, and the random share tests them.
        sets: Preferences so far, whose pairs are not chosen again.

    Raises:
        ValueError: No pair has got a label that decides, or there are labels from elsewhere.
    """
    from trl_ext.data import convert_rows
    from trl_ext.data.reading import read_json_rows
    from trl_ext.feedback.exchange import preference_rows
    from trl_ext.feedback.labels import read_labels
    from trl_ext.feedback.pairs import read_pairs, write_rows

    folder = work.round(number)
    path, labelled = folder / "pairs.jsonl", folder / "preferences.jsonl"
    names = ("labels_per_round", "sampled_prompts", "answers_per_prompt", "choose", "random_share")
    facts = model_facts(work) | {name: getattr(work.recipe, name) for name in names}
    facts |= sampling_facts(work, work.prompts, policy) | {"adapters": [digest(each) for each in rewards]}
    if not done(folder, facts):  # before any label is given: pairs that are labelled are never written again
        for stale in (labelled, folder / "before.json"):
            stale.unlink(missing_ok=True)
        write_rows(path, [choice.row() for choice in choose(work, number, policy, rewards, sets)])
        finish(folder, facts)
    labels = path.with_suffix(".labels")
    begin_labels(work.recipe, labels)
    if not labelled.is_file():
        pairs = read_pairs(path)
        give_labels(work, pairs, labels)
        rows, dropped = preference_rows(pairs, read_labels(labels))
        if not held_apart(rows, work.recipe)[0]:
            raise ValueError(f"{labels}: no label to train on. Label more pairs, or lower --random_share.")
        write_rows(labelled, rows)
        left = "".join(f", {count:,} left out: {reason}" for reason, count in dropped.items())
        again = f". To ask for those again, remove {labelled} before the round goes on" if dropped else ""
        work.show(f"Round {number}: {len(rows):,} labelled pairs{left}{again}")
    kept, tested = held_apart(list(read_json_rows(labelled)), work.recipe)  # type: ignore[arg-type]
    if tested and not (folder / "before.json").is_file():
        write_json(folder / "before.json", accuracy_on(work, rewards, tested))
    return convert_rows(kept)[0]


def begin_labels(recipe: Any, folder: Path) -> None:
    """Write down who labels a round, before the first label; labels of two sources are never pooled.

    Raises:
        ValueError: There are labels from elsewhere; names the source, or the file.
    """
    from trl_ext.feedback.judge import read_judge_prompt

    source = recipe.labels_from
    facts = {"labels_from": source}
    if source == "judge":
        facts |= {"judge": judge_kind(recipe)}
        facts |= {name: getattr(recipe, name) for name in ("judge_model", "judge_base_url")}
        facts["judge_prompt"] = digest_of([read_judge_prompt(recipe.judge_prompt).encode()])
    there = {path.stem for path in folder.glob("*.jsonl")}
    others = there & {"gold", "judge"} if source == "people" else there - {source}
    if others and not (folder / BEGUN).is_file():
        raise ValueError(
            f"{folder} holds labels of {', '.join(sorted(others))}, and --labels_from is {source}: labels of two "
            "sources are not mixed. Set that back, or remove the folder of this round and those of later ones."
        )
    begin(folder, facts)


def held_apart(rows: list[dict[str, Any]], recipe: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Labelled pairs to train on, and those drawn at random to test on."""
    if recipe.choose == "random":  # all of them are: the first ones, of an order without meaning
        count = round(recipe.random_share * len(rows))
        return rows[count:], rows[:count]
    return tuple([row for row in rows if (row["chosen_by"] == "random") == of] for of in (False, True))  # type: ignore[return-value]


def choose(work: Work, number: int, policy: Path, rewards: Sequence[Path], sets: Mapping[str, Any]) -> list[Any]:
    """Pairs to label: where the ensemble disagrees, beside a random share."""
    import numpy as np

    from trl_ext.feedback import choose as by
    from trl_ext.feedback.pairs import make_pair, read_pairs, unordered

    recipe, seed = work.recipe, work.training.seed + number
    count = min(recipe.sampled_prompts, len(work.prompts))
    drawn = random.Random(f"round-{number}-{work.training.seed}").sample(range(len(work.prompts)), count)
    path = work.round(number) / "responses.jsonl"
    work.show(f"Round {number}: the policy answers {count:,} prompts ...", flush=True)
    rows = answer(work, policy, work.prompts.select(drawn), path, recipe.answers_per_prompt)
    taken = {unordered(make_pair(row)) for rows_of in (*sets.values(), work.test_pairs) for row in rows_of}
    for earlier in range(2, number):  # whatever became of them: a part was held out, some have no label
        taken |= {unordered(pair) for pair in read_pairs(work.round(earlier) / "pairs.jsonl")}
    candidates, _ = by.make_candidates([{k: v for k, v in row.items() if k != "index"} for row in rows], taken)
    values = None
    if recipe.choose == "different":
        values = by.difference_values(candidates)
    elif recipe.choose == "information":
        places = [(i, k) for i, row in enumerate(rows) for k in range(len(row["responses"]))]
        prompts, texts = [rows[i]["prompt"] for i, _ in places], [rows[i]["responses"][k] for i, k in places]
        scores, spread = member_scores(work.base, work.encoder, rewards, prompts, texts)
        raw = (scores * spread).T.tolist()
        found = [dict(zip(places, own, strict=True)) for own in raw]
        values = by.information_gain(np.asarray(by.member_differences(candidates, found)))
    share = {} if values is None else {"random_share": recipe.random_share}
    return by.choose_pairs(candidates, recipe.labels_per_round, values, method=recipe.choose, seed=seed, **share)


def give_labels(work: Work, pairs: Sequence[Any], folder: Path) -> None:
    """Labels of all pairs that have none, from where the flags say; each is on disk before the next one."""
    from trl_ext.feedback.labels import LabelFile

    source = work.recipe.labels_from
    if source == "people":
        wait_for_people(pairs, folder, work.recipe.label_port, work.training.seed)
        return
    file = LabelFile(folder, source, [pair.id for pair in pairs])
    open_pairs = [pair for pair in pairs if pair.id not in file.labels]
    if source == "gold":
        for pair in open_pairs:
            file.label(pair.id, reader(pair, work.training.seed))
        return
    judge = model_judge_of(work.recipe)
    for record in ask_model(judge, open_pairs, open_judge(judge, folder.parent)):
        if record.verdict in ("a", "b", "tie"):
            file.label(record.pair.id, record.verdict)


def reader(pair: Any, seed: int) -> str:
    """What the embedded world's reader says, "a" or "b": a Bradley-Terry one with the gold reward in mind."""
    from trl_ext.toy.task import gold_score

    lead = gold_score(pair.a) - gold_score(pair.b)
    return "a" if random.Random(f"reader-{seed}-{pair.id}").random() < 1 / (1 + math.exp(-lead / NOISE)) else "b"


def accuracy_on(work: Work, rewards: Sequence[Path], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How often reward models agree with labels that they have not seen, on pairs drawn at random."""
    from trl_ext.text import message_text

    prompts = [row["prompt"] for row in rows] * 2
    texts = [message_text(row[name]) for name in ("chosen", "rejected") for row in rows]
    chosen, rejected = member_scores(work.base, work.encoder, rewards, prompts, texts)[0].chunk(2)
    right = (chosen.mean(1) > rejected.mean(1)).float().mean()
    return {"pairs": len(rows), "ensemble": float(right), "members": (chosen > rejected).float().mean(0).tolist()}


# ---------------------------------------------------------------------- figures of a round


def measure(work: Work, number: int, policy: Path, rewards: Sequence[Path]) -> dict[str, Any]:
    """How the round's policy scores on held-out prompts; kept in `measured.json`.

    Returns:
        `proxy`, the mean score of the reward models that PPO had, and `judge`, that of the one it never saw, both with
        the spread of reference responses as the unit; in the embedded world `gold`; `length` in characters.
    """
    folder = work.round(number)
    path = folder / "measured.json"
    prompts = work.held_out.select(range(min(work.recipe.judged_prompts, len(work.held_out))))
    facts = sampling_facts(work, prompts, policy)
    found: dict[str, Any] = {"round": number}
    hangs_on = facts | {"adapters": [digest(each) for each in rewards]}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if kept.get("of") == hangs_on:
        found = kept
    else:
        rows = answer(work, policy, prompts, answers_path(folder, facts), 1)
        texts = [row["responses"][0] for row in rows]
        scores, _ = member_scores(work.base, work.encoder, rewards, [row["prompt"] for row in rows], texts)
        found |= {
            "proxy": float(scores[:, : len(paying(rewards))].mean()),
            "judge": float(scores[:, -1].mean()),
            "spread": float(scores.std(1, unbiased=False).mean()),
            "length": sum(map(len, texts)) / len(texts),
            "of": hangs_on,
        }
        if work.in_world:
            from trl_ext.toy.task import gold_score

            found["gold"] = sum(map(gold_score, texts)) / len(texts)
    for name, place in (("accuracy", folder / "reward" / "accuracy.json"), ("before", folder / "before.json")):
        if place.is_file():
            found[name] = json.loads(place.read_text(encoding="utf-8"))
    why = ended_early(policy)
    if why is not None:
        found["ended_early"] = why
    write_json(path, found)
    return found


def report(work: Work, course: Sequence[Mapping[str, Any]]) -> None:
    """`rounds.json`, a table, and a picture where there are several rounds."""
    write_json(work.folder / "rounds.json", list(course))
    columns, rows = table_of(course)
    print_table("Rounds, on held-out prompts", columns, rows)
    for found in course:
        if "ended_early" in found:
            print(f"PPO-Max of round {found['round']} ended before its last step: {found['ended_early']}")
    if len(course) > 1:
        picture(course, work.folder / "rounds.png")


def picture(course: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what PPO was paid and what the others say, by round."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    numbers = [found["round"] for found in course]
    for name, label in (("proxy", "PPO's reward models"), ("judge", "held-out reward model"), ("gold", "gold reward")):
        if name in course[0]:
            axis.plot(numbers, [found[name] for found in course], marker="o", label=label)
    axis.set(xlabel="round", title="Score of held-out answers", xticks=numbers)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------- the judgement


def judge(work: Work, before: Path, after: Path, rewards: Sequence[Path]) -> dict[str, Any]:
    """The last policy, A, against the SFT policy, B, on held-out prompts: `judge/result.json`, and a table."""
    from trl_ext.feedback.judge import match_answers, read_answers
    from trl_ext.feedback.labels import read_labels
    from trl_ext.feedback.pairs import without_nan, write_rows
    from trl_ext.feedback.verdicts import judge_by_people, judge_by_scores
    from trl_ext.scripts.judging import show_result

    folder, recipe = work.folder / "judge", work.recipe
    folder.mkdir(exist_ok=True)
    prompts = work.held_out.select(range(min(recipe.judged_prompts, len(work.held_out))))
    folders = ((after.parent, after), (folder, before))  # the last policy's were written when its round was measured
    paths = [answers_path(where, sampling_facts(work, prompts, each)) for where, each in folders]
    for policy, path in zip((after, before), paths, strict=True):
        answer(work, policy, prompts, path, 1)
    pairs, _ = match_answers(read_answers(paths[0]), read_answers(paths[1]))
    asked = differing(pairs)
    write_rows(folder / "pairs.jsonl", [{"prompt": p.prompt, "answer_a": p.a, "answer_b": p.b} for p in asked])
    if recipe.judge == "adapter":
        scores = adapter_scores(work.base, work.encoder, [rewards[-1]], pairs, folder / "scores.jsonl")
        judged = judge_by_scores(pairs, scores)
    elif recipe.judge == "people":
        wait_for_people(asked, folder / "pairs.labels", recipe.label_port, work.training.seed)
        judged = judge_by_people(pairs, read_labels(folder / "pairs.labels"))
    else:
        by = model_judge_of(recipe)
        judged = ask_model(by, pairs, open_judge(by, folder))
    title = f"A: the tuned policy, B: the SFT policy, by {recipe.judge}"
    content, _ = show_result(judged, title, RESAMPLES, work.training.seed)
    if work.in_world:
        from trl_ext.toy.task import gold_score

        for side in ("a", "b"):
            content[f"gold_{side}"] = sum(gold_score(getattr(pair, side)) for pair in pairs) / len(pairs)
        print(f"gold reward      A {content['gold_a']:.3f}, B {content['gold_b']:.3f}")
    content["judge"] = recipe.judge
    write_json(folder / "result.json", without_nan(content))
    return content
