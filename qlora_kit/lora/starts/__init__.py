"""What A and B of a layer start from: one file a method, each with its paper.

A method takes the weight of a layer, or what was seen of the first rows, and returns A and B.
`loading.py` runs the methods while a base is loaded, `form.py` knows PEFT's form of the adapters
whose start changes the base, `check.py` what a start can be combined with.

Shapes: D in, K out, R rank.
"""
