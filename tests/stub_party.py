"""A process in child.py's place that computes nothing: for tests of how processes.py watches and ends its processes.

STUB says what it does: "work" begins a step and finishes an image with every beat, "idle" only beats, "fail" lets rank
0 end with an error.
"""

import json
import os
import sys
import time

rank, descriptor, behaviour = int(os.environ["RANK"]), int(sys.argv[5]), os.environ["STUB"]
for beat in range(3000):  # ends by itself, should nobody end it
    done = beat if behaviour == "work" else 0
    line = json.dumps({"done": done, "images": done, "place": f"step {done}", "cpu": 0.0})
    os.write(descriptor, f"{line}\n".encode())
    if behaviour == "fail" and rank == 0 and beat == 3:
        sys.exit("Traceback\nKeyError: '0.beta'")
    time.sleep(0.02)
