"""Run the program several times in one process: ``several.py jobs.json`` under torchrun.

The file lists pairs of a folder to run in and the arguments. Starting each run by itself would take
longer than the runs do.
"""

import json
import os
import sys
from pathlib import Path

import main

if __name__ == "__main__":
    for folder, arguments in json.loads(Path(sys.argv[1]).read_text()):
        os.chdir(folder)
        main.main(arguments)
