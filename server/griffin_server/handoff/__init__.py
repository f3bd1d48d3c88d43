"""What travels from Prefill to Decode: KV, statistic and experts, by chunks or shared memory."""
