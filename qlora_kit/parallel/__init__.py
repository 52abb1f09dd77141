"""The processes of a run: sums over all of them, decisions they share, and which of them writes.

one.py            the protocol, and a run of one process
data_parallel.py  several processes, each with rows of its own, through torch.distributed
division.py       the rows of an optimiser step -> the rows of each process
launch.py         `--devices N`: torch's own launcher around the same command
"""
