"""What the recipes do: flags, loading, one module for the body of each recipe, tables and pictures."""
