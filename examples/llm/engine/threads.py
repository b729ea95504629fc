"""On the CPU numpy multiplies one row at a time, as one thread: more would wait for each other for
longer than they compute.  It is read when numpy is imported.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
