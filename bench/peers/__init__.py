"""Other ways to a better or a faster answer, on the same models, prompts and rules: what DiffPO is measured against."""
