"""From a data file to batches: read, recognise, template, tokenise, batch.

    read.py      file            -> Line (file, line, record)
    shapes.py    records         -> Conversation | Pair | Text
    samples.py   file or hub id  -> Samples, all of one shape
    template.py  sample          -> Rendered (text, supervised spans)
    tokens.py    Samples         -> Tokenized (rows, counts)
    batch.py     rows            -> Batch

`read`, `shapes` and `samples` import neither torch nor transformers, so that wrong data is
reported before either is loaded.
"""
