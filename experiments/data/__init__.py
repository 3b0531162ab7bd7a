"""Text to batches: documents -> split -> tokenizer -> token files -> batches, and two baselines."""
