"""One line an event on stderr: who came, which ticket, done, refused and why. No key, share, image or label in any."""

import sys
import time


def log(line: str) -> None:
    text = line.removeprefix("secure: ")
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
