"""What a run leaves behind: model cards, and what can be said of a policy on held-out prompts."""
