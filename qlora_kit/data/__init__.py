"""From a data file to batches: read, recognise, template, tokenise, batch.

    sources.py   --data          -> which files, or which split of the hub
    read.py      file            -> Record (place, content)
    recognise.py Records         -> shape and samples, by way of columns.py (other names) and
                                    convert.py (fields -> sample), messages.py (turns)
    samples.py   --data          -> Samples, all of one shape; the door to the four above
    template.py  sample          -> Rendered (text, supervised spans), by way of
                                    chat_template.py (which) and chat_text.py (turns -> text)
    tokens.py    Samples         -> Tokenized (rows, counts)
    batch.py     rows            -> Batch
    survey.py    Samples, rows   -> Survey: what would be learnt, by way of pieces.py (ids -> text)

What makes `Samples` imports neither torch nor transformers, so that wrong data is reported
before either is loaded; shapes.py says what samples are.
"""
