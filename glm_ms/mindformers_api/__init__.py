"""Classes for users of MindFormers: AutoConfig, AutoModel, AutoTokenizer, Trainer, pipeline."""
