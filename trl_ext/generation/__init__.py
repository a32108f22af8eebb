"""Prompts to completions: by generate, seeded prompt by prompt, or as TRL does it."""
