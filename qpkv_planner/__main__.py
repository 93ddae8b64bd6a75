"""python -m qpkv_planner: the command qpkv-plan."""

import sys

from qpkv_planner.cli import main

sys.exit(main())
