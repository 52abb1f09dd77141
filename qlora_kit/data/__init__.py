"""From a data file to batches: read, recognise, template, tokenise, batch.

    samples.py        one source     -> Samples, all of one shape; the door to the next three
      read.py         file           -> Record (place, content)
      recognise.py    Records        -> shape and samples
        labelled_fields.py  record   -> which column is the text, which the label
      convert.py      record         -> sample, by its texts, turns and labels
    sources.py        the options    -> Samples of one source, or of several, joined
    template.py       sample         -> Rendered (text, supervised spans)
      chat_template.py  tokenizer    -> the chat template it is used with
      chat_text.py      turns        -> text, through that template
    divide.py         conversation   -> parts of it whose rows are not too long
    encode.py         Rendered       -> ids and labels; ids and labels -> text for a reader
    labels.py         Samples        -> Labels: kind, names, weights; a sample's target
    tokens.py         Samples        -> Tokenized (TokenRows, counts), through one of
      text_rows.py    texts to learn -> rows, through template.py and encode.py
      labelled_rows.py  labelled texts -> rows, with the labels of the whole
    joined_rows.py    Samples of several sources -> Tokenized, one source after another
    mixing.py         rows, weights  -> the optimiser steps of an epoch
    batch.py          TokenRows      -> Batch
    streamed_samples.py  --data      -> SampleStream: samples read while they are needed
    stream.py         SampleStream   -> StreamedRows: the rows of one step after another, through
      stream_worker.py  samples      -> their rows, made here or in other processes
      stream_count.py   SampleStream -> the number of its rows, and the samples that are held out
      held_samples.py  Samples      -> HeldSamples: samples in memory, in the place of a stream
    streamed_sources.py  the options -> StreamedSources: the streams of several sources
    mixed_stream.py   StreamedRows   -> MixedStream: the rows of several streams, by weights
    row_arrays.py     Samples, rows  -> arrays of all tokens and labels
    survey.py         the arrays     -> Survey of everything a model would learn
      label_survey.py                -> of its labels

samples.py, sources.py and the modules under them import neither torch nor transformers, so wrong
data is reported before either is loaded. shapes.py defines records and samples, fields.py checks
the fields of a record.
"""
