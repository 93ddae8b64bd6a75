"""Evaluation: how good answers are under a plan, on tasks that others use too.

`samples` says what a sample is; `niah`, `ruler`, `text` and `longbench` make them, with the model's own tokenizer;
`answering` runs the model on them inside a plan's bytes (or with the full cache) and `metrics` scores the answers;
`run` keeps and resumes a run, `report` shows it, `comparison` compares two; `cli` is the command qpkv-eval.
"""
