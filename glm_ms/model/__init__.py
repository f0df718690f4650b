"""The network: configuration, layers, masks, loss, KV cache. Mathematics only."""
