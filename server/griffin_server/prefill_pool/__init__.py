"""The prefill side: the internal servicer, and Decode's two ways to reach one."""
