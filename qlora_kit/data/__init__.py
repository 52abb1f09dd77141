"""From a data file to batches: read, recognise, template, tokenise, batch.

    samples.py        --data         -> Samples, all of one shape; the door to the next three
      read.py         file           -> Record (place, content)
      recognise.py    Records        -> shape and samples
      convert.py      record         -> sample, by its texts and turns
    template.py       sample         -> Rendered (text, supervised spans)
      chat_template.py  tokenizer    -> the chat template it is used with
      chat_text.py      turns        -> text, through that template
    encode.py         Rendered       -> ids and labels; ids and labels -> text for a reader
    tokens.py         Samples        -> Tokenized (TokenRows, counts), through the two above
    batch.py          TokenRows      -> Batch
    survey.py         Samples, rows  -> Survey of everything a model would learn

samples.py and the modules under it import neither torch nor transformers, so wrong data is
reported before either is loaded. shapes.py defines records and samples, fields.py checks the
fields of a record.
"""
