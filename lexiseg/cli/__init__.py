"""The ``lexiseg`` command: one verb a file, and one place that turns mistakes into sentences and exit codes.

Exit codes: 0 when everything asked for was done; 1 when some of it was (a bad file in a folder of good ones, a failed
self-test); 2 when nothing was because the user must change something, said in one sentence on stderr; 130 when the
user stopped it, 143 when SIGTERM did. A traceback means a defect of ours.

The verbs import torch only once they run, so that ``lexiseg --help`` answers at once.
"""

from lexiseg.cli.application import app, main

__all__ = ["app", "main"]
