"""From a data file to batches: read, recognise, template, tokenise, batch.

    samples.py        --data         -> Samples, all of one shape; the door to the next three
      read.py         file           -> Record (place, content)
      recognise.py    Records        -> shape and samples
      convert.py      record         -> sample, by its texts and turns
    template.py       sample         -> Rendered (text, supervised spans), by way of
                                        chat_template.py (which) and chat_text.py (turns -> text)
    encode.py         Rendered       -> ids and labels, and these -> text to be read
    tokens.py         Samples        -> Tokenized (TokenRows, counts), by way of the two above
    batch.py          TokenRows      -> Batch
    survey.py         Samples, rows  -> Survey: what would be learnt

What makes `Samples` imports neither torch nor transformers, so that wrong data is reported
before either is loaded; shapes.py says what records and samples are, fields.py what a record's
fields may hold.
"""
