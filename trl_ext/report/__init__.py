"""What a run leaves behind: metrics, samples, a page about it, model cards; and a policy on held-out prompts."""
