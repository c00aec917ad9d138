"""From conversations to token samples with a loss mask, in ragged shards."""
