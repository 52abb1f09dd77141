"""Answers many requests at once: an engine that batches them, and the server before it.

`engine` takes requests and gives pieces of text back; `running` is the batch and its key-value
cache; `choosing` takes the next tokens, `text` turns them into text. `protocol` knows the JSON of
OpenAI's interface, `app` its addresses, `server` the socket and the signals. Needs the extra
`serve` for the last two alone. Never loads a model.
"""
