"""Networks whose weights are split over cards. `config` and `partition` need no MindSpore."""
