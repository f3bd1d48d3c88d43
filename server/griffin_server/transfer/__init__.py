"""What travels from Prefill to Decode: KV, statistic and experts, and the ways KV can go."""
