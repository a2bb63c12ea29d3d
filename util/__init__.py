"""The ground floor: flags, processes, devices, files, images, the token cache, pictures, logs.

It is imported before torch: a program that imports torch itself imports `cli` from here first.
"""

import os
import sys

try:
    os.getcwd()
except FileNotFoundError:  # torch could not be imported, and would not say why
    print("error: the working directory is deleted: cd to one that exists", file=sys.stderr)
    sys.exit(2)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave their core to other programs
