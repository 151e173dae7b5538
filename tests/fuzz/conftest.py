"""The small models and tables of the toolkit's tests serve these as well."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "exits"))
