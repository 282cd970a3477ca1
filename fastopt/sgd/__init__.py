"""SGD's step, below optim.py:

    quiet.py    what torch puts around a step, only where somebody looks on
    step.py     one step: all parameters at once, or group by group beside torch's own
    devices.py  what lasts from step to step on a GPU
    gather.py   how a step's tensors become rows of addresses
    launch.py   which kernels serve a GPU, and how they are launched
    table.py    rows, options and all else that the kernels are given, as C++ declares it

Each uses only what stands under it.
"""
