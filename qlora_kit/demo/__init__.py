"""The built-in demo: a tiny Llama, its tokenizer, and a task it cannot do before training.

`model/`, `train.jsonl` and `test.jsonl` are data; `corpus.py` and `pretrain.py` made them. No
other part of the package imports these scripts.
"""
