"""The pages that `--help` shows: of each command the flags most used, by group, with their defaults, and examples.

Nothing here imports a library; a test compares names and defaults with the parsers.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """What `--help` shows: an explanation, examples that work, flags by group.

    Attributes:
        text: What the command does, in a few sentences.
        examples: Command lines.
        groups: Title -> rows of (flag, its default or "", what it is).
    """

    text: str
    examples: tuple[str, ...]
    groups: dict[str, tuple[tuple[str, str, str], ...]]


# ---------------------------------------------------------------------- flags that several commands have

CONFIG = ("config", "", "yaml file, or a name: qlora_8b, colab_0.5b, tinychat, ...")
OUTPUT = ("output_dir", "", "Where adapters, checkpoints, tables and pictures go")
MODEL = (
    ("model_name_or_path", "", "The base: Hub id or folder. None: the embedded world"),
    ("load_in_4bit", "false", "Keep the base in 4 bits (NF4)"),
    ("dtype", "float32", "Of the base: float32, bfloat16, float16, auto"),
    ("lora_r", "16", "Rank of a fresh adapter"),
    ("lora_alpha", "32", "Its scale is lora_alpha / lora_r"),
)
PROMPTS = (
    ("dataset_name", "", "Prompts: Hub id, folder, jsonl or gz with a column `prompt`"),
    ("dataset_test_split", "", "Split to evaluate on"),
    ("policy_adapter", "", "SFT adapter that the policy starts from and stays near"),
    ("reward_adapter", "", "Adapter of a reward model; several are an ensemble"),
    ("reward_funcs", "", "Reward functions, file.py:function, or classifiers by id"),
)
PREFERENCES = (
    ("dataset_name", "", "Preferences: Hub id, folder, jsonl, json, gz, parquet"),
    ("dataset_format", "auto", "hh-rlhf, shp, webgpt, ultrafeedback, trl, ranking, ..."),
    ("dataset_test_name", "", "Other preferences to test on"),
    ("dataset_test_split", "", "Split to test on; none: a tenth is held out"),
)
STEPS = (
    ("per_device_train_batch_size", "8", "Rows in a micro-batch"),
    ("gradient_accumulation_steps", "1", "Micro-batches in an optimizer step"),
    ("num_train_epochs", "3", "Passes over the dataset"),
    ("max_steps", "-1", "Optimizer steps, in place of passes"),
)
LENGTHS = (
    ("gradient_checkpointing", "true", "Recompute activations in backward: less memory"),
    ("bf16", "", "bfloat16 autocast; by itself where the card has it"),
)
RUN = (
    ("seed", "42", "Of everything that is random"),
    ("logging_steps", "10", "Log every so many optimizer steps"),
    ("report_to", "none", "trackio, tensorboard, wandb, ..."),
    ("save_steps", "500", "Checkpoint every so many optimizer steps"),
    ("resume_from_checkpoint", "", "true: from the newest whole one, or anew if there is none"),
    ("push_to_hub", "false", "Upload the result at the end"),
)
WORLD = (("world_seed", "", "Seed of the embedded world; default: seed"),)

# ---------------------------------------------------------------------- the commands

PPO_MAX = Page(
    "Tune a policy with PPO-Max: policy, reference, reward and critic are adapters on one frozen base. Without a model "
    "it builds a small world with a known reward and trains in it: on a CPU, in minutes, no download.",
    (
        "trl-ext ppo-max",
        "trl-ext ppo-max --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output_dir out \\",
        "    --dataset_name prompts.jsonl --reward_funcs my_rewards.py:reward --config colab_0.5b",
        "trl-ext ppo-max --model_name_or_path meta-llama/Llama-3.1-8B --output_dir out --config qlora_8b \\",
        "    --dataset_name me/prompts --policy_adapter me/llama-sft --reward_adapter me/llama-rm",
    ),
    {
        "Model, data, reward": (CONFIG, OUTPUT, *MODEL, *PROMPTS),
        "Rollouts": (
            ("max_completion_length", "512", "Longest completion, tokens"),
            ("temperature", "1", "Of sampling"),
            ("steps_per_generation", "", "Micro-batches in a rollout batch"),
            ("eval_prompts", "256", "Prompts of the evaluation before and after"),
            ("missing_eos_penalty", "", "Taken off the score of a completion that was cut"),
        ),
        "PPO": (
            ("learning_rate", "0.0001", "Where the policy's learning rate starts"),
            ("update_kl_target", "", "KL that one update may make; 0: fixed learning rate"),
            ("num_iterations", "2", "Passes over each rollout batch"),
            ("beta", "0.05", "Weight of the KL penalty, where it starts"),
            ("kl_target", "6", "KL per completion that beta holds, nats"),
            ("diversity_target", "0.85", "Share of its first distinct-2 that the policy keeps; 0: off"),
            ("kl_control", "pi", "pi, adaptive, penalty or fixed"),
            ("critic_learning_rate", "", "Default: 3 times the policy's"),
            ("reward_clip", "0.8", "Clip of the normalised score"),
            ("guard_acts", "raise_beta step_back stop", "What the guard may do"),
        ),
        "Batches and memory": (
            *STEPS,
            *LENGTHS,
            ("auto_batch", "false", "Choose batches that fit the card"),
        ),
        "Run": (*RUN, ("eval_strategy", "no", "steps: evaluate on the way, and keep the best policy")),
    },
)

REWARD_MODEL = Page(
    "Train a reward model from preferences: a LoRA adapter with a scalar head, ready to be the reward role of ppo-max. "
    "Without a model it trains in the embedded world.",
    (
        "trl-ext reward-model",
        "trl-ext reward-model --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output_dir out/rm \\",
        "    --dataset_name Anthropic/hh-rlhf --dataset_test_split test",
        "trl-ext reward-model --model_name_or_path meta-llama/Llama-3.1-8B --output_dir out/rm \\",
        "    --dataset_name Anthropic/hh-rlhf --dataset_test_split test --config reward_qlora_8b",
    ),
    {
        "Model and data": (CONFIG, OUTPUT, *MODEL, *PREFERENCES, ("max_length", "1024", "Longer pairs are left out")),
        "Loss": (
            ("learning_rate", "0.0001", "Learning rate"),
            ("margin", "0", "By how much the preferred score should lead"),
            ("margin_column", "", "Column with a margin for each pair"),
            ("label_smoothing", "0", "Probability that a label is wrong"),
            ("lm_coef", "0", "Weight of the imitation term"),
            ("center_rewards_coefficient", "", "Holds the scores around 0"),
            ("normalize_rewards", "true", "Store mean and spread of the scores with the adapter"),
        ),
        "Batches and memory": (*STEPS, *LENGTHS),
        "Run": (*RUN, *WORLD),
    },
)

RRHF = Page(
    "RRHF: rank scored responses, no critic and no rollout loop. A dataset with columns `responses` and `scores` is "
    "trained on as it is; for prompts alone, responses are sampled first. Without a model: the embedded world.",
    (
        "trl-ext rrhf",
        "trl-ext rrhf --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output_dir out --use_peft true \\",
        "    --dataset_name responses.jsonl --reward_funcs my_rewards.py:reward",
        "trl-ext rrhf --model_name_or_path meta-llama/Llama-3.1-8B --output_dir out --config rrhf_8b \\",
        "    --dataset_name me/prompts --policy_adapter me/llama-sft --reward_adapter me/llama-rm",
    ),
    {
        "Model, data, reward": (CONFIG, OUTPUT, *MODEL, *PROMPTS),
        "Loss": (
            ("learning_rate", "0.0005", "Learning rate"),
            ("rank_coef", "1", "Weight of the ranking"),
            ("sft_coef", "1", "Weight of imitating the best response"),
            ("length_penalty", "1", "Exponent of the length in a response's log-probability"),
            ("beta", "0", "Weight of the KL to the reference"),
        ),
        "Responses": (
            ("sampling_methods", "temperature:4", "Sampled first: temperature, nucleus, beam, diverse"),
            ("max_new_tokens", "256", "Longest response sampled first, tokens"),
            ("online_every_steps", "", "Sample from the current policy every so many steps"),
            ("online_every_pass", "false", "Sample from the current policy before every pass"),
            ("num_online_responses", "4", "Responses to a prompt, sampled online"),
            ("max_prompts", "", "Train on so many prompts"),
            ("eval_prompts", "256", "Prompts of the evaluation before and after"),
        ),
        "Batches and memory": (*STEPS, *LENGTHS),
        "Run": (*RUN, *WORLD),
    },
)

PIPELINE = Page(
    "The whole road on one base: preferences, reward models, PPO-Max, and a judgement by reward models that training "
    "never saw.",
    (
        "trl-ext pipeline --model_name_or_path MODEL --config pipeline_tinychat \\",
        "    --output_dir runs/pipeline --dataset_name train.jsonl.gz --dataset_test_name test.jsonl.gz",
        "trl-ext pipeline ... --resume_from_checkpoint true    # goes on in the stage that was stopped",
    ),
    {
        "Model and data": (
            CONFIG,
            OUTPUT,
            *(("model_name_or_path", "", "The base that is tuned: Hub id or folder"), *MODEL[1:]),
            *PREFERENCES,
            ("policy_adapter", "", "SFT adapter that the policy starts from and stays near"),
        ),
        "Reward models and judgement": (
            ("members", "5", "Reward models: the first is trained against, the others judge"),
            ("reward_config", "reward_tinychat", "Options of the reward models: yaml file or name"),
            ("reward_dir", "", "Where reward adapters are, or go"),
            ("judged_prompts", "256", "Test prompts that both policies answer"),
            ("max_prompt_length", "160", "Longer prompts are left out"),
        ),
        "PPO": (
            ("learning_rate", "0.0001", "Where the policy's learning rate starts"),
            ("kl_target", "6", "KL per completion that beta holds, nats"),
            ("max_completion_length", "512", "Longest completion, tokens"),
            ("steps_per_generation", "", "Micro-batches in a rollout batch"),
        ),
        "Batches and memory": (*STEPS, *LENGTHS),
        "Run": RUN,
    },
)

STRENGTH = Page(
    "Measure how much several reward models believe each label, and flip, smooth, margin or drop the doubtful ones. "
    "Without a model: the embedded world.",
    (
        "trl-ext preference-strength --policy flip --share 0.2",
        "trl-ext preference-strength --model_name_or_path meta-llama/Llama-3.1-8B \\",
        "    --output_dir out/strength --dataset_name Anthropic/hh-rlhf --config reward_qlora_8b",
    ),
    {
        "Doubt": (
            ("members", "5", "Reward models that are trained"),
            ("policy", "flip", "What to do with a doubtful label: flip, smooth, margin, drop"),
            ("share", "", "Doubt this share of the labels"),
            ("threshold", "0", "Without a share: doubt labels below this mean strength"),
        ),
        "Model and data": (CONFIG, OUTPUT, *MODEL, *PREFERENCES, ("max_length", "1024", "Longer pairs are left out")),
        "Training": (("learning_rate", "0.0001", "Learning rate"), *STEPS, *LENGTHS, RUN[0], *WORLD),
    },
)

SAMPLE = Page(
    "Sample several responses to every prompt, score them, and write them to a jsonl file, which rrhf trains on. Start "
    "it again with the same options to go on where it stopped.",
    (
        "trl-ext sample --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name prompts.jsonl \\",
        "    --reward_funcs my_rewards.py:reward --sampling_methods temperature:3 diverse:3 \\",
        "    --output responses.jsonl",
    ),
    {
        "Model, data, reward": (
            CONFIG,
            ("model_name_or_path", "", "The base: Hub id or folder"),
            *MODEL[1:3],
            ("dataset_name", "", "Prompts: Hub id, folder, jsonl or gz with a column `prompt`"),
            ("dataset_train_split", "train", "Split to take"),
            ("max_prompts", "", "Only so many prompts"),
            ("policy_adapter", "", "Adapter to sample from; none: the base"),
            ("reward_adapter", "", "Adapter of a reward model; several are an ensemble"),
            ("ensemble", "mean", "How they make one score: mean, min, variance"),
            ("reward_funcs", "", "Reward functions, file.py:function, or classifiers by id"),
            ("reward_weights", "", "One for each of them"),
            ("output", "", "The jsonl file"),
        ),
        "Sampling": (
            ("sampling_methods", "temperature:4", "method:count of temperature, nucleus, beam, diverse"),
            ("sampling_temperature", "1", "Of temperature, nucleus and diverse"),
            ("sampling_top_p", "0.9", "Probability mass of nucleus"),
            ("max_new_tokens", "256", "Longest response, tokens"),
            ("sampling_batch_size", "64", "Responses at once"),
            ("sampling_seed", "0", "Every prompt has random numbers of its own from it"),
            ("response_columns", "", "Columns of the dataset with further responses"),
        ),
    },
)

HELD_OUT = (
    ("reference_adapter", "", "Where KL is from: default the run's, else the base; or none"),
    ("reward_adapter", "", "Adapters of reward models; default: the run's"),
    ("reward_funcs", "", "Reward functions, file.py:function, or classifiers by id"),
    ("reward_weights", "", "One for each of them"),
    ("dataset_name", "", "Prompts; default: those that the run held out"),
    ("dataset_test_name", "", "Other prompts to evaluate on"),
    ("dataset_test_split", "", "Split to evaluate on"),
    ("model_name_or_path", "", "The base; default: what the adapter names"),
    *MODEL[1:3],
)
ANSWERS = (
    ("eval_prompts", "256", "Of the held-out prompts, the first so many"),
    ("max_new_tokens", "", "Longest completion; default: the run's, else 256"),
    ("batch_size", "64", "Completions sampled and scored at a time"),
    ("seed", "42", "Every prompt has random numbers of its own from it"),
)

EVALUATE = Page(
    "A finished policy on held-out prompts, beside where it started: reward, KL, length, variety, each with a 95 % "
    "interval, and samples. Writes a page, a table and the samples. Nothing is trained.",
    (
        "trl-ext evaluate --policy_adapter runs/toy",
        "trl-ext evaluate --policy_adapter me/llama-ppo --load_in_4bit true \\",
        "    --dataset_name me/prompts --reward_adapter me/llama-rm --output_dir out/evaluation",
    ),
    {
        "What, on what": (
            ("policy_adapter", "", "The adapter: output_dir of a run, folder or Hub id"),
            CONFIG,
            ("output_dir", "runs/evaluation", "Where table, samples, picture and page go"),
            *HELD_OUT,
        ),
        "Completions": ANSWERS,
    },
)

COMPARE = Page(
    "Several finished policies beside each other: a table with paired intervals, a picture of reward against KL, a "
    "page. Of finished runs alone it is read from what they wrote at their end, without any model; where prompts or "
    "rewards are named, or an adapter is of no run, all answer the same prompts now.",
    (
        "trl-ext compare runs/a runs/b",
        "trl-ext compare runs/a runs/b me/llama-ppo --dataset_name me/prompts --reward_adapter me/llama-rm",
    ),
    {
        "What, on what": (
            ("policies", "", "Runs, folders, Hub ids; may stand first without this flag"),
            CONFIG,
            ("output_dir", "runs/comparison", "Where table, samples, picture and page go"),
            *HELD_OUT,
        ),
        "Completions": ANSWERS,
    },
)

EVALUATE_REWARD = Page(
    "How good a reward model is: accuracy, calibration, length bias, agreement with others; a table and pictures. "
    "Several adapters of one base are evaluated one by one and as an ensemble.",
    (
        "trl-ext evaluate-reward --reward_adapter out/rm --output_dir out/evaluation \\",
        "    --dataset_name Anthropic/hh-rlhf --dataset_test_split test",
    ),
    {
        "What": (
            ("reward_adapter", "", "Adapters of reward models on one base"),
            ("model_name_or_path", "", "The base; default: what the adapter names"),
            *MODEL[1:3],
            ("dataset_name", "", "Preferences: Hub id, folder, file"),
            ("dataset_format", "auto", "hh-rlhf, shp, webgpt, ultrafeedback, trl, ranking, ..."),
            ("dataset_test_split", "", "Split; default: test, or all rows of a file"),
            ("output_dir", "runs/evaluation", "Where table and pictures go"),
            ("batch_size", "16", "Pairs scored at a time"),
            ("max_length", "1024", "Longer pairs are left out"),
        ),
    },
)

PLAN_MEMORY = Page(
    "What a PPO run needs on a card, phase by phase, from the model's configuration alone: no weights are loaded. "
    "Takes the flags of ppo-max that change the memory, and its configuration files.",
    (
        "trl-ext plan-memory --model_name_or_path meta-llama/Llama-3.1-8B --config qlora_8b --gpu 24GB",
        "trl-ext plan-memory --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --config colab_0.5b --gpu 16GB",
    ),
    {
        "Model and card": (
            CONFIG,
            ("model_name_or_path", "", "Hub id, or a folder with a config.json"),
            ("gpu", "auto", "Size of the card, as in 24GB; auto: the card at hand"),
            *MODEL[1:],
            ("adapters", "policy reference reward critic", "Roles with an adapter"),
            ("adapter_dtype", "float32", "Of the adapters: float32 or bfloat16"),
        ),
        "Lengths and batches": (
            ("max_prompt_length", "512", "Longest prompt, tokens"),
            ("max_completion_length", "512", "Longest completion, tokens"),
            ("per_device_train_batch_size", "1", "Sequences in a micro-batch"),
            ("steps_per_generation", "", "Micro-batches in a rollout batch"),
            ("per_device_generate_batch_size", "", "Completions generated at a time"),
            ("per_device_score_batch_size", "", "Sequences scored at a time"),
            ("gradient_checkpointing", "true", "Recompute activations in backward"),
            ("bf16", "true", "Autocast, as on a card"),
            ("optim", "paged_adamw_8bit", "Optimizer"),
        ),
    },
)
