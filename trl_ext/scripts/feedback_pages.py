"""The pages that `--help` shows of the commands with people, or judges in their place, in the loop; see `pages`."""

from trl_ext.scripts.pages import CONFIG, LENGTHS, MODEL, OUTPUT, RUN, STEPS, WORLD, Page

BASE = (("model_name_or_path", "", "The base; default: what the adapter names"), *MODEL[1:3])
PAIRS = ("pairs", "", "jsonl file of pairs; may stand first without this flag")

RLHF = Page(
    "SFT, reward models, PPO-Max and a judge in one process on one base, loaded once; with --rounds labels of what the "
    "policy writes, and all of it again. Without a model it runs in the embedded world: on a CPU, in minutes, no "
    "download. The same command goes on where it was stopped.",
    (
        "trl-ext rlhf",
        "trl-ext rlhf --rounds 3",
        "trl-ext rlhf --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output_dir out \\",
        "    --config colab_0.5b --sft_dataset demonstrations.jsonl \\",
        "    --preferences Anthropic/hh-rlhf --prompts prompts.jsonl",
        "trl-ext rlhf ... --rounds 2 --labels_from people    # you label on a local page between the rounds",
    ),
    {
        "Model and data": (
            *(CONFIG, OUTPUT, *MODEL[:4]),
            ("sft_dataset", "", "Demonstrations: prompt and completion, messages, or text"),
            ("policy_adapter", "", "LoRA adapter in place of the SFT stage"),
            ("preferences", "", "Pairs of the first round: Hub id, folder or file"),
            ("preferences_test", "", "Pairs to test on; default: a tenth, by prompt"),
            ("prompts", "", "Prompts of PPO; default: those of the preferences"),
            ("prompts_test", "", "Prompts to judge on; default: held out of the prompts"),
        ),
        "Stages": (
            ("sft_config", "sft", "Options of SFTConfig: a yaml file or its name"),
            ("reward_config", "reward", "Options of RewardModelConfig: a yaml file or its name"),
            ("members", "3", "Reward models: the last one judges, PPO has the others"),
            ("learning_rate", "0.0001", "Of PPO, where it starts"),
            ("kl_target", "6", "KL per completion that beta holds, nats"),
            ("max_completion_length", "512", "Longest completion, tokens"),
            ("max_prompt_length", "512", "Longer prompts are left out, and counted"),
            *(STEPS[0], STEPS[3], *LENGTHS),
        ),
        "Rounds": (
            ("rounds", "1", "How often reward models and policy are trained"),
            ("labels_from", "", "gold (default of the world), people (elsewhere), judge"),
            ("labels_per_round", "300", "Pairs that are labelled between two rounds"),
            ("sampled_prompts", "500", "Prompts answered to choose these pairs from"),
            ("choose", "information", "By what: information, random or different"),
            ("random_share", "0.2", "Share drawn at random, held out to test on"),
        ),
        "Judge": (
            ("judge", "adapter", "adapter (last reward model), endpoint, local, people, none"),
            ("judge_model", "", "Name at the endpoint, or folder of a local chat model"),
            ("judge_base_url", "", "Of the endpoint; default: OpenAI's"),
            ("judged_prompts", "256", "Held-out prompts that policies answer"),
        ),
        "Run": (*(RUN[0], RUN[2], RUN[3]), *WORLD),
    },
)

