"""How the operations of the models are computed on each platform, with their gradients.

Functions of arrays, which know nothing of the modules that call them. A file `<operation>.py` has
what the models call and XLA's own forms; `<operation>_mosaic.py` and `<operation>_triton.py` have
kernels for TPUs and for NVIDIA GPUs.
"""
