#!/usr/bin/env python3
"""Runs nvcc, keeps the messages of ptxas beside the object, and fails if it gave up a fast path.

ptxas reports an ignored setmaxnreg (C7508) and serialised wgmma (C7510 to C7519) as information only, which no
compiler flag turns into errors.
"""

import re
import subprocess
import sys
from pathlib import Path

command = sys.argv[1:]
result = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
if "-o" in command and "-c" in command:
    Path(command[command.index("-o") + 1] + ".ptxas").write_text(result.stderr)

for line in result.stderr.splitlines():
    if "(C7" in line or not re.match(r"ptxas info|\s+\d+ bytes stack frame|\s*Compile time", line):
        print(line, file=sys.stderr)
lost = re.search(r"\(C7(?:508|51\d)\)", result.stderr)
if lost and result.returncode == 0:
    print("error: the device compiler gave up a fast path, see the line above", file=sys.stderr)
sys.exit(result.returncode or (1 if lost else 0))