CHOOSE = Page(
    "Which pairs of answers people should label next: where several reward models are sure and disagree, beside a "
    "share at random, which says honestly how good they are. Needs answers, which trl-ext sample writes.",
    (
        "trl-ext choose --responses responses.jsonl --method random --output pairs.jsonl",
        "trl-ext choose --responses responses.jsonl --reward_adapter out/rm1 out/rm2 out/rm3 --count 300 \\",
        "    --exclude pairs.jsonl --output pairs_2.jsonl",
    ),
    {
        "From what": (
            ("responses", "", "jsonl with prompt and responses, as trl-ext sample writes it"),
            ("output", "", "jsonl file of pairs that is written"),
            ("exclude", "", "Files of pairs that are not chosen again"),
        ),
        "Which": (
            ("method", "information", "information (needs reward adapters), random, different"),
            ("count", "100", "Pairs to choose"),
            ("random_share", "0.2", "Share drawn at random: hold it out, and test on it"),
            ("per_prompt", "1", "Pairs of one prompt at most"),
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
    "A local page where people say which of two answers is better, with a few keys. Every label is on disk before the "
    "next pair is shown: stop at any time, and go on tomorrow. Also writes labels as preferences, and reads labels "
    "made elsewhere. The page needs pip install 'trl_ext[label]'.",
    (
        "trl-ext label pairs.jsonl                                # then open the address that it prints",
        "trl-ext label pairs.jsonl --export preferences.jsonl     # to train a reward model on",
        "trl-ext label pairs.jsonl --import_from others.csv --annotator ben",
    ),
    {
        "The page": (
            PAIRS,
            ("labels", "", "Folder of the labels; default: pairs.labels beside the pairs"),
            ("criteria", "", "Text shown on the side; default: helpful, honest, harmless"),
            ("annotators", "", "Names that may label; default: whoever gives one"),
            ("show_skipped", "false", "Show skipped pairs again at the end"),
            ("port", "7860", "Port; 0 takes a free one"),
            ("host", "127.0.0.1", "Address; another one than this machine's needs a token"),
            ("seed", "0", "Decides which answer stands on the left, for each annotator"),
        ),
        "Out": (
            ("export", "", "Write preferences to this jsonl file; no page"),
            ("margin", "", "A column `margin`: this times the strength (better 1, much 2)"),
            ("min_votes", "1", "Only pairs with so many labels"),
        ),
        "In": (
            ("import_from", "", "Add labels of a csv or jsonl file made elsewhere; no page"),
            ("annotator", "", "Whose they are, where rows have no column `annotator`"),
        ),
    },
)

AGREEMENT = Page(
    "How far annotators agree: share, Krippendorff's alpha, Cohen's kappa, by annotator and by topic, with intervals, "
    "and who is off. Labels are those of trl-ext label.",
    (
        "trl-ext agreement pairs.jsonl",
        "trl-ext agreement pairs.jsonl --topic category --output_dir out/agreement",
    ),
    {
        "What": (
            PAIRS,
            ("labels", "", "Files or folders of labels; default: pairs.labels"),
            ("topic", "", "Column of the pairs to report by"),
            ("output_dir", "", "Also write agreement.json there"),
            ("resamples", "1000", "Bootstrap resamples of the pairs, for intervals"),
            ("seed", "0", "Of the resamples"),
        ),
    },
)

JUDGE = Page(
    "Two policies, or two files of answers, compared on held-out prompts: by a model at an endpoint or on this "
    "machine, by reward adapters, or by people on the label page. Models are asked in both orders. What was answered "
    "is kept: the same command goes on.",
    (
        "trl-ext judge --policy_a out/ppo --policy_b base --prompts held_out.jsonl \\",
        "    --judge adapter --judge_adapter out/rm5",
        "trl-ext judge --answers_a after.jsonl --answers_b before.jsonl --judge_model NAME --dry_run true",
        "trl-ext judge --answers_a after.jsonl --answers_b before.jsonl --judge_model NAME \\",
        "    --base_url http://127.0.0.1:8000/v1 --output_dir out/judge",
        "trl-ext judge ... --judge people    # on a local page",
    ),
    {
        "Sides": (
            ("policy_a", "", "An adapter, a finished run, or base"),
            ("policy_b", "", "What it is compared with"),
            ("answers_a", "", "In place of a policy: jsonl with prompt and answer"),
            ("answers_b", "", "Of the other side"),
            ("prompts", "", "What policies answer: Hub id, folder, or file"),
            ("max_prompts", "256", "Only so many of them"),
            ("max_new_tokens", "256", "Longest answer, tokens"),
            *BASE,
            ("output_dir", "runs/judge", "Where answers, replies and results go"),
        ),
        "Judge": (
            ("judge", "endpoint", "endpoint, local (a chat model), adapter, people"),
            ("judge_model", "", "Name at the endpoint, or folder or Hub id of a local one"),
            ("judge_adapter", "", "Reward adapters, not those of PPO"),
            ("judge_prompt", "helpful", "helpful, harmless, or a text file of your own"),
            ("base_url", "", "Endpoint; default: OpenAI's"),
            ("api_key_env", "OPENAI_API_KEY", "Environment variable with the key"),
            ("dry_run", "false", "Show what it will cost, and stop"),
            ("price_input", "", "Of a million tokens in, for the estimate"),
            ("price_output", "", "Of a million tokens out"),
            ("concurrency", "4", "Requests at a time"),
            ("timeout", "60", "Seconds that a request may take"),
            ("attempts", "3", "Asks so often for a reply that has a verdict"),
            ("port", "7860", "Of the label page, where people judge"),
        ),
        "Result": (
            ("labels", "", "People's labels of output_dir/pairs.jsonl: agreement with them"),
            ("resamples", "1000", "Bootstrap resamples, for intervals"),
            ("seed", "0", "Of the resamples, and of the policies' answers"),
        ),
    },
)

RED_TEAM = Page(
    "What a policy refuses of harmful prompts, and of harmless ones that look like them: rates by category with "
    "intervals, and its worst answers. 48 short prompts come with the package.",
    (
        "trl-ext red-team --policy out/ppo",
        "trl-ext red-team --policy out/ppo --prompts mine.jsonl --reward_adapter out/rm_harmless",
        "trl-ext red-team --answers answered.jsonl --output_dir out/red_team",
    ),
    {
        "What": (
            ("policy", "", "An adapter, a finished run, or base"),
            ("prompts", "", "jsonl with prompt, harmful, category; default: the package's"),
            ("answers", "", "In place of both: such a file, with responses"),
            ("reward_adapter", "", "Reward adapters that say which answers are worst"),
            *BASE,
            ("output_dir", "runs/red_team", "Where answers and the result go"),
        ),
        "Answers": (
            ("count", "4", "To each prompt"),
            ("max_new_tokens", "128", "Longest answer, tokens"),
            ("sampling_temperature", "1", "Of the policy"),
            ("seed", "0", "Of the answers"),
        ),
    },
)

REWARD_SHIFT = Page(
    "Whether a run's reward is still to be trusted: several reward models score what the policy wrote over its run. "
    "Where the mean score rises and the models come to disagree, the policy writes what they have not seen.",
    (
        "trl-ext reward-shift --run out/ppo --reward_adapter out/rm1 out/rm2 out/rm3",
        "trl-ext reward-shift --run out/ppo --reward_adapter out/rm1 out/rm2 --kind evaluation",
    ),
    {
        "What": (
            ("run", "", "Folder of a PPO or RRHF run, with samples.jsonl"),
            ("reward_adapter", "", "At least two reward adapters; more than PPO had is better"),
            ("kind", "training", "Samples of the training, or of evaluations"),
            ("moments", "10", "Parts into which the training is cut"),
            *BASE,
            ("output_dir", "", "Where table and picture go; default: the run's folder"),
        ),
    },
)
