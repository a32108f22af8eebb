"""The pages that `--help` shows of the commands around labels and judgements; see `pages`."""

from trl_ext.scripts.pages import CONFIG, LENGTHS, MODEL, RUN, STEPS, WORLD, Page

BASE = (("model_name_or_path", "", "The base; default: what the adapter names"), *MODEL[1:3])

RLHF = Page(
    "SFT, reward models, PPO-Max and a judgement on one base loaded once, in rounds: between two, answers are chosen, "
    "labelled and learned from. The same command goes on where a run was stopped: what is there is not repeated.",
    (
        "trl-ext rlhf                   # the embedded world: no download, minutes on a CPU",
        "trl-ext rlhf --rounds 3        # and label, train and tune again, twice",
        "trl-ext rlhf --model_name_or_path MODEL --load_in_4bit true --output_dir out \\",
        "    --sft_dataset demonstrations.jsonl --preferences Anthropic/hh-rlhf --prompts prompts.jsonl",
    ),
    {
        "Model and data": (
            CONFIG,
            ("output_dir", "", "Where the stages go: sft, round_1/reward, round_1/ppo, judge"),
            *MODEL,
            ("sft_dataset", "", "Demonstrations: prompt and completion, or messages"),
            ("policy_adapter", "", "LoRA adapter in place of the SFT stage"),
            ("preferences", "", "Preferences of the first round: Hub id, folder, file"),
            ("preferences_test", "", "To test on; default: a tenth of them, by prompt"),
            ("prompts", "", "Prompts of PPO; default: those of the preferences"),
            ("prompts_test", "", "Prompts to judge on; default: held out of the others"),
        ),
        "Stages": (
            ("sft_config", "sft", "Options of SFTConfig: a yaml file, or its name"),
            ("reward_config", "reward", "Options of RewardModelConfig: a yaml file, or its name"),
            ("members", "3", "Reward models; the last one judges, PPO has the others"),
            ("learning_rate", "0.0001", "Of PPO: where the policy's learning rate starts"),
            ("kl_target", "6", "KL per completion that beta holds, nats"),
            ("max_completion_length", "512", "Longest completion, tokens"),
        ),
        "Rounds and judge": (
            ("rounds", "1", "How often reward models and policy are trained"),
            ("labels_per_round", "300", "Pairs that are labelled between two rounds"),
            ("labels_from", "", "judge, people, or the world's gold"),
            ("choose", "information", "Pairs by information, random or different"),
            ("judge", "adapter", "adapter (the last one), endpoint, local, people or none"),
            ("judge_model", "", "Of endpoint: its name there; of local: a folder"),
            ("judged_prompts", "256", "Held-out prompts that policies answer"),
        ),
        "Batches and memory": (*STEPS, *LENGTHS),
        "Run": (*(row for row in RUN if row[0] in ("seed", "report_to")), *WORLD),
    },
)

CHOOSE = Page(
    "Which pairs of answers to label next, by what a label would tell about a reward ensemble. A share is drawn at "
    "random (`chosen_by`): hold it out, and measure the reward model on it.",
    (
        "trl-ext choose --responses responses.jsonl --reward_adapter out/rm1 out/rm2 out/rm3 \\",
        "    --count 300 --output pairs.jsonl",
        "trl-ext choose --responses responses.jsonl --method random --output pairs.jsonl",
    ),
    {
        "What": (
            ("responses", "", "jsonl with prompt and responses, as trl-ext sample writes it"),
            ("output", "", "jsonl file of pairs that is written"),
            ("count", "100", "Pairs to choose"),
            ("method", "information", "information (needs reward adapters), random, different"),
            ("random_share", "0.2", "Share that is drawn at random, for evaluation"),
            ("per_prompt", "1", "Pairs of one prompt at most"),
            ("exclude", "", "Files of pairs that are not to be chosen again"),
            ("seed", "0", "Of the draws"),
        ),
        "Reward models": (
            ("reward_adapter", "", "At least two adapters of reward models on one base"),
            *BASE,
            ("batch_size", "16", "Pairs scored at a time"),
            ("max_length", "1024", "Longer responses are not chosen, and counted"),
        ),
    },
)

LABEL = Page(
    "The label page: which of two answers is better? Every label is on disk before the next pair is shown, in "
    "`pairs.labels/<annotator>.jsonl`. A line of the file has `prompt`, `answer_a` and `answer_b` (or two `responses`, "
    "or `chosen` and `rejected`). On another address than 127.0.0.1 a token is asked for: TRL_EXT_LABEL_TOKEN, or a "
    "random one that is printed.",
    (
        "trl-ext label pairs.jsonl                                # open the address that it prints",
        "trl-ext label pairs.jsonl --export preferences.jsonl     # TRL's format, with strength",
        "trl-ext label pairs.jsonl --import_from others.csv --annotator ben",
    ),
    {
        "What": (
            ("pairs", "", "jsonl file of pairs; may stand without --pairs"),
            ("labels", "", "Folder of the annotators' files; default: pairs.labels"),
            ("criteria", "", "Text file shown at the side"),
            ("annotators", "", "Names that may label; default: any"),
            ("show_skipped", "false", "Show skipped pairs again at the end"),
            ("seed", "0", "Decides which answer stands on the left"),
        ),
        "Page": (
            ("host", "127.0.0.1", "Address to listen on; another one needs a token"),
            ("port", "7860", "0 takes a free one"),
        ),
        "Without a page": (
            ("export", "", "Write preferences to this jsonl file"),
            ("margin", "", "Export a column `margin`: this number times the strength"),
            ("min_votes", "1", "Export only pairs with so many labels"),
            ("import_from", "", "Add labels of a csv or jsonl file made elsewhere"),
            ("annotator", "", "Whose they are, where rows do not say"),
        ),
    },
)

AGREEMENT = Page(
    "How well annotators agree, by annotator and by topic, and who is off. Labels are those of trl-ext label. "
    "Intervals are 95 %, over pairs.",
    ("trl-ext agreement pairs.jsonl --topic category",),
    {
        "What": (
            ("pairs", "", "jsonl file of pairs; may stand without --pairs"),
            ("labels", "", "Annotators' files or folders; default: pairs.labels"),
            ("topic", "", "Column of the pairs to report by"),
            ("resamples", "1000", "Bootstrap resamples of the pairs, for intervals"),
            ("seed", "0", "Of the resamples"),
            ("output_dir", "", "Also write agreement.json there"),
        ),
    },
)

JUDGE = Page(
    "Two policies compared on prompts, every pair in both orders: by a model, by reward adapters, or by people. A side "
    "is a file of answers (`prompt` and `answer` a line), or a policy: a LoRA adapter, a finished run's folder, or "
    "`base`. Answers, replies and labels are on disk when they come: start it again to go on.",
    (
        "trl-ext judge --answers_a after.jsonl --answers_b before.jsonl --judge_model NAME \\",
        "    --output_dir out/judge --price_input 0.15 --price_output 0.6 --dry_run true",
        "trl-ext judge --policy_a out/ppo --policy_b out/sft --prompts held_out.jsonl \\",
        "    --judge local --judge_model CHAT_MODEL",
        "trl-ext judge --policy_a out/ppo --policy_b base --prompts held_out.jsonl \\",
        "    --judge adapter --judge_adapter out/rm5",
    ),
    {
        "Whose answers": (
            ("answers_a", "", "Answers of policy A: jsonl with prompt, answer"),
            ("answers_b", "", "Answers of policy B to the same prompts"),
            ("policy_a", "", "In place of them: an adapter, a finished run, or base"),
            ("policy_b", "", "In place of answers_b"),
            ("prompts", "", "That policies answer: Hub id, folder or file"),
            ("max_prompts", "256", "Only so many of them, from the first one on"),
            ("max_new_tokens", "256", "Longest answer of a policy, tokens"),
            *BASE,
        ),
        "Judge": (
            ("judge", "endpoint", "endpoint, local (a chat model), adapter, or people"),
            ("judge_model", "", "Its name at the endpoint; of local: folder or Hub id"),
            ("judge_adapter", "", "Reward adapters that judge; not those of PPO"),
            ("judge_prompt", "helpful", "helpful, harmless, or a text file"),
            ("base_url", "", "Endpoint, as http://127.0.0.1:8000/v1; default: OpenAI's"),
            ("api_key_env", "OPENAI_API_KEY", "Environment variable with the key"),
            ("concurrency", "4", "Requests at a time"),
            ("price_input", "", "Of a million tokens in, for the estimate"),
            ("price_output", "", "Of a million tokens out"),
            ("dry_run", "false", "Show what it will cost, and stop"),
            ("port", "7860", "Of the label page, where people judge"),
        ),
        "Result": (
            ("output_dir", "runs/judge", "Where replies, verdicts and results go"),
            ("labels", "", "People's labels of its pairs.jsonl: do they agree?"),
            ("seed", "0", "Of the answers, and of the resamples"),
        ),
    },
)

RED_TEAM = Page(
    "What a policy refuses of harmful and harmless prompts: rates with intervals, and its worst answers. A line has "
    "`prompt`, `harmful` (true: it should be refused) and perhaps `category`. Refusals are found by their words. A run "
    "that was stopped goes on.",
    (
        "trl-ext red-team --policy out/ppo --prompts red_team.jsonl --output_dir out/red_team",
        "trl-ext red-team --answers answered.jsonl --output_dir out/red_team",
    ),
    {
        "What": (
            ("policy", "", "An adapter, the folder of a finished run, or base"),
            ("prompts", "", "jsonl file with prompt, harmful and perhaps category"),
            ("answers", "", "In place of both: such a file, with responses"),
            ("output_dir", "runs/red_team", "Where answers and the result go"),
            *BASE,
        ),
        "Answers": (
            ("count", "4", "Answers to each prompt"),
            ("max_new_tokens", "128", "Longest answer, tokens"),
            ("sampling_temperature", "1", "Of the policy"),
            ("seed", "0", "Of the answers"),
            ("reward_adapter", "", "Reward adapters that say which answers are worst"),
        ),
    },
)

REWARD_SHIFT = Page(
    "Whether a run's reward is still to be trusted: scores of an ensemble and its spread on what the policy wrote. "
    "Where both rise together, the policy writes what the reward models have not seen.",
    ("trl-ext reward-shift --run out/ppo --reward_adapter out/rm1 out/rm2 out/rm3",),
    {
        "What": (
            ("run", "", "Folder of a PPO or RRHF run, with samples.jsonl"),
            ("reward_adapter", "", "At least two on its base; more than PPO had is better"),
            ("kind", "training", "Samples of the training, or of evaluations"),
            ("moments", "10", "Parts into which the training is cut"),
            ("output_dir", "", "Where result and picture go; default: the run's folder"),
            *BASE,
        ),
    },
)
